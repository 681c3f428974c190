"""Reconstruction of pruned blocks: against least squares, and what it must leave as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from pjit_train.compression.calibrate import Walker, enter_all
from pjit_train.compression.reconstruct import Reconstruction
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from sparsity.post_training.one_shot import magnitude_mask

CONFIG = TransformerConfig(
    vocab_size=64, max_len=16, d_model=16, num_layers=1, num_heads=4, num_kv_heads=2, d_ff=24,
    init_std=0.3,
)  # fmt: skip
DOWN = "blocks/feed_forward/down/kernel"


@functools.cache
def place():
    """(graph of a block, its parameters, states of random text before it)."""
    model = CONFIG.build(jax.random.key(0), Rules())
    rng = np.random.default_rng(0)
    batches = [{"inputs": rng.integers(0, 64, size=(4, 16))} for _ in range(8)]
    stacked = nnx.to_pure_dict(nnx.split(model.blocks)[1])
    block = jax.tree.map(lambda x: np.array(x[0]), stacked)
    return nnx.graphdef(model.blocks), block, enter_all(model, batches)


def pruned(block, names):
    flat = {path: x.copy() for path, x in flatten_dict(block, sep="/").items()}
    for name in names:
        kernel = flat[name.removeprefix("blocks/")]
        inputs = 24 if name == DOWN else 16
        matrix = kernel.reshape(inputs, -1)
        matrix *= np.asarray(magnitude_mask(jnp.asarray(matrix), "2:4"))
    return unflatten_dict(flat, sep="/")


def test_one_kernel_comes_to_the_least_squares_of_its_kept_weights():
    graph, block, states = place()
    sparse = pruned(block, [DOWN])
    walker = Walker(graph, lambda x_TI: x_TI.T @ x_TI, jnp.add)
    H = np.asarray(walker.measure(0, block, states)["feed_forward/down"], np.float64)
    dense, start = (b["feed_forward"]["down"]["kernel"].astype(np.float64) for b in (block, sparse))
    best = np.zeros_like(dense)
    for j in range(dense.shape[1]):
        kept = np.flatnonzero(start[:, j])
        best[kept, j] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept] @ dense[:, j])

    def error(kernel):
        return np.sqrt(
            np.sum((dense - kernel) * (H @ (dense - kernel))) / np.sum(dense * (H @ dense))
        )

    fitted, errors = Reconstruction(graph, 60).fit(0, block, sparse, [DOWN], states)
    assert set(errors) == {"feed_forward"}
    before, after = errors["feed_forward"]
    assert before == pytest.approx(error(start), rel=1e-3)
    assert after == pytest.approx(error(fitted["feed_forward"]["down"]["kernel"]), rel=1e-3)
    assert error(best) < after < 1.02 * error(best) < before


def test_halves_get_better_and_all_else_stays():
    graph, block, states = place()
    names = [
        f"blocks/{name}/kernel"
        for name in ("attention/query", "attention/out", "feed_forward/up", "feed_forward/down")
    ]
    sparse = pruned(block, names)
    fitted, errors = Reconstruction(graph, 4).fit(0, block, sparse, names, states)
    again, _ = Reconstruction(graph, 4).fit(0, block, sparse, names, states)
    for before, after in errors.values():
        assert after < 0.95 * before
    new, old, same = (flatten_dict(tree, sep="/") for tree in (fitted, sparse, again))
    for name, x in new.items():
        np.testing.assert_array_equal(x, same[name])
        if f"blocks/{name}" in names:
            np.testing.assert_array_equal(x == 0, old[name] == 0)
            assert (x != old[name]).any()
        else:
            np.testing.assert_array_equal(x, old[name])


def test_what_cannot_get_better_is_left():
    graph, block, states = place()
    fitted, errors = Reconstruction(graph, 2).fit(0, block, block, [DOWN], states)
    assert errors["feed_forward"] == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, fitted, block)
