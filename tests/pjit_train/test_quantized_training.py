"""Quantized matmuls in the trainer: their gradients, a whole step, layouts, resuming, mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.collectives import collectives
from helpers.run_directories import rows
from helpers.tiny_models import GPT2, LLAMA, make_batch, make_program

from pjit_train.checkpoint import CheckpointConfig
from pjit_train.errors import UserError
from pjit_train.evaluate import evaluate
from pjit_train.language_model import of_run
from pjit_train.loop import train
from pjit_train.models.blocks import rotary_angles, rotate
from pjit_train.models.projection import StoredKernel, project
from pjit_train.models.sampler import Choice
from pjit_train.optimizers import SGD, Schedule
from pjit_train.sample import TextSampler
from pjit_train.sharding import Rules
from sparsity import recipes
from sparsity.numbers.formats import HBFP, MX, Int
from sparsity.numbers.quantization import quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.recipes.kernels import dense_tree

pytestmark = pytest.mark.usefixtures("quick_compiles")
KERNELS = "(attention/(query|key|value)|feed_forward)/.*kernel"
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
FOURS, TWOS = MX(block=4), MX(block=2)
STOCHASTIC = MatmulFormats(
    weights=TWOS,
    activations=TWOS,
    gradients=TWOS,
    rounding="stochastic",
    gradient_rounding="stochastic",
)


def both(format) -> MatmulFormats:
    return MatmulFormats(weights=format, activations=format)


@pytest.mark.parametrize("gradients", [None, "hbfp6"])
def test_gradients_of_a_matmul_are_the_straight_through_ones(gradients):
    """Of [heads, head_dim, outputs]: blocks lie along both input axes, taken as one."""
    rng = np.random.default_rng(0)
    x, w, d_y = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 64, 4, 16), (4, 16, 64), (2, 64, 64))
    )
    formats = MatmulFormats(weights="mxfp4_e2m1", activations="int4", gradients=gradients)
    kernel = QuantizedKernel(
        kernel=w,
        key=None,
        formats=formats.resolved(),
        axes=(-3, -2),
        rank=3,
        order="sparsify_then_quantize",
        products=None,
    )

    stored = StoredKernel(stored=kernel, rules=Rules(), axes=(None, None, None), dtype=None)

    @jax.jit
    def pulled(x, stored):
        y, pull = jax.vjp(lambda x, k: project("bthk,hkd->btd", x, k, None), x, stored)
        d_x, d_stored = pull(d_y)
        return y, d_x, d_stored.stored.kernel

    # The definition, in matrices: [tokens, inputs] and [inputs, outputs].
    flat_x, flat_w = x.reshape(2, 64, 64), w.reshape(64, 64)
    x_q = np.asarray(quantize(flat_x, "int4", axis=2))
    w_q = np.asarray(quantize(flat_w, "mxfp4_e2m1", axis=0))
    d_y_q, d_y_t, w_t, x_t = d_y, d_y, w_q, x_q
    if gradients is not None:
        d_y_q, d_y_t = (np.asarray(quantize(d_y, "hbfp6", axis=axis)) for axis in (2, 1))
        w_t = np.asarray(quantize(flat_w, "mxfp4_e2m1", axis=1))
        x_t = np.asarray(quantize(flat_x, "int4", axis=1))
    y, d_x, d_w = pulled(x, stored)
    np.testing.assert_allclose(y, x_q @ w_q, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_x.reshape(2, 64, 64), d_y_q @ w_t.T, rtol=1e-4, atol=1e-4)
    want = np.einsum("bti,bto->io", x_t, d_y_t)
    np.testing.assert_allclose(d_w.reshape(64, 64), want, rtol=1e-4, atol=1e-4)


def reference_loss(params, tokens, targets):
    """LLAMA in plain jnp, its matmuls of values that are rounded and passed straight through."""

    def q(x, axis, format=FOURS):
        return x + jax.lax.stop_gradient(quantize(x, format, axis=axis) - x)

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def matmul(x, w):
        return jnp.einsum("btd,df->btf", q(x, -1), q(w, 0))

    c = LLAMA
    length = tokens.shape[1]
    angles = rotary_angles(jnp.arange(length), c.head_dim, c.rope_theta)
    x = params["embedding"][tokens]
    for layer in range(c.num_layers):
        block = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        h = norm(x, block["attention_norm"]["scale"])
        heads = {}
        for name in ("query", "key", "value"):
            kernel = block["attention"][name]["kernel"]
            heads[name] = matmul(h, kernel.reshape(c.d_model, -1)).reshape(
                *h.shape[:2], *kernel.shape[1:]
            )
        k, v = (
            jnp.repeat(x, c.num_heads // c.num_kv_heads, axis=2)
            for x in (
                q(rotate(heads["key"], angles), -1, Int()),
                q(heads["value"], -1, Int()),
            )
        )
        logits = jnp.einsum("bthk,bshk->bhts", q(rotate(heads["query"], angles), -1, Int()), k)
        logits = jnp.where(np.tri(length, dtype=bool), logits / np.sqrt(c.head_dim), -jnp.inf)
        attended = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)
        x += jnp.einsum("bthk,hkd->btd", attended, block["attention"]["out"]["kernel"])
        h = norm(x, block["feed_forward_norm"]["scale"])
        kernels = {name: p["kernel"] for name, p in block["feed_forward"].items()}
        gated = jax.nn.silu(matmul(h, kernels["gate"])) * matmul(h, kernels["up"])
        x += matmul(gated, kernels["down"])
    logits = matmul(norm(x, params["norm"]["scale"]), params["head"])
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -jnp.mean(picked)


def test_a_step_is_that_of_a_plain_implementation():
    rate = 0.5  # half of it in the first step, which warms up
    program = make_program(
        LLAMA,
        quantization=Quantization(
            layers={KERNELS: both(FOURS), "head": both(FOURS)}, attention="int8"
        ),
        optimizer=SGD(
            learning_rate=rate, clip_norm=None, schedule=Schedule(shape="constant", warmup_steps=1)
        ),
    )
    state, batch = program.new_state(), make_batch(program, 0)
    params = jax.device_get(state["params"])
    loss, grads = jax.jit(jax.value_and_grad(reference_loss))(
        params, np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    )
    after, figures = program.compile_step(batch)(state, batch)
    # A sum in another order may round to the neighbour, so a few numbers differ by as much.
    np.testing.assert_allclose(figures["loss"], loss, rtol=1e-5)
    moved = jax.tree.map(
        lambda new, old: (old - new) / (rate / 2), jax.device_get(after["params"]), params
    )
    for got, want in zip(jax.tree.leaves(moved), jax.tree.leaves(grads), strict=True):
        assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


@functools.cache
def stepped(name: str, sharded: bool, quantized: bool = True):
    """(collectives of the step, weights read before and after training, losses) of a short run."""
    model, sparsity, quantization = LAYOUTS[name]
    program = make_program(
        model,
        MESH if sharded else {},
        sparsity=sparsity,
        quantization=quantization if quantized else None,
    )
    state, losses = program.new_state(), []
    step = program.compile_step(make_batch(program, 0))
    hlo = step.as_text()
    read = jax.device_get(jax.jit(dense_tree)(program.weights(state)))
    for i in range(3):
        state, figures = step(state, make_batch(program, i))
        losses.append(float(figures["loss"]))
    return (collectives(hlo), hlo.count("all-reduce("), hlo.count("all-gather(")), read, losses


SPARSE = recipes.sr_ste({KERNELS: "2:4"})
LAYOUTS = {
    "stochastic": (
        LLAMA,
        SPARSE,
        Quantization(
            layers={"head": both(FOURS), "up/": STOCHASTIC, KERNELS: both(FOURS)}, attention="int8"
        ),
    ),
    "tied head": (GPT2, None, Quantization(layers={"^embedding": both(HBFP(block=8))})),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sharded_step_reads_the_same_numbers_and_talks_no_more(name):
    found, read, losses = stepped(name, True)
    _, one_read, one_losses = stepped(name, False)
    jax.tree.map(np.testing.assert_array_equal, read, one_read)
    np.testing.assert_allclose(losses, one_losses, rtol=1e-5)
    without, _, other_losses = stepped(name, True, quantized=False)
    assert found == without
    assert np.all(np.abs(np.subtract(losses, other_losses)) > 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_with_stochastic_rounding_and_packed(run, tmp_path, reused):
    packed = dataclasses.replace(
        run,
        steps=6,
        eval_every=3,
        quantization=Quantization(
            layers={"up/": STOCHASTIC, "attention/query": both(FOURS)},
            order="quantize_then_sparsify",
        ),
        sparsity=dataclasses.replace(recipes.mdgf_linear(), fine_tune_fraction=0.5, packed=True),
        checkpoints=CheckpointConfig(every_steps=1, keep_last=30, keep_best=0),
    )
    out = tmp_path / "packed"
    train(packed, out, config_text="")
    found = rows(out)
    kind = "attention/query"
    assert 0 < found[-1][f"quantization_error/{kind}"] < 0.1
    assert 0 <= found[-1][f"clipped/{kind}"] < 0.2
    assert 0 < found[-1][f"quantization_error/{kind}/activations"] < 0.1
    assert 0 <= found[-1]["clipped/feed_forward/up/gradients"] < 0.2
    figures = evaluate(packed, out)
    assert figures["sparse"]
    assert figures["val_loss"] == found[-1]["val_loss"]
    assert (
        evaluate(dataclasses.replace(packed, quantization=None), out)["val_loss"]
        != (figures["val_loss"])
    )
    texts = TextSampler(of_run(packed, out), tokens=3, choice=Choice())
    assert texts(["1"])[0].startswith("1")
    for step in (2, 4):  # the state is packed between the third step and the fourth
        for path in (out / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > step:
                path.rename(tmp_path / f"{step}_{path.name}")
        train(packed, out, config_text="")
        assert rows(out) == found


def test_formats_that_do_not_fit_are_one_line():
    def program(layers, mesh=None, model=LLAMA, **options):
        return make_program(model, mesh, quantization=Quantization(layers=layers), **options)

    for layers, options, says in (
        ({"feed_forward/up": "mxfp8_e4m3"}, {"mesh": {"fsdp": 2}}, r"up/kernel: weights: 2 shards"),
        (
            {"feed_forward/down": "mxfp8_e4m3"},
            {},
            r"down/kernel: weights: 40 entries.*blocks of 32",
        ),
        ({"embedding": "int8"}, {}, r"'embedding' matches no matmul; use .*head"),
        ({"position": "int8"}, {"model": GPT2}, r"'position' matches no matmul"),
        ({"head": STOCHASTIC}, {}, r"head: gradients of the head are not quantized"),
        (
            {"attention/query": STOCHASTIC},
            {"mesh": {"sequence": 8}},
            r"along tokens: 8 shards of 24 entries cut blocks of 2",
        ),
    ):
        with pytest.raises(UserError, match=rf"^quantization: .*{says}") as error:
            program(layers, **options)
        assert "\n" not in str(error.value)
