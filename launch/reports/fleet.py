"""`torsion fleet`: what became of a pod's time and its jobs, by policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.reports.fleet_workload import HOUR, Workload
from launch.reports.pictures import written
from pjit_train.errors import UserError
from topology import simulate_pod
from topology.fleet.pod_report import JobRecord, Report
from topology.fleet.workload import DAY
from topology.hardware import of_blocks


def report(
    workload: Workload, tell: Callable[[dict[str, Any]], object] = lambda row: None
) -> dict[str, Any]:
    """The outcome of a workload, as `torsion fleet --json` prints it.

    Args:
      tell: is called with each policy's row as soon as it is simulated.

    Returns:
      `offered`: the work that arrives and can be done before the end, as a part of the pod; no
      policy's goodput is larger. `policies`: by name `utilisation` (the part of the pod's time that
      jobs hold), `goodput` (that is work kept), `mean_wait_hours`, `finished_jobs`,
      `interrupted_jobs`, `interruptions` by what was done, `shares` of the pod's time by what
      became of it, and `jobs`: hours at which each arrived, started and finished, null for what it
      did not reach.

    Raises:
      UserError: a job can never be placed, or two have one name.
    """
    horizon, total = workload.horizon, of_blocks(workload.pod).num_blocks
    rows = []
    for name, policy in workload.policies.items():
        try:
            outcome = simulate_pod(
                workload.jobs,
                workload.outages,
                horizon=horizon,
                policy=policy,
                costs=workload.costs,
                rates=workload.rates,
                pod=workload.pod,
            )
        except ValueError as error:
            raise UserError(f"{workload.name}: policy {name!r}: {error}") from error
        row = policy_row(name, outcome)
        tell(row)
        rows.append(row | {"jobs": [_job(record) for record in outcome.jobs]})
    offered = sum(
        job.slice.num_blocks * min(job.work, max(0.0, horizon - job.arrival))
        for job in workload.jobs
    )
    return {
        "pod": workload.pod.name,
        "days": horizon / DAY,
        "blocks": total,
        "jobs": len(workload.jobs),
        "outages": len(workload.outages),
        "offered": offered / (total * horizon),
        "policies": rows,
    }


def policy_row(name: str, report: Report) -> dict[str, Any]:
    """The figures of a policy out of its simulation."""
    machine = report.horizon * report.blocks
    return {
        "policy": name,
        "utilisation": report.utilisation,
        "goodput": report.goodput,
        "mean_wait_hours": report.mean_wait / HOUR,
        "finished_jobs": sum(record.finished is not None for record in report.jobs),
        "interrupted_jobs": report.interrupted_jobs,
        "interruptions": dict(report.interruptions),
        "shares": {key: seconds / machine for key, seconds in report.block_seconds.items()},
    }


def _job(record: JobRecord) -> dict[str, Any]:
    def hours(seconds: float | None) -> float | None:
        return None if seconds is None else seconds / HOUR

    return {
        "name": record.job.name,
        "slice": str(record.job.slice),
        "arrived_hours": hours(record.job.arrival),
        "started_hours": hours(record.started),
        "finished_hours": hours(record.finished),
        "kept_hours": hours(record.progress.kept),
        "interruptions": dict(record.interruptions),
    }


def title(workload: Workload) -> str:
    """Says what is simulated, and the heads of the rows that follow."""
    pod = of_blocks(workload.pod)
    return (
        f"{workload.name}: {pod.name} of {pod.num_blocks} blocks over {workload.horizon / DAY:g} "
        f"days, {len(workload.jobs)} jobs, {len(workload.outages)} outages\n\n"
        f"{'policy':<{_width(workload)}}{'used':>8}{'goodput':>9}{'mean wait':>12}"
        f"{'finished':>10}{'jobs hit':>10}  how"
    )


def row_text(workload: Workload, row: dict[str, Any]) -> str:
    """The outcome of a policy for people."""
    how = ", ".join(f"{n} {kind}" for kind, n in sorted(row["interruptions"].items()))
    return (
        f"{row['policy']:<{_width(workload)}}{row['utilisation']:>8.1%}{row['goodput']:>9.1%}"
        f"{row['mean_wait_hours']:>10.1f} h{row['finished_jobs']:>10}{row['interrupted_jobs']:>10}"
        f"  {how}"
    ).rstrip()


def _width(workload: Workload) -> int:
    return max(6, *map(len, workload.policies)) + 1


def summary(found: dict[str, Any]) -> str:
    """Says the bound."""
    return (
        f"\nwork offered is {found['offered']:.1%} of the pod: no policy has more goodput"
        + (" than that" if found["offered"] < 1 else " than all of it")
        + "\nused: held by jobs; goodput: work that was kept; jobs hit: interrupted once at least"
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws what became of the pod's time under each policy."""
    from launch.reports.pod_figures import draw_year

    with written(path) as new:
        draw_year({"year": found}, new)
