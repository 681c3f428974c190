import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import TPU_V3, TPU_V4, TPU_V5P
from topology.fleet.availability import (
    block_availability,
    first_fit_boxes,
    grid_boxes,
    most_boxes,
    ocs_goodput,
    sample_blocks,
    sample_goodput,
    static_goodput,
)

SMALL = replace(TPU_V4, name="8 blocks", num_blocks=8, block_grid=(2, 2, 2))


def boxes_by_hand(shape, grid, wraparound):
    """Sets of (x, y, z), found by walking from every corner in every turn."""
    found = set()
    for sides in itertools.permutations(shape):
        for corner in itertools.product(*map(range, grid)):
            cells = [
                tuple(c + o for c, o in zip(corner, offset, strict=True))
                for offset in itertools.product(*map(range, sides))
            ]
            if wraparound:
                cells = [tuple(c % g for c, g in zip(cell, grid, strict=True)) for cell in cells]
            inside = all(c < g for cell in cells for c, g in zip(cell, grid, strict=True))
            if inside and len(set(cells)) == math.prod(shape):
                found.add(frozenset(cells))
    return found


def most_disjoint(boxes):
    """By trying every box, or none, as the next one."""
    if not boxes:
        return 0
    first, *rest = boxes
    return max(most_disjoint(rest), 1 + most_disjoint([box for box in rest if not box & first]))


def blocks_up(word, grid):
    cells = itertools.product(*map(range, grid))
    return {cell for b, cell in enumerate(cells) if int(word) >> b & 1}


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("a", [0.5, 0.9, 0.97, 0.999])
def test_closed_forms_add_up_every_state_of_a_small_pod(shape, a):
    p, n = a**16, math.prod(shape)
    boxes = boxes_by_hand(shape, (2, 2, 2), False)
    with_switches = static = 0.0
    for word in range(2**8):
        up = blocks_up(word, (2, 2, 2))
        chance = p ** len(up) * (1 - p) ** (8 - len(up))
        with_switches += chance * (len(up) // n) * n / 8
        static += chance * most_disjoint([box for box in boxes if box <= up]) * n / 8
    assert ocs_goodput(a, n, SMALL) == pytest.approx(with_switches, rel=1e-9)
    assert static_goodput(a, shape, SMALL) == pytest.approx(static, rel=1e-9, abs=1e-12)


# Monte Carlo figures of a reference that does not say how many trials it took: its figures with
# switches, compared with the binomial, are off as those of a few hundred would be.
@pytest.mark.parametrize(
    ("a", "with_switches", "static"),
    [(0.990, 0.744, 0.190), (0.995, 0.751, 0.442), (0.999, 0.842, 0.811)],
)
def test_goodput_of_slices_of_1024_chips(a, with_switches, static):
    assert ocs_goodput(a, 16) == pytest.approx(with_switches, abs=0.004)
    assert static_goodput(a, (2, 2, 4)) == pytest.approx(static, abs=0.015)


@pytest.mark.parametrize("a", [0.990, 0.992, 0.995])
def test_published_goodput_of_large_slices(a):
    assert ocs_goodput(a, 32) == pytest.approx(0.50, abs=0.01)  # of 2048 chips
    assert ocs_goodput(a, 48) == pytest.approx(0.75, abs=0.01)  # of 3072 chips
    assert static_goodput(a, (2, 4, 4)) < 0.2
    assert static_goodput(a, (3, 4, 4)) < 0.1


def test_whole_pod_needs_every_host():
    for goodput in (ocs_goodput(0.999, 64), static_goodput(0.999, (4, 4, 4))):
        assert goodput == pytest.approx(0.999**1024)
    assert block_availability(0.99) == pytest.approx(0.99**16)


@settings(max_examples=8, deadline=None)
@given(
    a=st.floats(0.96, 0.9999),
    shape=st.sampled_from([(2, 2, 4), (1, 4, 4), (2, 3, 4), (2, 4, 4), (3, 3, 3)]),
    seed=st.integers(0, 2**32),
)
def test_monte_carlo_agrees_with_the_closed_forms(a, shape, seed):
    n, trials = math.prod(shape), 40_000
    for wired, exact in ((True, static_goodput(a, shape)), (False, ocs_goodput(a, n))):
        found = sample_goodput(a, shape, static=wired, trials=trials, seed=seed)
        assert found.exact
        assert abs(found.mean - exact) < 5 * found.error + 10 / trials


def test_monte_carlo_with_wraparound():
    a, shape = 0.99, (1, 4, 4)  # a plane is a plane, around the edge or not
    around = sample_goodput(a, shape, static=True, wraparound=True, trials=20_000)
    assert around == sample_goodput(a, shape, static=True, trials=20_000)
    more = sample_goodput(a, (2, 2, 4), static=True, wraparound=True, trials=20_000)
    assert more.mean > sample_goodput(a, (2, 2, 4), static=True, trials=20_000).mean + 0.03
    assert static_goodput(a, (2, 4, 4), wraparound=True) > static_goodput(a, (2, 4, 4))


def test_standard_error_is_that_of_repeated_runs():
    runs = [sample_goodput(0.99, (2, 2, 4), static=True, trials=2000, seed=s) for s in range(60)]
    spread = np.std([run.mean for run in runs], ddof=1)
    assert np.mean([run.error for run in runs]) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("p", [0.0, 1.0, 0.5, 0.25, 0.9, 0.0123, 0.8515])
def test_sampled_bits_are_independent_with_their_chance(p):
    trials = 40_000
    words = sample_blocks(p, trials, np.random.default_rng(1), 64)
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - p).max() <= 5 * math.sqrt(p * (1 - p) / trials)
    if 0 < p < 1:
        assert np.abs(np.corrcoef(bits.T) - np.eye(64)).max() < 5.5 / math.sqrt(trials)
        counts = bits.sum(axis=1)
        assert counts.var() == pytest.approx(64 * p * (1 - p), rel=0.05)
        assert abs(np.corrcoef(counts[1:], counts[:-1])[0, 1]) < 5 / math.sqrt(trials)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(2, 2, 4), (1, 4, 4), (2, 2, 2), (2, 3, 4)]),
    wraparound=st.booleans(),
    down=st.sets(st.integers(0, 63), min_size=4, max_size=20),
)
def test_boxes_are_packed_best(shape, wraparound, down):
    grid = (4, 4, 4)
    places = grid_boxes(shape, grid, wraparound)
    by_hand = boxes_by_hand(shape, grid, wraparound)
    assert {frozenset(blocks_up(place, grid)) for place in places} == by_hand
    word = sum(1 << b for b in range(64) if b not in down)
    up = blocks_up(word, grid)
    candidates = [box for box in by_hand if box <= up]
    first = first_fit_boxes(np.array([word], np.uint64), places)[0]
    if len(candidates) > 16:
        candidates = candidates[:16]  # keep the search by hand short: pack these alone
        places = [sum(1 << ((x * 4 + y) * 4 + z) for x, y, z in box) for box in candidates]
    levels, unions = [], set(places)
    while unions:
        levels.append(sorted(unions))
        unions = {u | place for u in unions for place in places if not u & place}
    most = most_boxes(np.array([word, 0, 2**64 - 1], np.uint64), levels)
    assert most[0] == most_disjoint(candidates)
    assert most[1] == 0
    assert most[2] == len(levels)
    assert bool(first) == bool(candidates)


