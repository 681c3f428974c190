"""A pod's months, event by event: the books, one job and many by hand, mistakes."""

from collections import Counter

import numpy as np
import pytest
from helpers.pods import (
    FREE,
    HOST,
    HOUR,
    LINK,
    POLICIES,
    ROUGH,
    SWITCH,
    finish,
    job,
    kinds,
    pod_of,
    rough_months,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import Part, Slice, fabric
from topology.fabric import light
from topology.fleet.pod_simulation import simulate
from topology.fleet.policies import (
    AnyBlocks,
    AsPublished,
    Backfill,
    Cheapest,
    ContiguousBox,
    InOrder,
    NeverReroute,
    Policy,
)
from topology.fleet.progress import Costs
from topology.fleet.workload import (
    DAY,
    FailureRates,
    Outage,
    generate_jobs,
    generate_maintenance,
)

# The books.


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(POLICIES))
def test_nothing_is_lost_and_nothing_is_used_twice(seed, policy):
    jobs, outages, horizon = rough_months(seed)
    report = simulate(jobs, outages, horizon=horizon, policy=policy, rates=ROUGH)
    total = 64 * horizon
    assert sum(report.block_seconds.values()) == pytest.approx(total, rel=1e-9)
    assert min(report.block_seconds.values()) >= 0

    # All of it again from the log alone: who has which block, which blocks are out.
    sizes = {j.name: j.slice.num_blocks for j in jobs}
    owner, has, out = {}, {}, Counter()
    held, seconds, last = Counter(), Counter(), 0.0
    for event in [*report.log, None]:
        now = horizon if event is None else event.time
        assert now >= last
        for name, blocks in has.items():
            held[name] += (now - last) * len(blocks)
        free = [b for b in range(64) if b not in owner]
        seconds["out"] += (now - last) * sum(out[b] > 0 for b in free)
        seconds["idle"] += (now - last) * sum(out[b] == 0 for b in free)
        last = now
        if event is None:
            break
        if event.kind in ("out", "back"):
            part = event.detail.split(":")
            if part[0] != "ocs":
                out[int(part[1].split(",")[0])] += 1 if event.kind == "out" else -1
        if event.kind in ("start", "swap", "migrate", "leave", "requeue", "preempt", "finish"):
            for block in has.pop(event.job, ()):
                del owner[block]
        if event.kind in ("start", "swap", "migrate"):
            assert len(set(event.blocks)) == sizes[event.job] == len(event.blocks)
            for block in event.blocks:
                assert block not in owner, "a block in two jobs"
                assert out[block] == 0, "a job on a block that is out"
                owner[block] = event.job
            has[event.job] = event.blocks
    for name in ("out", "idle"):
        assert seconds[name] == pytest.approx(report.block_seconds[name], rel=1e-9, abs=1e-3)
    assert report.utilisation == pytest.approx(sum(held.values()) / total, rel=1e-9)
    assert report.goodput <= report.utilisation

    assert len(report.jobs) == len(jobs)
    for record in report.jobs:
        name, progress = record.job.name, record.progress
        # Time held is what was done and what was spent on it.
        assert progress.held * sizes[name] == pytest.approx(held[name], rel=1e-9, abs=1e-2)
        assert progress.kept <= record.job.work * (1 + 1e-9)
        if record.finished is not None:
            assert progress.kept == pytest.approx(record.job.work, rel=1e-9)
            assert name not in has
        if record.started is not None:
            assert record.wait >= 0
    assert report.interrupted_jobs == sum(bool(r.interruptions) for r in report.jobs) > 0


def test_blocks_of_a_static_pod_are_boxes():
    jobs, outages, horizon = rough_months(5)
    policy = Policy(placement=ContiguousBox(), defragment=True)
    report = simulate(jobs, outages, horizon=horizon, policy=policy, rates=ROUGH)
    sides = {j.name: sorted(j.slice.block_shape) for j in jobs}
    for event in report.log:
        if event.blocks:
            cells = np.array(np.unravel_index(event.blocks, (4, 4, 4))).T
            assert sorted(np.ptp(cells, axis=0) + 1) == sides[event.job]


def test_optical_fabric_can_make_every_step_of_the_log():
    jobs, outages, horizon = rough_months(7, days=4)
    report = simulate(jobs, outages, horizon=horizon, rates=ROUGH)
    slices = {j.name: j.slice for j in jobs}
    pod, steps = fabric.Fabric(), 0
    for event in report.log:
        if event.job in pod.placements and (
            event.blocks or event.kind in ("requeue", "preempt", "finish")
        ):
            pod = fabric.release(pod, event.job)
        if event.blocks:
            pod = fabric.place(pod, event.job, slices[event.job], event.blocks)
            steps += 1
    assert steps > 50
    assert light.check(pod) == []


