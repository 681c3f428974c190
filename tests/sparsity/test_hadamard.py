"""Block Hadamard transforms, held against scipy's matrix and their algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.linalg import hadamard as matrix

import sparsity


def test_four_worked_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 2.0])
    assert sparsity.hadamard(x, 4).tolist() == [5.0, -1.0, -2.0, 0.0, 1.0, -1.0, -1.0, 1.0]
    assert sparsity.hadamard(x, 1).tolist() == x.tolist()


@pytest.mark.parametrize("size", [2, 16, 32, 128])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_is_that_of_scipy_orthonormal_and_its_own_inverse(size, axis):
    x = np.random.default_rng(size).normal(size=(256, 128, 128)[: 3 if axis == 1 else 2])
    x = x[:, :, :3] if x.ndim == 3 else x
    x = x.astype(np.float32)
    found = np.asarray(sparsity.hadamard(x, size, axis))
    blocks = np.moveaxis(x, axis, -1)
    blocks = blocks.reshape(*blocks.shape[:-1], -1, size) @ (matrix(size) / np.sqrt(size))
    wanted = np.moveaxis(blocks.reshape(np.moveaxis(x, axis, -1).shape), -1, axis)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(sparsity.hadamard(found, size, axis), x, atol=4e-6)
    np.testing.assert_allclose((found**2).sum(), (x**2).sum(), rtol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
def test_signs_leave_a_product_and_are_undone(whole):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 64), (64, 7)))
    signs = rng.choice([-1.0, 1.0], 64 if whole else 16).astype(np.float32)
    at, bt = sparsity.hadamard(a, 16, signs=signs), sparsity.hadamard(b, 16, 0, signs=signs)
    np.testing.assert_allclose(at @ bt, a @ b, atol=3e-5)
    tiled = signs if whole else np.tile(signs, 4)
    np.testing.assert_allclose(tiled * sparsity.hadamard(at, 16), a, atol=2e-6)


def test_an_outlier_is_spread_over_its_block():
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = 4.0
    found = np.asarray(sparsity.hadamard(x, 16))
    np.testing.assert_array_equal(np.abs(found), [[1.0] * 16 + [0.0] * 16])


def test_low_precision_is_summed_in_float32():
    x = jnp.ones((2, 128), jnp.bfloat16) * 3
    found = sparsity.hadamard(x, 128)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[:, 0].astype(jnp.float32), 3 * np.sqrt(128), rtol=2**-8)


def test_errors():
    x = jnp.zeros((4, 48))
    for arguments, says in (
        ((x, 12), "size=12: Sylvester"),
        ((x, 0), "size=0: Sylvester"),
        ((x, 2.0), r"size=2\.0: Sylvester"),
        ((x, 32), "48 entries are not cut into blocks of 32; .* such as 16"),
        ((x, 16, 2), "axis=2 of an array of 2 axes"),
        ((x, 16, -1, np.ones(4)), r"signs of shape \(4,\); use one of \(16,\) or \(48,\)"),
        ((x.astype(int), 16), "x of int"),
    ):
        with pytest.raises(ValueError, match=says):
            sparsity.hadamard(*arguments)


def test_sharded_blocks_stay_where_they_are():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    x = np.random.default_rng(5).normal(size=(32, 64)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, sharding)
        transform = jax.jit(lambda x: sparsity.hadamard(x, 16))
        compiled = transform.lower(sharded).compile()
        found = compiled(sharded)
        with pytest.raises(ValueError, match="4 shards of 64 entries cut blocks of 32"):
            jax.jit(lambda x: sparsity.hadamard(x, 32))(sharded)
    assert "all-" not in compiled.as_text()
    assert found.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(found, sparsity.hadamard(x, 16), atol=1e-6)
