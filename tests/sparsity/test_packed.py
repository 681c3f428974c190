import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity.masks.packed import (
    decode_indices,
    encode_indices,
    gather_nm,
    nm_indices,
    pack_nm,
    unpack_nm,
)

PATTERNS = [(2, 4, 0), (2, 4, 2), (1, 8, 1), (3, 5, 0), (4, 4, 2), (1, 1, 1), (5, 24, 1)]


def random_mask(rng, shape, n, m, axis):
    """Exactly n of every m."""
    groups = np.tile(np.arange(m) < n, (np.prod(shape) // m, 1))
    order = rng.permuted(groups, axis=-1)
    rest = [s for a, s in enumerate(shape) if a != axis]
    return np.moveaxis(order.reshape(*rest, shape[axis]), -1, axis)


def loops(x, mask, m, axis):
    """Kept values and their places, group by group."""
    x, mask = np.moveaxis(x, axis, -1), np.moveaxis(mask, axis, -1)
    values, places = [], []
    for row, kept in zip(x.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1]), strict=True):
        values.append([v for v, k in zip(row, kept, strict=True) if k])
        places.append([i % m for i, k in enumerate(kept) if k])
    shape = (*x.shape[:-1], -1)
    back = [np.moveaxis(np.array(a).reshape(shape), -1, axis) for a in (values, places)]
    return back[0].astype(x.dtype), back[1]


@pytest.mark.parametrize(("n", "m", "axis"), PATTERNS)
def test_values_and_places_against_loops(n, m, axis):
    """Every bit of a value is kept: of -0, subnormals and NaN, too."""
    rng = np.random.default_rng(m)
    shape = [5, 6, 7]
    shape[axis] = 3 * m
    x = rng.choice([0.0, -0.0, 1.5, -2.5, 1e-42, np.inf, np.nan], shape).astype(np.float32)
    mask = random_mask(rng, shape, n, m, axis)
    values, places = loops(x, mask, m, axis)
    indices = jax.jit(lambda mask: nm_indices(mask, n, m, axis=axis))(mask)
    assert indices.dtype == jnp.uint8
    np.testing.assert_array_equal(indices, places)

    def bits(x):
        return np.asarray(x).view(np.uint32)

    @jax.jit
    def functions(x, mask, indices):
        packed = pack_nm(x, mask, n, m, axis=axis)
        dense = unpack_nm(packed, indices, n, m, axis=axis)
        return packed, dense, gather_nm(x, indices, n, m, axis=axis)

    packed, dense, gathered = functions(x, mask, indices)
    np.testing.assert_array_equal(bits(packed), bits(values))
    np.testing.assert_array_equal(bits(dense), np.where(mask, bits(x), 0))
    np.testing.assert_array_equal(bits(gathered), bits(values))


@pytest.mark.parametrize(("m", "planes"), [(1, 0), (2, 1), (3, 2), (4, 2), (8, 3), (128, 7)])
@pytest.mark.parametrize("axis", [-1, 0])
def test_codes_of_indices(m, planes, axis):
    indices = np.random.default_rng(m).integers(0, m, (12, 20)).astype(np.uint8)
    code = encode_indices(indices, m, axis=axis)
    assert code.shape == ((planes, 12, 3) if axis == -1 else (planes, 2, 20))
    for b in range(planes):
        np.testing.assert_array_equal(
            code[b], np.packbits(indices >> b & 1, axis=axis, bitorder="little")
        )
    decoded = decode_indices(code, m, indices.shape[axis], axis=axis)
    assert decoded.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, indices)


def test_bits_of_a_dense_weight():
    """2:4 takes 1 bit, 1:8 takes 3/8."""
    for n, m, bits in [(2, 4, 1), (1, 8, 3 / 8)]:
        indices = jnp.zeros((64 * n // m, 64), jnp.uint8)
        assert encode_indices(indices, m, axis=-1).size * 8 == 64 * 64 * bits


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 32)])
def test_gradients(n, m):
    """Of the values: the dense gradient's kept entries; of x: the values' gradient, spread out."""
    rng = np.random.default_rng(6)
    mask = random_mask(rng, [2 * m, 3], n, m, 0)
    indices = nm_indices(mask, n, m, axis=0)
    dense = rng.normal(size=mask.shape).astype(np.float32)
    values, _ = loops(dense, mask, m, 0)
    spread = jax.jit(jax.grad(lambda v: jnp.sum(unpack_nm(v, indices, n, m, axis=0) * dense)))
    np.testing.assert_array_equal(spread(values), values)
    taken = jax.jit(jax.grad(lambda x: jnp.sum(gather_nm(x, indices, n, m, axis=0) * values)))
    np.testing.assert_array_equal(taken(dense), np.where(mask, dense, 0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 32)])
def test_shards_pack_their_own(n, m, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    rng = np.random.default_rng(7)
    x = rng.normal(size=(128, 32)).astype(np.float32)
    mask = random_mask(rng, x.shape, n, m, 0)

    def round_trip(x, mask):
        values = pack_nm(x, mask, n, m, axis=0)
        code = encode_indices(nm_indices(mask, n, m, axis=0), m, axis=-1)
        return unpack_nm(values, decode_indices(code, m, 32, axis=-1), n, m, axis=0)

    with jax.set_mesh(mesh):
        arrays = jax.device_put((x, mask), NamedSharding(mesh, P("fsdp", "tensor")))
        compiled = jax.jit(round_trip).lower(*arrays).compile()
        result = compiled(*arrays)
    assert not any(f"{name}-" in compiled.as_text() for name in ("all", "collective"))
    np.testing.assert_array_equal(result, np.where(mask, x, 0))
