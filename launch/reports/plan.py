"""Reports of `torsion plan`: a step on a slice, and on its twin, as data and as text."""

from pathlib import Path
from typing import Any

from topology.plan.economics import AVERAGE_SITE, GOOGLE_OKLAHOMA, cost_of
from topology.plan.machine import Machine, machine_of
from topology.plan.predict import Prediction, across_slices, predict, read, summary
from topology.torus.slices import Slice

TOKENS = 1e12


def report(
    slice: Slice,
    text: str,
    *,
    machine: Machine | None = None,
    partitions: list[list[int]] | None = None,
    peak_bytes: int | None = None,
    planned: Any = None,
    slices: int = 1,
    tokens: float = TOKENS,
    free: tuple[str, ...] = (),
) -> tuple[dict[str, Any], Prediction]:
    """The report of a program on a slice, or on several of them, and its prediction.

    Args:
      planned: the `launch.plan.Planned` that the program is of; None for one of unknown work.
    """
    machine = machine_of(slice.pod) if machine is None else machine
    prediction = predict(read(text), slice, machine=machine, partitions=partitions, free=free)
    found: dict[str, Any] = {
        "slice": str(slice),
        "pod": slice.pod.version,
        "chips": slice.num_chips * slices,
        "slices": slices,
        **summary(prediction),
        "memory_bytes": peak_bytes,
        "memory_limit_bytes": machine.memory,
        "mfu": None,
    }
    low, high = prediction.low, prediction.high
    if slices > 1:
        if planned is not None:
            shard = 4.0 * planned.params / slice.num_chips
            low, high = across_slices(prediction, slices, gradient_bytes=shard, machine=machine)
        found["step_seconds"] = {"low": low, "high": high}
    if planned is not None:
        middle = (low + high) / 2
        found["mfu"] = planned.flops / (middle * machine.peak * slice.num_chips)
        found["tokens_per_step"] = planned.tokens * slices
        found["tokens_per_second"] = planned.tokens * slices / middle
        found["assumed"] = list(planned.assumed)
        found["mesh"] = planned.mesh
        steps = tokens / (planned.tokens * slices)
        cost = cost_of(steps, middle, slice, slices=slices)
        found["run"] = {
            "tokens": tokens,
            "steps": steps,
            "days": cost.days,
            "goodput": cost.goodput,
            "failures": cost.failures,
            "seconds_between_checkpoints": cost.save_every,
            "chip_hours": cost.chip_hours,
            "megawatt_hours": None if cost.energy is None else cost.energy / 3.6e9,
            "tonnes_co2e": None
            if cost.energy is None
            else {site.name: site.tonnes(cost.energy) for site in (GOOGLE_OKLAHOMA, AVERAGE_SITE)},
        }
    return found, prediction


def describe(found: dict[str, Any]) -> str:
    """The report for people."""
    step = found["step_seconds"]
    several = f"{found['slices']} slices " if found["slices"] > 1 else ""
    lines = [
        f"{several}{found['slice']} of TPU {found['pod']}, {found['chips']} chips: "
        f"{_span(step['low'], step['high'])} s a step"
    ]
    if found["mfu"] is not None:
        lines.append(
            f"  {100 * found['mfu']:.1f} % model FLOPs utilisation, "
            f"{found['tokens_per_second']:,.0f} tokens/s ({found['tokens_per_step']:,} a step)"
        )
    limit = found["memory_limit_bytes"] / 2**30
    if found["memory_bytes"] is not None:
        need = found["memory_bytes"] / 2**30
        lines.append(f"  memory {need:.2f} GiB of {limit:.2f} GiB a chip")
    if found.get("assumed"):
        lines.append("  not configured, so taken: " + ", ".join(found["assumed"]))
    compute = found["compute_seconds"]
    other = compute - found["matmul_seconds"]
    lines += [
        "",
        f"  {'computing':<44} {compute:9.4f} s",
        f"  {'  matmuls and attention':<44} {found['matmul_seconds']:9.4f}",
        f"  {'  all else':<44} {other:9.4f}",
        f"  {'waiting for the network':<44} {found['exposed_network_seconds']:9.4f}",
        f"  {'waiting for copies within the chip':<44} {found['copy_wait_seconds']:9.4f}",
    ]
    if found["recomputed_by_compiler_seconds"] > 0:
        again = found["recomputed_by_compiler_seconds"]
        lines.append(f"  {'made again by the compiler, short of memory':<44} {again:9.4f}")
    lines += ["", "  where the computing goes" + " " * 23 + "seconds"]
    lines += [f"  {name[:46]:<46} {s:8.4f}" for name, s in list(found["compute"].items())[:12]]
    if found["collectives"]:
        lines += [
            "",
            f"  {'collectives':<46} {'times':>6} {'seconds':>8} {'hidden':>8} {'exposed':>8}",
        ]
    for c in found["collectives"][:12]:
        name = f"{c['kind']} of {c['members']} {c['strategy']}"
        lines.append(
            f"  {name[:46]:<46} {c['count']:>6} {c['seconds']:>8.4f} {c['hidden_seconds']:>8.4f} "
            f"{c['exposed_seconds']:>8.4f}"
        )
    if found["not_understood"]:
        lines += ["", "  not understood:"]
        lines += [f"    {n} x {what}" for what, n in found["not_understood"].items()]
    if run := found.get("run"):
        lines += ["", "  " + _run(run)]
    return "\n".join(lines)