def test_same_seed_same_log():
    first, second = (
        simulate(*rough_months(11)[:2], horizon=15 * DAY, policy=POLICIES[3], rates=ROUGH)
        for _ in range(2)
    )
    assert first.log == second.log
    assert first.block_seconds == second.block_seconds
    other = simulate(*rough_months(12)[:2], horizon=15 * DAY, policy=POLICIES[3], rates=ROUGH)
    assert other.log != first.log


# One job, by hand.


def test_job_alone_takes_its_work_and_its_checkpoints():
    costs = Costs(save=30, restore=300, reconfigure=120, reroute=10)
    report = simulate(
        [job(work=3500.0, arrival=100.0)], horizon=DAY, costs=costs, policy=Policy(interval=1000.0)
    )
    assert finish(report) == pytest.approx(100 + 120 + 3500 + 3 * 30)  # none at the end
    assert kinds(report) == ["submit", "start", "finish"]
    exact = simulate([job(work=3000.0)], horizon=DAY, costs=costs, policy=Policy(interval=1000.0))
    assert finish(exact) == pytest.approx(120 + 3000 + 2 * 30)


def test_failure_costs_the_work_since_the_checkpoint():
    # 120 s to start, 1000 s, 30 s to save, 400 s of the next 1000: then the host fails.
    outage = Outage(120 + 1030 + 400, 5 * HOUR, HOST)
    report = simulate([job(work=3500.0)], [outage], horizon=DAY, policy=Policy(interval=1000.0))
    assert kinds(report) == ["submit", "start", "swap", "finish"]
    assert report.log[-2].kind == "finish"  # the repair comes after
    assert finish(report) == pytest.approx(outage.start + 120 + 300 + 2500 + 2 * 30)
    record = report.jobs[0]
    assert record.progress.lost == pytest.approx(400)
    assert [e.blocks for e in report.log if e.blocks] == [(0,), (1,)]


def test_failure_while_it_saves_costs_the_whole_interval():
    outage = Outage(120 + 1000 + 29, 5 * HOUR, HOST)
    report = simulate([job(work=3500.0)], [outage], horizon=DAY, policy=Policy(interval=1000.0))
    assert report.jobs[0].progress.lost == pytest.approx(1000)
    assert finish(report) == pytest.approx(outage.start + 420 + 3500 + 3 * 30)


def test_without_spare_blocks_it_waits_for_the_repair():
    outage = Outage(120 + 500, 3 * HOUR, HOST)
    whole = job(shape="16x16x16", work=2000.0)
    report = simulate([whole], [outage], horizon=DAY, policy=Policy(interval=1e9))
    assert kinds(report) == ["submit", "start", "requeue", "start", "finish"]
    assert finish(report) == pytest.approx(3 * HOUR + 420 + 2000)
    assert report.block_seconds["out"] == pytest.approx(3 * HOUR - 620)
    assert report.jobs[0].wait == 0


@pytest.mark.parametrize(
    ("part", "work", "recovery", "way"),
    [
        (LINK, 600.0, Cheapest(), "reroute"),  # 10 % of little work is less than a restart
        (LINK, 20 * HOUR, Cheapest(), "swap"),  # 10 % of 20 hours is more
        (LINK, 600.0, AsPublished(), "swap"),
        (LINK, 600.0, NeverReroute(), "swap"),
        (SWITCH, 20 * HOUR, Cheapest(), "reroute"),
        (SWITCH, 20 * HOUR, AsPublished(), "reroute"),
        (SWITCH, 20 * HOUR, NeverReroute(), "stall"),
        (HOST, 600.0, Cheapest(), "swap"),
    ],
)
def test_way_out(part, work, recovery, way):
    policy = Policy(recovery=recovery, interval=1e9)
    outage = Outage(120 + 300, 40 * HOUR, part)
    report = simulate([job(work=work, slowdown=0.1)], [outage], horizon=5 * DAY, policy=policy)
    end = {
        "reroute": outage.start + 10 + (work - 300) * 1.1,
        "swap": outage.start + 420 + work,
        "stall": outage.end + 420 + work,
    }
    assert report.interruptions == Counter([way])
    assert finish(report) == pytest.approx(end[way])


