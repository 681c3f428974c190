import graphlib

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

from topology.routing.deadlock import dependencies
from topology.routing.throughput import all_to_all, closed_form, switch_links
from topology.routing.wild_first import candidate_paths, wild_first
from topology.torus.slices import Slice

CASES = [("4x4x4", 1), ("4x4x8", 2), ("4x4x8", 0), ("4x4x8_twisted", 0), ("4x8x8", 1)]


@pytest.mark.parametrize(("name", "d"), CASES)
def test_all_candidates_together_are_free_of_deadlock(name, d):
    slice = Slice.parse(name)
    sources, destinations, paths = candidate_paths(slice, d, 1, 2)
    sorter = graphlib.TopologicalSorter()
    for here, there in dependencies([paths]).tolist():
        sorter.add(here, there)
    sorter.prepare()  # raises on a cycle
    assert paths.max() < 2 * 6 * slice.num_chips
    pairs = np.unique(sources * slice.num_chips + destinations)
    assert len(pairs) == slice.num_chips * (slice.num_chips - 1)


@pytest.mark.parametrize(("name", "d"), CASES)
def test_paths_are_wild_first_and_avoid_the_failure(name, d):
    slice = Slice.parse(name)
    failed = set(switch_links(slice, d, 1, 2).tolist())
    order = [d] + [e for e in range(3) if e != d]
    sources, destinations, paths = candidate_paths(slice, d, 1, 2)
    picked = np.random.default_rng(0).choice(len(paths), 3000, replace=False)
    by_order = {}
    for source, destination, path in zip(
        sources[picked], destinations[picked], paths[picked], strict=True
    ):
        here, ranks = source, []
        for buffer in path[path >= 0]:
            link = buffer % (6 * slice.num_chips)
            assert link not in failed
            assert link // 6 == here
            here = slice.neighbours[here, link % 6]
            ranks.append(order.index(link % 6 // 2))
        assert here == destination
        # Some number of first hops, one per dimension at most, and the rest in order.
        wild = next(w for w in range(3) if ranks[w:] == sorted(ranks[w:]))
        assert ranks[:wild] == sorted(set(ranks[:wild]))
        by_order[wild] = by_order.get(wild, 0) + 1
    assert set(by_order) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "d", "least"),
    [("4x4x4", 1, 31 / 32), ("4x4x8", 2, 15 / 16), ("4x4x8", 0, 1), ("4x8x8", 1, 15 / 16)],
)
def test_wild_first_keeps_the_optimum_of_regular_slices(name, d, least):
    slice = Slice.parse(name)
    result = wild_first(slice, d, 1, 2)
    optimum = all_to_all(slice, switch_links(slice, d, 1, 2))
    assert result.lower_bound <= result.max_link_load
    assert result.max_link_load >= optimum.lower_bound
    assert closed_form(slice) / result.max_link_load == pytest.approx(least, rel=1e-4)


def test_wild_first_on_a_twisted_slice():
    slice = Slice.parse("4x4x8_twisted")
    result = wild_first(slice, 0, 1, 2)
    kept = closed_form(slice) / result.max_link_load
    optimum = all_to_all(slice, switch_links(slice, 0, 1, 2)).max_link_load
    assert 0.922 < kept <= closed_form(slice) / optimum
    assert kept > 0.99
    # Every pair of the sources listed is served whole.
    pairs, where = np.unique(
        result.sources * slice.num_chips + result.destinations, return_inverse=True
    )
    np.testing.assert_allclose(np.bincount(where, result.shares), 1, rtol=1e-6)
    assert len(pairs) == len(np.unique(result.sources)) * (slice.num_chips - 1)


def test_best_mixture_of_all_candidates_by_a_plain_program():
    # Every path its own variable, every pair its own row, no symmetry.
    slice = Slice.parse("4x4x4")
    sources, destinations, paths = candidate_paths(slice, 2, 0, 3)
    _, pairs = np.unique(sources * 64 + destinations, return_inverse=True)
    hops = (paths >= 0).sum(axis=1)
    fewest = np.full(64 * 63, 99)
    np.minimum.at(fewest, pairs, hops)
    near = hops <= fewest[pairs] + 2  # longer ones cost more than they help
    paths, pairs = paths[near], pairs[near]
    K = len(paths)
    path, hop = np.nonzero(paths >= 0)
    loads = csr_array((np.ones(len(path)), (paths[path, hop] % 384, path)), (384, K))
    each = csr_array((np.ones(K), (pairs, np.arange(K))), (64 * 63, K))
    solved = linprog(
        np.append(np.zeros(K), 1),
        A_ub=hstack([loads, csr_array(-np.ones((384, 1)))]).tocsr(),
        b_ub=np.zeros(384),
        A_eq=hstack([each, csr_array((64 * 63, 1))]).tocsr(),
        b_eq=np.ones(64 * 63),
        method="highs-ipm",
    )
    assert wild_first(slice, 2, 0, 3).max_link_load == pytest.approx(solved.fun, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("2x2x2", "has no optical link"), ("4x4x12_twist:0,0,4/0,0,4/0,0,0", "two virtual channels")],
)
def test_errors(name, message):
    with pytest.raises(ValueError, match=message):
        wild_first(Slice.parse(name), 0, 0, 0)
