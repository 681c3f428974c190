"""8-bit floats by tiles of inputs and outputs, against numpy and ml_dtypes, tile by tile."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity.numbers.encoding import bits_per_element, decode, encode
from sparsity.numbers.formats import TiledFP8, get_format
from sparsity.numbers.quantization import block_scales, quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.post_training.gptq import gptq, rtn
from sparsity.post_training.interplay import lost_maxima

NAME = "fp8_e4m3:128x128"


def to_e4m3(v):
    return np.clip(v, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def tiles(matrix_IO, size):
    """The slices of every tile, and its place."""
    inputs, outputs = matrix_IO.shape
    for i in range(0, inputs, size[0]):
        for o in range(0, outputs, size[1]):
            yield (slice(i, i + size[0]), slice(o, o + size[1])), (i // size[0], o // size[1])


def expected(matrix_IO, size=(128, 128)):
    """Values, codes and scales of a matrix [inputs, outputs]."""
    values = np.zeros(matrix_IO.shape, np.float32)
    codes = np.zeros(matrix_IO.shape, np.uint8)
    scales = {}
    for at, place in tiles(matrix_IO, size):
        tile = matrix_IO[at]
        largest = np.abs(tile).max()
        scale = largest / np.float32(448) if largest else np.float32(1)
        element = to_e4m3(tile / scale)
        codes[at], values[at] = element.view(np.uint8), element.astype(np.float32) * scale
        scales[place] = scale
    shape = [1 + max(p[k] for p in scales) for k in (0, 1)]
    return values, codes, np.float32([scales[p] for p in np.ndindex(*shape)]).reshape(shape)


def matrix(inputs, outputs, seed=0):
    """Weights whose size differs from place to place, with a tile of zeros where there is one."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (inputs, outputs))
    w *= np.exp(2 * rng.normal(size=(inputs, 1)) + rng.normal(size=outputs))
    w[128:256, :128] = 0
    return w.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(256, 384), (300, 200), (128, 130), (100, 300), (260, 60), (64, 50), (1, 1)]
)
def test_values_codes_and_scales_are_those_of_each_tile(shape):
    w = matrix(*shape)
    values, codes, scales = expected(w)
    for axis, x, turned in ((0, w, False), (1, w.T, True), (-1, w.T, True)):
        of = (lambda a: np.asarray(a).T) if turned else np.asarray
        np.testing.assert_array_equal(of(quantize(x, NAME, axis=axis)), values)
        encoded = encode(x, NAME, axis=axis)
        # The blocked axis is the last of codes.
        np.testing.assert_array_equal(encoded.codes, codes.T)
        np.testing.assert_array_equal(of(encoded.scales), scales)
        decoded = np.asarray(decode(encoded))
        np.testing.assert_array_equal(of(decoded).view(np.int32), values.view(np.int32))
        stored = scales.size * 4 + w.size
        assert encoded.nbytes == stored
        assert bits_per_element(NAME, x.shape, axis=axis) == 8 * stored / w.size
        np.testing.assert_array_equal(block_scales(x, NAME, axis=axis)[0], encoded.scales)
        given = quantize(x, NAME, axis=axis, scale=encoded.scales)
        np.testing.assert_array_equal(of(given), values)


