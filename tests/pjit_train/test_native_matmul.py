"""Matmuls of codes, held against numpy, and against the emulation of the same formats."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import LLAMA, make_batch, make_program

from pjit_train.errors import UserError
from pjit_train.models.projection import StoredKernel, project
from pjit_train.sharding import Rules
from sparsity import recipes
from sparsity.masks.bits import pack_bits
from sparsity.numbers.formats import E5M2, FP8, MX, Int
from sparsity.numbers.native import check_matmul, codes_of
from sparsity.numbers.quantization import quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.recipes.kernels import MaskedKernel

pytestmark = pytest.mark.usefixtures("quick_compiles")
KERNELS = "(attention|feed_forward)/.*kernel"
SPARSE = "(attention/(query|key|value)|feed_forward)/.*kernel"
ORDERS = ("sparsify_then_quantize", "quantize_then_sparsify")
E4M3_CHANNEL, E5M2_CHANNEL = FP8(block="channel"), FP8(element=E5M2, block="channel")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kernel(w, matmul="native", *, axes=(-2,), order=ORDERS[0], key=None, **formats):
    return QuantizedKernel(
        kernel=w,
        key=key,
        formats=MatmulFormats(matmul=matmul, **formats).resolved(),
        axes=axes,
        rank=max(-axes[0], 2),
        order=order,
        products=None,
    )


def projected(equation, x, stored, dtype=None):
    """`project` without a mesh."""
    axes = (None,) * stored.ndim
    kernel = StoredKernel(stored=stored, rules=Rules(), axes=axes, dtype=dtype)
    return project(equation, x, kernel, None)


@functools.partial(jax.jit, static_argnames="equation")
def pulled(equation, x, stored, d_y):
    """(y, d_x, d_w) of a matmul with a quantized kernel of an array."""
    y, pull = jax.vjp(lambda x, k: projected(equation, x, k), x, stored)
    d_x, d_stored = pull(d_y)
    return y, d_x, d_stored.kernel


def int8(x, axis):
    """numpy: (codes, scales), in steps of max / 127.5."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127.5)
    return np.clip(np.round(x / scale), -128, 127).astype(np.int64), scale


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        ("int8", jnp.int8),
        (Int(bits=4, narrow=True), jnp.int8),
        (Int(block="tensor"), jnp.int8),
        ("fp8_e4m3", jnp.float8_e4m3fn),
        (E4M3_CHANNEL, jnp.float8_e4m3fn),
        (E5M2_CHANNEL, jnp.float8_e5m2),
    ],
)
def test_codes_times_scales_are_the_numbers_of_the_format(format, dtype):
    x = normal(3, 4, 6, 5) * np.float32(10.0) ** np.arange(-2, 3, dtype=np.float32)
    formats = MatmulFormats(weights=format).resolved()
    codes, scale = codes_of(x, formats.weights, (-3, -2))
    assert codes.dtype == dtype
    assert codes.shape == x.shape
    want = quantize(x.reshape(3, 24, 5), format, axis=1).reshape(x.shape)
    np.testing.assert_array_equal(np.asarray(codes, np.float32) * scale, want)


def test_int8_is_the_sum_of_integers_bit_for_bit():
    """Of [heads, head_dim, outputs], and of outputs [heads, head_dim]."""
    x, w = normal(2, 8, 4, 16), normal(4, 16, 10, seed=1)
    x_codes, x_scale = int8(x.reshape(2, 8, 64), -1)
    w_codes, w_scale = int8(w.reshape(64, 10), 0)
    want = (x_codes @ w_codes).astype(np.float32) * x_scale * w_scale
    stored = kernel(w, axes=(-3, -2), weights="int8", activations="int8")
    got = pulled("bthk,hkd->btd", x, stored, normal(2, 8, 10))[0]
    np.testing.assert_array_equal(got, want)
    stored = kernel(w.reshape(64, 5, 2), axes=(-3,), weights="int8", activations="int8")
    got = pulled("btd,dhk->bthk", x.reshape(2, 8, 64), stored, normal(2, 8, 5, 2))[0]
    np.testing.assert_array_equal(got, want.reshape(2, 8, 5, 2))


def test_int8_is_the_emulation_bit_for_bit_where_that_is_exact():
    """Where scales are powers of two, and sums of products less than 2^24 of their steps."""
    rng = np.random.default_rng(2)
    x, w = (rng.integers(-127, 128, s).astype(np.float32) for s in ((2, 8, 64), (64, 24)))
    x[..., 0], w[0] = 127.5, -127.5
    x *= 2.0 ** rng.integers(-9, 9, (2, 8, 1))
    w *= 2.0 ** rng.integers(-9, 9, 24)
    ways = [
        pulled(
            "btd,df->btf",
            x.astype(np.float32),
            kernel(w.astype(np.float32), way, weights="int8", activations="int8"),
            normal(2, 8, 24),
        )
        for way in ("native", "emulated")
    ]
    jax.tree.map(np.testing.assert_array_equal, *ways)


