import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity.masks.nm import check_nm, nm_mask, nm_violations

COLLECTIVES = re.compile(r"\b(all-|collective-|reduce-scatter)")


def sorted_mask(scores, n, m, axis):
    """The first n of each group in a stable sort: numbers from the greatest, then NaN."""
    values = np.moveaxis(np.asarray(scores).astype(np.float64), axis, -1)
    groups = values.reshape(*values.shape[:-1], -1, m)
    order = np.lexsort((-groups, np.isnan(groups)), axis=-1)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[..., :n], True, axis=-1)
    return np.moveaxis(mask.reshape(values.shape), -1, axis)


def test_the_largest_of_each_group():
    scores = jnp.array([[1.0, 4.0, 3.0, 2.0, -1.0, -2.0, -3.0, -4.0]])
    assert nm_mask(scores, 2, 4).astype(int).tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    assert nm_mask(scores, 1, 8).astype(int).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    assert nm_mask(scores.T, 2, 4, axis=0)[:, 0].astype(int).tolist() == [0, 1, 1, 0, 1, 1, 0, 0]


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, -1.0, 3.4e38]


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays(
        np.float32, (3, 8, 2), elements=st.sampled_from(SPECIAL) | st.floats(-4, 4, width=32)
    ),
    st.integers(1, 4),
)
def test_any_floats_against_a_stable_sort(scores, n):
    np.testing.assert_array_equal(nm_mask(scores, n, 4, axis=1), sorted_mask(scores, n, 4, 1))


SIZES = {1: False, 8: True, 12: False, 32: True, 40: False, 72: False, 80: True}


@pytest.mark.parametrize(("m", "traced"), SIZES.items())
def test_group_sizes_against_a_stable_sort(m, traced):
    """Small integers: most groups have ties at the threshold."""
    n = -(-m // 3)
    scores = np.random.default_rng(m).integers(-9, 9, (2, 4 * m, 3)).astype(np.float32)
    mask = nm_mask(scores, jnp.int32(n) if traced else n, m, axis=1)
    np.testing.assert_array_equal(mask, sorted_mask(scores, n, m, 1))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "uint32", "int8", "bool"]
)
def test_dtypes(dtype):
    scores = np.random.default_rng(0).normal(size=(16, 24)) * 3
    if dtype == "uint32":  # beyond int32
        scores = np.abs(scores) * 2.0**29
    scores = jnp.asarray(scores).astype(dtype)
    expected = sorted_mask(
        np.asarray(scores.astype("uint32" if dtype == "uint32" else "float32")), 3, 8, 0
    )
    np.testing.assert_array_equal(nm_mask(scores, 3, 8, axis=0), expected)


@pytest.mark.parametrize("m", [16, 40])
def test_extreme_integers(m):
    """The ends of int32, which no float score reaches."""
    limits = np.iinfo(np.int32)
    scores = np.resize([limits.min, limits.max, 0, limits.min, -1], m).astype(np.int32)
    np.testing.assert_array_equal(nm_mask(scores, m // 2, m), sorted_mask(scores, m // 2, m, 0))


@pytest.mark.parametrize("m", [4, 8, 40, 80])
def test_a_traced_n_goes_from_none_to_all_without_retracing(m):
    scores = np.random.default_rng(1).integers(0, 5, (3, m)).astype(np.float32)
    scores[0, 0] = 9
    traces = []

    @jax.jit
    def mask(scores, n):
        traces.append(n)
        return nm_mask(scores, n, m)

    for n in (0, 1, m // 2, m):
        np.testing.assert_array_equal(mask(scores, jnp.int32(n)), sorted_mask(scores, n, m, 1))
    assert len(traces) == 1


@pytest.mark.parametrize("m", [8, 40])
def test_last_ties(m):
    scores = np.random.default_rng(2).integers(0, 3, (4, m)).astype(np.float32)
    expected = sorted_mask(scores[:, ::-1], 3, m, 1)[:, ::-1]
    np.testing.assert_array_equal(nm_mask(scores, 3, m, ties="last"), expected)


def test_adjacent_axes_are_cut_as_one():
    scores = np.random.default_rng(3).normal(size=(5, 6, 4, 2)).astype(np.float32)
    expected = sorted_mask(scores.reshape(5, 24, 2), 2, 8, 1).reshape(scores.shape)
    np.testing.assert_array_equal(nm_mask(scores, 2, 8, axis=(1, 2)), expected)
    expected = sorted_mask(scores, 2, 4, 2)  # groups within the last of the axes
    np.testing.assert_array_equal(nm_mask(scores, 2, 4, axis=(-3, -2)), expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4))
def test_violations_are_counted(seed, n):
    weights = np.random.default_rng(seed).integers(0, 2, (4, 8, 3)).astype(np.float32)
    count = sum(
        np.count_nonzero(weights[a, 4 * g : 4 * g + 4, b]) > n
        for a, g, b in itertools.product(range(4), range(2), range(3))
    )
    assert nm_violations(weights, n, 4, axis=1) == count
    assert nm_violations(weights * nm_mask(weights, n, 4, axis=1), n, 4, axis=1) == 0


def test_mistakes_say_what_would_be_right():
    scores = jnp.zeros((6, 10))
    for n, m, message in [
        (3, 2, "3:2 keeps 3 of every 2; N goes from 1 to M=2"),
        (0, 2, "0:2 keeps 0 of every 2"),
        (-1, 2, "-1:2 keeps -1"),
        (1, 0, "M=0; groups have 1 entry or more"),
        (2, 4, r"axis 1 of \(6, 10\): 10 entries .* groups of 4; use an M .* 10, such as 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            nm_mask(scores, n, m, axis=1)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda s, n=n, m=m: nm_mask(s, n, m, axis=1))(scores)
    with pytest.raises(ValueError, match="axis=2 of an array of 2 axes; use 0 to 1, or -2 to -1"):
        nm_mask(scores, 1, 2, axis=2)
    with pytest.raises(ValueError, match="adjacent"):
        nm_mask(jnp.zeros((2, 2, 2)), 1, 2, axis=(0, 2))


def test_shards_must_not_cut_groups():
    check_nm(2, 4, 24, ways=3)
    check_nm(2, 4, 24, ways=6)
    message = "4 shards of 6 entries cut groups of 4; use M that divides 6, or fewer shards"
    with pytest.raises(ValueError, match=f"^mlp/kernel: {message}$"):
        check_nm(2, 4, 24, ways=4, name="mlp/kernel")


@pytest.mark.parametrize(
    ("n", "m", "axis", "kind"),
    [
        (2, 4, 1, AxisType.Auto),
        (2, 4, 2, AxisType.Explicit),
        (4, 32, 1, AxisType.Explicit),
        (8, 48, 2, AxisType.Auto),
    ],
)
def test_a_sharded_mask_needs_no_collective(n, m, axis, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    scores = np.random.default_rng(5).normal(size=(2, 128, 192)).astype(np.float32)

    def mask(scores):
        return nm_mask(scores, n, m, axis=axis)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(scores, sharding)
        compiled = jax.jit(mask).lower(sharded).compile()
        result = compiled(sharded)
    assert not COLLECTIVES.search(compiled.as_text())
    assert result.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(result, sorted_mask(scores, n, m, axis))
