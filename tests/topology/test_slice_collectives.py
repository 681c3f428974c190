import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from topology import Slice
from topology.collectives import (
    KINDS,
    Network,
    broadcast_rounds,
    collective_cost,
    lower_bounds,
)
from topology.collectives.groups import Groups, groups_of_axes, vectors_between

IDEAL = Network(bandwidth=45e9, hop_latency=0.0)
MiB = 2.0**20


def whole(name):
    slice = Slice.parse(name)
    return Groups(slice, np.arange(slice.num_chips)[None])


def over(name, shape, axes):
    slice = Slice.parse(name)
    return groups_of_axes(slice, np.arange(slice.num_chips).reshape(shape), axes)


@pytest.mark.parametrize("name", ["4x4x4", "4x4x8", "4x8x8", "8x8x8", "4x4x16", "4x12x8"])
@pytest.mark.parametrize("dimensions", [(0,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_tori_reach_the_textbook_time_of_rings_over_several_axes(name, dimensions):
    # V (N - 1) / N / (2 B axes) and half the sizes' sum in hops.
    groups = over(name, Slice.parse(name).shape, dimensions)
    cost = collective_cost("all_gather", groups)
    n = groups.size
    assert cost.load == pytest.approx((n - 1) / n / (2 * len(dimensions)), rel=1e-12)
    assert cost.hops == sum(groups.slice.shape[d] // 2 for d in dimensions)
    assert collective_cost("reduce_scatter", groups) == cost
    assert collective_cost("all_reduce", groups).load == 2 * cost.load


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_line_takes_what_one_link_carries(n):
    groups = over("4x4x8_wrap:", (4, 4, 8 // n, n), [3])
    cost = collective_cost("all_gather", groups)
    assert (cost.hops, cost.load) == (n - 1, (n - 1) / n)


def test_a_strided_ring_shares_its_links():
    cost = collective_cost("all_gather", over("4x4x8", (4, 4, 4, 2), [2]))
    assert (cost.hops, cost.load) == (4, 2 * 3 / 4 / 2)


@pytest.mark.parametrize("name", ["4x4x4", "4x4x8", "8x8x8", "4x4x8_twisted", "4x8x8_twisted"])
def test_all_reduce_of_64_mib_takes_half_a_millisecond_on_every_torus(name):
    groups = whole(name)
    seconds = collective_cost("all_reduce", groups).seconds(64 * MiB, IDEAL)
    n = groups.size
    assert seconds == pytest.approx(2 * (n - 1) / n * 64 * MiB / 6 / 45e9)
    assert 488e-6 < seconds < 498e-6


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("4x4x8", 128),
        ("4x8x8", 256),
        ("8x8x8", 512),
        ("4x4x8_twisted", 220 / 3),
        ("4x8x8_twisted", 184),
    ],
)
def test_all_to_all_reaches_the_optimum(name, load):
    cost = collective_cost("all_to_all", whole(name))
    assert cost.load * Slice.parse(name).num_chips == pytest.approx(load, rel=1e-5)


def test_all_to_all_of_64_mib_on_8x8x8():
    seconds = collective_cost("all_to_all", whole("8x8x8")).seconds(64 * MiB, IDEAL)
    assert seconds == pytest.approx(1491e-6, rel=1e-3)


@pytest.mark.parametrize("name", ["4x4x8", "4x4x8_twisted", "4x4x4_wrap:z"])
def test_permute_to_the_next_chip_is_bytes_over_bandwidth(name):
    slice = Slice.parse(name)
    groups = over(name, (*slice.shape[:2], slice.shape[2]), [2])
    cost = collective_cost("permute", groups)
    assert (cost.hops, cost.load) == (1, 1.0)


def test_permute_counts_shared_links():
    groups = over("4x4x8", (4, 4, 8), [2])
    to = (np.arange(8) + 3) % 8  # all go three hops the same way round
    cost = collective_cost("permute", groups, to=to)
    assert (cost.hops, cost.load) == (3, 3.0)
    cost = collective_cost("permute", groups, to=(np.arange(8) + 4) % 8)  # both ways round
    assert (cost.hops, cost.load) == (4, 2.0)


def rounds_by_linear_program(groups):
    """The least largest part of a receiver's moves, each round, from distances alone."""
    slice, members = groups.slice, list(groups.members[0])
    moves = [tuple(m) for m in groups.moves]
    chips = {tuple(slice.coordinates[c]): i for i, c in enumerate(members)}

    def go(i, move, sign=1):
        to = slice.reduce(slice.coordinates[members[i]] + sign * np.array(move))
        return chips.get(tuple(to))

    n = len(members)
    away = np.full((n, n), n)
    for i in range(n):
        away[i, i], front = 0, [i]
        while front:
            found = []
            for j, move in itertools.product(front, moves):
                k = go(j, move)
                if k is not None and away[i, k] == n:
                    away[i, k] = away[i, j] + 1
                    found.append(k)
            front = found
    worst = np.zeros(away.max() + 1)
    for q, t in itertools.product(range(n), range(1, away.max() + 1)):
        origins = np.flatnonzero(away[:, q] == t)
        ways = [(o, m) for o in range(len(origins)) for m, move in enumerate(moves)
                if (j := go(q, move, -1)) is not None and away[origins[o], j] == t - 1]  # fmt: skip
        if not ways:
            continue
        each = np.zeros((len(origins), len(ways) + 1))
        limits = np.zeros((len(moves), len(ways) + 1))
        for w, (o, m) in enumerate(ways):
            each[o, w], limits[m, w] = 1, groups.sharing[m]
        limits[:, -1] = -1
        cost = np.append(np.zeros(len(ways)), 1)
        least = linprog(cost, limits, np.zeros(len(moves)), each, np.ones(len(origins)))
        worst[t] = max(worst[t], least.fun)
    return worst[1:]


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("4x4x4", (4, 4, 4), [0, 2]),
        ("4x4x4_wrap:z", (4, 4, 4), [1, 2]),
        ("4x4x8_twisted", (4, 4, 8), [0, 1]),
        ("4x4x8_twisted", (4, 4, 4, 2), [0, 2]),
        ("2x4x4", (2, 4, 4), [0, 1, 2]),
        ("4x4x8", (4, 4, 2, 2, 2), [0, 2, 4]),
    ],
)
def test_rounds_are_the_best_split_of_each_round(name, shape, axes):
    groups = over(name, shape, axes)
    mine = [float(r.load) for r in broadcast_rounds(groups)]
    np.testing.assert_allclose(mine, rounds_by_linear_program(groups), rtol=1e-9)


SLICES = ["2x2x1", "2x4x4", "4x4x4", "4x4x8", "4x4x8_twisted", "4x4x4_wrap:x", "4x4x8_wrap:"]


@st.composite
def cases(draw):
    """Groups over some axes of a mesh whose axes are factors of a slice's dimensions."""
    slice = Slice.parse(draw(st.sampled_from(SLICES)))
    shape = []
    for k in slice.shape:
        inner = draw(st.sampled_from([f for f in (1, 2, 4) if k % f == 0]))
        shape += [k // inner, inner]
    axes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    return groups_of_axes(slice, np.arange(slice.num_chips).reshape(shape), sorted(axes))


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from(KINDS), st.sampled_from([1.0, 1e5, 1e8]))
def test_no_time_is_below_a_bound(groups, kind, size):
    network = Network()
    seconds = collective_cost(kind, groups).seconds(size, network, "StrategyND")
    bounds = lower_bounds(kind, groups, size, network)
    assert seconds >= max(bounds.values()) * (1 - 1e-6)


@pytest.mark.parametrize("name", ["4x4x8", "4x4x8_twisted", "4x8x8_twisted"])
@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "all_to_all"])
def test_whole_tori_meet_their_bounds(name, kind):
    groups = whole(name)
    seconds = collective_cost(kind, groups).seconds(1e9, IDEAL)
    assert seconds == pytest.approx(max(lower_bounds(kind, groups, 1e9, IDEAL).values()), rel=1e-5)
    latency = Network(bandwidth=1e30)
    hops = groups.slice.diameter
    times = 2 if kind == "all_reduce" else 1
    assert collective_cost(kind, groups).hops == times * hops
    assert lower_bounds(kind, groups, 1.0, latency)["latency"] == pytest.approx(hops * 1e-6)


