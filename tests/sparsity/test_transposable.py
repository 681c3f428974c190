"""Masks that are N:M along two axes, held against all patterns and against a linear program."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.optimize import linprog

from sparsity.masks.transposable import transposable_mask
from sparsity.post_training.one_shot import magnitude_mask

COLLECTIVES = re.compile(r"\b(all-|collective-|reduce-scatter)")


def block_patterns():
    """The 0/1 matrices of 4 x 4 with two ones in every row and column."""
    matrices = (np.array(bits).reshape(4, 4) for bits in itertools.product((0, 1), repeat=16))
    return np.array([a for a in matrices if (a.sum(0) == 2).all() and (a.sum(1) == 2).all()])


def test_transposable_mask_has_the_best_sum_of_the_90_patterns():
    patterns = block_patterns()
    assert len(patterns) == 90
    scores = np.random.default_rng(4).integers(-1000, 1000, (3, 12, 5, 8)).astype(np.float32)
    mask = np.asarray(transposable_mask(scores, axes=(1, 3)))

    def blocks(x):
        return x.reshape(3, 3, 4, 5, 2, 4).transpose(0, 1, 3, 4, 2, 5)

    kept = blocks(mask)
    assert (kept.sum(-1) == 2).all()
    assert (kept.sum(-2) == 2).all()
    sums = np.einsum("...ij,pij->...p", blocks(scores), patterns)
    np.testing.assert_array_equal((blocks(scores) * kept).sum((-1, -2)), sums.max(-1))


def test_transposable_mask_finds_every_pattern():
    patterns = block_patterns()
    mask = transposable_mask(jnp.asarray(patterns.astype(np.float32)))
    np.testing.assert_array_equal(mask, patterns.astype(bool))


def test_transposable_mask_avoids_nan_and_takes_infinity():
    scores = np.zeros((4, 4), np.float32)
    scores[0, :2], scores[2, 3], scores[1, 1] = np.nan, np.inf, -np.inf
    mask = transposable_mask(scores)
    assert mask[0].tolist() == [False, False, True, True]
    assert mask[2, 3]
    assert not mask[1, 1]
    # Against all patterns: the fewest NaN, then the fewest -inf, the most +inf, the greatest sum.
    rng, patterns = np.random.default_rng(6), block_patterns()
    blocks = rng.normal(size=(200, 4, 4)).astype(np.float32)
    blocks *= np.float32(10.0) ** rng.integers(-40, 39, (200, 1, 1))
    for value in (np.nan, np.inf, -np.inf):
        blocks[rng.random(blocks.shape) < rng.random((200, 1, 1)) * 0.6] = value
    kept = np.asarray(transposable_mask(blocks))
    for block, mask in zip(blocks, kept, strict=True):
        finite = np.where(np.isfinite(block), block, 0).astype(np.float64)

        def merit(p, block=block, finite=finite):
            count = lambda of: int((of(block) & (p == 1)).sum())
            return -count(np.isnan), -count(np.isneginf), count(np.isposinf), (finite * p).sum()

        *found, total = merit(mask)
        *best, greatest = max(merit(p) for p in patterns)
        assert found == best
        np.testing.assert_allclose(total, greatest, rtol=1e-5, atol=1e-5 * np.abs(finite).max())
    with pytest.raises(ValueError, match=r"10 entries .* groups of 4"):
        transposable_mask(jnp.zeros((8, 10)))
    with pytest.raises(ValueError, match="one axis"):
        transposable_mask(jnp.zeros((8, 8)), axes=(0, -2))


def greatest_sum(scores, n):
    """Of all N:M masks of a block, by linear programming: its corners are the masks."""
    m = len(scores)
    lines = np.zeros((2 * m, m * m))
    for i in range(m):
        lines[i, i * m : (i + 1) * m] = lines[m + i, i::m] = 1
    found = linprog(-scores.ravel(), A_eq=lines, b_eq=np.full(2 * m, n), bounds=(0, 1))
    return -found.fun


def in_blocks(x, m):
    rows, columns = x.shape
    return x.reshape(rows // m, m, columns // m, m).transpose(0, 2, 1, 3).reshape(-1, m, m)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (4, 8), (3, 16)])
def test_other_patterns_are_close_to_the_best(n, m):
    rng = np.random.default_rng(m)
    scores = np.abs(rng.standard_t(3, (3 * m, 4 * m))).astype(np.float32)
    mask = np.asarray(transposable_mask(scores, n, m))
    blocks = in_blocks(mask, m)
    assert (blocks.sum(-1) == n).all()
    assert (blocks.sum(-2) == n).all()
    best = sum(greatest_sum(block, n) for block in in_blocks(scores, m))
    assert 0.99 * best <= (scores * mask).sum() <= best * (1 + 1e-6)
    # Scores may be negative, and what is added to all of them changes nothing.
    moved = np.asarray(transposable_mask(scores - 8, n, m))
    assert ((scores - 8) * moved).sum() == pytest.approx(((scores - 8) * mask).sum(), rel=1e-3)


def test_the_only_good_pattern_is_found():
    rng = np.random.default_rng(1)
    wanted = np.stack([sum(np.roll(np.eye(8), k, 1) for k in (0, 3, 5))] * 6)  # 3:8 both ways
    for block in wanted:
        rng.shuffle(block)  # rows
    mask = transposable_mask(wanted.astype(np.float32) * 7 - 20, 3, 8)
    np.testing.assert_array_equal(mask, wanted == 1)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf, 3e38])
def test_blocks_of_one_value_or_none_that_is_finite(value):
    scores = np.full((16, 8), value, np.float32)
    blocks = in_blocks(np.asarray(transposable_mask(scores, 3, 8)), 8)
    assert (blocks.sum(-1) == 3).all()
    assert (blocks.sum(-2) == 3).all()
    scores = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    scores[np.arange(8), np.arange(8)] = value
    mask = np.asarray(transposable_mask(scores, 3, 8))
    if not value < np.inf:  # NaN too
        assert mask.diagonal().all() == (value == np.inf)


def test_one_shot_pruning_takes_them():
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(16, 24)).astype(np.float32))
    mask = magnitude_mask(kernel, "2:8", transposable=True)
    np.testing.assert_array_equal(mask, transposable_mask(jnp.abs(kernel), 2, 8))
    with pytest.raises(ValueError, match="only N:M is kept along both axes"):
        magnitude_mask(kernel, "0.5", transposable=True)
    with pytest.raises(ValueError, match=r"^24 entries .* groups of 16"):
        magnitude_mask(kernel, "2:16", transposable=True)


def test_what_is_no_pattern():
    for n, m, says in ((0, 4, "0:4 keeps"), (5, 4, "5:4 keeps"), (2, 0, "M=0"), (1.5, 4, "N=1.5")):
        with pytest.raises(ValueError, match=says):
            transposable_mask(jnp.zeros((8, 8)), n, m)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8)])
def test_sharded_blocks_need_no_collective_of_scores(n, m):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    scores = np.random.default_rng(5).normal(size=(2, 64, 96)).astype(np.float32)
    mask = jax.jit(lambda scores: transposable_mask(scores, n, m))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, sharding)
        compiled = mask.lower(sharded).compile()
        result = compiled(sharded)
    assert result.sharding.is_equivalent_to(sharding, 3)
    sent = [line for line in compiled.as_text().splitlines() if COLLECTIVES.search(line)]
    # How long some block goes on with swaps, one bool, is all that devices tell each other.
    assert all("pred[]" in line for line in sent), sent
    assert bool(sent) == (m != 4)
    np.testing.assert_array_equal(result, mask(scores))
