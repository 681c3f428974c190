import graphlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.routing.deadlock import (
    buffers,
    dependencies,
    end_datelines,
    find_cycle,
    is_deadlock_free,
    routing_buffers,
    virtual_channels,
)
from topology.routing.routing import best_single_path, dimension_order, routes
from topology.torus.slices import Slice

NO_DATELINES = ((frozenset(), frozenset()),) * 3


def has_cycle(waits):
    sorter = graphlib.TopologicalSorter()
    for here, there in np.asarray(waits).tolist():
        sorter.add(here, there)
    try:
        sorter.prepare()
    except graphlib.CycleError:
        return True
    return False


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_find_cycle_on_any_graph(waits):
    cycle = find_cycle(np.array(waits, int).reshape(-1, 2))
    assert (cycle is not None) == has_cycle(np.array(waits, int).reshape(-1, 2))
    if cycle is not None:
        assert set(zip(cycle, cycle[1:] + cycle[:1], strict=True)) <= set(waits)
        assert len(set(cycle)) == len(cycle)


TORI = ["4x4x4", "4x4x8", "8x4x4_twisted", "4x4x8_twisted", "4x8x8_twisted"]


@pytest.mark.parametrize("name", [*TORI, "2x4x4", "4x4x4_wrap:y"])
def test_dimension_order_has_no_cycle_with_two_channels(name):
    slice = Slice.parse(name)
    routing = dimension_order(slice, order=(2, 0, 1))
    waits = dependencies(routing_buffers(slice, routing))
    assert not has_cycle(waits)
    assert is_deadlock_free(slice, routing)
    assert waits.max() < 2 * 6 * slice.num_chips


@pytest.mark.parametrize("name", TORI)
def test_without_datelines_there_is_a_cycle_and_it_is_one(name):
    slice = Slice.parse(name)
    waits = dependencies(routing_buffers(slice, dimension_order(slice), NO_DATELINES))
    cycle = find_cycle(waits)
    assert has_cycle(waits)
    pairs = set(map(tuple, waits.tolist()))
    assert all(pair in pairs for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True))
    # A ring: each link starts where the one before ends, all in one direction.
    ends = slice.neighbours.ravel()[cycle]
    np.testing.assert_array_equal(ends, np.roll(np.array(cycle) // 6, -1))
    assert len({link % 6 for link in cycle}) == 1


def test_a_planted_cycle_is_found():
    # Round a square of a mesh: two of its four turns are those of dimension order, x before y; two
    # packets that turn from y to x close the circle.
    slice = Slice.parse("4x4x4_wrap:")
    corners = [slice.index(at) for at in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]]
    right, up, left, down = (6 * c + k for c, k in zip(corners, (0, 2, 1, 3), strict=True))
    paths = list(routing_buffers(slice, dimension_order(slice)))
    assert find_cycle(dependencies(paths)) is None
    assert find_cycle(dependencies([*paths, np.array([[up, left, -1]])])) is None
    cycle = find_cycle(dependencies([*paths, np.array([[up, left, -1], [down, right, -1]])]))
    turned = cycle[cycle.index(right) :] + cycle[: cycle.index(right)]
    assert turned == [right, up, left, down]


def test_paths_past_two_ends_need_a_third_channel():
    slice = Slice.parse("4x4x12_twist:0,0,4/0,0,4/0,0,0")
    routing = dimension_order(slice)
    waits = dependencies(routing_buffers(slice, routing))
    assert not has_cycle(waits)
    assert waits.max() // (6 * slice.num_chips) == 2


def test_virtual_channels_count_ends_passed():
    slice = Slice.parse("4x4x8_twisted")
    routing, _ = best_single_path(slice)
    paths = routes(slice, routing, 0, [5, 90])
    channels = virtual_channels(slice, paths)
    rows = paths.reshape(-1, paths.shape[-1]), channels.reshape(-1, paths.shape[-1])
    for path, channel in zip(*rows, strict=True):
        passed = [0, 0, 0]
        for link, virtual in zip(path, channel, strict=True):
            if link >= 0:
                d, place = link % 6 // 2, slice.coordinates[link // 6, link % 6 // 2]
                passed[d] += place == (0 if link % 2 else slice.shape[d] - 1)
                assert virtual == passed[d]


def test_buffers_mark_the_end_of_paths():
    slice = Slice.parse("4x4x4")
    links = np.array([[18, 0, -1, -1]])
    x_end = [6 * slice.index((3, 0, 0)), 0]  # +x past the end, and once more
    assert buffers(slice, [x_end]).tolist() == [[x_end[0] + 6 * 64, 6 * 64]]
    assert (buffers(slice, links)[0, 2:] == -1).all()
    assert end_datelines(slice)[0] == (frozenset([3]), frozenset([0]))
