"""Jobs and failures as they are drawn, against published figures."""

import math
from collections import Counter

import numpy as np
import pytest
from helpers.pods import (
    HOUR,
    ROUGH,
)

from topology.fleet.workload import (
    DAY,
    YEAR,
    FailureRates,
    generate_jobs,
    generate_maintenance,
    generate_outages,
)


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
