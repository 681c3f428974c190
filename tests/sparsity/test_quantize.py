"""Formats against outputs of other programs, and against IEEE arithmetic of numpy.

tests/fixtures/formats: mx.npz holds inputs, what microxcaling 7bc4195 gives on a CPU ("nearest" is
half away from zero), and an exact reference with ties to even; hbfp.npz what the code of Harma et
al. (bed02bf39) gives.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsity import nm_mask, topk_mask
from sparsity.numbers import formats
from sparsity.numbers.formats import FORMATS, FP8, HBFP, MX, NVFP4, Int
from sparsity.numbers.quantization import block_scales, clipped, fake_quantize, quantize

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "formats"
LARGEST = np.finfo(np.float32).max
LEAST = np.finfo(np.float32).smallest_subnormal


@functools.cache
def compiled(format):
    """Of x of one shape, the values by rounding, compiled together."""
    roundings = ("even", "away", "floor")
    return jax.jit(lambda x: {r: quantize(x, format, rounding=r) for r in roundings})


# The other way: blocks one by one, in float64 where that is exact, and in IEEE float32.


def nearest(v, rounding):
    a = np.abs(v)
    if rounding == "even":
        r = np.round(a)
    elif rounding == "floor":
        r = np.floor(a)
    else:
        r = np.floor(a) + (a - np.floor(a) >= 0.5)
    return np.copysign(r, v)


def to_element(v, element, rounding):
    v = v.astype(np.float64)
    step = np.exp2(np.maximum(np.frexp(v)[1] - 1, element.emin) - element.mantissa_bits)
    return np.clip(nearest(v / step, rounding) * step, -element.largest, element.largest)


def times(v, scale):
    """float32, clipped where it is infinite."""
    with np.errstate(over="ignore"):
        return np.clip(v.astype(np.float32) * np.float32(scale), -LARGEST, LARGEST)


def expected_block(x, format, rounding):
    largest = np.abs(x).max()
    if largest == 0:
        return x
    wide = x.astype(np.float64)
    fraction, exponent = np.frexp(float(largest))
    if isinstance(format, MX):
        shared = int(np.clip(exponent - 1 - format.element.emax, -127, 127))
        scaled = np.ldexp(wide, -shared)
        if format.element is formats.INT8:
            result = np.clip(nearest(scaled * 64, rounding), -127, 127) / 64
        else:
            result = to_element(scaled, format.element, rounding)
        return np.ldexp(result, shared).astype(np.float32)
    if isinstance(format, HBFP):
        bits = format.mantissa_bits
        shared = max(exponent - (fraction == 0.5), -126)
        limit = 2**bits - 1
        result = np.clip(nearest(np.ldexp(wide, bits - shared), rounding), -limit, limit)
        return np.ldexp(result, shared - bits).astype(np.float32)
    if isinstance(format, FP8):
        scale = max(largest / np.float32(format.element.largest), LEAST)
        # The product to 24 bits, then to a multiple of 2^-149.
        fraction, exponent = np.frexp(scale)
        product = to_element(x / scale, format.element, rounding) * float(fraction)
        return np.clip(np.ldexp(np.float32(product), int(exponent)), -LARGEST, LARGEST)
    half = 2 ** (format.bits - 1)
    if format.symmetric:
        scale = largest / np.float32(half - 1 if format.narrow else half - 0.5)
        scale = max(scale, LEAST)
        codes = np.clip(nearest(x / scale, rounding), -half + format.narrow, half - 1)
        return times(codes, scale)
    least, greatest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    with np.errstate(over="ignore"):
        span = np.float32(greatest - least)
    few = np.float32(2 * half - 1)
    scale = span / few if np.isfinite(span) else np.float32((greatest - least) / 4) / few * 4
    scale = max(np.float32(scale), LEAST)
    zero = np.minimum(np.round(np.float32(-least) / scale), few)
    return times(np.clip(nearest(x / scale, rounding), -zero, few - zero), scale)


def expected(x, format, rounding="even", axis=-1):
    """Also of blocks that do not divide the axis."""
    rows = np.moveaxis(x, axis, -1)
    size = rows.shape[-1]
    block = {"channel": size, "tensor": None}.get(format.block, format.block)
    if block is None:
        return expected_block(x, format, rounding)
    result = np.zeros(rows.shape, np.float32)
    for at in np.ndindex(rows.shape[:-1]):
        for start in range(0, size, block):
            part = (*at, slice(start, start + block))
            result[part] = expected_block(rows[part], format, rounding)
    return np.moveaxis(result, -1, axis)


def floats(bits):
    return np.asarray(bits).astype(np.uint32).view(np.float32)


def hard_rows(seed=0, width=64):
    """Finite float32: all exponents, subnormals, powers of two and neighbours, ties, FLT_MAX."""
    rng = np.random.default_rng(seed)
    rows = []
    for spread in (2, 8, 20, 40):
        for top in rng.integers(1, 255, 8):
            low = max(0, int(top) - spread)
            rows.append(floats(rng.integers(low << 23, (int(top) + 1) << 23, width)))
    for width_of in range(1, 31):  # from one unit of 2^-149
        rows.append(floats(rng.integers(0, 2**width_of, width)))
    for power in (1, 2, 5, 30, 100, 127, 200, 253, 254):
        near = (np.maximum(power - rng.integers(0, 12, width), 0) << 23) + rng.integers(
            -2, 3, width
        )
        rows.append(floats(np.clip(near, 0, 0x7F7FFFFF)))
    for exponent in rng.integers(-149, 110, 20):  # ties of integers
        rows.append(np.ldexp(rng.integers(0, 512, width) / 2, exponent).astype(np.float32))
    rows += [np.full(width, LARGEST), np.zeros(width), np.r_[LARGEST, np.zeros(width - 1)]]
    rows = np.stack(rows).astype(np.float32)
    return np.copysign(rows, rng.choice([-1, 1], rows.shape)).astype(np.float32)


STATED = [
    *(FORMATS[name] for name in FORMATS if name[:2] in ("mx", "hb", "in")),
    Int(bits=3, narrow=True, block=16),
    Int(bits=8, symmetric=False, block=32),
    Int(bits=4, symmetric=False, block=48),
    FP8(element=formats.E4M3, block=24),
    FP8(element=formats.E5M2, block=24),
    FP8(element=formats.E2M3, block=24),
]


@pytest.mark.slow
@pytest.mark.parametrize("format", STATED, ids=str)
def test_every_kind_of_float32_against_ieee_arithmetic(format):
    x = hard_rows()
    for rounding, got in compiled(format)(x).items():
        np.testing.assert_array_equal(got, expected(x, format, rounding), err_msg=rounding)


@pytest.mark.parametrize("format", [MX(), Int(bits=4)], ids=str)
def test_operations_one_by_one_give_the_same(format):
    x = hard_rows()[::5, :32]
    with jax.disable_jit():
        got = quantize(x, format)
    np.testing.assert_array_equal(got, expected(x, format))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(STATED),
    st.sampled_from(["even", "away", "floor"]),
    st.lists(st.integers(0, 0x7F7FFFFF), min_size=12, max_size=12),
    st.integers(0, 30),
    st.integers(0, 4095),
)
def test_any_block_against_ieee_arithmetic(format, rounding, bits, shift, signs):
    x = np.zeros_like(hard_rows())
    x[0, :12] = floats((np.array(bits) >> shift) | ((signs >> np.arange(12) & 1) << 31))
    got = compiled(format)(x)[rounding]
    np.testing.assert_array_equal(got[:1], expected(x[:1], format, rounding))


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("mx")])
def test_mx_against_microxcaling_and_the_exact_reference(name):
    data = np.load(FIXTURES / "mx.npz")

    def blocks(key):  # one array of them: axes and longer rows have tests of their own
        x = data[key]
        return (x.T if key.split("/")[1].endswith("axis0") else x).reshape(-1, 32)

    sources = [key[3:] for key in data.files if f"spec_exact_rne/{key[3:]}/{name}" in data.files]
    assert len(sources) >= 3
    got = compiled(FORMATS[name])(np.concatenate([blocks(f"in/{source}") for source in sources]))
    for rounding, theirs in (("even", "even"), ("away", "nearest"), ("floor", "floor")):
        want = [blocks(f"out/{source}/{name}/{theirs}") for source in sources]
        np.testing.assert_array_equal(got[rounding], np.concatenate(want), err_msg=theirs)
    want = [blocks(f"spec_exact_rne/{source}/{name}") for source in sources]
    np.testing.assert_array_equal(got["even"], np.concatenate(want))


def test_hbfp_and_int8_against_the_code_of_the_paper():
    data = np.load(FIXTURES / "hbfp.npz")
    for source in ("gauss", "w_init", "outliers"):
        x = data[f"in/{source}"]
        sparse = np.where(nm_mask(np.abs(x), 2, 4), x, 0)
        np.testing.assert_array_equal(sparse, data[f"sparse_2_4/{source}"])
        for bits in (4, 6, 8):
            name = f"hbfp{bits}"
            np.testing.assert_array_equal(quantize(x, name), data[f"{name}_b64/{source}"])
            both = data[f"s_first/bfp{bits - 1}/structured/{source}"]
            np.testing.assert_array_equal(quantize(sparse, name), both)
        np.testing.assert_array_equal(quantize(x, "int8"), data[f"int8_w/{source}"])
        both = data[f"s_first/int8/structured/{source}"]
        np.testing.assert_array_equal(quantize(sparse, "int8"), both)


@pytest.mark.parametrize("source", ["gauss", "outliers"])
def test_both_orders_against_the_code_of_the_paper(source):
    """Equal magnitudes, of which it keeps others than we do, may change places."""
    data = np.load(FIXTURES / "hbfp.npz")
    x = data[f"in/{source}"]

    def half(x):
        return np.where(topk_mask(np.abs(x), x.size // 2), x, 0)

    one_of_four = np.where(nm_mask(np.abs(x), 1, 4), x, 0)
    np.testing.assert_array_equal(one_of_four, data[f"sparse_1_4/{source}"])
    np.testing.assert_array_equal(half(x), data[f"sparse_unstr50/{source}"])
    for theirs, ours in {"bfp7": "hbfp8", "bfp5": "hbfp6", "bfp3": "hbfp4", "int8": "int8"}.items():
        both = data[f"s_first/{theirs}/unstructured/{source}"]
        np.testing.assert_array_equal(quantize(half(x), ours), both)
        q = np.asarray(quantize(x, ours))
        for pattern, found, groups in (
            ("structured", np.where(nm_mask(np.abs(q), 2, 4), q, 0), (-1, 4)),
            ("unstructured", half(q), (1, -1)),
        ):
            want = data[f"q_first/{theirs}/{pattern}/{source}"]
            np.testing.assert_array_equal(want[want != 0], q[want != 0])
            got, want, each = (np.abs(y).reshape(groups) for y in (found, want, q))
            np.testing.assert_array_equal(np.sort(got), np.sort(want))
            kept = each.shape[1] // 2
            least = np.sort(each)[:, -kept, None]  # that is kept of a group
            np.testing.assert_array_equal(got[each != least], want[each != least])
            assert np.mean(each != least) > 0.1


def test_hbfp_with_the_epsilon_of_the_code():
    x = np.float32([2.0**-20, 2.0**-21, 0, 0])  # 2^-20 + 1e-8 is above a power of two
    np.testing.assert_array_equal(quantize(x, HBFP(mantissa_bits=3)), [7 * 2.0**-23, 2**-21, 0, 0])
    np.testing.assert_array_equal(quantize(x, HBFP(mantissa_bits=3, epsilon=1e-8)), x)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn, 448.0),
        ("fp8_e5m2", ml_dtypes.float8_e5m2, 57344.0),
    ],
)
def test_fp8_of_every_upper_half_of_a_float32(name, dtype, largest):
    upper = np.arange(2**16, dtype=np.uint32) << 16
    x = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = x.view(np.float32)
    x = x[~np.isnan(x)]
    want = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, name), want)
    assert np.isnan(quantize(np.float32([np.nan]), name)).all()


def expected_nvfp4(x, block, rounding):
    """Steps in float32, the casts by ml_dtypes (to nearest even)."""
    f = np.float32
    with np.errstate(divide="ignore", over="ignore"):
        tensor = min(f(2688) / np.abs(x).max(), f(2.0**100))
    result = np.zeros(x.shape, f)
    for row in range(len(x)):
        for start in range(0, x.shape[1], block):
            part = x[row, start : start + block]
            wanted = min(np.abs(part).max() / f(6) * tensor, f(448))
            stored = f(wanted.astype(ml_dtypes.float8_e4m3fn))
            if np.abs(part).max() > 0:
                stored = max(stored, f(2.0**-9))  # the least of E4M3: the block does not vanish
                scale = min(
                    stored / tensor, f(float.fromhex("0x1.555554p125"))
                )  # 6 of it are finite
                element = to_element(part / scale, formats.E2M1, rounding)
                result[row, start : start + block] = element.astype(f) * scale
    return result


def test_nvfp4_against_ieee_arithmetic():
    rng = np.random.default_rng(0)
    gauss = rng.normal(size=(8, 40)).astype(np.float32)
    heavy = gauss * np.exp(4 * rng.normal(size=gauss.shape)).astype(np.float32)
    arrays = [gauss, heavy, gauss * np.float32(1e-38), gauss * np.float32(5e37), 0 * gauss]
    arrays += [rows[:8, :40] for rows in np.array_split(hard_rows(), 9)]
    for x in arrays:
        for rounding, got in compiled(NVFP4())(x).items():
            np.testing.assert_array_equal(got, expected_nvfp4(x, 16, rounding), err_msg=rounding)
    assert np.isfinite(quantize(np.full((1, 16), LARGEST), "nvfp4")).all()


def test_an_nvfp4_block_beside_a_much_greater_one_does_not_vanish():
    x = np.zeros((1, 48), np.float32)
    x[0, 0] = 1
    x[0, 16:32] = np.linspace(-1e-6, 1e-6, 16)  # 1e-6 / 6 * 2688 is less than half of 2^-9
    got = np.asarray(quantize(x, "nvfp4"))
    scale = np.float32(2.0**-9 / 2688)
    np.testing.assert_allclose(got[0, 16:32] / scale, np.round(x[0, 16:32] / scale * 2) / 2, 1e-6)
    assert np.abs(got - x).max() < np.abs(x[0, 16:]).max() / 2
    assert NVFP4().raised(jnp.asarray(x), 1) == 1
    assert NVFP4().raised(jnp.ones((2, 32)), 1) == 0


@pytest.mark.parametrize(
    ("shape", "axis", "format"),
    [
        ((3, 50, 4), 1, MX(block=32)),
        ((50, 3), 0, HBFP(mantissa_bits=5, block=7)),
        ((2, 3, 65), -1, Int(bits=8, symmetric=False, block=64)),
        ((40, 130), 0, Int(bits=4, block="channel")),
        ((3, 80), -2, MX(element=formats.E2M1, block=32)),
        ((2500, 2), 0, Int(bits=8)),
        ((6, 331), 1, Int(bits=8, symmetric=False)),
        ((5, 96, 3), 0, Int(bits=8, block="tensor")),
    ],
)
def test_any_axis_and_blocks_that_do_not_divide(shape, axis, format):
    x = np.random.default_rng(1).standard_t(2, shape).astype(np.float32)
    np.testing.assert_array_equal(quantize(x, format, axis=axis), expected(x, format, axis=axis))


def test_long_blocks_find_their_maximum():
    for size in (37, 64, 1024, 2112):
        x = np.ones((3, size), np.float32)
        x[[0, 1, 2], [0, size // 2, size - 1]] = -127.5
        for axis, y in ((1, x), (0, x.T)):
            scale, _ = block_scales(y, Int(bits=8), axis=axis)
            np.testing.assert_array_equal(scale, np.ones(scale.shape))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxint8", "hbfp6", "int8", "nvfp4"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(name, bad):
    x = np.random.default_rng(3).normal(size=(2, 128)).astype(np.float32)
    format = FORMATS[name] if name != "int8" else Int(block=32)
    clean = np.asarray(quantize(x, format))
    x[1, 70] = bad
    got = np.asarray(quantize(x, format))
    start = 70 // format.block * format.block
    block = np.zeros(x.shape, bool)
    block[1, start : start + format.block] = True
    assert np.isnan(got[block]).all()
    if name != "nvfp4":  # the tensor scale may have been that of the block
        np.testing.assert_array_equal(got[~block], clean[~block])
    assert np.isfinite(got[~block]).all()


def test_stochastic_rounding_is_keyed_and_without_bias():
    key = jax.random.key(7)
    x = np.float32([[1.0, 0.3, -0.3, 0.0625, 0.9999, -1e-3, 0.5, 0.0]]).repeat(4000, 0)
    format = Int(bits=4, block="tensor", narrow=True)
    call = jax.jit(functools.partial(quantize, format=format, rounding="stochastic"))
    drawn = np.asarray(call(x, key=key))
    np.testing.assert_array_equal(drawn, quantize(x, format, rounding="stochastic", key=key))
    assert (drawn != np.asarray(call(x, key=jax.random.key(8)))).any()
    step = 1 / 7
    assert np.abs(drawn - x).max() < step * 1.00001
    low, high = np.floor(x[0] / step) * step, np.ceil(x[0] / step) * step
    deviation = np.sqrt(np.abs((x[0] - low) * (high - x[0])) / len(x))
    assert (np.abs(drawn.mean(0) - x[0]) <= 4.5 * deviation + 1e-6).all()
    assert (drawn[:, 0] == drawn[0, 0]).all()  # values of the format stay
    x = np.float32([[4.0, 1.25, -0.3, 1e-3]]).repeat(4000, 0)
    drawn = np.asarray(quantize(x, MX(block=4), rounding="stochastic", key=key))
    assert np.abs(drawn.mean(0) / x[0] - 1).max() < 0.02


@pytest.mark.slow
def test_static_scales():
    x = np.random.default_rng(4).normal(size=(6, 64)).astype(np.float32)
    for format in (
        Int(bits=8),
        Int(bits=4, block=16),
        Int(bits=8, symmetric=False, block="tensor"),
        Int(bits=4, symmetric=False, block=24),
        FP8(block="channel"),
        NVFP4(),
    ):
        scale, zero_point = block_scales(x, format)
        given_back = functools.partial(quantize, format=format, scale=scale, zero_point=zero_point)
        np.testing.assert_array_equal(given_back(x), quantize(x, format))
        np.testing.assert_array_equal(jax.jit(given_back)(x), quantize(x, format))
    scale, zero_point = np.float32(0.1), np.int32(-100)
    y = quantize(x, Int(symmetric=False, block="tensor"), scale=scale, zero_point=zero_point)
    codes = np.clip(np.round(x / scale) - 100, -128, 127)
    np.testing.assert_array_equal(y, ((codes + 100) * scale).astype(np.float32))
    big = np.float32([[1e30, -np.inf, 3.0, 1e-40]])
    y = quantize(big, Int(bits=8), scale=np.float32([[0.5]]))
    np.testing.assert_array_equal(y, [[63.5, -64, 3, 0]])


def test_straight_through_gradients():
    x = np.float32([[0.3, -2.0, 9.0, -9.0]])
    scale = np.float32([[0.5]])
    weights = np.float32([[1.0, 2.0, 3.0, 4.0]])

    def loss(x, **options):
        return jnp.sum(weights * fake_quantize(x, Int(bits=4), **options))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), weights)
    got = jax.grad(functools.partial(loss, scale=scale, clip_gradient=True))(x)
    np.testing.assert_array_equal(got, [[1, 2, 0, 0]])
    np.testing.assert_array_equal(
        clipped(x, Int(bits=4), scale=scale), [[False, False, True, True]]
    )
    value, tangent = jax.jvp(lambda x: fake_quantize(x, "mxfp4_e2m1"), (x,), (weights,))
    np.testing.assert_array_equal(value, quantize(x, "mxfp4_e2m1"))
    np.testing.assert_array_equal(tangent, weights)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("name", "axis"), [("mxfp8_e4m3", 0), ("hbfp6", 1), ("int8", 0), ("mxfp4_e2m1", 1)]
)
def test_whole_blocks_on_a_device_need_no_collective(kind, name, axis):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    spec = P(None, ("fsdp", "tensor")) if name == "int8" else P("fsdp", "tensor")
    sharding = NamedSharding(mesh, spec)
    x = np.random.default_rng(5).normal(size=(256, 256)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, sharding)
        call = jax.jit(functools.partial(fake_quantize, format=name, axis=axis))
        compiled = call.lower(sharded).compile()
        result = compiled(sharded)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-", "collective-", "reduce-scatter"))
    assert result.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(result, quantize(x, name, axis=axis))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(format="fp4"), "unknown format 'fp4'; use one of int4"),
        (dict(format="int8", rounding="up"), "rounding='up' is unknown; use even"),
        (dict(format="int8", rounding="stochastic"), "rounding='stochastic' with no key"),
        (dict(format="int8", axis=2), "axis=2 of an array of 2 axes"),
        (dict(format="mxint8", scale=1.0), "takes no scale; Int, FP8"),
        (dict(format="int8", scale=np.ones(3)), r"scale of shape \(3,\); use \(2, 1\)"),
        (dict(format="int8", scale=np.zeros((2, 1))), "not positive finite"),
        (dict(format=Int(symmetric=False), scale=np.ones((2, 1))), "needs a zero_point"),
        (dict(format="int8", zero_point=1), "zero_point without scale"),
    ],
)
def test_bad_arguments_get_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        quantize(np.ones((2, 8), np.float32), **options)
    assert "\n" not in str(error.value)
