"""GPTQ against Gaussian elimination in float64 with grids by enumeration, and its properties."""

import jax
import ml_dtypes
import numpy as np
import pytest

from sparsity.masks.nm import nm_mask
from sparsity.numbers.formats import E2M1, E4M3, FP8, HBFP, MX, NVFP4, Int
from sparsity.numbers.quantization import quantize
from sparsity.post_training.gptq import gptq, rtn

INPUTS, OUTPUTS, DAMPING = 48, 10, 0.01
FORMATS = {
    "int4": Int(bits=4),
    "int4_tensor": Int(bits=4, block="tensor"),
    "int4_groups": Int(bits=4, block=16),
    "int4_asymmetric": Int(bits=4, block=24, symmetric=False),
    "int8_narrow": Int(bits=8, narrow=True),
    "fp8": FP8(),
    "fp8_channel": FP8(block="channel"),
    "mxfp8": MX(element=E4M3, block=16),
    "mxfp4": MX(element=E2M1, block=16),
    "hbfp4": HBFP(mantissa_bits=3, block=16),
    "nvfp4": NVFP4(block=16),
}


def problem(seed, inputs=INPUTS):
    """A kernel and correlated inputs for it, those of every fourth feature large."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(inputs, OUTPUTS)).astype(np.float32)
    x = rng.normal(size=(4 * inputs, inputs)) @ (np.eye(inputs) + rng.normal(size=(inputs,) * 2))
    return kernel, x * np.where(np.arange(inputs) % 4 == 0, 3.0, 1.0)


def lost(kernel, changed, x):
    difference = np.asarray(changed, np.float64) - kernel
    return np.linalg.norm(x @ difference) / np.linalg.norm(x @ kernel)


def grid(element):
    """All values of a small float by decoding every code."""
    dtype = {E4M3: ml_dtypes.float8_e4m3fn, E2M1: ml_dtypes.float4_e2m1fn}[element]
    codes = np.arange(2**element.bits, dtype=np.uint8).view(dtype)
    values = codes.astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def nearest(w, values):
    return values[np.abs(np.asarray(w)[..., None] - values).argmin(-1)]


def to_e4m3(x):
    return np.minimum(x, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def rounder(block, format, tensor_scale):
    """From weights [outputs] to their values, by the scales of a block [inputs, outputs]."""
    largest = np.abs(block).max(0)
    match format:
        case Int(block="tensor"):
            largest = np.full_like(largest, largest.max())
    match format:
        case Int(symmetric=False, bits=bits):
            low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
            step = (high - low) / (2**bits - 1)
            zero = np.rint(-low / step)
            return lambda w: (np.clip(np.rint(w / step) + zero, 0, 2**bits - 1) - zero) * step
        case Int(bits=bits, narrow=narrow):
            top = 2 ** (bits - 1) - 1
            step = largest / (top if narrow else top + 0.5)
            return lambda w: np.clip(np.rint(w / step), -top - (not narrow), top) * step
        case FP8(block=None):
            return lambda w: nearest(w, grid(E4M3))
        case FP8():
            return lambda w: nearest(w / (largest / 448), grid(E4M3)) * (largest / 448)
        case MX(element=element):
            step = 2.0 ** (np.floor(np.log2(largest)) - element.emax)
            return lambda w: nearest(w / step, grid(element)) * step
        case HBFP(mantissa_bits=bits):
            step = 2.0 ** (np.ceil(np.log2(largest)) - bits)
            return lambda w: np.clip(np.rint(w / step), 1 - 2**bits, 2**bits - 1) * step
        case NVFP4():
            step = to_e4m3(largest / 6 * tensor_scale) / tensor_scale
            return lambda w: nearest(w / step, grid(E2M1)) * step


def by_elimination(kernel, x, format, mask=None):
    """GPTQ with the whole inverse at hand, reduced by one input after another."""
    w = kernel.astype(np.float64)
    mask = np.ones(w.shape, bool) if mask is None else mask
    w = np.where(mask, w, 0)
    tensor_scale = 448 * 6 / np.abs(w).max()
    hessian = x.T @ x
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(w)))
    length = format.block if isinstance(format.block, int) else len(w)
    found = np.zeros_like(w)
    for j in range(len(w)):
        if j % length == 0:
            begun = np.where(mask, w, 0)[j : j + length]
            to_format = rounder(begun, format, tensor_scale)
        found[j] = np.where(mask[j], to_format(w[j]), 0)
        w -= np.outer(inverse[:, j] / inverse[j, j], w[j] - found[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("masked", [False, True])
def test_gptq_is_elimination(name, masked):
    kernel, x = problem(1)
    mask = np.asarray(nm_mask(np.abs(kernel), 2, 4, axis=0)) if masked else None
    expected = by_elimination(kernel, x, FORMATS[name], mask)
    found = np.asarray(gptq(kernel, x.T @ x, FORMATS[name], mask_IO=mask, damping=DAMPING).values)
    # In float32 a few weights near the middle of two values go the other way.
    assert np.mean(~np.isclose(found, expected, rtol=1e-3, atol=1e-5)) < 0.03
    np.testing.assert_allclose(lost(kernel, found, x), lost(kernel, expected, x), rtol=0.02)
    if masked:
        assert not found[~mask].any()


@pytest.mark.parametrize("name", FORMATS)
def test_it_loses_less_than_rounding_and_as_much_where_inputs_are_not_correlated(name):
    format = FORMATS[name]
    to_format = jax.jit(lambda kernel: quantize(kernel, format, axis=0))
    for seed in range(3):
        kernel, x = problem(seed)
        rounded = rtn(kernel, format)
        np.testing.assert_array_equal(rounded.values, to_format(kernel))
        assert lost(kernel, gptq(kernel, x.T @ x, format).values, x) < lost(
            kernel, rounded.values, x
        )
        alone = gptq(kernel, np.diag(np.exp(kernel[:, 0])), format)
        np.testing.assert_array_equal(alone.values, rounded.values)
        for found, expected in zip(alone.scales, rounded.scales, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_and_codes_give_the_values(name):
    kernel, x = problem(4)
    format = FORMATS[name]
    for found in (rtn(kernel, format), gptq(kernel, x.T @ x, format)):
        values, scales = np.asarray(found.values), found.scales
        if scales.scale is None:
            assert format == FP8()
            continue
        scale = scales.scale / (1 if scales.tensor_scale is None else scales.tensor_scale)
        scale = np.repeat(scale, INPUTS // len(scale), axis=0)
        elements = values / scale
        if isinstance(format, Int):
            codes = np.rint(elements)
            np.testing.assert_array_equal((codes * scale).astype(np.float32), values)
            low, high = codes.min(), codes.max()
            if scales.zero_point is not None:
                codes = codes + np.repeat(scales.zero_point, format.block, axis=0)[:INPUTS]
                low, high = codes.min(), codes.max()
            assert -(2 ** (format.bits - 1)) + format.narrow <= low
            assert high <= 2 ** (format.bits - 1) - 1
        elif isinstance(format, HBFP):
            mantissas = elements * 2**format.mantissa_bits
            np.testing.assert_array_equal(mantissas, np.rint(mantissas))
        else:
            near = nearest(elements, grid(format.element))
            np.testing.assert_allclose(elements, near, rtol=1e-6)


def test_zeros_of_the_kernel_are_kept():
    kernel, x = problem(5)
    kernel[np.abs(kernel) < 0.7] = 0
    for found in (rtn(kernel, MX(element=E2M1, block=16)), gptq(kernel, x.T @ x, Int(bits=4))):
        assert not np.asarray(found.values)[kernel == 0].any()


def test_in_order_of_the_diagonal_is_gptq_of_the_reordered_kernel():
    kernel, x = problem(6)
    hessian = x.T @ x
    order = np.argsort(-np.diag(hessian), kind="stable")
    reordered = gptq(kernel[order], hessian[np.ix_(order, order)], "int4").values
    found = gptq(kernel, hessian, "int4", order=True).values
    np.testing.assert_array_equal(np.asarray(found)[order], reordered)
    # Blocks keep their places, and the scales that they have at the start.
    format = FORMATS["int4_groups"]
    grouped = gptq(kernel, hessian, format, order=True)
    np.testing.assert_array_equal(grouped.scales.scale, rtn(kernel, format).scales.scale)
    assert lost(kernel, grouped.values, x) < lost(kernel, rtn(kernel, format).values, x)


def test_the_size_of_a_block_is_a_matter_of_speed():
    kernel, x = problem(7, 30)
    whole = gptq(kernel, x.T @ x, Int(bits=8, block=6))
    parts = gptq(kernel, x.T @ x, Int(bits=8, block=6), block_size=14)
    np.testing.assert_allclose(whole.values, parts.values, rtol=0, atol=0.05)
    np.testing.assert_allclose(
        lost(kernel, whole.values, x), lost(kernel, parts.values, x), rtol=0.02
    )


@pytest.mark.parametrize("name", ["int4", "int4_groups", "int4_asymmetric", "mxfp4"])
@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_were_always_zero_inflate_no_scale(name, order):
    kernel, x = problem(8)
    dead = [5, 16, 17, 40]
    x[:, dead] = 0
    kernel[dead] *= 100
    found = np.asarray(gptq(kernel, x.T @ x, FORMATS[name], order=order).values)
    assert not found[dead].any()
    kernel[dead] = 0
    expected = gptq(kernel, x.T @ x, FORMATS[name], order=order).values
    np.testing.assert_array_equal(found, expected)
    assert lost(kernel, found, x) < 0.2


@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("int9", "unknown format 'int9'; use one of int4, int8"),
        (Int(bits=4, block=36), "48 entries are not cut into blocks of 36; .* such as 12"),
        ("nvfp4x", "unknown format"),
    ],
)
def test_what_cannot_be_is_one_line(format, says):
    kernel, x = problem(0)
    for find in (lambda: rtn(kernel, format), lambda: gptq(kernel, x.T @ x, format)):
        with pytest.raises(ValueError, match=says) as raised:
            find()
        assert "\n" not in str(raised.value)


def test_what_is_not_finite_is_refused():
    kernel, x = problem(0)
    with pytest.raises(ValueError, match=r"hessian_II: entry .* is not finite"):
        gptq(kernel, np.full((INPUTS, INPUTS), np.nan), "int4")
    kernel[3, 2] = np.inf
    for find in (lambda: rtn(kernel, "int4"), lambda: gptq(kernel, x.T @ x, "int4")):
        with pytest.raises(ValueError, match=r"kernel_IO: entry \[3, 2\] is inf; use finite"):
            find()
