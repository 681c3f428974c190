import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from topology.fleet.checkpoint_interval import (
    best_interval,
    daly_interval,
    efficiency,
    young_interval,
)

MINUTE = 60.0


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_published_intervals(mtbf, minutes):
    """Daly 2006, figures 3 to 5: checkpoints take 5 minutes."""
    found = daly_interval(5 * MINUTE, mtbf * MINUTE) / MINUTE
    assert found == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


def test_young():
    assert young_interval(8.0, 100.0) == 40.0


@settings(max_examples=40, deadline=None)
@given(save=st.floats(0.1, 600), mtbf=st.floats(1000, 1e6), restore=st.floats(0, 1000))
def test_best_interval_has_the_greatest_efficiency(save, mtbf, restore):
    found = optimize.minimize_scalar(
        lambda work: -efficiency(work, save, restore, mtbf),
        bounds=(save / 100, 5 * mtbf),
        method="bounded",
        options={"xatol": 1e-9 * mtbf},
    )
    best = best_interval(save, mtbf)
    assert best == pytest.approx(found.x, rel=1e-2)
    assert efficiency(best, save, restore, mtbf) >= -found.fun * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(mtbf=st.floats(100, 1e6), part=st.floats(1e-6, 0.3))
def test_rules_are_near_the_best(mtbf, part):
    save = part * mtbf
    best = best_interval(save, mtbf)
    assert daly_interval(save, mtbf) == pytest.approx(best, rel=0.01)
    error = abs(young_interval(save, mtbf) - best)
    assert abs(daly_interval(save, mtbf) - best) <= error + 1e-9 * best
    # The bottom is flat: even Young's costs little.
    lost = efficiency(best, save, 0, mtbf) - efficiency(young_interval(save, mtbf), save, 0, mtbf)
    assert 0 <= lost + 1e-12 < 0.02


def test_daly_at_its_end():
    assert daly_interval(200.0, 100.0) == 100.0
    assert daly_interval(300.0, 100.0) == 100.0


@pytest.mark.parametrize(("work", "restore"), [(20.0, 3.0), (60.0, 30.0), (200.0, 0.0)])
def test_efficiency_is_that_of_a_job_with_failures(work, restore):
    save, mtbf, intervals = 4.0, 150.0, 20_000
    rng = np.random.default_rng(3)
    time, next_failure = 0.0, rng.exponential(mtbf)
    for _ in range(intervals):
        while time + work + save > next_failure:  # fails, and has to restore first
            time = next_failure
            next_failure = time + rng.exponential(mtbf)
            while time + restore > next_failure:
                time = next_failure
                next_failure = time + rng.exponential(mtbf)
            time += restore
        time += work + save
    assert intervals * work / time == pytest.approx(efficiency(work, save, restore, mtbf), rel=0.03)


def test_efficiency_where_nothing_is_ever_done():
    assert efficiency(1e6, 1.0, 0.0, 1.0) == 0.0
    assert math.isclose(efficiency(1.0, 1e-12, 0.0, 1e12), 1.0, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: young_interval(0, 10), "save 0: seconds, more than 0"),
        (lambda: daly_interval(1, -5), "mtbf -5: seconds, more than 0"),
        (lambda: best_interval(float("nan"), 5), "save nan"),
        (lambda: efficiency(0, 1, 1, 10), "work 0"),
        (lambda: efficiency(1, 1, -1, 10), "restore -1: seconds, 0 or more"),
    ],
)
def test_mistakes(call, line):
    with pytest.raises(ValueError, match=line):
        call()