@pytest.mark.slow
@pytest.mark.parametrize(
    "formats",
    [
        dict(weights="int8", activations=Int(block="tensor"), gradients="int8"),
        dict(weights=Int(bits=4), activations="int8", rounding="stochastic"),
        dict(weights="fp8_e4m3", activations="fp8_e4m3"),
        dict(weights=FP8(block="tensor"), activations=E5M2_CHANNEL, rounding="floor"),
        dict(weights=E5M2_CHANNEL, activations=E4M3_CHANNEL, gradients=E5M2_CHANNEL),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_native_is_the_emulation_but_for_the_order_of_the_sum(formats, dtype):
    x, w, d_y = normal(2, 8, 64), normal(64, 24, seed=1), normal(2, 8, 24, seed=2)
    x, d_y = jnp.asarray(x, dtype), jnp.asarray(d_y, dtype)
    key = jax.random.key_data(jax.random.key(5)) if "stochastic" in formats.values() else None

    @jax.jit
    def both(x, w):
        return [
            jax.vjp(
                lambda x, k: projected("btd,df->btf", x, k, dtype),
                x,
                kernel(w, way, key=key, **formats),
            )
            for way in ("native", "emulated")
        ]

    (y, pull), (emulated, emulated_pull) = both(x, w)
    assert y.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2  # the emulation rounds its operands besides
    wide = functools.partial(np.asarray, dtype=np.float32)
    size = np.abs(wide(emulated)).max()
    np.testing.assert_allclose(wide(y), wide(emulated), rtol=0, atol=tolerance * size)
    for got, want in zip(pull(d_y), emulated_pull(d_y), strict=True):
        got, want = (wide(g.kernel if isinstance(g, QuantizedKernel) else g) for g in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", [0.0, 0.375, 1.0])
def test_masks_in_either_order(order, decay):
    x, w = normal(2, 8, 32), normal(32, 16, seed=1)
    mask = np.argsort(np.argsort(-np.abs(w.reshape(8, 4, 16)), 1), 1).reshape(32, 16) < 2  # 2:4
    factor = np.where(mask, 1, np.float32(decay))
    stored = MaskedKernel(
        weight=w, bits=pack_bits(mask), decay=jnp.float32(decay), gradient=jnp.float32(1), axis=-1
    )
    stored = kernel(stored, order=order, weights="int8", activations="int8")
    y, pull = jax.vjp(lambda x, k: projected("btd,df->btf", x, k), x, stored)
    x_codes, x_scale = int8(x, -1)
    w_codes, w_scale = int8(w * factor if order == ORDERS[0] else w, 0)
    w_read = w_codes * np.float64(w_scale) * (1 if order == ORDERS[0] else factor)
    want = (x_codes * np.float64(x_scale)) @ w_read
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    d_y = normal(2, 8, 16, seed=2)
    np.testing.assert_allclose(pull(d_y)[0], d_y @ w_read.T, rtol=1e-4, atol=1e-5)


def dots_of(text: str, of: str, to: str) -> int:
    """How many dots of a program in text have operands and result of these types."""
    count = 0
    for computation in text.split("\n\n"):
        types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", computation))
        for result, operands in re.findall(r"= (\w+)\[[^=]*? dot\(([^)]*)\)", computation):
            names = re.findall(r"%[\w.-]+", operands)
            count += result == to and [types.get(name) for name in names] == [of, of]
    return count


def stepped(matmul: str, mesh: dict[str, int]):
    """(text of the compiled step, losses) of a short run: a soft 2:4 mask of int8 kernels."""
    formats = dict(weights="int8", activations="int8", matmul=matmul)
    layers = {"up/": MatmulFormats(rounding="stochastic", **formats)}
    program = make_program(
        LLAMA,
        mesh,
        sparsity=recipes.mask_decay({SPARSE: "2:4"}),
        quantization=Quantization(
            layers={**layers, KERNELS: MatmulFormats(**formats)}, order=ORDERS[1]
        ),
    )
    state, losses = program.new_state(), []
    step = program.compile_step(make_batch(program, 0))
    for i in range(3):
        state, figures = step(state, make_batch(program, i))
        losses.append(float(figures["loss"]))
    return step.as_text(), losses


@pytest.mark.slow
def test_a_sharded_step_multiplies_int8_and_gathers_bytes():
    """Scanned layers, inputs split over fsdp and over tensor, the mask after the scales."""
    text, losses = stepped("native", {"data": 2, "fsdp": 2, "tensor": 2})
    assert dots_of(text, "s8", "s32") == 7 + 6  # those of pruned weights, in branches
    gathers = re.findall(r" = (\w+)\[[^=]*? all-gather\(", text)
    assert gathers.count("s8") >= 14  # forward and backward
    emulated, want = stepped("emulated", {})
    assert dots_of(emulated, "s8", "s32") == 0
    np.testing.assert_allclose(losses, want, rtol=1e-4)


def test_fp8_reaches_the_compiler_as_fp8():
    """Lowered for a CPU and for a GPU; the CPU's XLA then takes it for float32."""
    one = kernel(normal(64, 24), weights=E4M3_CHANNEL, activations=E5M2_CHANNEL)
    traced = jax.jit(lambda x: projected("btd,df->btf", x, one)).trace(normal(2, 8, 64))
    wanted = r"dot_general.*tensor<2x8x64xf8E5M2>, tensor<64x24xf8E4M3FN>\) -> tensor<2x8x24xf32>"
    for platform in ("cpu", "cuda"):
        assert re.search(wanted, traced.lower(lowering_platforms=(platform,)).as_text())


def device(platform, kind, **more):
    return SimpleNamespace(platform=platform, device_kind=kind, **more)


TPU_V4, TPU_V5P, TPU_7X = (device("tpu", f"TPU{v}") for v in (" v4", " v5p", "7x"))
A100, H100 = (
    device("gpu", f"NVIDIA {n}", compute_capability=c)
    for n, c in (("A100", "8.0"), ("H100", "9.0"))
)
MI300 = device("gpu", "MI300X", compute_capability="gfx942")
CPU = device("cpu", "cpu")
INT8_PAIR, FP8_PAIR = (Int(), Int(bits=4)), (FP8(), E5M2_CHANNEL)


@pytest.mark.parametrize("where", [CPU, TPU_V5P, A100, H100])
def test_devices_with_int8(where):
    check_matmul(*INT8_PAIR, 4096, where)


@pytest.mark.parametrize("where", [CPU, TPU_7X, H100])
def test_devices_with_fp8(where):
    check_matmul(*FP8_PAIR, 2**20, where)


def native(weights, activations=None):
    return MatmulFormats(weights=weights, activations=activations or weights, matmul="native")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MatmulFormats(matmul="fast"), r"matmul='fast' is unknown; use emulated or native"),
        (lambda: native("mxfp8_e4m3"), r"one scale to an output.*are mxfp8_e4m3; use int8 or fp8"),
        (lambda: native("int8", "nvfp4"), r"activations are nvfp4; .*or matmul='emulated'"),
        (lambda: native(Int(block=64)), r"weights are int8 in blocks of 64; .*matmul='emulated'"),
        (lambda: native(Int(symmetric=False)), r"takes no zero point.*use int8"),
        (lambda: MatmulFormats(weights="int8", matmul="native"), r"activations are None; use int8"),
        (
            lambda: native("int8", "fp8_e4m3"),
            r"operands of one kind.*use int8 or fp8_e4m3 for both",
        ),
        (lambda: native("fp8_e5m2"), r"E5M2 and E5M2.*use E4M3 for weights or activations"),
        (lambda: check_matmul(*FP8_PAIR, 64, A100), r"A100 has no 8-bit float matmul; use int8 of"),
        (lambda: check_matmul(*FP8_PAIR, 64, MI300), r"MI300X has no .*; use matmul='emulated'"),
        (
            lambda: check_matmul(*INT8_PAIR, 64, TPU_V4),
            r"TPU v4 has no int8.*use matmul='emulated'",
        ),
        (lambda: check_matmul(*INT8_PAIR, 64, TPU_7X), r"TPU7x has no int8 matmul; use fp8_e4m3"),
        (
            lambda: check_matmul(Int(), Int(), 2**17, H100),
            r"131072 products.*at most 131071 inputs",
        ),
        (
            lambda: Quantization(layers={"w": native("int8")}).build({"w": np.zeros((2**17, 1))}),
            r"^quantization: w: matmul='native' sums 131072",
        ),
        (lambda: Quantization(layers={"w": native("int8", MX())}), r"are mxfp8_e4m3;"),
    ],
)
def test_what_is_not_there_is_one_line(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_head_says_that_it_has_none():
    program = make_program(LLAMA, quantization=Quantization(layers={"head": native("int8")}))
    with pytest.raises(UserError, match=r"the head has no native matmul; give it") as error:
        program.compile_step(make_batch(program, 0))
    assert "\n" not in str(error.value)
