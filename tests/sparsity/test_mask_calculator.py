import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity.mask_calculator import get_topk_fn
from sparsity.sparsity_types import Block, Channel, NByM, Unstructured


def best(scores, keep):
    """The `keep` largest of a flat list, of equal ones the first."""
    mask = np.zeros(len(scores), np.uint8)
    mask[np.argsort(-np.asarray(scores), kind="stable")[:keep]] = 1
    return mask


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("sparsity_type", [Unstructured, Unstructured()])
def test_unstructured(sparsity_type, jitted):
    topk = get_topk_fn(sparsity_type)
    topk = jax.jit(topk) if jitted else topk
    scores = np.random.default_rng(0).integers(0, 6, (4, 10)).astype(np.float32)
    for sparsity, keep in [(0, 40), (0.5, 20), (0.8, 8), (1.0, 1)]:
        mask = topk(scores, sparsity)
        assert mask.dtype == jnp.uint8
        np.testing.assert_array_equal(mask, best(scores.ravel(), keep).reshape(4, 10))


@pytest.mark.parametrize("jitted", [False, True])
def test_n_by_m_falls_with_the_sparsity(jitted):
    topk = get_topk_fn(NByM(2, 8, axis=0))
    topk = jax.jit(topk) if jitted else topk
    scores = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    kept_at = {0: 8, 0.1: 8, 0.125: 7, 0.3: 6, 0.375: 5, 0.6: 4, 0.74: 3, 0.75: 2, 0.9: 2, 1: 2}
    for sparsity, n in kept_at.items():
        mask = np.asarray(topk(scores, sparsity))
        groups, kept = scores.reshape(2, 8, 3), mask.reshape(2, 8, 3)
        for g in range(2):
            for c in range(3):
                np.testing.assert_array_equal(kept[g, :, c], best(groups[g, :, c], n))


def test_every_density_of_n_by_m_is_met_exactly():
    """In float32, 1 - k / m is not exact: no group may keep one too many."""
    scores = np.arange(100, dtype=np.float32)
    topk = jax.jit(get_topk_fn(NByM(1, 100)))
    for k in range(1, 101):
        assert topk(scores, 1 - k / 100).sum() == k


def test_n_by_m_keeps_the_last_of_equal_scores():
    """As JaxPruner does; its default axis is the last."""
    mask = get_topk_fn(NByM(2, 4))(jnp.ones((2, 4)), 0.5)
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert mask.dtype == jnp.uint8


def test_n_by_m_mistakes():
    with pytest.raises(ValueError, match="4:2 keeps 4 of every 2"):
        get_topk_fn(NByM(4, 2))(jnp.ones(8), 0.5)
    with pytest.raises(ValueError, match=r"10 entries .* groups of 4"):
        get_topk_fn(NByM(2, 4))(jnp.ones((4, 10)), 0.5)


def pooled(scores, height, width, pool):
    """Scores of the blocks of the first two axes, and each entry's block, by loops."""
    rows, columns = scores.shape[:2]
    corners = [(r, c) for r in range(0, rows, height) for c in range(0, columns, width)]
    return corners, [pool(scores[r : r + height, c : c + width]) for r, c in corners]


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (5, 6, 4)])
@pytest.mark.parametrize("average", [True, False])
def test_blocks_of_the_first_two_axes(shape, average):
    """Ragged edges too: their blocks are averaged over the entries that they have."""
    scores = np.random.default_rng(2).uniform(1, 2, shape).astype(np.float32)
    corners, values = pooled(scores, 2, 3, np.mean if average else np.max)
    expected = np.zeros(shape, np.uint8)
    for (r, c), kept in zip(corners, best(values, round(len(values) * 0.4)), strict=True):
        expected[r : r + 2, c : c + 3] = kept
    topk = functools.partial(get_topk_fn(Block((2, 3), average)), sparsity=0.6)
    np.testing.assert_array_equal(jax.jit(topk)(scores), expected)


def test_blocks_of_one_axis():
    mask = get_topk_fn(Block((1, 3)))([0, 9, 0, 1, 1, 1, 2, 2.5], sparsity=0.4)
    assert mask.tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="height and width are 1 or more"):
        get_topk_fn(Block((0, 3)))(jnp.ones(8), 0.5)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_by_their_sums(axis):
    scores = np.random.default_rng(3).normal(size=(4, 6, 5)).astype(np.float32)
    sums = np.moveaxis(scores, axis, 0).reshape(scores.shape[axis], -1).sum(1)
    keep = round(len(sums) * 0.5)
    expected = np.moveaxis(np.zeros_like(scores), axis, 0)
    expected[best(sums, keep).astype(bool)] = 1
    mask = get_topk_fn(Channel(axis))(scores, 0.5)
    np.testing.assert_array_equal(mask, np.moveaxis(expected, 0, axis))


def test_no_type():
    with pytest.raises(ValueError, match=r"'2:4' is no type of sparsity; use Unstructured\(\)"):
        get_topk_fn("2:4")