def test_first_fit_is_a_lower_bound_and_says_so():
    small = sample_goodput(0.99, (1, 1, 2), static=True, trials=5000)
    assert not small.exact
    assert small.mean <= sample_goodput(0.99, (1, 1, 2), trials=5000).mean
    assert sample_goodput(0.99, (1, 1, 1), static=True, trials=5000).exact
    with pytest.raises(ValueError, match="sample_goodput"):
        static_goodput(0.99, (1, 2, 2))


def test_a_box_longer_than_the_grid_never_fits():
    assert static_goodput(0.999, (1, 1, 8)) == 0
    assert sample_goodput(0.999, (1, 1, 8), static=True, trials=1000).mean == 0
    assert ocs_goodput(0.999, 8) > 0.9


def test_switches_are_never_worse():
    for a, shape in itertools.product((0.97, 0.99, 0.999), ((2, 2, 2), (2, 2, 4), (3, 4, 4))):
        free = sample_goodput(a, shape, trials=4000)
        assert sample_goodput(a, shape, static=True, trials=4000).mean <= free.mean


def test_other_pods():
    assert 0.9 < ocs_goodput(0.999, 4, TPU_V5P) <= 1
    with pytest.raises(ValueError, match="140 blocks, at most 64"):
        sample_goodput(0.999, (1, 1, 1), pod=TPU_V5P)
    with pytest.raises(ValueError, match="not made of blocks"):
        ocs_goodput(0.999, 4, TPU_V3)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: ocs_goodput(1.2, 4), "host_availability 1.2: a part of the time"),
        (lambda: ocs_goodput(-0.1, 4), "host_availability -0.1"),
        (lambda: ocs_goodput(float("nan"), 4), "host_availability nan"),
        (lambda: ocs_goodput(0.9, 65), "slice_blocks 65: a whole number, 1 .. 64"),
        (lambda: static_goodput(0.9, (0, 4, 4)), "block_shape 0: a whole number, 1 or more"),
        (lambda: sample_goodput(0.9, (2, 2, 2), trials=1), "trials 1"),
    ],
)
def test_mistakes(call, line):
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)
