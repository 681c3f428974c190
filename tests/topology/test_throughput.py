import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import lil_array

from topology.routing.throughput import (
    all_to_all,
    all_to_all_kept,
    both_ways,
    bytes_per_second_per_chip,
    closed_form,
    is_cut,
    switch_links,
)
from topology.torus.slices import DIRECTIONS, Slice


def flow_program(neighbours, demands, classes):
    """The edge-flow linear program, as it stands in a textbook: flow of each source on each link.

    classes: [N, 6]; the load of a class is the mean over its links.
    """
    N = len(neighbours)
    links = [(c, k) for c in range(N) for k in range(6) if neighbours[c, k] >= 0]
    L, S = len(links), len(demands)
    names = sorted({classes[link] for link in links})
    sizes = [sum(classes[link] == name for link in links) for name in names]
    balance, right = lil_array((S * N, S * L + 1)), np.zeros(S * N)
    load = lil_array((len(names), S * L + 1))
    for s, row in enumerate(demands):
        for e, (c, k) in enumerate(links):
            balance[s * N + neighbours[c, k], s * L + e] += 1
            balance[s * N + c, s * L + e] -= 1
            name = names.index(classes[c, k])
            load[name, s * L + e] = 1 / sizes[name]
        right[s * N : s * N + N] = row
        right[s * N + s] = -(row.sum() - row[s])
    load[:, [S * L]] = -np.ones((len(names), 1))
    cost = np.zeros(S * L + 1)
    cost[-1] = 1
    solved = linprog(
        cost,
        A_ub=load.tocsr(),
        b_ub=np.zeros(len(names)),
        A_eq=balance.tocsr(),
        b_eq=right,
    )
    assert solved.status == 0
    return solved.fun


def every_link(N):
    return np.arange(6 * N).reshape(N, 6)


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("4x4x8", 128),
        ("4x4x8_twisted", 220 / 3),
        ("8x4x4_twisted", 220 / 3),
        ("4x8x8", 256),
        ("4x8x8_twisted", 184),
        ("8x8x8", 512),
    ],
)
def test_table_of_optima(name, load):
    flow = all_to_all(Slice.parse(name))
    assert flow.is_exact
    assert flow.max_link_load == pytest.approx(load, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["4x4x4", "4x4x8_twisted", "4x4x12_twist:0,0,4/0,0,4/0,0,0", "4x8x8_twist:0,4,0/0,0,4"]
)
def test_one_source_of_a_torus_by_edge_flows(name):
    slice = Slice.parse(name + "/0,0,0" * (name.count("/") == 1))
    N = slice.num_chips
    # Flow of one source; the load of a direction is N times its mean over the direction's links.
    mean = flow_program(slice.neighbours, np.ones((1, N)), np.tile(np.arange(6), (N, 1)))
    assert all_to_all(slice).max_link_load == pytest.approx(N * mean, rel=1e-6)


@pytest.mark.parametrize("name", ["2x2x1", "2x2x2", "2x4x1"])
def test_all_sources_of_a_mesh_by_edge_flows(name):
    slice = Slice.parse(name)
    N = slice.num_chips
    exact = flow_program(slice.neighbours, np.ones((N, N)), every_link(N))
    assert all_to_all(slice).max_link_load == pytest.approx(exact, rel=1e-6)


@given(st.lists(st.integers(0, 47), min_size=1, max_size=3, unique=True))
@settings(max_examples=8, deadline=None)
def test_failed_links_of_a_mesh_by_edge_flows(failed):
    slice = Slice.parse("2x2x2")
    failed = [link for link in failed if slice.neighbours.ravel()[link] >= 0]
    neighbours = slice.neighbours.copy()
    neighbours.ravel()[failed] = -1
    if (neighbours >= 0).any(axis=1).all() and set(neighbours.ravel()) >= set(range(8)):
        exact = flow_program(neighbours, np.ones((8, 8)), every_link(8))
        assert all_to_all(slice, failed).max_link_load == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("2x4x4", "2x2x4", "4x4x4_wrap:", "4x4x4_wrap:y", "4x4x8_wrap:z", "4x4x12", "4x12x8"),
        *("16x16x16", "4x4x8_twisted", "8x16x8_twisted", "12x12x24_twisted", "8x4x8_twisted"),
        "16x8x16_twisted",
    ],
)
def test_closed_forms(name):
    slice = Slice.parse(name)
    assert closed_form(slice) == pytest.approx(all_to_all(slice).max_link_load, rel=1e-6)


