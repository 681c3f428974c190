"""Schedules: formulas by hand and in plain Python."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import sparsity_schedules as schedules

TARGETS = {"a": 0.8, "b": {"bias": None, "kernel": 0.5}}


def test_no_updates():
    schedule = schedules.NoUpdateSchedule()
    assert schedule.get_sparsity_at_step(TARGETS, 3) == TARGETS
    assert not any(schedule.is_mask_update_iter(step) for step in range(20))


def test_one_shot():
    schedule = schedules.OneShotSchedule(target_step=7)
    assert [step for step in range(20) if schedule.is_mask_update_iter(step)] == [7]
    assert schedule.get_sparsity_at_step(TARGETS, 7) == TARGETS


@pytest.mark.parametrize(
    ("end", "expected"), [(21, [10, 15, 20]), (20, [10, 15, 20]), (None, [10, 15, 20, 25])]
)
def test_periodic(end, expected):
    schedule = schedules.PeriodicSchedule(5, 8, end)
    due = jax.jit(schedule.is_mask_update_iter)
    assert [step for step in range(29) if due(step)] == expected
    assert not schedule.is_mask_update_iter(None)


def test_polynomial_by_hand():
    # p = (step + 1 - 4) / 8: 1/8, 1/2, 1.
    schedule = schedules.PolynomialSchedule(1, 4, 12)
    for step, rise in [(0, 0), (3, 0), (4, 1 - (7 / 8) ** 3), (7, 7 / 8), (11, 1), (30, 1)]:
        sparsities = jax.jit(schedule.get_sparsity_at_step)(TARGETS, step)
        assert sparsities["a"] == pytest.approx(0.8 * rise, abs=1e-6)
        assert sparsities["b"]["kernel"] == pytest.approx(0.5 * rise, abs=1e-6)
        assert sparsities["b"]["bias"] is None


@settings(max_examples=25, deadline=None)
@given(
    start=st.integers(0, 20),
    length=st.integers(0, 30),
    every=st.integers(1, 9),
    power=st.integers(1, 4),
    step=st.integers(0, 60),
)
def test_polynomial_against_its_formula(start, length, every, power, step):
    end = start + length
    schedule = schedules.PolynomialSchedule(every, start, end, power)
    progress = min(max(step + 1 - start, 0), length) / length if length else 1
    expected = 0.9 * (1 - (1 - progress) ** power)
    assert float(schedule.get_sparsity_at_step(0.9, step)) == pytest.approx(expected, abs=1e-6)
    due = (step % every == 0 and start <= step <= end) or step == end
    assert bool(schedule.is_mask_update_iter(step)) == due


def test_the_target_is_reached_where_the_period_does_not_divide_the_end():
    schedule = schedules.PolynomialSchedule(7, 0, 20)
    last = max(step for step in range(40) if schedule.is_mask_update_iter(step))
    assert float(schedule.get_sparsity_at_step(0.8, last)) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: schedules.PeriodicSchedule(0, 0, 9), "update_freq=0; use a whole number from 1"),
        (lambda: schedules.PeriodicSchedule(1, 9, 3), "end_step=3 is before update_start_step=9"),
        (lambda: schedules.PolynomialSchedule(1, 0, None), "needs the step of its end"),
    ],
)
def test_errors(make, line):
    with pytest.raises(ValueError, match=line):
        make()