@pytest.mark.slow
def test_other_tiles_and_several_axes_across():
    w = matrix(40, 60)
    want, _, scales = expected(w, (16, 24))
    format = get_format("fp8_e4m3:16x24")
    assert format == TiledFP8(block=16, output_block=24)
    np.testing.assert_array_equal(quantize(w, format, axis=0), want)
    heads = w.reshape(40, 4, 15)  # outputs of several axes are taken as one
    np.testing.assert_array_equal(quantize(heads, format, axis=0), want.reshape(heads.shape))
    encoded = encode(heads, format, axis=0)
    np.testing.assert_array_equal(encoded.scales, scales)
    np.testing.assert_array_equal(decode(encoded), want.reshape(heads.shape))
    middle = heads.transpose(1, 0, 2)
    np.testing.assert_array_equal(
        quantize(middle, format, axis=1), want.reshape(heads.shape).transpose(1, 0, 2)
    )
    # Of one token's features only blocks along them are left: those of FP8.
    np.testing.assert_array_equal(quantize(w[:, 0], format), quantize(w[:, 0], "fp8_e4m3:16"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_tile_that_is_not_finite_is_nan_and_no_other(bad):
    w = matrix(300, 200)
    values, *_ = expected(w)
    w[140, 150] = bad
    got = np.asarray(quantize(w, NAME, axis=0))
    tile = np.zeros(w.shape, bool)
    tile[128:256, 128:] = True
    assert np.isnan(got[tile]).all()
    np.testing.assert_array_equal(got[~tile], values[~tile])
    decoded = decode(encode(w, NAME, axis=0))
    np.testing.assert_array_equal(decoded, got)


def test_rounding():
    w = matrix(130, 20)
    scale = np.repeat(expected(w)[2], 128, 0)[:130].repeat(20, 1)
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    key = jax.random.key(0)
    floor = np.abs(np.asarray(quantize(w, NAME, axis=0, rounding="floor")))
    drawn = np.abs(np.asarray(quantize(w, NAME, axis=0, rounding="stochastic", key=key)))
    below = np.searchsorted(grid, np.minimum(np.abs(w) / scale, 448), side="right") - 1
    np.testing.assert_array_equal(floor, grid[below] * scale)
    above = grid[np.minimum(below + 1, 126)] * scale
    assert ((drawn == floor) | (drawn == above)).all()
    assert (drawn != floor).any()


def kernel(w, **formats):
    return QuantizedKernel(
        kernel=w,
        key=None,
        formats=MatmulFormats(**formats).resolved(),
        axes=(-2,),
        rank=2,
        order="sparsify_then_quantize",
        products=None,
    )


def test_a_matmul_reads_tiles_of_weights_and_blocks_of_each_token():
    w = np.stack([matrix(160, 140, seed) for seed in (1, 2)])  # two layers
    k = kernel(w, weights=NAME, activations=NAME)
    want = np.stack([expected(layer)[0] for layer in w])
    np.testing.assert_array_equal(k.dense(), want)
    np.testing.assert_array_equal(k.turned(), want)  # square tiles are the same either way
    x = np.random.default_rng(3).normal(size=(2, 3, 160)).astype(np.float32)
    np.testing.assert_array_equal(k.inputs(x), quantize(x, "fp8_e4m3:128"))


def test_rounding_to_nearest_and_gptq_of_a_kernel():
    w = matrix(256, 150)
    values, _, scales = expected(w)
    found = rtn(w, NAME)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.scales.scale, scales)
    x = np.random.default_rng(4).normal(size=(600, 256)) @ np.random.default_rng(5).normal(
        size=(256, 256)
    )
    # Coarser elements than those of a trained format, that there is something to make up for.
    found = gptq(w, x.T @ x, NAME)
    lost = [np.linalg.norm(x @ (np.asarray(v) - w)) for v in (found.values, values)]
    assert lost[0] < lost[1]
    assert found.scales.scale.shape == (2, 2)
    scale = found.scales.scale.repeat(128, 0).repeat(128, 1)[:, :150]
    elements = to_e4m3(np.asarray(found.values) / scale).astype(np.float32)
    np.testing.assert_array_equal(elements * scale, found.values)
    alone = gptq(w, np.diag(np.arange(1.0, 257)), NAME)  # inputs that are not correlated
    np.testing.assert_array_equal(alone.values, values)


def test_shards_that_cut_tiles_are_refused():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    like = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    quantization = Quantization(layers={"kernel": MatmulFormats(weights=NAME)})
    for shape, spec, says in (
        ((512, 256), P("fsdp", "tensor"), None),
        ((512, 200), P("fsdp"), None),
        ((512, 128), P("fsdp", "tensor"), "kernel: weights, tiles across: 2 shards of 128"),
        ((256, 256), P("fsdp"), "kernel: weights: 4 shards of 256 entries cut blocks of 128"),
    ):
        params = {"kernel": like(shape, sharding=NamedSharding(mesh, spec))}
        if says is None:
            quantization.build(params)
            continue
        with pytest.raises(ValueError, match=says):
            quantization.build(params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_tiles_are_the_same(kind):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    w = matrix(256, 256)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P("fsdp", "tensor")))
        got = jax.jit(lambda x: quantize(x, NAME, axis=0))(sharded)
    np.testing.assert_array_equal(got, expected(w)[0])


def test_a_tile_loses_its_maximum_to_a_mask():
    w = np.abs(matrix(256, 256)) + 1
    mask = np.ones(w.shape, bool)
    assert lost_maxima(w, mask, NAME, axis=0).lost == 0
    greatest = w[128:, 128:] == w[128:, 128:].max()
    assert greatest.sum() == 1
    mask[128:, 128:] = ~greatest
    mask[:128, 128:] = False
    found = lost_maxima(w, mask, NAME, axis=0)
    assert (float(found.lost), float(found.empty)) == (0.25, 0.25)
    mask[128:, 128:] = greatest  # and nothing else is left
    assert lost_maxima(w, mask, NAME, axis=0).lost == 0
