"""A pod's months against limits that theory knows."""

import math

import numpy as np
import pytest
from helpers.pods import (
    FREE,
    HOUR,
    job,
    pod_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.fleet.availability import ocs_goodput
from topology.fleet.checkpoint_interval import (
    best_interval,
    daly_interval,
    efficiency,
    young_interval,
)
from topology.fleet.pod_simulation import simulate
from topology.fleet.policies import (
    InOrder,
    Policy,
)
from topology.fleet.progress import Costs, Progress
from topology.fleet.workload import (
    DAY,
    YEAR,
    FailureRates,
    generate_jobs,
    generate_outages,
)


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
