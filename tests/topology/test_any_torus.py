"""Tori of one's own: any sides, wraps and twists, and links of different bandwidths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path

from topology import Network, Part, Slice, any_torus, replay, schedule
from topology.collectives import collective_cost, lower_bounds
from topology.collectives.degraded import degraded_cost
from topology.collectives.groups import Groups, groups_of_axes
from topology.fabric import losses
from topology.routing.loads import least_load, link_loads
from topology.routing.open_loop import measure
from topology.routing.routing import dimension_order
from topology.routing.throughput import all_to_all, bisection_is_least

ANY = any_torus()
IDEAL = Network(bandwidth=1.0, hop_latency=0.0)
few = settings(max_examples=40, deadline=None)
small_shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(
    lambda sides: 1 < math.prod(sides) <= 24
)


def whole(slice):
    return Groups(slice, np.arange(slice.num_chips)[None])


def graph_distances(slice):
    """int [N, N], by breadth-first search over pairs of chips that a rule of their own joins."""
    N = slice.num_chips
    joined = np.zeros((N, N))
    for a, b in itertools.product(range(N), repeat=2):
        apart = slice.coordinates[a] - slice.coordinates[b]
        for d, (k, wraps) in enumerate(zip(slice.shape, slice.wrap, strict=True)):
            rest = np.delete(apart, d)
            step = abs(apart[d])
            if not rest.any() and (step == 1 or (wraps and k > 1 and step == k - 1)):
                joined[a, b] = 1
    return shortest_path(csr_array(joined), unweighted=True)


@few
@given(small_shapes, st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_box_of_any_sides_is_the_graph_that_it_says(sides, wraps):
    shape = (*sides, *(1,) * (3 - len(sides)))
    wrap = tuple(w and k > 1 for w, k in zip(wraps, shape, strict=True))
    slice = Slice(shape=tuple(sides), wrap=wrap, pod=ANY)
    away = graph_distances(slice)
    for chip in (0, slice.num_chips - 1):
        np.testing.assert_array_equal(slice.hop_distances(chip), away[chip])
    N = slice.num_chips
    assert slice.diameter == away.max()
    assert slice.mean_distance == pytest.approx(away.sum() / (N * (N - 1)))
    assert Slice.parse(str(slice), ANY) == slice


def test_names_and_default_wraps():
    assert Slice.parse("7", ANY).wrap == (True, False, False)
    assert Slice.parse("2x3", ANY).wrap == (False, True, False)
    assert str(Slice.parse("5x7", ANY)) == "5x7x1"
    assert str(Slice.parse("5x7x1_wrap:y", ANY)) == "5x7x1_wrap:y"
    double = Slice.parse("2_wrap:x", ANY)  # two links between the same two chips
    assert double.num_links == 2
    assert list(double.neighbours[0, :2]) == [1, 1]


@few
@given(small_shapes)
def test_the_bisection_is_that_of_brute_force(sides):
    assume(math.prod(sides) <= 12)
    slice = Slice(shape=tuple(sides), pod=ANY)
    N = slice.num_chips
    ends = [(a, int(b)) for a in range(N) for b in slice.neighbours[a] if b >= 0]
    least = min(
        sum(1 for a, b in ends if a in half and b not in half)
        for half in map(set, itertools.combinations(range(N), N // 2))
    )
    assert slice.bisection_links == least
    lower = all_to_all(slice).lower_bound
    assert not bisection_is_least(slice, lower) or slice.bisection_links == least


@pytest.mark.parametrize("n", [3, 4, 5, 8, 9])
def test_a_ring_by_closed_forms(n):
    """Shards go both ways; of an even ring the last one goes half each way."""
    slice = Slice.parse(f"{n}", ANY)
    cost = collective_cost("all_gather", whole(slice))
    assert (cost.hops, cost.load) == (n // 2, pytest.approx((n - 1) / n / 2))
    # All-to-all: the sum of the distances of a chip, over its two links.
    assert all_to_all(slice).max_link_load == pytest.approx(
        sum(min(i, n - i) for i in range(n)) / 2
    )


def test_a_twist_of_any_shift_is_a_cayley_graph():
    """6 x 9, a step past the end of x shifts y by 3: distances by brute force over the lattice."""
    slice = Slice.parse("6x9_twist:0,3,0/0,0,0/0,0,0", ANY)
    assert slice.is_torus
    assert slice.is_twisted
    for x, y, _ in slice.coordinates:
        ways = [
            abs(x + 6 * a) + abs(y - 3 * a + 9 * b)
            for a, b in itertools.product(range(-3, 4), repeat=2)
        ]
        assert slice.hop_distances()[slice.index([x, y, 0])] == min(ways)
    even = np.ones((54, 54)) - np.eye(54)
    flow = least_load(slice, even, tolerance=1e-3)
    assert all_to_all(slice).max_link_load == pytest.approx(flow.max_link_load, rel=2e-3)


rates = st.sampled_from([1.0, 2.0, 3.0, 0.5])


@few
@given(small_shapes, st.tuples(rates, rates, rates),
       st.sampled_from(["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute"]),
       st.integers(1, 7))  # fmt: skip
def test_with_links_of_other_bandwidths_costs_are_those_of_a_replay_and_above_bounds(
    sides, bandwidths, kind, axes
):
    slice = Slice(shape=tuple(sides), pod=any_torus([1e9 * b for b in bandwidths]))
    over = [d for d in range(3) if axes >> d & 1]
    groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), over)
    cost = collective_cost(kind, groups)
    network = Network.of(slice.pod)
    free = Network(bandwidth=network.bandwidth, hop_latency=0.0)
    played = replay(schedule(kind, groups), 6e6, free)
    assert played.correct
    assert played.seconds == pytest.approx(cost.seconds(6e6, free), rel=0.05)
    bounds = lower_bounds(kind, groups, 6e6, free)
    assert max(bounds.values()) <= cost.seconds(6e6, free) * (1 + 1e-9)
    # A chip's links by hand, of an all-gather over all chips of a torus.
    if kind == "all_gather" and groups.size == slice.num_chips and slice.is_torus:
        n = groups.size
        into = 2e9 * sum(b for b, wraps in zip(bandwidths, slice.wrap, strict=True) if wraps)
        assert bounds["chip"] == pytest.approx(6e6 * (n - 1) / n / into)


def test_links_twice_as_fast_in_one_dimension_by_hand():
    """8 x 8: of uniform traffic, N k / 8 units on a link of either dimension."""
    slow, fast = (Slice.parse("8x8", any_torus(b)) for b in (50e9, (100e9, 50e9, 50e9)))
    even = np.ones((64, 64))
    loads = link_loads(fast, dimension_order(fast), even) / fast.link_rates
    assert loads[:, 0].max() == 64
    assert loads[:, 2].max() == 64 * 2  # in parts of the rate of the fastest
    cost = {s: collective_cost("all_gather", whole(s)) for s in (slow, fast)}
    times = {s: c.load * 1e6 / Network.of(s.pod).bandwidth for s, c in cost.items()}
    assert times[slow] == pytest.approx(63 / 64 * 1e6 / (4 * 50e9))
    assert times[fast] >= 63 / 64 * 1e6 / (2 * 100e9 + 2 * 50e9)
    assert times[fast] < times[slow]


def test_detours_around_a_failed_link_know_the_bandwidths():
    slice = Slice.parse("4x4", any_torus((100e9, 25e9, 25e9)))
    groups = whole(slice)
    links = losses.lost(slice, [Part.parse("link:0,0,0,+x", slice.pod)])[1]
    around = degraded_cost("all_gather", groups, links.tolist())
    bounds = lower_bounds("all_gather", groups, 1.0, IDEAL, failed_links=links.tolist())
    healthy = collective_cost("all_gather", groups)
    assert max(bounds.values()) <= around.load * (1 + 1e-9)
    assert around.load > healthy.load
    # One fast link less into a chip: 1 + 2 / 4 of the rate of a fast link is left.
    assert bounds["chip"] == pytest.approx(15 / 16 / 1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: any_torus((1e9, 2e9)), "link_bandwidth: 2; one for all links, or of x, y and z"),
        (lambda: any_torus(0.0), "link_bandwidth 0.0: bytes a second, more than 0"),
        (lambda: Slice.parse("3x1_wrap:y", ANY), "one chip along y does not wrap around"),
        (lambda: Slice.parse("300x300x2", ANY), "at most 65536 chips"),
        (lambda: Slice.parse("8", Slice.parse("4x4x4").pod), "'8': not a slice"),
        (lambda: Slice.parse("4x4_twist:0,1,0/0,0,0/0,0,0_wrap:x", ANY), "wraps around in all its"),
        (lambda: Slice.parse("4x4_twist:0,1,0/1,0,0/0,0,0", ANY), "shift each other in a circle"),
        (lambda: all_to_all(Slice.parse("4x4", any_torus((1e9, 2e9, 1e9)))), "links alike"),
        (
            lambda: least_load(Slice.parse("2x2", any_torus((1e9, 2e9, 1e9))), np.ones((4, 4))),
            "links alike",
        ),
        (
            lambda: measure(
                Slice.parse("3x3", any_torus((1e9, 2e9, 1e9))),
                dimension_order(Slice.parse("3x3", ANY)),
                np.ones((9, 9)) / 9,
                0.1,
            ),
            "a packet takes a cycle on every link",
        ),
        (lambda: Slice.parse("5x5", ANY).num_blocks, "is not made of blocks"),
        (lambda: Part.parse("ocs:x,0,0", ANY), "neither blocks nor optical switches"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
