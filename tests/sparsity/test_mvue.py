"""Unbiased N:M estimates, held against their distribution worked out, and against the bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsity

DRAWS = 40_000


def draws(group, n):
    """Estimates of one group [DRAWS, m], each by its own number."""
    many = jnp.tile(jnp.asarray(group, jnp.float32), (DRAWS, 1))
    return np.asarray(sparsity.mvue(many, n, len(group), jax.random.key(0)), np.float64)


def probabilities(size, n):
    """min(1, size / t) that add up to n, by bisection."""
    low, high = 0.0, size.sum()
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.minimum(1, size / t).sum() > n else (low, t)
    return np.minimum(1, size / high)


def test_one_of_two_worked_by_hand():
    found = draws([3.0, -1.0], 1)
    first = found[:, 0] != 0
    np.testing.assert_array_equal(found[first], [[4.0, 0.0]] * first.sum())
    np.testing.assert_array_equal(found[~first], [[0.0, -4.0]] * (~first).sum())
    assert abs(first.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / DRAWS)


def test_two_of_four_worked_by_hand():
    # 8 is more than half of 10: it is kept as it is; 1, -1, 0 share the other place, as +-2.
    found = draws([1.0, 8.0, -1.0, 0.0], 2)
    assert set(map(tuple, found)) == {(2.0, 8.0, 0.0, 0.0), (0.0, 8.0, -2.0, 0.0)}
    # Of equal ones each is kept half the time, and becomes twice itself.
    found = draws([1.0, 1.0, -1.0, 1.0], 2)
    assert set(np.unique(found)) == {-2.0, 0.0, 2.0}


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 16)])
def test_unbiased_with_the_least_variance(n, m):
    group = np.random.default_rng(m + n).standard_t(2, m).astype(np.float32)
    found = draws(group, n)
    assert ((found != 0).sum(-1) == n).all()
    p = probabilities(np.abs(group.astype(np.float64)), n)
    # The least E[y^2] is x^2 / p: Cauchy-Schwarz for each p, and Lagrange for all of them.
    variance = group.astype(np.float64) ** 2 * (1 / p - 1)
    error = np.sqrt(variance / DRAWS)
    assert (np.abs(found.mean(0) - group) < 4.5 * error + 1e-6 * np.abs(group)).all()
    kept = found[:, p < 1] != 0
    assert (np.abs(kept.mean(0) - p[p < 1]) < 4.5 * np.sqrt(0.25 / DRAWS)).all()
    for column, x, q in zip(found.T, group, p, strict=True):
        np.testing.assert_allclose(column[column != 0], x / q, rtol=2e-6)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 1e38])
def test_any_magnitude(scale):
    x = np.array([[1.0, -2.0, 0.5, 0.25], [0, 0, 0, 0], [0, 1.0, 0, 0]], np.float32) * np.float32(
        scale
    )
    found = np.asarray(sparsity.mvue(x, 2, 4, jax.random.key(1)), np.float64)
    assert (found[1] == 0).all()
    np.testing.assert_array_equal(found[2], x[2])
    assert (found[0] != 0).sum() == 2
    np.testing.assert_allclose(found[0].min(), -2.0 * scale, rtol=0.25)  # t is 1.75 of 2: kept


def test_axes_keys_and_dtypes():
    x = np.random.default_rng(0).normal(size=(6, 8, 5)).astype(np.float32)
    key = jax.random.key(2)
    found = np.asarray(sparsity.mvue(x, 2, 4, key, axis=1))
    assert sparsity.nm_violations(found, 2, 4, axis=1) == 0
    np.testing.assert_array_equal(found, sparsity.mvue(x, 2, 4, key, axis=-2))
    assert (found != np.asarray(sparsity.mvue(x, 2, 4, jax.random.key(3), axis=1))).any()
    assert sparsity.mvue(x.astype(jnp.bfloat16), 2, 4, key, axis=1).dtype == jnp.bfloat16
    np.testing.assert_array_equal(sparsity.mvue(x, 4, 4, key, axis=1), x)  # nothing to choose


def test_what_is_not_finite_is_nan_in_its_group_alone():
    x = np.ones((4, 4), np.float32)
    x[1, 2], x[2, 0] = np.inf, np.nan
    found = np.asarray(sparsity.mvue(x, 2, 4, jax.random.key(0)))
    assert np.isnan(found).all(-1).tolist() == [False, True, True, False]


def test_errors():
    x, key = jnp.zeros((4, 6)), jax.random.key(0)
    for arguments, says in (
        ((x, 2, 4, key), "6 entries are not cut into groups of 4"),
        ((x, 4, 3, key), "4:3 keeps 4"),
        ((x.astype(int), 1, 3, key), "x of int"),
    ):
        with pytest.raises(ValueError, match=says):
            sparsity.mvue(*arguments)


def test_sharded_as_on_one_device():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    x = np.random.default_rng(5).normal(size=(32, 48)).astype(np.float32)
    estimate = jax.jit(lambda x, key: sparsity.mvue(x, 2, 4, key))
    with jax.set_mesh(mesh):
        found = estimate(jax.device_put(x, sharding), jax.random.key(0))
    assert found.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(found, estimate(x, jax.random.key(0)))
