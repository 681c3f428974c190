"""`torsion study pod`: published figures of the TPU v4 pod beside those of `topology`.

Nothing is fitted to the published figures but one number, the efficiency of all-to-all. What
differs is shown with its reason.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.optimize import brentq

from launch.reports.fleet import policy_row
from launch.reports.fleet_workload import POLICIES
from launch.reports.pod_figures import FIGURES
from launch.reports.pod_table import make_table
from launch.study_files import compute_and_write
from pjit_train.errors import UserError
from topology import TPU_V3, TPU_V4, Fabric, Policy, Slice, fabric, simulate_pod
from topology.fabric import light
from topology.fabric.parts import fibre_end
from topology.fleet import checkpoint_interval
from topology.fleet.availability import ocs_goodput, sample_goodput, static_goodput
from topology.fleet.workload import (
    DAY,
    YEAR,
    FailureRates,
    Job,
    generate_jobs,
    generate_maintenance,
    generate_outages,
)
from topology.hardware import CLOUD_V4, ISCA23, Pod, published
from topology.plan.economics import AVERAGE_SITE, GOOGLE_OKLAHOMA
from topology.routing.routing import best_single_path, dimension_order, direction_loads
from topology.routing.throughput import all_to_all, switch_links
from topology.routing.wild_first import wild_first
from topology.torus.shapes import legal_shapes, times
from topology.torus.twists import ranked_twists

NSDI24 = "Zu et al., Resiliency at Scale, NSDI 2024"
MEASURED_GAINS = {"4x4x8": 1.63, "4x8x8": 1.31}  # of the shipped twist in all-to-all, ISCA 2023
KEPT = (0.922, 1.017)  # of all-to-all under one failed switch, least and most; NSDI 2024
BOXES = {1024: (2, 2, 4), 2048: (2, 4, 4), 3072: (3, 4, 4)}  # chips of a slice: its blocks
CHIP_PER_WATT = 2.0  # of TPU v4 over a contemporary accelerator, ISCA 2023, section 7.6
SAVE, FACTORS = 30.0, (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 2.8, 4.0)


@dataclass(frozen=True, kw_only=True)
class PodStudy:
    """Extent of the study: slices, shapes, trials and years.

    Attributes:
      rerouted: slices of which each switch fails in turn, with the wild-first reroute.
      larger: slices of which only the optimum is found then.
      twist_blocks: the largest shapes of which all twists are ranked.
      trials: of each Monte Carlo estimate.
      years: of a pod's events; checkpoint intervals are tried over 20 times as many.
    """

    rerouted: tuple[str, ...] = (
        "4x4x4",
        "4x4x8",
        "4x4x8_twisted",
        "4x8x8",
        "4x8x8_twisted",
        "8x8x8",
    )
    larger: tuple[str, ...] = ("8x8x16", "8x8x16_twisted", "8x16x16_twisted", "16x16x16")
    twist_blocks: int = 16
    trials: int = 1_000_000
    years: float = 1.0


def study_pod(out: Path, *, as_json: bool = False, study: PodStudy | None = None) -> int:
    """Runs `torsion study pod`; see `study_files.compute_and_write`."""
    return compute_and_write(
        out,
        lambda tell: find(study or PodStudy(), tell),
        make_table,
        FIGURES,
        as_json=as_json,
    )


def check_pod(pod: Pod) -> None:
    """Raises a UserError where too little was published of a pod to put figures beside it."""
    if pod.name != TPU_V4.name:
        raise UserError(
            f"study pod: of {pod.name} neither the gain of twists, nor goodput, nor failures of "
            f"switches are published, which the study puts beside computed ones; take {TPU_V4.name}"
        )


def find(study: PodStudy, tell: Callable[[str], None] = lambda part: None) -> dict[str, Any]:
    """Computes all results, as they stand in results.json. `tell` hears the name of each part."""
    tell("all-to-all of twisted slices")
    gains, efficiency = compare_gains()
    tell("switches that fail")
    failed = failed_switches(study.rerouted, study.larger)
    tell("goodput")
    goodput, samples = compare_goodput(), sampled_goodput(study.trials)
    tell("the fabric")
    wiring = compare_wiring()
    tell(f"all twists of up to {study.twist_blocks} blocks")
    twists = rank_twists(study.twist_blocks)
    tell("a pod's events")
    return {
        "comparisons": gains + compare_kept(failed) + goodput + wiring + compare_generations(),
        "efficiency": efficiency,
        "failed_switch": failed,
        "goodput": samples,
        "twists": twists,
        "year": a_year(study.years),
        "checkpoints": checkpoints(20 * study.years),
    }


def compared(
    what: str, published: float | Sequence[float], ours: float, source: str, why: str = ""
) -> dict[str, Any]:
    """A published figure, or its range, beside the computed one; the difference is 0 in a range."""
    low, high = (published, published) if isinstance(published, int | float) else published
    return {
        "what": what,
        "published": published,
        "ours": ours,
        "difference": ours - min(max(ours, low), high),
        "source": source,
        "why": why,
    }


def compare_gains() -> tuple[list[dict[str, Any]], float]:
    """The twisted gain in all-to-all, and the one efficiency that explains the measured ones."""
    bounds, naive = {}, {}
    for name in MEASURED_GAINS:
        twisted, regular = Slice.parse(f"{name}_twisted"), Slice.parse(name)
        bounds[name] = all_to_all(regular).lower_bound / all_to_all(twisted).max_link_load
        loads = [
            direction_loads(dimension_order(s, ties="positive")).max() for s in (regular, twisted)
        ]
        naive[name] = float(loads[0] / loads[1])
    # Least squares of measured = efficiency * bound.
    products = sum(MEASURED_GAINS[name] * bound for name, bound in bounds.items())
    efficiency = products / sum(bound**2 for bound in bounds.values())
    rows = []
    for name, bound in bounds.items():
        measured = MEASURED_GAINS[name]
        rows += [
            compared(
                f"all-to-all of {name}_twisted over regular: exact optimum",
                measured,
                bound,
                ISCA23,
                f"a bound: the machine reached {measured / bound:.1%} of it; dimension order with "
                f"one tie rule for both slices gives {naive[name]:.2f}",
            ),
            compared(
                f"the same, times {efficiency:.3f}",
                measured,
                efficiency * bound,
                ISCA23,
                "one efficiency, fitted to both slices",
            ),
        ]
    return rows, efficiency


def failed_switches(rerouted: Sequence[str], larger: Sequence[str]) -> list[dict[str, Any]]:
    """Computes the share of all-to-all kept without one switch, for one of each kind of switch.

    A slice's 16 switches of a dimension are alike, since translations take one to the other; so
    are dimensions of the same size.
    """
    rows = []
    for name in (*rerouted, *larger):
        slice = Slice.parse(name)
        whole = all_to_all(slice).max_link_load
        plain = dimension_order(slice, ties="early"), best_single_path(slice)[0]
        by_order, single = (float(direction_loads(routing).max()) for routing in plain)
        for d in sorted({slice.shape.index(k) for k in slice.shape}):
            left = all_to_all(slice, switch_links(slice, d, 1, 2), tolerance=1e-5)
            row = {
                "slice": name,
                "dimension": "xyz"[d],
                "optimum": whole / left.max_link_load,
                "optimum_at_most": whole / left.lower_bound,
            }
            if name in rerouted:
                reroute = wild_first(slice, d, 1, 2)
                row["wild_first"] = whole / reroute.max_link_load
                row["wild_first_at_most"] = whole / reroute.lower_bound
                row["of_single_path"] = single / reroute.max_link_load
                row["of_dimension_order"] = by_order / reroute.max_link_load
            rows.append(row)
    return rows


def compare_kept(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The least and the most of `failed_switches`, beside the published range."""
    kinds = {
        "optimum": ("the exact optimum", ""),
        "wild_first": ("wild-first", "with two virtual channels, of the optimum before"),
        "of_single_path": (
            "the same, of single paths before",
            "before the failure one path a pair, chosen best; more than 1 where the reroute, which "
            "splits paths, is better than that",
        ),
        "of_dimension_order": (
            "the same, of dimension order before",
            "before the failure plain dimension order with one rule for ties, which on twisted "
            "slices is far from the optimum; the published 1.017 says that what was routed before "
            "was a little less than the optimum",
        ),
    }
    found = []
    for key, (name, why) in kinds.items():
        values = [row[key] for row in rows if key in row]
        for which, value in (("least", min(values)), ("most", max(values))):
            what = f"all-to-all kept without a switch, {which}: {name}"
            found.append(compared(what, KEPT, value, NSDI24, why))
    return found


