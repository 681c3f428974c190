"""Pods and jobs of tests that simulate months."""

from dataclasses import replace

from topology import TPU_V4, Part, Slice
from topology.fleet.policies import (
    AsPublished,
    Backfill,
    ContiguousBox,
    InOrder,
    NeverReroute,
    Policy,
)
from topology.fleet.progress import Costs
from topology.fleet.workload import (
    DAY,
    FailureRates,
    Job,
    generate_jobs,
    generate_maintenance,
    generate_outages,
)

HOUR = 3600.0
FREE = Costs(save=0, restore=0, reconfigure=0, reroute=0)
ROUGH = FailureRates(host=0.02, cable=0.002, switch=0.02)  # a pod that fails all the time
POLICIES = [
    Policy(),
    Policy(spares=3, recovery=AsPublished()),
    Policy(preempt=True, queue=InOrder(), recovery=NeverReroute()),
    Policy(preempt=True, spares=1, queue=Backfill(patience=HOUR), interval=1800.0),
    Policy(placement=ContiguousBox()),
    Policy(placement=ContiguousBox(wraparound=True), defragment=True, preempt=True),
]
LINK = Part("link", (0, 0, 0, 0, 0))
HOST = Part("host", (0, 5))
SWITCH = Part("ocs", (0, 1, 2))


def pod_of(blocks, grid=(4, 4, 4)):
    return replace(TPU_V4, name=f"{blocks} blocks", num_blocks=blocks, block_grid=grid)


def job(name="a", shape="4x4x4", arrival=0.0, work=HOUR, **more):
    return Job(name=name, slice=Slice.parse(shape), arrival=arrival, work=work, **more)


def rough_months(seed, days=15):
    horizon = days * DAY
    jobs = generate_jobs(horizon, load=1.2, mean_work=0.6 * DAY, seed=seed)
    outages = generate_outages(horizon, ROUGH, seed=seed)
    outages += generate_maintenance(horizon, every=8 * DAY, lasts=6 * HOUR)
    return jobs, outages, horizon


def kinds(report, name="a"):
    return [event.kind for event in report.log if event.job == name]


def finish(report, name="a"):
    return next(record.finished for record in report.jobs if record.job.name == name)