def test_rerouted_until_the_repair():
    outage = Outage(120 + 300, 120 + 300 + 10 + 1100, SWITCH)
    report = simulate([job(work=2 * HOUR, slowdown=0.1)], [outage], horizon=DAY)
    progress = report.jobs[0].progress
    assert progress.slowed == pytest.approx(100)  # 1000 seconds of work in 1100
    assert finish(report) == pytest.approx(120 + 10 + 2 * HOUR + 100 + progress.saving)


def test_who_did_not_opt_in_waits_for_the_switch():
    outage = Outage(420.0, 5000.0, SWITCH)
    jobs = [
        job("in", slowdown=0.05, work=600.0),
        job("out", work=600.0),
        job("part", "2x2x2", work=600.0),  # inside a block no light is needed
        job("late", arrival=1000.0, work=600.0),
        job("late_in", arrival=1000.0, work=600.0, slowdown=0.05),
    ]
    report = simulate(jobs, [outage], horizon=DAY)
    assert kinds(report, "in") == ["submit", "start", "reroute", "finish"]
    assert kinds(report, "out") == ["submit", "start", "stall", "resume", "finish"]
    assert finish(report, "out") == pytest.approx(5000 + 420 + 600)
    assert kinds(report, "part") == ["submit", "start", "finish"]
    assert finish(report, "late") == pytest.approx(5000 + 120 + 600)
    assert finish(report, "late_in") == pytest.approx(1000 + 120 + 600 * 1.05)


def test_one_detour_at_a_time():
    outages = [Outage(420.0, 9000.0, SWITCH), Outage(1000.0, 5000.0, Part("ocs", (1, 0, 0)))]
    report = simulate([job(work=600.0 + 6000, slowdown=0.05)], outages, horizon=DAY)
    assert kinds(report) == ["submit", "start", "reroute", "stall", "resume", "finish"]
    progress = report.jobs[0].progress
    assert progress.stalled_for == pytest.approx(4000)
    assert finish(report) == pytest.approx(progress.held)  # it held its block all the time


def test_switch_that_comes_back_while_another_is_out():
    first = Outage(420.0, 3000.0, SWITCH)
    second = Outage(1000.0, 9000.0, Part("ocs", (1, 0, 0)))
    report = simulate([job(work=6600.0, slowdown=0.05)], [first, second], horizon=DAY)
    # It waits only until one switch is left to go around.
    assert kinds(report) == ["submit", "start", "reroute", "stall", "reroute", "resume", "finish"]
    assert report.jobs[0].progress.stalled_for == pytest.approx(2000)


def test_rerouted_job_leaves_both_bad_blocks_when_another_fails():
    outages = [Outage(420.0, 9 * HOUR, LINK), Outage(600.0, 9 * HOUR, Part("host", (1, 0)))]
    one = job(shape="4x4x8", work=800.0, slowdown=0.01)
    report = simulate([one], outages, horizon=DAY, policy=Policy(interval=1e9))
    assert kinds(report) == ["submit", "start", "reroute", "swap", "finish"]
    assert [e.blocks for e in report.log if e.blocks] == [(0, 1), (2, 3)]
    assert finish(report) == pytest.approx(600 + 420 + 800)


def test_maintenance_loses_no_work():
    outage = Outage(420.0, 4 * HOUR, Part("block", (0,)), planned=True)
    report = simulate([job(work=2000.0)], [outage], horizon=DAY)
    assert report.block_seconds["lost"] == 0
    assert finish(report) == pytest.approx(420 + 30 + 420 + 1700)


# Many jobs, by hand.


def test_spares_replace_what_fails():
    jobs = [job(str(n), "4x4x8", work=10 * HOUR) for n in range(2)]
    outages = [Outage(HOUR, 9 * HOUR, HOST)]
    pod = pod_of(4)
    without = simulate(jobs, outages, horizon=DAY, pod=pod)
    assert without.interruptions == Counter(requeue=1)
    spared = simulate(jobs, outages, horizon=DAY, pod=pod, policy=Policy(spares=1))
    assert spared.interruptions == Counter(swap=1)
    assert finish(spared, "1") > finish(spared, "0")  # it had to wait for the other


