"""What a run says of its quantized activations and gradients, against numpy on the same batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_models import LLAMA, B, make_batch, make_program

from sparsity.numbers.formats import Int
from sparsity.numbers.quantized import MatmulFormats, Quantization

pytestmark = pytest.mark.usefixtures("quick_compiles")
TWO_LAYERS, ONE_LAYER = (dataclasses.replace(LLAMA, num_layers=n) for n in (2, 1))
INPUTS = MatmulFormats(activations="int8")
EVERY_KERNEL = {"(attention|feed_forward)/.*kernel|head": INPUTS}


def quantized(x_RI: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(values, which are clipped) of rows in integers, a scale each: max |x| / (2^(bits-1) - .5)"""
    top = 2 ** (bits - 1)
    scale = np.abs(x_RI).max(-1, keepdims=True) / (top - 0.5)
    elements = x_RI / scale
    values = np.clip(np.rint(elements), -top, top - 1) * scale
    return values, (elements > top - 1) | (elements < -top)


class Noted:
    """Rows that were quantized, by name."""

    def __init__(self):
        self.rows: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, x: np.ndarray, width: int) -> np.ndarray:
        rows = x.reshape(-1, width)
        self.rows.setdefault(name, []).append(rows)
        return quantized(rows)[0].reshape(x.shape)

    def figures(self) -> dict[str, float]:
        found = {}
        for name, rows in self.rows.items():
            lost = sum(np.sum((quantized(x)[0] - x) ** 2) for x in rows)
            found[f"quantization_error/{name}"] = np.sqrt(lost / sum(np.sum(x * x) for x in rows))
            clipped = sum(np.sum(quantized(x)[1]) for x in rows)
            found[f"clipped/{name}"] = clipped / sum(x.size for x in rows)
        return found


def forward(params, tokens_BT: np.ndarray, c, read) -> np.ndarray:
    """The hidden states of a Llama in float64, its matmuls' inputs and q, k, v given to `read`."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.norm_epsilon) * scale

    def rotated(x_BTHd):
        half = c.head_dim // 2
        turns = np.arange(x_BTHd.shape[1])[:, None] / c.rope_theta ** (np.arange(half) / half)
        z = (x_BTHd[..., :half] + 1j * x_BTHd[..., half:]) * np.exp(1j * turns)[None, :, None]
        return np.concatenate([z.real, z.imag], -1)

    x = params["embedding"][tokens_BT]
    length = tokens_BT.shape[1]
    for layer in range(c.num_layers):
        p = jax.tree.map(lambda w, i=layer: w[i], params["blocks"])
        h = norm(x, p["attention_norm"]["scale"])
        heads = {}
        for name in ("query", "key", "value"):
            h_q = read(f"attention/{name}/activations", h, c.d_model)
            y = np.einsum("btd,dhk->bthk", h_q, p["attention"][name]["kernel"])
            y = y if name == "value" else rotated(y)
            heads[name] = read(f"attention/{name}/operands", y, c.head_dim)
        k, v = (np.repeat(heads[n], c.num_heads // c.num_kv_heads, 2) for n in ("key", "value"))
        logits = np.einsum("bthk,bshk->bhts", heads["query"], k) / np.sqrt(c.head_dim)
        logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        attended = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
        attended = read("attention/out/activations", attended, c.num_heads * c.head_dim)
        x = x + np.einsum("bthk,hkd->btd", attended, p["attention"]["out"]["kernel"])
        h = norm(x, p["feed_forward_norm"]["scale"])
        up, gate = (
            read(f"feed_forward/{n}/activations", h, c.d_model) @ p["feed_forward"][n]["kernel"]
            for n in ("up", "gate")
        )
        wide = read("feed_forward/down/activations", gate / (1 + np.exp(-gate)) * up, c.d_ff)
        x = x + wide @ p["feed_forward"]["down"]["kernel"]
    return x


def in_float64(state):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(state["params"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh", "rows"),
    [(ONE_LAYER, {}, [0]), (TWO_LAYERS, {"data": 2, "tensor": 2}, [0, B // 2])],
    ids=["one", "mesh"],
)
def test_activations_are_those_of_a_plain_forward_pass(model, mesh, rows):
    """Of the first sequence of every shard of the batch."""
    program = make_program(
        model, mesh, quantization=Quantization(layers=EVERY_KERNEL, attention="int8")
    )
    state, batch = program.new_state(), make_batch(program, 0)
    got = {name: float(x) for name, x in program.observe(None, state, batch).items()}
    params, noted = in_float64(state), Noted()
    x = forward(params, np.asarray(batch["inputs"])[rows], model, noted)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + model.norm_epsilon)
    noted("head/activations", x * params["norm"]["scale"], model.d_model)
    want = noted.figures()
    assert got.keys() == want.keys()
    for name in want:
        # An entry at the edge between two integers falls to either side, which moves what is next.
        slack = {"rel": 2e-2} if name.startswith("quant") else {"abs": 2e-3}
        assert got[name] == pytest.approx(want[name], **slack), name
    if model is ONE_LAYER:  # nothing was rounded before
        for name in ("quantization_error", "clipped"):
            name += "/attention/query/activations"
            assert got[name] == pytest.approx(want[name], rel=1e-5)
    assert 0.001 < want["quantization_error/feed_forward/down/activations"] < 0.02
    assert 0 < want["clipped/feed_forward/down/activations"] < 0.1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_those_of_the_step(accumulate):
    """In a cast without a scale, whose error depends on the size of the gradient."""
    formats = MatmulFormats(activations="int8", gradients="fp8_e5m2")
    program = make_program(
        ONE_LAYER, quantization=Quantization(layers={"down/": formats}), accumulate=accumulate
    )
    state, batch = program.new_state(), make_batch(program, 0)
    got = {name: float(x) for name, x in program.observe(None, state, batch).items()}
    assert got.keys() == {
        f"{figure}/feed_forward/down/{what}"
        for figure in ("quantization_error", "clipped")
        for what in ("activations", "gradients")
    }
    inputs, targets = (np.asarray(batch[name])[:1] for name in ("inputs", "targets"))
    params = in_float64(state)
    noted = Noted()

    def read(name, x, width):
        return noted(name, x, width) if name == "feed_forward/down/activations" else x

    x = forward(params, inputs, ONE_LAYER, read)

    def loss(x):  # what comes after the outputs of `down`
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + ONE_LAYER.norm_epsilon)
        logits = x * params["norm"]["scale"] @ params["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1).sum()

    gradient = np.asarray(jax.grad(loss)(jnp.float32(x)))
    gradient = gradient / (batch["targets"].size if accumulate == 1 else 1)
    cast = gradient.astype(jnp.float8_e5m2).astype(np.float32)
    error = np.linalg.norm(cast - gradient) / np.linalg.norm(gradient)
    assert got["quantization_error/feed_forward/down/gradients"] == pytest.approx(error, rel=1e-2)
    assert got["clipped/feed_forward/down/gradients"] == 0
    want = noted.figures()["quantization_error/feed_forward/down/activations"]
    assert got["quantization_error/feed_forward/down/activations"] == pytest.approx(want, rel=5e-3)


def test_what_is_not_quantized_has_no_figures():
    layers = {"up/": MatmulFormats(weights=Int(bits=4)), "query/": INPUTS}
    program = make_program(ONE_LAYER, quantization=Quantization(layers=layers))
    found = program.observe(None, program.new_state(), make_batch(program, 0))
    assert found.keys() == {
        f"{figure}/{what}"
        for figure in ("quantization_error", "clipped")
        for what in ("feed_forward/up", "attention/query/activations")
    }
