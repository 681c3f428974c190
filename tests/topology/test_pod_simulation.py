import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import TPU_V4, Part, Slice, fabric
from topology.fabric import light
from topology.fleet.availability import ocs_goodput
from topology.fleet.checkpoint_interval import (
    best_interval,
    daly_interval,
    efficiency,
    young_interval,
)
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
from topology.fleet.progress import Costs, Progress
from topology.fleet.workload import (
    DAY,
    YEAR,
    FailureRates,
    Job,
    Outage,
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


# Limits that theory knows.


def erlang_c_wait(servers, load, mean_work):
    """Mean wait in an M/M/c queue."""
    offered = servers * load
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - load)
    return last / (sum(terms) + last) * mean_work / (servers * (1 - load))


@pytest.mark.parametrize(("blocks", "load"), [(1, 0.6), (4, 0.8)])
def test_waits_are_those_of_a_queue_with_many_servers(blocks, load):
    pod, mean = pod_of(blocks), HOUR
    horizon = 15_000 * mean / (blocks * load)
    jobs = generate_jobs(
        horizon, load=load, mean_work=mean, sizes={1.0: ["4x4x4"]}, urgent=0, seed=4, pod=pod
    )
    report = simulate(
        jobs, horizon=horizon, costs=FREE, policy=Policy(queue=InOrder(), interval=1e9), pod=pod
    )
    assert report.mean_wait == pytest.approx(erlang_c_wait(blocks, load, mean), rel=0.12)
    assert report.utilisation == pytest.approx(load, rel=0.03)
    assert report.goodput == pytest.approx(report.utilisation, rel=1e-9)


def test_preempting_jobs_wait_as_if_they_were_alone():
    pod, mean, load, urgent = pod_of(4), HOUR, 0.8, 0.5
    horizon = 12_000 * mean / load
    whole = {1.0: ["4x8x8"]}
    jobs = generate_jobs(
        horizon, load=load, mean_work=mean, sizes=whole, urgent=urgent, seed=6, pod=pod
    )
    report = simulate(
        jobs, horizon=horizon, costs=FREE, policy=Policy(preempt=True, interval=1e9), pod=pod
    )
    first = [record.wait for record in report.jobs if record.job.priority == 1]
    mine = load * urgent
    assert np.mean(first) == pytest.approx(mine / (1 - mine) * mean, rel=0.12)
    assert report.goodput == pytest.approx(load, rel=0.04)


def test_goodput_of_endless_jobs_is_that_of_the_closed_form():
    rates = FailureRates(host=0.01, cable=0, switch=0, host_repair=DAY / 2)
    a = 1 / (1 + 0.01 * 0.5)
    assert rates.block_availability() == pytest.approx(a**16)
    horizon = 4 * YEAR
    jobs = [job(str(n), "8x8x16", work=1e12) for n in range(4)]
    outages = generate_outages(horizon, rates, seed=2)
    report = simulate(
        jobs, outages, horizon=horizon, costs=FREE, policy=Policy(interval=1.0), rates=rates
    )
    assert report.utilisation == pytest.approx(ocs_goodput(a, 16), abs=0.004)
    one = simulate(
        [job(work=1e12, shape="12x16x16")],
        outages,
        horizon=horizon,
        costs=FREE,
        policy=Policy(interval=1.0),
    )
    assert one.utilisation == pytest.approx(ocs_goodput(a, 48), abs=0.004)
    up = 1 - report.block_seconds["out"] / (64 * horizon)
    assert up == pytest.approx(a**16, abs=0.004)


@pytest.mark.parametrize("interval", [0.2, 1.0, 5.0])
def test_long_job_is_as_efficient_as_the_renewal_formula_says(interval):
    rates = FailureRates(host=0.02, cable=0, switch=0, host_repair=HOUR)
    blocks, horizon = 32, 150 * DAY
    mtbf = DAY / (0.02 * 16 * blocks)
    costs = Costs(save=120, restore=240, reconfigure=60, reroute=0)
    work = interval * young_interval(120, mtbf)
    report = simulate(
        [job(shape="8x16x16", work=1e9)],
        generate_outages(horizon, rates, seed=9),
        horizon=horizon,
        policy=Policy(interval=work),
        costs=costs,
    )
    assert report.interruptions["requeue"] == 0
    found = report.jobs[0].progress.kept / horizon
    assert found == pytest.approx(efficiency(work, 120, 300, mtbf), rel=0.04)


def test_simulated_best_interval_is_in_the_flat_bottom_around_the_rules():
    rates = FailureRates(host=0.02, cable=0, switch=0, host_repair=HOUR)
    horizon, mtbf = 150 * DAY, DAY / (0.02 * 16 * 32)
    costs = Costs(save=120, restore=240, reconfigure=60, reroute=0)
    outages = generate_outages(horizon, rates, seed=10)
    best = best_interval(120, mtbf)

    def goodput(interval):
        policy = Policy(interval=interval)
        jobs = [job(shape="8x16x16", work=1e9)]
        return simulate(
            jobs, outages, horizon=horizon, policy=policy, costs=costs, rates=rates
        ).goodput

    found = {best * factor: goodput(best * factor) for factor in (0.1, 0.4, 0.7, 1, 1.4, 2, 5)}
    top = max(found, key=found.get)
    assert 0.4 * best <= top <= 2 * best
    for rule in (young_interval(120, mtbf), daly_interval(120, mtbf), None):
        assert goodput(rule) > 0.99 * found[top]
    assert min(found.values()) < 0.9 * found[top]


