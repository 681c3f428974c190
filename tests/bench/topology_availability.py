"""Availability of a pod: figures beside the published ones, and how fast they come.

    python tests/bench/topology_availability.py [--trials 2000000] [--years 1]

Goodput: closed form and Monte Carlo, with switches and with static wiring, against the figures that
were published, or sampled by a reference (it does not say with how many trials). Speed: trials a
second, and seconds for a year of a pod's events, medians of three. Policies: the same year under
each, then checkpoint intervals by rule and as the simulation finds them.
"""

import argparse
import statistics
import time

from topology.fleet.availability import ocs_goodput, sample_goodput, static_goodput
from topology.fleet.checkpoint_interval import best_interval, daly_interval, young_interval
from topology.fleet.pod_simulation import simulate
from topology.fleet.policies import AsPublished, ContiguousBox, NeverReroute, Policy
from topology.fleet.workload import (
    DAY,
    YEAR,
    FailureRates,
    Job,
    generate_jobs,
    generate_maintenance,
    generate_outages,
)
from topology.torus.slices import Slice

REFERENCE = {  # (chips, host availability): (with switches, static)
    (1024, 0.990): (0.744, 0.190),
    (1024, 0.995): (0.751, 0.442),
    (1024, 0.999): (0.842, 0.811),
    (2048, 0.990): (0.50, None),
    (2048, 0.995): (0.50, None),
    (3072, 0.990): (0.75, None),
    (3072, 0.995): (0.75, None),
}
SHAPES = {1024: (2, 2, 4), 2048: (2, 4, 4), 3072: (3, 4, 4)}
POLICIES = {
    "switches": Policy(),
    "2 spare blocks": Policy(spares=2),
    "pre-emption": Policy(preempt=True),
    "reroute as published": Policy(recovery=AsPublished()),
    "never reroute": Policy(recovery=NeverReroute()),
    "static": Policy(placement=ContiguousBox()),
    "static, wraparound": Policy(placement=ContiguousBox(wraparound=True)),
    "static, defragmented": Policy(placement=ContiguousBox(), defragment=True),
}


def seconds(run, times=3) -> float:
    """Median time of a call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def goodput(trials: int):
    print(
        f"{'goodput of slices':24}{'wiring':10}{'closed':>9}{'sampled':>9}{'error':>9}{'ref.':>7}"
    )
    for (chips, a), reference in REFERENCE.items():
        shape = SHAPES[chips]
        rows = (
            ("switches", False, ocs_goodput(a, chips // 64), reference[0]),
            ("static", True, static_goodput(a, shape), reference[1]),
        )
        for name, static, closed, published in rows:
            found = sample_goodput(a, shape, static=static, trials=trials)
            beside = "" if published is None else f"{published:7.3f}"
            print(
                f"{chips} chips, hosts {a:.1%}   {name:10}{closed:9.4f}{found.mean:9.4f}"
                f"{found.error:9.5f}{beside}"
            )
    for name, static in (("switches", False), ("static", True)):
        run = seconds(lambda s=static: sample_goodput(0.995, (2, 2, 4), static=s, trials=trials))
        print(f"{name}: {trials / run / 1e6:.2f} million trials a second")


def policies(years: float):
    horizon = years * YEAR
    jobs = generate_jobs(horizon, seed=1)
    outages = generate_outages(horizon, seed=1)
    outages += generate_maintenance(horizon, every=90 * DAY, lasts=4 * 3600)
    print(f"\n{years} years: {len(jobs)} jobs, {len(outages)} outages")
    print(f"{'policy':22}{'used':>7}{'goodput':>9}{'wait':>8}{'hit jobs':>9}{'seconds':>9}")
    for name, policy in POLICIES.items():
        report = simulate(jobs, outages, horizon=horizon, policy=policy)
        run = seconds(lambda p=policy: simulate(jobs, outages, horizon=horizon, policy=p))
        print(
            f"{name:22}{report.utilisation:7.3f}{report.goodput:9.3f}"
            f"{report.mean_wait / 3600:6.0f} h{report.interrupted_jobs:9}{run:9.2f}"
            f"  {dict(report.interruptions)}"
        )


def intervals():
    rates = FailureRates(cable=0, switch=0)
    horizon, save, blocks = 5 * YEAR, 30.0, 32
    mtbf = 1 / (rates.block_failures() * blocks)
    outages = generate_outages(horizon, rates, seed=2)
    job = Job(name="long", slice=Slice.parse("8x16x16"), arrival=0, work=1e12)
    print(f"\n2048 chips, a failure each {mtbf / 3600:.1f} h, 30 s to save: minutes between saves")
    rules = (young_interval(save, mtbf), daly_interval(save, mtbf), best_interval(save, mtbf))
    print("Young {:.1f}  Daly {:.1f}  exact {:.1f}".format(*(rule / 60 for rule in rules)))
    for factor in (0.25, 0.5, 0.7, 0.85, 1, 1.2, 1.4, 2, 4):
        policy = Policy(interval=factor * rules[2])
        report = simulate([job], outages, horizon=horizon, policy=policy, rates=rates)
        kept = report.jobs[0].progress.kept / report.jobs[0].progress.held
        print(f"  {policy.interval / 60:6.1f} min: {kept:.5f} of the time it held is work kept")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2_000_000)
    parser.add_argument("--years", type=float, default=1)
    args = parser.parse_args()
    goodput(args.trials)
    policies(args.years)
    intervals()


if __name__ == "__main__":
    main()
