import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsity.numbers import formats
from sparsity.numbers.encoding import bits_per_element, decode, encode
from sparsity.numbers.formats import FORMATS, FP8, HBFP, MX, NVFP4, Int
from sparsity.numbers.quantization import quantize

OTHERS = {
    "int5 asymmetric": Int(bits=5, symmetric=False, block=24),
    "int4 per tensor": Int(bits=4, narrow=True, block="tensor"),
    "fp8 scaled": FP8(block=32),
    "fp8 e5m2 by channel": FP8(element=formats.E5M2, block="channel"),
    "hbfp of 11 bits": HBFP(mantissa_bits=10, block=10),
    "mx of e2m3 and 12": MX(element=formats.E2M3, block=12),
}


def sample():
    rng = np.random.default_rng(0)
    x = rng.standard_t(2, (24, 50)).astype(np.float32)
    x[3] *= np.float32(1e-38)
    x[4] *= np.float32(1e37)
    x[5] = 0
    x[6] = rng.integers(0, 2**20, 50).astype(np.uint32).view(np.float32)  # subnormal
    x[7, :3] = -0.0, np.finfo(np.float32).max, -np.finfo(np.float32).max
    return x


@pytest.mark.parametrize(("name", "axis"), list(zip([*FORMATS, *OTHERS], [0, 1] * 11, strict=True)))
def test_decoding_gives_what_quantize_gives(name, axis):
    format = FORMATS.get(name) or OTHERS[name]
    x = sample()
    want = np.asarray(quantize(x, format, axis=axis))
    encoded = encode(x, format, axis=axis)
    got = np.asarray(decode(encoded))
    if name == "mxint8":  # its codes have one zero
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
    rows, size = np.moveaxis(x, axis, -1).shape
    exact = bits_per_element(format, x.shape, axis=axis) * x.size
    codes = formats.element_bits(format) * size * rows
    filled = rows * -(-formats.element_bits(format) * size // 8) * 8
    assert encoded.nbytes * 8 == exact - codes + filled
    assert encoded.codes.dtype == jnp.uint8


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4", 4 + 32 / 4096),
        ("int8", 8 + 32 / 4096),
        ("fp8_e4m3", 8),
        ("fp8_e5m2", 8),
        ("hbfp4", 4.125),
        ("hbfp6", 6.125),
        ("hbfp8", 8.125),
        ("mxfp8_e4m3", 8.25),
        ("mxfp8_e5m2", 8.25),
        ("mxfp6_e3m2", 6.25),
        ("mxfp6_e2m3", 6.25),
        ("mxfp4_e2m1", 4.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5 + 32 / 2**15),
        ("nf4", 4.5),
        ("fp8_e4m3:128x128", 8 + 32 * 32 / 2**15),
    ],
)
def test_bits_per_element(name, bits):
    assert bits_per_element(name, (8, 4096)) == bits
    encoded = jax.eval_shape(lambda x: encode(x, name), jnp.ones((8, 4096)))
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(encoded))
    assert stored * 8 == bits * 8 * 4096


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (formats.E4M3, ml_dtypes.float8_e4m3fn),
        (formats.E5M2, ml_dtypes.float8_e5m2),
        (formats.E3M2, ml_dtypes.float6_e3m2fn),
        (formats.E2M3, ml_dtypes.float6_e2m3fn),
        (formats.E2M1, ml_dtypes.float4_e2m1fn),
    ],
)
def test_every_code_of_an_element(element, dtype):
    codes = np.arange(2**element.bits)
    want = codes.astype(np.uint8).view(dtype).astype(np.float32)
    magnitude, negative = element.values(jnp.asarray(codes))
    got = np.where(negative, -magnitude, magnitude)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(negative, np.signbit(want))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(element.codes(magnitude[finite], negative[finite]), codes[finite])


def test_bytes_are_those_of_the_specifications():
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 1.0, -0.5, 6.0, 4.0, -3.0, 1.5
    encoded = encode(x, "mxfp4_e2m1")
    assert encoded.scales.tolist() == [[127]]  # 2^0
    assert encoded.codes[0, :3].tolist() == [0x92, 0x67, 0x3D]  # the first is the low half
    assert encode(4 * x, "mxfp4_e2m1").scales.tolist() == [[129]]
    assert encode(0 * x, "mxfp4_e2m1").scales.tolist() == [[0]]
    assert encode(x + np.inf, "mxfp4_e2m1").scales.tolist() == [[255]]
    x = np.linspace(-448, 448, 32).astype(np.float32)[None]
    np.testing.assert_array_equal(
        encode(x, "mxfp8_e4m3").codes, x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    np.testing.assert_array_equal(
        encode(x, "fp8_e5m2").codes, x.astype(ml_dtypes.float8_e5m2).view(np.uint8)
    )
    encoded = encode(np.float32([[1.0, -1.0, 127 / 64, 0]]), "mxint8")
    np.testing.assert_array_equal(encoded.codes.view(np.int8), [[64, -64, 127, 0]])
    encoded = encode(np.float32([[3.0, -1.0, 2.0]]), Int(bits=4, narrow=True))
    np.testing.assert_array_equal(encoded.codes, [[7 | 14 << 4, 5]])  # 3 / (3 / 7), -1 -> -2, 5
    np.testing.assert_array_equal(encoded.scales, np.float32([[3]]) / np.float32(7))
    # e2m3: four codes of six bits in three bytes.
    encoded = encode(np.float32([[7.5, 0.125, 1.0, -1.0]]), MX(element=formats.E2M3))
    assert int.from_bytes(bytes(np.asarray(encoded.codes)[0]), "little") == (
        0b011111 | 0b000001 << 6 | 0b001000 << 12 | 0b101000 << 18
    )


def test_nan_is_kept_by_formats_that_have_it_and_refused_by_others():
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.nan
    for format in ("mxfp6_e3m2", "nvfp4", "fp8_e4m3", FP8(block=32)):
        np.testing.assert_array_equal(decode(encode(x, format)), quantize(x, format))
    for format in ("int8", "hbfp6"):
        with pytest.raises(ValueError, match=r"1 of 128 entries are NaN or infinite; .*neither$"):
            encode(x, format)
        traced = jax.jit(functools.partial(encode, format=format))(x)
        np.testing.assert_array_equal(decode(traced), quantize(x, format))


def test_rounding_and_given_scales():
    x = sample()
    key = jax.random.key(1)
    want = quantize(x, "hbfp4", rounding="stochastic", key=key)
    np.testing.assert_array_equal(decode(encode(x, "hbfp4", rounding="stochastic", key=key)), want)
    scale = np.float32(2.0)
    encoded = encode(x, NVFP4(), scale=scale)
    assert encoded.tensor_scale == 2
    np.testing.assert_array_equal(decode(encoded), quantize(x, NVFP4(), scale=scale))
