import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity.masks.topk import global_topk_masks, keep_count, order_key, topk_mask

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, -1.0, 3.4e38]
FLOATS = st.sampled_from(SPECIAL) | st.floats(-4, 4, width=32)


def sorted_mask(scores, keep):
    """The first `keep` of a stable sort: numbers from the greatest, then NaN."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    mask = np.zeros(flat.shape, bool)
    mask[np.lexsort((-flat, np.isnan(flat)))[:keep]] = True
    return mask.reshape(np.shape(scores))


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, (4, 16), elements=FLOATS), st.integers(0, 70))
def test_any_floats_against_a_stable_sort(scores, keep):
    np.testing.assert_array_equal(topk_mask(scores, keep), sorted_mask(scores, keep))


@pytest.mark.parametrize("shape", [(), (7,), (64, 96), (5, 512, 3)])
def test_shapes_and_ties(shape):
    """Small integers: nearly every threshold has ties, of which the first are kept."""
    scores = np.random.default_rng(0).integers(-3, 3, shape).astype(np.float32)
    for keep in {0, 1, scores.size // 3, scores.size}:
        np.testing.assert_array_equal(topk_mask(scores, keep), sorted_mask(scores, keep))


def test_equal_scores_keep_the_first():
    assert topk_mask(jnp.zeros((2, 4)), 1 << 40).all()
    assert topk_mask(jnp.zeros((0, 4)), 5).shape == (0, 4)
    assert topk_mask(jnp.zeros((2, 4)), 5).astype(int).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("dtype", ["bfloat16", "uint32", "bool"])
def test_dtypes(dtype):
    scores = np.random.default_rng(1).normal(size=(16, 40)) * 2
    if dtype.endswith("32"):
        scores = (np.abs(scores) if dtype == "uint32" else scores) * 2.0**28
    scores = jnp.asarray(scores).astype(dtype)
    wide = scores if dtype.endswith("32") else scores.astype("float32")
    np.testing.assert_array_equal(topk_mask(scores, 100), sorted_mask(wide, 100))


def test_extreme_integers():
    limits = np.iinfo(np.int32)
    scores = np.array([limits.min, limits.max, 0, limits.min, limits.max, -1], np.int32)
    for keep in range(7):
        np.testing.assert_array_equal(topk_mask(scores, keep), sorted_mask(scores, keep))


def test_a_traced_count_does_not_retrace():
    scores = np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)
    traces = []

    @jax.jit
    def mask(scores, keep):
        traces.append(keep)
        return topk_mask(scores, keep)

    for keep in (1, 17, 128):
        np.testing.assert_array_equal(mask(scores, keep), sorted_mask(scores, keep))
    assert len(traces) == 1


def test_each_array_of_a_stack():
    scores = np.random.default_rng(3).integers(0, 9, (2, 3, 8, 16)).astype(np.float32)
    scores[1, 1] = 4
    masks = topk_mask(scores, 50, stacked=2)
    for a in range(2):
        for b in range(3):
            np.testing.assert_array_equal(masks[a, b], sorted_mask(scores[a, b], 50))
    assert topk_mask(scores, 1, stacked=4).all()
    with pytest.raises(ValueError, match="stacked=5 of 4 axes; use 0 to 4"):
        topk_mask(scores, 1, stacked=5)


@settings(max_examples=15, deadline=None)
@given(
    arrays.arrays(np.float32, (2, 8), elements=FLOATS),
    arrays.arrays(np.float32, (5,), elements=FLOATS),
    st.integers(0, 21),
)
def test_one_threshold_over_a_tree(first, second, keep):
    """As the mask of all leaves in a row; a None leaf stays None."""
    masks = global_topk_masks({"a": first, "b": None, "c": second}, keep)
    assert masks["b"] is None
    flat = np.concatenate([np.ravel(masks["a"]), masks["c"]])
    np.testing.assert_array_equal(flat, sorted_mask(np.concatenate([first.ravel(), second]), keep))


def test_a_tree_of_mixed_dtypes_or_of_nothing():
    scores = {"a": jnp.array([1, 3], jnp.bfloat16), "b": jnp.array([2.0, 0.0])}
    masks = global_topk_masks(scores, 2)
    assert masks["a"].tolist() == [False, True]
    assert masks["b"].tolist() == [True, False]
    assert global_topk_masks({"a": None}, 2) == {"a": None}


def test_too_many_scores():
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 15), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"2147483648 scores; fewer than 2\^31"):
        jax.eval_shape(lambda x: topk_mask(x, 1), huge)
    jax.eval_shape(lambda x: topk_mask(x, 1, stacked=1), huge)


@settings(max_examples=25, deadline=None)
@given(st.lists(FLOATS, min_size=2, max_size=2))
def test_keys_stand_in_the_order_of_the_scores(pair):
    low, high = order_key(np.array(pair, np.float32)).tolist()
    rank = [(-1, 0.0) if np.isnan(x) else (0, float(np.float32(x))) for x in pair]
    assert (low < high) == (rank[0] < rank[1])
    assert (low == high) == (rank[0] == rank[1])


def test_keep_count():
    assert keep_count(33_554_432, 0.9) == 3_355_443  # in float32: 3355444
    assert keep_count(10, 0.0) == 10
    assert keep_count(10, 1.0) == 1
    assert keep_count(10, 0.99) == 1
    assert keep_count(0, 0.5) == 1
    with pytest.raises(ValueError, match="fewer than 2"):
        keep_count(1 << 31, 0.5)
    with pytest.raises(ValueError, match=r"sparsity=1.5; use a number from 0 to 1"):
        keep_count(10, 1.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**31 - 1), st.floats(0, 1, width=32))
def test_a_traced_sparsity_keeps_the_count_to_1(size, sparsity):
    exact = size * (1 - Fraction(sparsity))
    kept = int(keep_count(size, jnp.float32(sparsity)))
    assert abs(kept - max(Fraction(1), exact)) <= 0.75  # 1/2 of rounding, 2^31 / 2^33 of s


@pytest.mark.parametrize(
    ("case", "shape", "axes", "kind"),
    [
        ("one", (3, 512, 96), ("fsdp", "tensor"), AxisType.Explicit),
        ("one", (3, 16, 5), (("fsdp", "tensor"), None), AxisType.Auto),  # two rows a shard
        ("stacked", (3, 64, 96), ("fsdp", "tensor"), AxisType.Auto),
        ("tree", (3, 64, 96), ("fsdp", "tensor"), AxisType.Explicit),
    ],
)
def test_a_sharded_mask_reduces_counts_only(case, shape, axes, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, P(None, *axes))
    scores = np.random.default_rng(4).integers(0, 50, shape).astype(np.float32)

    def mask(scores):
        match case:
            case "one":
                return topk_mask(scores, 100)
            case "stacked":
                return topk_mask(scores, 100, stacked=1)
        return global_topk_masks([scores, scores[0]], 100)[0]

    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, sharding)
        compiled = jax.jit(mask).lower(sharded).compile()
        result = compiled(sharded)
    found = re.findall(r" = (.*?) (all-\S+?|collective-\S+?|reduce-scatter)\(", compiled.as_text())
    assert found
    for shapes, name in found:
        assert name == "all-reduce"
        sizes = [
            np.prod([int(n) for n in d.split(",") if n]) for d in re.findall(r"\[(.*?)\]", shapes)
        ]
        assert max(sizes) <= 3  # a count for each array of the stack
    assert result.sharding.is_equivalent_to(sharding, 3)
    if case == "stacked":
        expected = np.stack([sorted_mask(part, 100) for part in scores])
    else:  # the tree's other leaf comes after the first, and so loses ties
        rows = [*scores, scores[0]] if case == "tree" else [*scores]
        expected = sorted_mask(np.stack(rows), 100)[:3]
    np.testing.assert_array_equal(result, expected)