def describe_twin(found: dict[str, Any], twin: dict[str, Any]) -> str:
    """A line that sets the same program on the twin beside it."""
    here, there = (_middle(x["step_seconds"]) for x in (found, twin))
    step = twin["step_seconds"]
    slower = there / here - 1
    word = "slower" if slower >= 0 else "faster"
    return (
        f"on {twin['slice']} {_span(step['low'], step['high'])} s a step, "
        f"{abs(100 * slower):.1f} % {word}: computing {twin['compute_seconds']:.4f} s, network "
        f"{twin['network_seconds']:.4f} s of which {twin['exposed_network_seconds']:.4f} s show"
    )


def describe_twist(found: dict[str, Any], twin: dict[str, Any], most: int = 8) -> str:
    """Table of what the twist gives and takes by collective, the largest differences first."""
    here, there = _by_groups(found), _by_groups(twin)
    rows = []
    for key in here.keys() | there.keys():
        kind, members = key
        pair = [at.get(key, (0.0, "-")) for at in (here, there)]
        rows.append((f"{kind} of {members}", pair[0], pair[1]))
    rows.sort(key=lambda row: -abs(row[2][0] - row[1][0]))
    heads = found["slice"], twin["slice"]
    lines = [f"  {'collectives':<28}{heads[0]:>14}{heads[1]:>24}   strategies"]
    for name, (before, how), (after, other) in rows[:most]:
        change = f"{100 * (after / before - 1):+.0f} %" if before else "new"
        ways = how if how == other else f"{how} -> {other}"
        lines.append(f"  {name:<28}{before:>12.4f} s{after:>13.4f} s {change:>8}   {ways}")
    return "\n".join(lines)


def _by_groups(found: dict[str, Any]) -> dict[tuple[str, int], tuple[float, str]]:
    """{(kind, members): (seconds, strategies)} of a report's collectives."""
    seconds: dict[tuple[str, int], float] = {}
    names: dict[tuple[str, int], list[str]] = {}
    for c in found["collectives"]:
        key = c["kind"], c["members"]
        seconds[key] = seconds.get(key, 0.0) + c["seconds"]
        if c["strategy"] and c["strategy"] not in names.setdefault(key, []):
            names[key].append(c["strategy"])
    return {key: (total, ", ".join(names.get(key, [])) or "-") for key, total in seconds.items()}


def describe_search(search: dict[str, Any], most: int = 20) -> str:
    """The ways that a search tried, the planned ones first, and why each lost."""
    order = {"planned": 0, "does not fit": 1, "failed": 2, "not reached": 3, "cannot win": 4}
    tried = [t for t in search["tried"] if t["status"] != "impossible"]
    impossible = len(search["tried"]) - len(tried)

    def key(t: dict[str, Any]) -> tuple[int, float]:
        step = t["step_seconds"]
        return order[t["status"]], t["bound_seconds"] if step is None else _middle(step)

    lines = [f"  {'slice':<16} {'mesh':<28} {'remat':<6} {'bound s':>8} {'step s':>8}  result"]
    for t in sorted(tried, key=key)[:most]:
        mesh = ",".join(f"{axis}={size}" for axis, size in t["mesh"].items() if size > 1)
        step = "" if t["step_seconds"] is None else f"{_middle(t['step_seconds']):.4g}"
        why = t["why"] or "best" if t["status"] == "planned" else t["status"]
        lines.append(
            f"  {t['slice']:<16} {mesh or 'data=1':<28} {t['remat']:<6} "
            f"{t['bound_seconds']:>8.4g} {step:>8}  {why}"
        )
    if len(tried) > most:
        lines.append(f"  and {len(tried) - most} more (--json has all)")
    if impossible:
        lines.append(f"  {impossible} that the run does not allow (--json says why)")
    if not search["complete"]:
        lines.append("  the time was up before all were tried; run it again to go on")
    return "\n".join(lines)


def _run(run: dict[str, Any]) -> str:
    energy = run["megawatt_hours"]
    power = "" if energy is None else f", {energy:,.1f} MWh of the chips"
    if run["tonnes_co2e"]:
        carbon = (f"{tonnes:,.1f} t in {site}" for site, tonnes in run["tonnes_co2e"].items())
        power += f": CO2e of their electricity {', '.join(carbon)}"
    return (
        f"{run['tokens']:,.0f} tokens: {run['days']:,.1f} days with "
        f"{run['failures']:,.0f} failures (goodput {100 * run['goodput']:.1f} %, a checkpoint each "
        f"{run['seconds_between_checkpoints'] / 60:,.0f} minutes), {run['chip_hours']:,.0f} "
        f"chip-hours{power}"
    )


def _span(low: float, high: float) -> str:
    if high - low < 0.005 * high:
        return f"{(low + high) / 2:.4g}"
    return f"{low:.4g} to {high:.4g}"


def _middle(step: dict[str, float]) -> float:
    return (step["low"] + step["high"]) / 2


def write_timeline(path: Path, prediction: Prediction) -> None:
    """Writes the timeline of the step that Perfetto opens."""
    from pjit_train.files import write_whole
    from topology.plan.replay import TRACKS
    from topology.timeline import trace_text

    step = prediction.interval.high
    write_whole(path, trace_text(step.events, processes={0: "step"}, tracks=TRACKS))