def compare_goodput() -> list[dict[str, Any]]:
    """Goodput with switches, and how reliable hosts must be for static wiring to do as well."""
    rows = []
    for chips, said in ((2048, 0.5), (3072, 0.75)):
        for host in (0.99, 0.995):
            ours, why = ocs_goodput(host, chips // 64), ""
            if abs(ours - said) > 1e-3:
                how = "too few blocks are up" if ours < said else "all blocks are up"
                why = f"in {abs(ours / said - 1):.1%} of the time {how}"
            what = f"goodput of {chips}-chip slices, hosts up {host:.1%}, switches"
            rows.append(compared(what, said, ours, ISCA23, why))
    for chips, box in BOXES.items():
        goal = ocs_goodput(0.99, chips // 64)
        host = brentq(lambda a, box=box, goal=goal: static_goodput(a, box) - goal, 0.99, 1)
        rows.append(
            compared(
                f"hosts up so that static wiring gives {chips}-chip slices what switches give at "
                "99.0%",
                0.999,
                host,
                ISCA23,
                "published as one round figure for large slices",
            )
        )
    return rows


def sampled_goodput(trials: int) -> list[dict[str, Any]]:
    """Computes goodput by closed form, and estimates it by Monte Carlo."""
    rows = []
    for chips, box in BOXES.items():
        for host in (0.99, 0.995, 0.999):
            for wiring, closed in (
                ("switches", ocs_goodput(host, chips // 64)),
                ("static", static_goodput(host, box)),
            ):
                found = sample_goodput(host, box, static=wiring == "static", trials=trials)
                rows.append(
                    {
                        "chips": chips,
                        "host_availability": host,
                        "wiring": wiring,
                        "closed_form": closed,
                        "sampled": found.mean,
                        "standard_error": found.error,
                    }
                )
    return rows


def compare_generations() -> list[dict[str, Any]]:
    """Speed, speed a watt and the pod of TPU v4 over those of v3; energy and CO2e of a chip in
    Google's data centre, over a contemporary one in an average one."""
    v4, v3 = TPU_V4.chip, TPU_V3.chip
    faster = v4.peak_bf16 / v3.peak_bf16
    (_, power, _), (_, before, _) = (published("power", chip.power) for chip in (v4, v3))
    peaks = "computed from peaks and mean power; published of a mean over production workloads"
    here, there = GOOGLE_OKLAHOMA, AVERAGE_SITE
    energy = CHIP_PER_WATT * there.pue / here.pue
    carbon = energy * there.kg_per_kwh / here.kg_per_kwh
    of_sites = (
        f"a chip {CHIP_PER_WATT:g} times as efficient (published as conservative), PUE {there.pue} "
        f"over {here.pue}"
    )
    grid = f"{of_sites}, and {there.kg_per_kwh} over {here.kg_per_kwh} kg of CO2e a kWh"
    return [
        compared("a chip of v4 over one of v3", 2.1, faster, ISCA23, peaks),
        compared("the same a watt", 2.7, faster * before / power, ISCA23, peaks),
        compared(
            "a pod of v4 over one of v3",
            10.0,
            faster * TPU_V4.num_chips / TPU_V3.num_chips,
            ISCA23,
            "published as nearly 10; 4 times the chips",
        ),
        compared("energy on premises over TPU v4 in Google Cloud", 2.85, energy, ISCA23, of_sites),
        compared("operational CO2e, the same", 18.3, carbon, ISCA23, grid),
    ]


def compare_wiring() -> list[dict[str, Any]]:
    """Bisection, and the switches and ports that the largest slice uses, by following the light."""
    slice = Slice.parse("16x16x16")
    pod = fabric.place(Fabric(), "all", slice)
    assert not light.check(pod)
    ports = max(len({p for pair in held.items() for p in pair}) for held in pod.connects.values())
    blocks = TPU_V4.num_blocks
    fibres = [
        fibre_end(switch, port, TPU_V4) for switch in pod.connects for port in range(2 * blocks)
    ]
    bisection = slice.bisection_links * TPU_V4.chip.link_bandwidth
    usable = TPU_V4.chip.link_efficiency
    return [
        compared(
            "bisection of a pod, TB/s one way",
            24.0,
            bisection / 1e12,
            CLOUD_V4,
            f"{slice.bisection_links} links of 50 GB/s; 24 is 93.8% of it, about what the twisted "
            f"gains show too; at the {usable:.0%} that the published all-reduce means it is "
            f"{usable * bisection / 1e12:.1f}",
        ),
        compared("switches that 16x16x16 uses", 48, len(pod.connects), ISCA23),
        compared("ports that it uses of each switch", 128, ports, ISCA23),
        compared("ports that it leaves of each switch", 8, TPU_V4.switch.ports - ports, ISCA23),
        compared("optical links of a block", 96, len(set(fibres)) / blocks, ISCA23),
        compared(
            "wires inside a block",
            144,
            (slice.num_links - len(fibres) / 2) / blocks,
            "derived: a 4x4x4 mesh",
        ),
    ]


def rank_twists(max_blocks: int) -> list[dict[str, Any]]:
    """Finds, for every shape, the twist of best all-to-all that the wiring can make."""
    rows = []
    for shape in legal_shapes(max_blocks):
        if shape[0] < TPU_V4.block.side or shape[2] == TPU_V4.block.side:
            continue
        ranked = ranked_twists(shape, measure=lambda slice: all_to_all(slice).max_link_load)
        loads: dict[str, Any] = {str(slice): load for slice, load in ranked}
        regular, shipped = loads[times(shape)], f"{times(shape)}_twisted"
        chips, bandwidth = math.prod(shape), TPU_V4.chip.link_bandwidth
        best = [name for name, load in loads.items() if load < min(loads.values()) * (1 + 1e-5)]
        rows.append(
            {
                "shape": times(shape),
                "chips": chips,
                "networks": len(loads),
                "best": times(shape) if times(shape) in best else best[0],
                "gain": regular / min(loads.values()),
                "bytes_per_second_per_chip": (chips - 1) * bandwidth / min(loads.values()),
                "regular_bytes_per_second_per_chip": (chips - 1) * bandwidth / regular,
                "shipped_gain": regular / loads[shipped] if shipped in loads else None,
            }
        )
    return rows


def a_year(years: float) -> dict[str, Any]:
    """Simulates a pod under several policies, with the same jobs and failures."""
    horizon = years * YEAR
    jobs = generate_jobs(horizon, seed=1)
    outages = generate_outages(horizon, seed=1)
    outages += generate_maintenance(horizon, every=90 * DAY, lasts=4 * 3600)
    rows = []
    for name, policy in POLICIES.items():
        report = simulate_pod(jobs, outages, horizon=horizon, policy=policy)
        rows.append(policy_row(name, report))
    return {"years": years, "jobs": len(jobs), "outages": len(outages), "policies": rows}


def checkpoints(years: float) -> dict[str, Any]:
    """Computes the goodput of a job of 2048 chips by checkpoint interval, and simulates it."""
    rates = FailureRates(cable=0, switch=0)
    job = Job(name="long", slice=Slice.parse("8x16x16"), arrival=0, work=100 * years * YEAR)
    mtbf = 1 / (rates.block_failures() * job.slice.num_blocks)
    outages = generate_outages(years * YEAR, rates, seed=2)
    best = checkpoint_interval.best_interval(SAVE, mtbf)
    rows = []
    for factor in FACTORS:
        policy = Policy(interval=factor * best)
        report = simulate_pod([job], outages, horizon=years * YEAR, policy=policy, rates=rates)
        progress = report.jobs[0].progress
        restarts = report.interruptions["swap"]
        rows.append(
            {
                "interval": policy.interval,
                "simulated": progress.kept / progress.held,
                "closed_form": checkpoint_interval.efficiency(
                    policy.interval, SAVE, progress.paused / max(restarts, 1), mtbf
                ),
            }
        )
    return {
        "chips": job.slice.num_chips,
        "years": years,
        "save": SAVE,
        "mtbf": mtbf,
        "restarts": restarts,
        "young": checkpoint_interval.young_interval(SAVE, mtbf),
        "daly": checkpoint_interval.daly_interval(SAVE, mtbf),
        "best": best,
        "intervals": rows,
    }
