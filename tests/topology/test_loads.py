import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from topology.routing.loads import least_load, link_loads, lower_bounds
from topology.routing.routing import dimension_order, direction_loads, optimal_split, routes
from topology.routing.throughput import all_to_all
from topology.torus.slices import Slice


def walked(slice, routing, traffic):
    """Loads by sending every pair's traffic hop by hop."""
    N = slice.num_chips
    loads = np.zeros(6 * N)
    for way in range(len(routing.shares)):
        paths = routes(slice, routing, way, np.arange(N))
        for a in np.flatnonzero(traffic.any(axis=1)):
            for b in range(N):
                apart = slice.coordinates[b] - slice.coordinates[a]
                apart = slice.reduce(apart) if slice.is_torus else apart % slice.shape
                share = routing.shares[way, slice.index(apart)]
                for link in paths[a, b]:
                    if link >= 0:
                        loads[link] += share * traffic[a, b]
    return loads.reshape(N, 6)


@pytest.mark.parametrize("ties", ["split", "positive"])
@pytest.mark.parametrize("name", ["2x4x4", "4x4x4_wrap:xz", "4x4x4", "4x4x8_twisted"])
def test_link_loads_by_walking(name, ties):
    slice = Slice.parse(name)
    traffic = np.random.default_rng(1).random((slice.num_chips,) * 2)
    traffic[1::3] = traffic[2::3] = 0
    routing = dimension_order(slice, ties=ties, order=(1, 2, 0))
    np.testing.assert_allclose(
        link_loads(slice, routing, traffic), walked(slice, routing, traffic), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", ["4x8x8_twisted", "4x4x8"])
def test_uniform_traffic_loads_every_link_of_a_direction_alike(name):
    slice = Slice.parse(name)
    routing = optimal_split(slice)
    loads = link_loads(slice, routing, np.ones((slice.num_chips,) * 2))
    expected = np.broadcast_to(direction_loads(routing), loads.shape)
    np.testing.assert_allclose(loads, expected, rtol=1e-9)


def edge_flow_optimum(slice, traffic):
    """The multi-commodity linear program, dense."""
    N = slice.num_chips
    tail, direction = np.nonzero(slice.neighbours >= 0)
    head, L = slice.neighbours[tail, direction], len(tail)
    incidence = np.zeros((N, L))
    incidence[head, range(L)] += 1
    incidence[tail, range(L)] -= 1
    right = traffic.copy()
    np.fill_diagonal(right, 0)
    right[range(N), range(N)] = -right.sum(axis=1)
    solved = linprog(
        np.append(np.zeros(N * L), 1),
        A_ub=np.column_stack([np.tile(np.eye(L), N), -np.ones(L)]),
        b_ub=np.zeros(L),
        A_eq=np.column_stack([np.kron(np.eye(N), incidence), np.zeros(N * N)]),
        b_eq=right.ravel(),
    )
    return solved.fun


matrices = st.lists(st.integers(0, 9), min_size=64, max_size=64).map(
    lambda entries: np.reshape(entries, (8, 8)).astype(float)
)


@given(matrices)
@settings(max_examples=10, deadline=None)
def test_least_load_between_bounds_and_routing(traffic):
    slice = Slice.parse("2x2x2")
    exact = edge_flow_optimum(slice, traffic)
    flow = least_load(slice, traffic)
    assert flow.max_link_load == pytest.approx(exact, rel=1e-3)
    assert flow.lower_bound <= exact * (1 + 1e-9)
    routed = link_loads(slice, dimension_order(slice), traffic).max()
    assert max(lower_bounds(slice, traffic).values()) <= exact * (1 + 1e-9)
    assert exact <= routed * (1 + 1e-9)


def test_bounds_of_a_torus_hold():
    slice = Slice.parse("4x4x4")
    rng = np.random.default_rng(2)
    traffic = rng.random((64, 64)) * (rng.random((64, 64)) < 0.03)
    flow = least_load(slice, traffic, tolerance=0.03)
    bounds = lower_bounds(slice, traffic)
    assert set(bounds) == {"chip", "cut", "distance", "average"}
    assert bounds["distance"] <= bounds["average"] * (1 + 1e-6)
    assert max(bounds.values()) <= flow.max_link_load
    routed = link_loads(slice, optimal_split(slice), traffic).max()
    assert flow.max_link_load < routed


def test_bounds_that_are_reached():
    # Neighbours along +z only: each z-link carries its own pair and nothing else is better.
    slice = Slice.parse("4x4x8")
    shift = np.zeros((128, 128))
    shift[np.arange(128), slice.neighbours[:, 4]] = 6
    assert link_loads(slice, dimension_order(slice), shift).max() == 6
    bounds = lower_bounds(slice, shift)
    # A slab's 16 links +z carry 6 each out of it, and its 16 links -z lead out too, empty.
    assert bounds["cut"] == pytest.approx(3)
    assert bounds["chip"] == pytest.approx(1)
    assert bounds["distance"] == pytest.approx(1)
    # Half to each other half of a torus: the cut through its middle.
    halves = slice.coordinates[:, 2] // 4
    across = (halves[:, None] != halves).astype(float)
    assert lower_bounds(slice, across)["cut"] == pytest.approx(64 * 64 / 32)


@pytest.mark.parametrize("name", ["4x4x4", "4x4x8_twisted"])
def test_average_bound_of_uniform_traffic_is_the_optimum(name):
    slice = Slice.parse(name)
    bound = lower_bounds(slice, np.ones((slice.num_chips,) * 2))["average"]
    assert bound == pytest.approx(all_to_all(slice).max_link_load, rel=1e-6)


def test_no_traffic():
    slice = Slice.parse("2x2x2")
    assert least_load(slice, np.eye(8)).max_link_load == 0
    assert link_loads(slice, dimension_order(slice), np.eye(8)).max() == 0


@pytest.mark.parametrize("call", [lower_bounds, least_load])
@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        (np.ones((8, 7)), r"the matrix is \[8, 8\]"),
        (-np.ones((8, 8)), "finite and 0 or more"),
        (np.full((8, 8), np.nan), "finite and 0 or more"),
    ],
)
def test_errors(call, traffic, message):
    with pytest.raises(ValueError, match=message):
        call(Slice.parse("2x2x2"), traffic)
