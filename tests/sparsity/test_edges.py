"""Arrays without entries, strange numbers, and shards that cut what they must not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsity
from sparsity import mask_calculator
from sparsity.masks.bits import pack_bits, unpack_bits
from sparsity.masks.packed import decode_indices, encode_indices, nm_indices, pack_nm, unpack_nm
from sparsity.numbers.formats import Int

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.slow
@pytest.mark.parametrize("format", [*sparsity.FORMATS, Int(bits=4, block=16, symmetric=False)])
@pytest.mark.parametrize(("shape", "axis"), [((0, 48), -1), ((48, 0), -1), ((2, 0, 48), 1)])
def test_formats_of_no_entries(format, shape, axis):
    x = jnp.zeros(shape)
    for found in (
        sparsity.quantize(x, format, axis=axis),
        sparsity.decode(sparsity.encode(x, format, axis=axis)),
        sparsity.clipped(x, format, axis=axis),
    ):
        assert found.shape == shape
    with pytest.raises(ValueError, match=r"^shape=.* has no entries"):
        sparsity.bits_per_element(format, shape, axis=axis)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_masks_of_no_entries(shape):
    x, n, m = jnp.zeros(shape), 2, 4
    masks = [
        sparsity.nm_mask(x, n, m),
        sparsity.nm_mask(x, n, m, axis=0),
        sparsity.transposable_mask(x),
        sparsity.topk_mask(x, 3),
        *sparsity.global_topk_masks([x, x], 3),
        unpack_bits(pack_bits(x), x.shape[-1]),
        *(
            mask_calculator.get_topk_fn(kind)(x, 0.5)
            for kind in (sparsity.Unstructured(), sparsity.NByM(2, 4), sparsity.Block((2, 4)))
        ),
    ]
    assert {mask.shape for mask in masks} == {shape}
    assert sparsity.nm_violations(x, n, m) == 0
    indices = nm_indices(masks[0], n, m, axis=-1)
    values = pack_nm(x, masks[0], n, m, axis=-1)
    assert unpack_nm(values, indices, n, m, axis=-1).shape == shape
    code = encode_indices(indices, m, axis=-1)
    assert decode_indices(code, m, indices.shape[-1], axis=-1).shape == indices.shape


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "uint32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (4, 4), (3, 40)])
def test_masks_of_every_dtype(dtype, n, m):
    rng = np.random.default_rng(n)
    scores = rng.normal(size=(5, 3 * m)) * 100
    scores = jnp.asarray(np.abs(scores) if dtype.startswith("u") else scores).astype(dtype)
    mask = np.asarray(sparsity.nm_mask(scores, n, m)).reshape(5, 3, m)
    keys = np.asarray(scores.astype(jnp.float32)).reshape(5, 3, m)
    order = np.argsort(-keys, axis=-1, kind="stable")[..., :n]
    expected = np.zeros(mask.shape, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    np.testing.assert_array_equal(mask, expected)


def test_strange_numbers_are_ordered():
    scores = np.float32([[np.nan, -np.inf, -0.0, 1e-45], [np.inf, 3e38, np.nan, -1e-45]])
    mask = sparsity.nm_mask(scores, 1, 4)
    np.testing.assert_array_equal(mask, [[0, 0, 0, 1], [1, 0, 0, 0]])
    mask = sparsity.nm_mask(scores, 3, 4)
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [1, 1, 0, 1]])
    np.testing.assert_array_equal(sparsity.topk_mask(scores, 2), [[0, 0, 0, 0], [1, 1, 0, 0]])
    # Equal ones: -0 and 0, of which the first is kept.
    np.testing.assert_array_equal(sparsity.nm_mask(np.float32([-0.0, 0.0]), 1, 2), [1, 0])


MESH = functools.partial(
    jax.make_mesh, (4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2
)


SIXTEEN = "24 entries are not cut into blocks of 16"
CUT = "shards of 24 entries cut blocks of 4"
GROUPS = "4 shards of 6 entries cut groups of 4"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: sparsity.quantize(x, "nvfp4", axis=0), SIXTEEN),
        (lambda x: sparsity.quantize(x, Int(bits=4, block=4), axis=0), CUT),
        (lambda x: sparsity.encode(x, "nvfp4", axis=0), SIXTEEN),
        (lambda x: sparsity.encode(x, "hbfp6", axis=0), "4 shards of 6 codes of 6 bits cut bytes"),
        (lambda x: sparsity.clipped(x, "nvfp4", axis=0), SIXTEEN),
        (lambda x: sparsity.nm_mask(x, 2, 4, axis=0), GROUPS),
        (lambda x: sparsity.nm_violations(x, 2, 4, axis=0), GROUPS),
        (lambda x: sparsity.transposable_mask(x), GROUPS),
        (lambda x: pack_bits(x > 0, axis=0), "4 shards of 6 entries cut bytes of 8"),
        (lambda x: pack_nm(x, x > 0, 2, 4, axis=0), GROUPS),
        (
            lambda x: mask_calculator.get_topk_fn(sparsity.NByM(2, 4, 0))(x, 0.5),
            GROUPS,
        ),
    ],
)  # fmt: skip
def test_shards_that_cut_a_block_or_a_group_are_one_line(call, says):
    mesh = MESH()
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((24, 64), np.float32), NamedSharding(mesh, P("fsdp", "tensor")))
        for f in (call, jax.jit(call)):
            with pytest.raises(ValueError, match=rf"^axis 0 of \(24, 64\): .*{says}") as raised:
                f(x)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("block", [(4, 4), (3, 5)])
def test_blocks_may_be_cut_by_shards(block):
    mesh, scores = MESH(), np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    mask_of = mask_calculator.get_topk_fn(sparsity.Block(block))
    expected = mask_of(scores, 0.5)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("fsdp", "tensor"))
        found = mask_of(jax.device_put(scores, sharding), 0.5)
    assert found.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: sparsity.nm_mask(x, 2.5, 4), "N=2.5; use an int"),
        (lambda x: sparsity.nm_mask(x, 2, "4"), "M='4'; use an int"),
        (lambda x: sparsity.nm_mask(x, 0, 4), "0:4 keeps 0 of every 4"),
        (lambda x: sparsity.nm_mask(x, 2, 4, axis=2), "axis=2 of an array of 2 axes"),
        (lambda x: sparsity.nm_mask(x, 2, 4, axis=1.0), "axis=1.0 of an array of 2 axes"),
        (lambda x: sparsity.nm_mask(x[0, 0], 1, 1), "axis=-1 of an array of 0 axes"),
        (lambda x: sparsity.nm_mask(x + 1j, 2, 4), "scores of complex64; use"),
        (lambda x: sparsity.transposable_mask(x, axes=(0, 5)), "axis=5 of an array of 2 axes"),
        (lambda x: sparsity.topk_mask(x, -1), "keep=-1; use an int from 0"),
        (lambda x: sparsity.topk_mask(x, 2.5), "keep=2.5; use an int from 0"),
        (lambda x: pack_bits(x, axis=2), "axis=2 of an array of 2 axes"),
        (lambda x: unpack_bits(x, 8, axis=-3), "axis=-3 of an array of 2 axes"),
        (lambda x: sparsity.bits_per_element("mxint8", (2, 64), axis=4), "axis=4 of an array"),
        (lambda x: sparsity.encode(x, "int8", axis=-3), "axis=-3 of an array of 2 axes"),
        (lambda x: sparsity.get_topk_fn(sparsity.Channel(2))(x, 0.5), "axis=2 of an array"),
    ],
)
def test_what_cannot_be_is_one_line(call, says):
    with pytest.raises(ValueError, match=says) as raised:
        call(jnp.ones((8, 8)))
    assert "\n" not in str(raised.value)
