"""The prefetching thread: order, how far ahead, errors, waiting, and its end."""

import threading
import time

import pytest

from pjit_train.data.prefetch import Prefetcher


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_values_come_in_order_from_the_start_on():
    with Prefetcher(lambda step: step * step, 3) as values:
        assert [next(values) for _ in range(4)] == [9, 16, 25, 36]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_it_runs_exactly_depth_values_ahead(depth):
    made = []
    with Prefetcher(made.append, 0, depth=depth) as values:
        assert until(lambda: len(made) == depth)
        time.sleep(0.05)
        assert made == list(range(depth))
        next(values)
        assert until(lambda: len(made) == depth + 1)
        time.sleep(0.05)
        assert made == list(range(depth + 1))


def test_an_error_is_raised_in_its_place():
    def make(step):
        if step == 2:
            raise KeyError("step two")
        return step

    values = Prefetcher(make, 0, depth=4)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(KeyError, match="step two"):
        next(values)
    assert list(values) == []


def test_close_ends_a_thread_that_is_far_ahead():
    before = threading.active_count()
    values = Prefetcher(lambda step: step, 0)
    next(values)
    assert threading.active_count() == before + 1
    values.close()
    values.close()
    assert threading.active_count() == before
    assert list(values) == []


def test_waiting_is_counted_once_and_only_where_the_maker_is_slow():
    with Prefetcher(lambda step: time.sleep(0.1), 0, depth=1) as values:
        next(values)
        next(values)
        assert 0.1 < values.wait_seconds < 1.0
        assert values.wait_seconds == 0.0

    made = []
    with Prefetcher(made.append, 0, depth=2) as values:
        for step in range(5):
            assert until(lambda: len(made) == step + 2)  # noqa: B023
            next(values)
        assert values.wait_seconds < 0.05
