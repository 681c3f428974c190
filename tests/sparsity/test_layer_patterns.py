"""Names of parameters, and the patterns over them."""

import re
from typing import NamedTuple

import jax
import numpy as np
import pytest

from sparsity.masks.layers import assign, names


class Pair(NamedTuple):
    first: np.ndarray
    second: np.ndarray


TREE = {
    "blocks": {
        "attention": {"query": {"kernel": np.zeros((2, 4)), "bias": np.zeros(4)}},
        "attention_norm": {"scale": np.zeros(4)},
        "feed_forward": {"up": {"kernel": np.zeros((4, 8))}},
    },
    "head": np.zeros((4, 4)),
}
DEFAULT = r"(attention|feed_forward)/.*kernel"


def test_names_join_keys_attributes_and_indices():
    tree = {"a": [np.zeros(1), Pair(np.zeros(1), np.zeros(1))], "b": {3: np.zeros(1)}}
    assert names(tree) == {"a": ["a/0", Pair("a/1/first", "a/1/second")], "b": {3: "b/3"}}


def test_leaves_that_match_nothing_are_left_out():
    assert assign(TREE, {DEFAULT: "2:4"}) == {
        "blocks": {
            "attention": {"query": {"kernel": "2:4", "bias": None}},
            "attention_norm": {"scale": None},
            "feed_forward": {"up": {"kernel": "2:4"}},
        },
        "head": None,
    }


@pytest.mark.parametrize("out", [None, "dense"])
def test_the_first_pattern_that_matches_counts(out):
    got = assign(TREE, {"query": out, DEFAULT: "2:4", "kernel|head": "1:8"})
    assert got["blocks"]["attention"]["query"]["kernel"] is None
    assert got["blocks"]["feed_forward"]["up"]["kernel"] == "2:4"
    assert got["head"] == "1:8"


def test_values_may_be_anything_and_params_shapes_only():
    shapes = jax.eval_shape(lambda: TREE)
    assert assign(shapes, {"^head$": (1, 2)})["head"] == (1, 2)


def test_a_pattern_that_matches_nothing_is_refused_in_a_line_with_near_names():
    with pytest.raises(ValueError, match="'heads' matches no parameter") as error:
        assign(TREE, {DEFAULT: "2:4", "heads": "2:4"})
    assert re.search(r"nearest names are .*\bhead\b", str(error.value))
    assert "\n" not in str(error.value)


def test_no_regular_expression():
    with pytest.raises(ValueError, match=r"'\(query' is no regular expression"):
        assign(TREE, {"(query": "2:4"})