def test_limits_of_the_twisted_gain():
    gains = {
        shape: closed_form(Slice(shape=shape)) / all_to_all(Slice.parse(name)).max_link_load
        for shape, name in [((8, 8, 16), "8x8x16_twisted"), ((8, 16, 16), "8x16x16_twisted")]
    }
    # 12/7 and 48/35 from above, the distance to them shrinking as 1/n^2 from that of n = 4.
    assert 12 / 7 < gains[8, 8, 16] < 12 / 7 + 0.3 * (128 * 3 / 220 - 12 / 7)
    assert 48 / 35 < gains[8, 16, 16] < 48 / 35 + 0.3 * (256 / 184 - 48 / 35)


def test_a_twist_has_no_formula_unless_it_ships():
    assert closed_form(Slice.parse("4x4x12_twist:0,0,4/0,0,4/0,0,0")) is None


def images(slice, failed):
    """All symmetries that keep the failed links, as (chips [N], directions [6]), by trying all."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            P = np.zeros((3, 3), int)
            P[range(3), order] = signs
            for to in slice.coordinates:
                chips = slice.index(slice.reduce(slice.coordinates @ P.T + to))
                turn = [DIRECTIONS.tolist().index((P @ v).tolist()) for v in DIRECTIONS]
                if (slice.neighbours[chips][:, turn] != chips[slice.neighbours]).any():
                    continue
                if {6 * chips[link // 6] + turn[link % 6] for link in failed} == set(failed):
                    found.append((chips, np.array(turn)))
    return found


@pytest.mark.parametrize(
    ("name", "d", "kept"),
    [("4x4x8", 2, 15 / 16), ("4x4x8", 0, 1), ("4x4x8_twisted", 0, 0.99394), ("4x4x4", 1, 31 / 32)],
)
def test_a_failed_switch_with_routing_and_prices(name, d, kept):
    slice = Slice.parse(name)
    failed = switch_links(slice, d, 1, 2)
    flow = all_to_all(slice, failed)
    assert closed_form(slice) / flow.max_link_load == pytest.approx(kept, abs=1e-5)

    # The bound: distances at the prices, found another way.
    N = slice.num_chips
    assert flow.prices.min() >= 0
    assert flow.prices.sum() == pytest.approx(1)
    apart = np.full((N, N), np.inf)
    alive = np.setdiff1d(np.arange(6 * N), failed)
    apart[alive // 6, slice.neighbours.ravel()[alive]] = flow.prices.ravel()[alive]
    np.fill_diagonal(apart, 0)
    for via in range(N):  # Floyd and Warshall
        apart = np.minimum(apart, apart[:, [via]] + apart[[via]])
    assert apart.sum() == pytest.approx(flow.lower_bound, rel=1e-9)
    assert flow.is_exact

    # The routing: each source's flow, and its images under all symmetries; then the detours.
    group = images(slice, failed.tolist())
    loads, sent, back = np.zeros((N, 6)), np.zeros(N), np.arange(6) ^ 1
    for source, used in zip(flow.sources, flow.flows, strict=True):
        assert (used >= 0).all()
        into = used[slice.neighbours, back].sum(axis=1)
        kept = into - used.sum(axis=1)
        np.testing.assert_allclose(np.delete(kept, source), 1, rtol=1e-9)
        fixed = sum(chips[source] == source for chips, _ in group)
        for chips, turn in group:
            loads[chips[:, None], turn] += used / fixed
            sent[chips[source]] += 1 / fixed
    np.testing.assert_allclose(sent, 1, rtol=1e-9)
    for link, ways in flow.detours.items():
        same = [(chips, turn, chips[link // 6] * 6 + turn[link % 6]) for chips, turn in group]
        for path, amount in ways:
            assert path[0] // 6 == link // 6
            ends = [slice.neighbours.ravel()[hop] for hop in (*path, link)]
            assert [hop // 6 for hop in path[1:]] == ends[: len(path) - 1]
            assert ends[-1] == ends[-2]
            for chips, turn, image in same:
                each = amount / sum(other == image for *_, other in same)
                loads.ravel()[image] -= each
                for hop in path:
                    loads[chips[hop // 6], turn[hop % 6]] += each
    assert (loads.ravel()[failed] == 0).all()
    assert loads.min() >= -1e-9 * loads.max()
    np.testing.assert_allclose(loads, flow.loads, atol=1e-6 * loads.max())
    assert loads.max() == pytest.approx(flow.max_link_load, rel=1e-9)


def test_kept_under_one_failed_switch():
    published = {"4x8x8": (15 / 16, 1), "4x8x8_twisted": (0.9935, 0.9945)}
    for name, (least, most) in published.items():
        slice = Slice.parse(name)
        kept = [all_to_all_kept(slice, switch_links(slice, d, 0, 3)) for d in range(3)]
        assert least - 1e-5 <= min(kept) <= max(kept) <= most + 1e-5


def test_every_switch_of_a_dimension_costs_the_same():
    slice = Slice.parse("4x4x8_twisted")
    loads = {
        (d, i, j): all_to_all(slice, switch_links(slice, d, i, j)).max_link_load
        for d, i, j in [(0, 0, 0), (0, 2, 1), (2, 3, 3), (2, 0, 1)]
    }
    np.testing.assert_allclose(list(loads.values()), loads[0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize(("name", "d", "kept"), [("4x4x8", 2, 31 / 32), ("4x4x8", 0, 1)])
def test_a_failed_link(name, d, kept):
    # 31 of the 32 links of the cut in two halves are left; the other dimensions have room.
    slice = Slice.parse(name)
    both = both_ways(slice, 6 * 37 + 2 * d)
    assert all_to_all_kept(slice, both) == pytest.approx(kept, rel=1e-5)


def test_bounds_hold_when_stopped_early():
    slice = Slice.parse("4x4x8_twisted")
    failed = both_ways(slice, 6 * 37)
    early, late = (all_to_all(slice, failed, max_rounds=rounds) for rounds in (3, 200))
    assert early.lower_bound <= late.lower_bound * (1 + 1e-6)
    assert early.max_link_load > late.max_link_load
    assert late.is_exact


def test_switch_links_are_the_optical_ones():
    slice = Slice.parse("4x8x8_twisted")
    for d in range(3):
        links = [switch_links(slice, d, i, j) for i in range(4) for j in range(4)]
        assert all(len(some) == 2 * slice.num_blocks for some in links)
        links = np.concatenate(links)
        assert len(np.unique(links)) == len(links)  # no link passes two switches
        leaving = slice.coordinates[links // 6] + DIRECTIONS[links % 6]
        assert ((leaving // 4 != slice.coordinates[links // 6] // 4).sum(axis=1) == 1).all()
        back = [both_ways(slice, link)[1] for link in links]
        assert set(back) == set(links.tolist())


def test_bytes_per_second():
    slice = Slice.parse("8x8x8")
    # 64 MiB a chip at 45 GB/s takes 1491 us: a unit is 64 MiB / 512.
    rate = bytes_per_second_per_chip(slice, all_to_all(slice).max_link_load, 45e9)
    assert 64 * 2**20 * 511 / 512 / rate == pytest.approx(1491e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: switch_links(s, 3, 0, 0), "switch: dimension 3: a whole number, 0 .. 2"),
        (lambda s: switch_links(s, 0, 4, 0), "switch: i 4: a whole number, 0 .. 3"),
        (lambda s: all_to_all(s, [6 * s.num_chips]), "failed link 384: a whole number, 0 .. 383"),
        (lambda s: all_to_all(Slice.parse("2x2x2"), [0, 1]), "which is 6 * chip + direction"),
        (lambda s: both_ways(s, -1), "link -1"),
        (lambda s: all_to_all(s, range(6)), "a destination cannot be reached"),
        (lambda s: switch_links(Slice.parse("2x2x2"), 0, 0, 0), "has no optical link"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(Slice.parse("4x4x4"))
    assert "\n" not in str(error.value)


def test_two_failed_links_without_symmetry_are_exact_in_seconds():
    """A pair for which 36 rounds over the ways of every source took minutes."""
    slice = Slice.parse("4x8x8")
    failed = np.concatenate([both_ways(slice, 6 * slice.index(c) + d) for c, d in PAIR])
    rounds = []
    flow = all_to_all(slice, failed, progress=lambda *both: rounds.append(both))
    assert flow.is_exact
    assert flow.max_link_load == pytest.approx(260.063492, rel=1e-6)  # as by the slow way
    assert len(rounds) < 30
    for low, high in rounds:
        assert low <= flow.max_link_load * (1 + 1e-6)
        assert high >= flow.lower_bound * (1 - 1e-6)


PAIR = [((3, 4, 4), 0), ((2, 5, 2), 2)]


def test_a_time_limit_leaves_a_close_interval():
    slice = Slice.parse("4x4x8_twisted")
    failed = np.concatenate([both_ways(slice, link) for link in (6 * 3, 6 * 40 + 2, 6 * 77 + 4)])
    flow = all_to_all(slice, failed, time_limit=0.0)
    assert flow.max_link_load * 0.9 < flow.lower_bound < flow.max_link_load


def test_cut_in_two_keeps_nothing():
    slice = Slice.parse("4x4x8")
    links = np.concatenate([switch_links(slice, 2, i, j) for i in range(4) for j in range(4)])
    assert not is_cut(slice, np.setdiff1d(links, both_ways(slice, links[0])))
    assert is_cut(slice, links)
    assert all_to_all_kept(slice, links) == 0
    # One way only is cut as well: a chip that cannot send.
    assert is_cut(slice, range(6))
