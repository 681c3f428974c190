"""Fractions of a mask are those of its count."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjit_train.sparse_metrics import observe


@pytest.mark.parametrize("shape", [(3, 48, 144), (7, 11), (1, 1), (5, 96, 97)])
@pytest.mark.parametrize("pruned", [0, 0.5, 1])
def test_a_dense_phase_is_0_and_no_less(shape, pruned):
    size = int(np.prod(shape))
    count = int(pruned * size)
    kernel = np.float32(np.arange(size) >= count).reshape(shape)
    params = {"query": {"kernel": jnp.asarray(kernel)}}
    masks = lambda state, params: {"query": {"kernel": params["query"]["kernel"] > 0}}
    updater = types.SimpleNamespace(masks=masks)
    state = {"sparsity": None, "params": params, "optimizer": ()}
    find = lambda state: observe(updater, None, None, state)
    for figures in (find(state), jax.jit(find)(state)):
        assert float(figures["sparsity/query"]) == np.float32(count) / np.float32(size)