def test_backfill_passes_a_large_job_until_its_patience_ends():
    pod = pod_of(4)
    jobs = [
        job("half", "4x4x8", work=HOUR),
        job("whole", "4x8x8", arrival=1.0, work=HOUR),
        *(job(f"small{n}", arrival=2.0 + n, work=HOUR / 2 * (n + 1)) for n in range(6)),
    ]
    starts = {}
    for name, queue in (("order", InOrder()), ("fill", Backfill(patience=0.9 * HOUR))):
        report = simulate(jobs, horizon=DAY, pod=pod, policy=Policy(queue=queue))
        starts[name] = {record.job.name: record.started for record in report.jobs}
    assert starts["order"]["small0"] > starts["order"]["whole"] > HOUR
    assert starts["fill"]["small0"] == 2.0
    assert starts["fill"]["small2"] < starts["fill"]["whole"] < starts["fill"]["small5"]


def test_preemption_takes_no_more_than_it_needs():
    pod = pod_of(8)
    jobs = [
        job("early", "4x8x8", work=10 * HOUR),
        job("later", "4x4x8", arrival=10.0, work=10 * HOUR),
        job("last", "4x4x8", arrival=20.0, work=10 * HOUR),
        job("urgent", "4x4x8", arrival=HOUR, work=HOUR, priority=1),
    ]
    report = simulate(jobs, horizon=3 * DAY, pod=pod, policy=Policy(preempt=True))
    assert report.interruptions == Counter(preempt=1)
    assert kinds(report, "last") == ["submit", "start", "preempt", "start", "finish"]
    urgent, last = (next(r for r in report.jobs if r.job.name == n) for n in ("urgent", "last"))
    assert urgent.wait == 0
    assert last.progress.lost == 0
    again = [e.time for e in report.log if e.job == "last" and e.kind == "start"][1]
    assert again == urgent.finished
    # One save when it left; the restart loads it.
    assert last.progress.paused == pytest.approx(120 + 30 + 120 + 300)


def test_defragmentation_makes_a_box():
    pod = pod_of(8, (1, 1, 8))
    jobs = [job(f"{n}", work=(10.0 if n % 2 else 100.0) * HOUR) for n in range(8)]
    jobs.append(job("pair", "4x4x16", arrival=20 * HOUR, work=HOUR))  # four in a row
    waits = {}
    for defragment in (False, True):
        policy = Policy(placement=ContiguousBox(grid=(1, 1, 8)), defragment=defragment)
        report = simulate(jobs, horizon=200 * HOUR, pod=pod, policy=policy)
        waits[defragment] = report.jobs[-1].wait
        assert report.block_seconds["lost"] == 0
        assert report.interruptions == Counter(migrate=2 if defragment else 0)
        assert all(record.finished for record in report.jobs)
    assert waits[True] == 0
    assert waits[False] > 70 * HOUR
    assert AnyBlocks().make_room(Slice.parse("4x4x16"), range(64), {}) is None


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: FailureRates(host=-1), "failure rates: host -1: a number, 0 or more"),
        (lambda: Costs(save=-1), "costs: save -1: seconds, 0 or more"),
        (lambda: Policy(spares=-1), "policy: spares -1"),
        (lambda: Policy(interval=0.0), "interval 0.0"),
        (lambda: job(work=0.0), "job 'a': work 0.0: seconds, more than 0"),
        (lambda: job(slowdown=-0.1), "job 'a': slowdown -0.1: a number, 0 or more"),
        (lambda: Outage(5.0, 4.0, HOST), "outage of host:0,5: from 5.0 to 4.0"),
        (lambda: Outage(5.0, 6.0, Part("port", (0, 0, 0, 3))), "outage of port:x,0,0,3"),
        (lambda: simulate([], horizon=0.0), "horizon 0.0: seconds, more than 0"),
        (lambda: simulate([job(), job()], horizon=DAY), "job 'a': there are two of this name"),
        (
            lambda: simulate([job(shape="4x8x8")], horizon=DAY, pod=pod_of(3)),
            "job 'a': 4x8x8 does not fit the pod of 3 blocks",
        ),
        (
            lambda: simulate(
                [job(shape="4x4x32")], horizon=DAY, policy=Policy(placement=ContiguousBox())
            ),
            "job 'a': 4x4x32 does not fit",
        ),
        (
            lambda: simulate([], [Outage(0.0, 1.0, HOST._replace(where=(70, 0)))], horizon=DAY),
            "outage of host:70,0: blocks are 0 .. 63",
        ),
        (lambda: simulate([job()], horizon=DAY, costs=FREE), "save 0 has no best interval"),
        (lambda: generate_jobs(DAY, load=-1), "jobs: load -1"),
        (lambda: generate_maintenance(DAY, every=1.0, lasts=2.0), "maintenance: lasts 2.0"),
    ],
)
def test_mistakes(call, line):
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)