def test_bounds_by_hand():
    groups = over("4x4x8", (4, 4, 8), [2])
    gather = lower_bounds("all_gather", groups, 1.0, Network(bandwidth=1.0, hop_latency=0.0))
    assert gather["chip"] == pytest.approx(7 / 8 / 6)
    assert gather["projection"] == pytest.approx(7 / 16)  # 7 of 8 through two links along z
    assert gather["cut"] == pytest.approx(7 / 16)  # seven shards into one plane over two links
    reduce = lower_bounds("all_reduce", groups, 1.0, Network(bandwidth=1.0, hop_latency=0.0))
    assert reduce["projection"] == pytest.approx(7 / 8)
    assert reduce["cut"] == pytest.approx(1 / 2)


def test_efficiencies_are_fitted():
    cost = collective_cost("all_gather", whole("4x4x4"))
    real = Network(efficiencies={"StrategyND": 0.8, "breadth_first": 1.0})
    sizes = [1e6, 1e7, 1e8]
    measured = [("StrategyND", cost, s, cost.seconds(s, real, "StrategyND")) for s in sizes]
    fitted = Network().fitted(measured)
    assert fitted.efficiencies["StrategyND"] == pytest.approx(0.8)
    assert fitted.efficiencies["breadth_first"] == 1.0
    with pytest.raises(ValueError, match="6 hops alone take"):
        Network().fitted([("StrategyND", cost, 1.0, 1e-6)])


def test_shortest_vectors_are_shortest():
    for name in [
        "4x4x8_twisted",
        "4x8x8_twisted",
        "4x4x12_twist:0,0,4/0,0,4/0,0,0",
        "4x4x8_wrap:y",
    ]:
        slice = Slice.parse(name)
        chips = np.arange(slice.num_chips)
        vectors = vectors_between(slice, np.full_like(chips, 5), chips)
        assert (slice.index(slice.reduce(slice.coordinates[5] + vectors)) == chips).all()
        np.testing.assert_array_equal(np.abs(vectors).sum(axis=1), slice.hop_distances(5))


def test_mistakes_are_named():
    slice = Slice.parse("4x4x4")
    with pytest.raises(ValueError, match=r"every chip 0 \.\. 63 belongs to one group"):
        Groups(slice, np.arange(32).reshape(2, 16))
    with pytest.raises(ValueError, match="group 1 is no translation of group 0"):
        Groups(slice, np.array([0, 1, 2, 4, 3, *range(5, 64)]).reshape(16, 4))
    with pytest.raises(ValueError, match="collective 'gather': one of all_gather"):
        collective_cost("gather", whole("4x4x4"))
    with pytest.raises(ValueError, match="bandwidth 0: a number, more than 0"):
        Network(bandwidth=0)
    with pytest.raises(ValueError, match="strategy 'fast': one of "):
        collective_cost("all_gather", whole("4x4x4")).seconds(1, Network(), "fast")