def test_the_default_interval_is_dalys():
    rates = FailureRates(host=0.02, cable=0.001, switch=0)
    mtbf = DAY / (4 * (16 * 0.02 + 240 * 0.001))
    report = simulate([job(shape="4x8x8")], horizon=DAY, rates=rates)
    assert report.jobs[0].progress.interval == pytest.approx(daly_interval(30, mtbf))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.01, 500), min_size=1, max_size=12),
    st.floats(1, 200),
    st.floats(0, 30),
    st.floats(0.2, 1),
)
def test_progress_in_pieces_is_progress_at_once(pieces, interval, save, speed):
    def fresh():
        return Progress(work=700.0, interval=interval, save=save, speed=speed, pause=17.0)

    whole, parts, second = fresh(), fresh(), fresh()
    whole.advance(min(sum(pieces), whole.time_left()))
    for piece in pieces:
        parts.advance(min(piece, parts.time_left()))
    # And once in steps of a fine clock, by the rules alone.
    step, time, kept, since, into, pause = 0.02, 0.0, 0.0, 0.0, None, 17.0
    while time < sum(pieces) and kept < 700:
        time += step
        if pause > 0:
            pause -= step
        elif into is not None:
            into += step
            if into >= save:
                into, since = None, 0.0
        else:
            kept, since = kept + step * speed, since + step * speed
            if since >= interval:
                into = 0.0
    assert parts.kept == pytest.approx(whole.kept, abs=1e-6)
    assert parts.held == pytest.approx(whole.held, abs=1e-6)
    cycles = 2 + 700 / interval
    assert whole.kept == pytest.approx(kept, abs=3 * step * cycles)
    second.advance(second.time_left())
    assert second.kept == pytest.approx(700)
    assert second.held == pytest.approx(fresh().time_left())


# Jobs and failures.


def test_sizes_are_those_of_the_published_sample():
    jobs = generate_jobs(12 * YEAR, seed=0, load=0.2)
    count = len(jobs)

    def share(wanted):
        return sum(map(wanted, jobs)) / count

    error = 4 * math.sqrt(0.25 / count)
    assert error < 0.02
    assert share(lambda j: j.slice.num_chips < 64) == pytest.approx(0.29, abs=error)
    ratios = {(1, 1, 2), (1, 2, 2)}
    twistable = [
        j for j in jobs if tuple(k / min(j.slice.shape) for k in sorted(j.slice.shape)) in ratios
    ]
    whole = [j for j in twistable if j.slice.is_whole_blocks]
    assert len(whole) / count == pytest.approx(0.33, abs=error)
    assert share(lambda j: j.slice.is_twisted) == pytest.approx(0.28, abs=error)
    large = [j for j in jobs if j.slice.num_chips >= 64]
    assert np.mean([j.slice.is_twisted for j in large]) == pytest.approx(0.40, abs=error)
    assert max(j.slice.num_chips for j in jobs) == 3072
    assert share(lambda j: j.slowdown is not None) == pytest.approx(0.95, abs=error)
    slow = [j.slowdown for j in jobs if j.slowdown is not None]
    assert 0.005 <= min(slow) < 0.006 < 0.08 < max(slow) <= 0.086
    held = sum(j.work * j.slice.num_blocks for j in jobs)
    assert held / (64 * 12 * YEAR) == pytest.approx(0.2, rel=0.08)


def test_failures_come_at_the_published_rates():
    years = 20
    outages = generate_outages(years * YEAR, seed=3)
    count = Counter(outage.part.kind for outage in outages)
    expected = {
        "host": 1024 * 0.0008 * 365 * years,
        "link": 64 * (144 + 96) * 0.00005 * 365 * years,
        "ocs": 48 * 0.0004 * 365 * years,
    }
    for kind, number in expected.items():
        assert abs(count[kind] - number) < 4 * math.sqrt(number)
    mean = np.mean([o.end - o.start for o in outages if o.part.kind == "host"])
    assert mean == pytest.approx(8 * HOUR, rel=0.06)
    cables = {o.part.where[1:] for o in generate_outages(900 * DAY, ROUGH) if o.part.kind == "link"}
    assert len(cables) == 240


def test_a_part_fails_only_while_it_is_up():
    rates = FailureRates(host=2.0, cable=0, switch=1.0, host_repair=DAY, switch_repair=DAY / 3)
    horizon = 60 * DAY
    up_from, down = {}, Counter()
    for outage in generate_outages(horizon, rates, seed=8):
        assert outage.start >= up_from.get(outage.part, 0)
        up_from[outage.part] = outage.end
        down[outage.part.kind] += min(outage.end, horizon) - outage.start
    assert down["host"] / (1024 * horizon) == pytest.approx(2 / 3, rel=0.02)
    assert down["ocs"] / (48 * horizon) == pytest.approx(1 / 4, rel=0.1)


def test_maintenance_takes_each_block_in_its_turn():
    outages = generate_maintenance(10 * DAY, every=5 * DAY, lasts=HOUR)
    assert Counter(o.part.where[0] for o in outages) == dict.fromkeys(range(64), 2)
    starts = np.array([o.start for o in outages])
    assert np.diff(starts) == pytest.approx(5 * DAY / 64)
    assert all(o.planned and o.end - o.start == HOUR for o in outages)


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
