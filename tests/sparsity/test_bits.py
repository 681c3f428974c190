import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity.masks.bits import pack_bits, unpack_bits


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8, 9, 31])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_bytes_are_those_of_numpy_and_go_back(size, axis):
    shape = [3, 2, 3]
    shape[axis] = size
    mask = np.random.default_rng(size).integers(0, 2, shape).astype(bool)
    packed = pack_bits(mask, axis=axis)
    assert packed.dtype == jnp.uint8
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=axis, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(packed, size, axis=axis), mask)


def test_jit_and_integer_masks():
    mask = jnp.array([1, 0, 0, 3, 2], jnp.uint8)  # the lowest bits: 1, 0, 0, 1, 0
    assert jax.jit(pack_bits)(mask).tolist() == [9]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", [0, 1])
def test_shards_pack_their_own(axis, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, P("fsdp", "tensor"))
    mask = np.random.default_rng(0).integers(0, 2, (64, 32)).astype(bool)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(mask, sharding)
        pack = jax.jit(lambda mask: pack_bits(mask, axis=axis)).lower(sharded).compile()
        packed = pack(sharded)
        unpack = jax.jit(lambda bits: unpack_bits(bits, mask.shape[axis], axis=axis))
        unpack = unpack.lower(packed).compile()
        result = unpack(packed)
    for compiled in (pack, unpack):
        assert not any(f"{name}-" in compiled.as_text() for name in ("all", "collective"))
    assert packed.sharding.is_equivalent_to(sharding, 2)
    assert result.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(result, mask)
