"""Summaries of masks and parameters, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity import summarize_intersection, summarize_sparsity
from sparsity.utils import map_entries

TREE = {"a": jnp.array([[1.0, 0], [0, 0]]), "b": {"bias": None, "kernel": jnp.array([2.0, 0])}}


@pytest.mark.parametrize("wrapped", [False, True])
def test_sparsity(wrapped):
    summary = (jax.jit(summarize_sparsity) if wrapped else summarize_sparsity)(TREE)
    assert summary == {
        "a": 0.75,
        "b/bias": None,
        "b/kernel": 0.5,
        "_total_sparsity": np.float32(4 / 6),
        "_nparams_nnz": 2,
        "_nparams": 6,
    }
    assert set(summarize_sparsity(TREE, only_total_sparsity=True)) == {
        "_total_sparsity",
        "_nparams_nnz",
        "_nparams",
    }


def test_sparsity_of_a_list_of_one_array_and_of_nothing():
    assert summarize_sparsity([jnp.zeros(2), jnp.ones(2)])["0"] == 1
    assert summarize_sparsity(jnp.array([0, 1, 1, 1]))["_total_sparsity"] == 0.25
    assert summarize_sparsity({"a": None})["_total_sparsity"] == 0


def test_intersection():
    first = {"a": jnp.array([1, 1, 1, 0]), "b": {"x": None, "y": jnp.array([0, 0])}}
    second = {"a": jnp.array([1, 0, 0, 1]), "b": {"x": None, "y": jnp.array([1, 1])}}
    assert summarize_intersection(first, second) == {
        "a": np.float32(1 / 3),
        "b/x": None,
        "b/y": 0,
        "_total_intersection": np.float32(1 / 3),
    }
    assert set(summarize_intersection(first, second, True)) == {"_total_intersection"}


@pytest.mark.parametrize(
    ("masks", "line"),
    [
        ({"a": None}, "masks: nothing at 'b/kernel'"),
        ({"a": None, "b": {"kernel": None, "bias": None}}, "masks: an entry 'b/bias' too many"),
        ({"a": None, "b": [None]}, "masks: nothing at 'b/kernel'"),
    ],
)
def test_trees_that_differ(masks, line):
    params = {"a": jnp.zeros(2), "b": {"kernel": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=line) as error:
        map_entries(lambda *_: None, params, masks)
    assert "\n" not in str(error.value)
