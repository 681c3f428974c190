"""Which numbers a quantized matmul reads, against numpy; and masks of them, in both orders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsity import recipes
from sparsity.masks.bits import pack_bits
from sparsity.numbers.formats import HBFP, MX, NVFP4, Int
from sparsity.numbers.quantization import quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.pruning import Pruning
from sparsity.recipes.autoswitch import AutoSwitch, scale_by_step_adam
from sparsity.recipes.kernels import MaskedKernel, dense, dense_tree
from sparsity.recipes.patterns import Geometric

pytestmark = pytest.mark.usefixtures("quick_compiles")
ORDERS = ("sparsify_then_quantize", "quantize_then_sparsify")
BOTH = MatmulFormats(weights=MX(block=4), activations=MX(block=4))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kernel(w, *, axes=(-2,), order=ORDERS[0], key=None, **formats) -> QuantizedKernel:
    return QuantizedKernel(
        kernel=w,
        key=key,
        formats=MatmulFormats(**formats).resolved(),
        axes=axes,
        rank=max(-axes[0], 2),
        order=order,
        products=None,
    )


def masked(w, mask, decay=0.0, gradient=1.0) -> MaskedKernel:
    decay, gradient = (jnp.full(w.shape[:1], x, jnp.float32) for x in (decay, gradient))
    return MaskedKernel(weight=w, bits=pack_bits(mask), decay=decay, gradient=gradient, axis=-1)


def int8_columns(w):
    """numpy: each column of [inputs, outputs] in steps of max / 127.5."""
    scale = np.abs(w).max(0) / np.float32(127.5)
    return np.clip(np.round(w / scale), -128, 127) * scale


def test_weights_have_blocks_along_all_inputs_of_a_layer():
    w = normal(3, 4, 6, 10)  # [layers, heads, head_dim, outputs]
    got = kernel(w, axes=(-3, -2), weights="int8").dense()
    want = [int8_columns(layer.reshape(24, 10)).reshape(4, 6, 10) for layer in w]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    turned = kernel(w, axes=(-3, -2), weights="int8").turned()  # a row of 10 outputs has a scale
    want = [int8_columns(layer.reshape(24, 10).T).T.reshape(4, 6, 10) for layer in w]
    np.testing.assert_allclose(turned, want, rtol=1e-6)


def test_a_scale_of_the_whole_kernel_is_one_of_its_layer():
    w = normal(2, 8, 8) * np.array([1, 100], np.float32)[:, None, None]
    got = kernel(w, weights=Int(block="tensor")).dense()
    for layer, read in zip(w, got, strict=True):
        np.testing.assert_allclose(
            read, int8_columns(layer.reshape(64, 1)).reshape(8, 8), rtol=1e-6
        )


def test_activations_of_a_token_do_not_depend_on_others():
    """Not even in formats with one scale for a whole array, nor do blocks go over tokens."""
    x = normal(2, 5, 4, 4)
    changed = x.copy()
    changed[:, 3:] *= 1000
    for format in (Int(block="tensor"), NVFP4(block=4), "int8", HBFP(block=16), MX(block=8)):
        one = kernel(normal(4, 4, 3), axes=(-3, -2), activations=format)
        got = np.asarray(one.inputs(x))
        np.testing.assert_array_equal(np.asarray(one.inputs(changed))[:, :3], got[:, :3])
        assert np.any(got != x)
    flat = np.asarray(kernel(normal(4, 4, 3), axes=(-3, -2), activations="int8").inputs(x))
    rows = x.reshape(10, 16)
    np.testing.assert_allclose(flat.reshape(10, 16), int8_columns(rows.T).T, rtol=1e-6)


def test_operands_along_tokens_and_of_attention():
    x = normal(2, 8, 6)
    one = kernel(normal(6, 3), activations=MX(block=4), gradients="int8")
    want = np.stack([quantize(row, MX(block=4), axis=0) for row in x])
    np.testing.assert_array_equal(one.inputs_by_tokens(x), want)
    want = np.stack([int8_columns(row) for row in x])  # over the tokens of one sequence
    np.testing.assert_allclose(one.gradients_by_tokens(x), want, rtol=1e-6)
    y = normal(2, 8, 3, 4)
    operand = dataclasses.replace(one, products=Int(block="tensor")).product_operand(y)
    want = int8_columns(y.reshape(-1, 4).T).T.reshape(y.shape)
    np.testing.assert_allclose(operand, want, rtol=1e-6)


def test_the_order_says_whether_a_mask_is_seen_by_the_scales():
    w = np.array([[[8.0, 1.03, 0.51, 0.26]]], np.float32).swapaxes(1, 2)  # the 8 sets the scale
    mask = np.array([[[0, 1, 1, 0]]]).swapaxes(1, 2) == 1
    block = MX(block=4)
    first, then = (
        np.asarray(kernel(masked(w, mask), order=order, weights=block).dense()) for order in ORDERS
    )
    np.testing.assert_array_equal(first, quantize(mask * w, block, axis=-2))
    np.testing.assert_array_equal(then, mask * np.asarray(quantize(w, block, axis=-2)))
    coarse = Int(bits=4, block="channel")
    reads = [
        np.asarray(kernel(masked(w, mask), order=order, weights=coarse).dense()) for order in ORDERS
    ]
    assert np.any(reads[0] != reads[1])


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_pass_straight_through_and_by_the_rule_of_the_mask(order):
    w, d = normal(2, 8, 4), normal(2, 8, 4, seed=1)
    mask = normal(2, 8, 4, seed=2) > 0

    def read(w, make):
        return jnp.vdot(kernel(make(w), order=order, weights="int4").dense(), d)

    np.testing.assert_array_equal(jax.grad(read)(w, lambda w: w), d)
    got = jax.grad(read)(w, lambda w: masked(w, mask, decay=0.5, gradient=0.25))
    np.testing.assert_array_equal(got, np.where(mask, d, 0.25 * d))


@pytest.mark.parametrize("order", ORDERS)
def test_packed_kernels_read_as_the_masked_ones_do(order):
    params = {"kernel": jnp.asarray(normal(16, 8))}
    recipe = dataclasses.replace(recipes.asp({"kernel": "2:4"}), packed=True)
    formats = MatmulFormats(weights="nvfp4", rounding="stochastic")
    quantizer = Quantization(layers={"kernel": formats}, order=order).build(params)
    updater = recipe.build(params, steps=4, scored=quantizer.scored)
    state = updater.wrap_optax(optax.adam(1e-2)).init(params)
    params = updater.post_gradient_update(params, state)
    packed, packed_state = updater.pack(params, state)
    clock = jnp.asarray(3, jnp.int32)
    one, other = (
        dense_tree(quantizer.weights(updater.weights(*pair), clock))["kernel"]
        for pair in ((params, state), (packed, packed_state))
    )
    np.testing.assert_array_equal(one, other)
    assert np.mean(np.asarray(one) == 0) >= 0.5


def test_masks_of_quantized_weights_break_ties_by_index():
    # In steps of a quarter of a power of two 1.02, 1.01 and 1.03 are one number.
    w = jnp.asarray([[1.02], [1.01], [0.2], [1.03]])
    quantizer = Quantization(
        layers={"w": MatmulFormats(weights=HBFP(mantissa_bits=3, block=4))}, order=ORDERS[1]
    ).build({"w": w})
    for scored, want in ((quantizer.scored, [1, 1, 0, 0]), (None, [1, 0, 0, 1])):
        updater = recipes.sr_ste({"w": "2:4"}).build({"w": w}, steps=4, scored=scored)
        state = updater.wrap_optax(optax.sgd(0.0)).init({"w": w})
        np.testing.assert_array_equal(updater.masks(state)["w"][:, 0], want)
        assert dense(updater.weights({"w": w}, state)["w"])[0, 0] == jnp.float32(1.02)


NAMES = ("sr_ste", "mask_decay", "structure_decay", "mdgf_linear", "mdgf_exponential")
NAMES += ("sdgf_stepwise", "sdgf_geometric", "step", "asp")
ALGORITHMS = ("magnitude", "magnitude_ste", "topkast", "rigl", "saliency", "iterative_nm")


@jax.jit
def _mx_of_inputs(w):
    return quantize(w.swapaxes(1, 2), BOTH.weights).swapaxes(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES + ALGORITHMS)
def test_every_recipe_trains_quantized_in_either_order(name, order):
    """What is read is always the quantized kernel of the mask that the recipe says."""
    params = {"layer": {"kernel": jnp.asarray(normal(2, 16, 8))}}  # stacked
    quantization = Quantization(layers={"kernel": BOTH}, order=order)
    quantizer = quantization.build(params, contraction=lambda name, shape: (-2,))
    inner = optax.adam(1e-2)
    if name in NAMES:
        made = getattr(recipes, name)({"kernel": "2:4"})
        if name == "step":
            switch = AutoSwitch(window=1, threshold=1e9, min_fraction=0.0, max_fraction=0.5)
            made = dataclasses.replace(made, variance=switch)
            inner = optax.chain(scale_by_step_adam(switch=switch, steps=4), optax.scale(-1e-2))
        if name == "sdgf_geometric":
            made = dataclasses.replace(made, pattern=Geometric(k=4))
    else:
        nm = {"sparsity": 0.5, "sparsity_type": "2:4"} if name == "iterative_nm" else {}
        made = Pruning(algorithm=name, layers=("kernel",), start_fraction=0, update_every=1, **nm)
    options = {"contraction": lambda name, shape: (-2,), "steps": 4}
    if order == ORDERS[1]:
        options["scored"] = quantizer.scored
    updater = made.build(params, **options)
    optimizer = updater.wrap_optax(inner)
    target = normal(2, 16, 8, seed=3)

    @jax.jit
    def step(params, state):
        def loss(params):
            read = dense_tree(quantizer.weights(updater.weights(params, state)))
            return jnp.sum((read["layer"]["kernel"] - target) ** 2), read

        (value, read), grads = jax.value_and_grad(loss, has_aux=True)(params)
        masks = updater.masks(state, params)["layer"]["kernel"]
        updates, new = optimizer.update(grads, state, params)
        new_params = updater.post_gradient_update(optax.apply_updates(params, updates), new)
        return new_params, new, value, read["layer"]["kernel"], masks

    @jax.jit
    def start(params):
        state = optimizer.init(params)
        return updater.post_gradient_update(params, state), state

    params, state = start(params)
    first, values = np.asarray(params["layer"]["kernel"]), []
    for i in range(3):
        w = np.asarray(params["layer"]["kernel"])
        decay = float(updater.settings(state)["decay"]) if name in NAMES else 0.0
        params, state, value, read, mask = step(params, state)
        values.append(float(value))
        q = lambda w: np.asarray(_mx_of_inputs(w))
        mask = np.asarray(mask) == 1
        if order == ORDERS[0]:
            want = q(np.where(mask, w, np.float32(decay) * w))
        else:
            want = np.where(mask, q(w), np.float32(decay) * q(w))
        np.testing.assert_array_equal(np.asarray(read), want, err_msg=f"step {i}")
    if name in NAMES:
        assert values[-1] < values[0]
    assert np.any(np.asarray(params["layer"]["kernel"]) != first)


def test_random_bits_are_of_the_seed_the_step_and_the_kernel():
    params = {"a": jnp.full((2, 8, 4), 1 / 3), "b": jnp.full((2, 8, 4), 1 / 3)}
    stochastic = MatmulFormats(weights=Int(bits=4, block=4), rounding="stochastic")

    def read(clock, seed=0):
        quantizer = Quantization(layers={"": stochastic}).build(
            {n: w + jnp.arange(8)[:, None] for n, w in params.items()}, seed=seed
        )
        w = {n: w + jnp.arange(8)[:, None] for n, w in params.items()}
        return jax.device_get(dense_tree(quantizer.weights(w, clock)))

    one = read(jnp.asarray(1))
    jax.tree.map(np.testing.assert_array_equal, one, read(jnp.asarray(1)))
    for other in (read(jnp.asarray(2)), read(jnp.asarray(1), seed=1)):
        assert np.any(other["a"] != one["a"])
    assert np.any(one["a"] != one["b"])
    assert np.any(one["a"][0] != one["a"][1])  # the layers
    even = read(None)
    np.testing.assert_array_equal(even["a"], even["b"])


def test_errors_and_clipped_weights_are_counted():
    w = normal(2, 8, 4)
    w[0, 0, 0], w[1, 4, 2] = 1.99 * 2, 1.99 * 4  # above 1.75 of their power of two
    quantizer = Quantization(layers={"w": MatmulFormats(weights=MX(block=4))}).build({"w": w})
    error, clipped = quantizer.errors({"w": jnp.asarray(w)})["w"]
    q = np.asarray(kernel(w, weights=MX(block=4)).dense())
    assert float(error) == pytest.approx(np.linalg.norm(q - w) / np.linalg.norm(w), rel=1e-5)
    blocks = np.abs(w.reshape(2, 2, 4, 4))
    top = 1.75 * 2.0 ** np.floor(np.log2(blocks.max(2, keepdims=True)))
    assert float(clipped) == pytest.approx(np.mean(blocks > top))
    assert clipped >= 2 / 64


def test_what_is_quantized_and_what_is_not_is_said():
    params = {"attention": {"query": {"kernel": normal(8, 2, 4)}}, "head": normal(8, 4)}
    contraction = lambda name, shape: (-len(shape),)
    build = lambda **options: Quantization(**options).build(
        params, contraction=contraction, attention_operands=["attention/query/kernel"]
    )
    said = build(layers={"query": BOTH}).describe()
    assert "weights mxfp8_e4m3 in blocks of 4" in said
    assert said.endswith("in full precision: head, the products of attention")
    said = build(layers={"head": "int8"}, attention="int8").describe()
    assert "weights int8, activations int8 of head; int8 queries, keys and values" in said
    assert said.endswith("in full precision: attention/query, the probabilities of attention")
    native = MatmulFormats(weights="int8", activations="int8", matmul="native")
    assert "activations int8 (native matmul) of head;" in build(layers={"head": native}).describe()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Quantization(layers={"w": "int9"}), r"'w': unknown format 'int9'; use .*int8"),
        (lambda: Quantization(layers={"w": 8}), r"'w': 8; use the name of a format"),
        (lambda: Quantization(order="both"), r"order='both' is unknown; use sparsify_then"),
        (lambda: Quantization(attention="mx"), r"attention: unknown format 'mx'"),
        (lambda: MatmulFormats(rounding="up"), r"rounding='up' is unknown; use even"),
        (lambda: build({"v": "int8"}), r"'v' matches no (parameter|matmul)"),
        (lambda: build({"w": "hbfp8"}), r"w: weights: 48 entries are not cut into blocks of 64"),
        (lambda: build({"w": "int8"}, attention="int8"), r"attention='int8' and no kernel"),
        (
            lambda: build({"w": MatmulFormats(gradients=MX(block=10))}),
            r"w: gradients: 32 entries are not cut into blocks of 10",
        ),
        (
            lambda: build({"w": MatmulFormats(gradients="mxfp8_e4m3")}, tokens=(80, 1)),
            r"gradients along tokens: 80 entries are not cut into blocks of 32",
        ),
        (
            lambda: build({"w": BOTH}, ways=lambda name: (8, 1)),
            r"w: activations: 8 shards of 48 entries cut blocks of 4",
        ),
    ],
)
def test_a_mistake_is_one_line(make, says):
    with pytest.raises(ValueError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def build(layers, *, attention=None, tokens=None, ways=lambda name: (1, 1)):
    quantization = Quantization(layers=layers, attention=attention)
    params = {"w": normal(48, 32)}
    return quantization.build(params, tokens=tokens, activation_ways=ways)
