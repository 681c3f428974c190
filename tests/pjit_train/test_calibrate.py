"""The inputs of every kernel, against those that an eager run of the model gives its Denses."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pjit_train.compression import calibrate
from pjit_train.data.sources import TextFiles
from pjit_train.data.text import TextData
from pjit_train.errors import UserError
from pjit_train.models import blocks, projection
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules

pytestmark = pytest.mark.usefixtures("quick_compiles")
LLAMA = TransformerConfig(
    vocab_size=64,
    max_len=16,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    init_std=0.3,
)
OPT = TransformerConfig(
    vocab_size=64,
    max_len=16,
    d_model=16,
    num_layers=2,
    num_heads=2,
    head_dim=4,
    d_ff=24,
    norm="layernorm",
    activation="relu",
    use_bias=True,
    positions="learned",
    tie_head=True,
    init_std=0.3,
    remat="full",
)
ORDER = {
    LLAMA: [
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "feed_forward/up",
        "feed_forward/gate",
        "feed_forward/down",
    ],
    OPT: [
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/out",
        "feed_forward/up",
        "feed_forward/down",
    ],
}


def new_model(config):
    model = config.build(jax.random.key(0), Rules())
    graph, state = nnx.split(model)
    return graph, jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def batches(count: int, segments: bool = False):
    rng = np.random.default_rng(0)
    for _ in range(count):
        batch = {"inputs": rng.integers(0, 64, size=(2, 16))}
        if segments:
            batch["segments"] = np.sort(rng.integers(1, 3, size=(2, 16)))
        yield batch


def names(config):
    kernels = [f"blocks/{layer}/kernel" for layer in ORDER[config]]
    return kernels if config.tie_head else [*kernels, "head"]


def eager_inputs(config, graph, params, batches, monkeypatch):
    """{(name, layer): X [tokens, inputs]}, noted by every Dense as a plain run calls it."""
    noted = []
    with monkeypatch.context() as patch:
        call = projection.Dense.__call__
        patch.setattr(
            projection.Dense,
            "__call__",
            lambda self, x: noted.append(np.asarray(x)) or call(self, x),
        )
        # Unrolled and without remat, so that the calls are eager ones.
        plain = dataclasses.replace(config, layers="unroll", remat="none")
        graph = nnx.split(plain.build(jax.random.key(0), Rules()))[0]
        found = {}
        for batch in batches:
            noted.clear()
            model = nnx.merge(graph, params)
            hidden, _ = model.hidden(batch["inputs"], segments=batch.get("segments"))
            kinds = ORDER[config]
            assert len(noted) == config.num_layers * len(kinds)
            for i, x in enumerate(noted):
                at = f"blocks/{kinds[i % len(kinds)]}/kernel", i // len(kinds)
                found.setdefault(at, []).append(x.reshape(2 * 16, -1))
            found.setdefault(("head", 0), []).append(np.asarray(hidden).reshape(2 * 16, -1))
    return {at: np.concatenate(parts).astype(np.float64) for at, parts in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("segments", [False, True])
def test_products_are_those_of_the_inputs_of_a_plain_run(config, segments, monkeypatch):
    graph, params = new_model(config)
    text = list(batches(3, segments))
    inputs = eager_inputs(config, graph, params, text, monkeypatch)
    seen = []

    def note(name, kernel_IO, products_II):
        at = name, sum(name == other for other, _ in seen)
        seen.append(at)
        expected = inputs[at].T @ inputs[at]
        np.testing.assert_allclose(products_II, expected, rtol=1e-3, atol=1e-3 * expected.max())
        leaf = params
        for key in name.split("/"):
            leaf = leaf[key]
        layer = leaf if name == "head" else leaf[at[1]]
        np.testing.assert_array_equal(kernel_IO, layer.reshape(len(products_II), -1))
        return kernel_IO

    same = calibrate.change_kernels(graph, params, text, names(config), note)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    order = [(name, layer) for layer in range(config.num_layers) for name in names(config)]
    assert seen == [at for at in order if at[0] != "head"] + [("head", 0)] * (not config.tie_head)


def test_a_block_sees_what_the_changed_ones_before_it_make_of_the_text(monkeypatch):
    graph, params = new_model(LLAMA)
    text = list(batches(2))
    calls, products = {}, {}

    def change(name, kernel_IO, products_II):
        layer = calls[name] = calls.get(name, -1) + 1
        products[name, layer] = np.asarray(products_II, np.float64)
        return np.where(np.arange(kernel_IO.size).reshape(kernel_IO.shape) % 3 == 0, 0, kernel_IO)

    before = jax.tree.map(np.copy, params)
    changed = calibrate.change_kernels(graph, params, text, names(LLAMA), change)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for layer in range(LLAMA.num_layers + 1):
        # What layer `layer` was given: those before it changed, itself and the later ones not.
        partly = jax.tree.map(
            lambda new, old, layer=layer: np.concatenate([new[:layer], old[layer:]]),
            changed["blocks"],
            params["blocks"],
        )
        inputs = eager_inputs(LLAMA, graph, params | {"blocks": partly}, text, monkeypatch)
        for name in names(LLAMA):
            at = name, layer if name != "head" else 0
            if at in products and (name == "head") == (layer == LLAMA.num_layers):
                expected = inputs[at].T @ inputs[at]
                close = dict(rtol=1e-3, atol=1e-3 * expected.max())
                np.testing.assert_allclose(products[at], expected, **close)
    query = np.copy(params["blocks"]["attention"]["query"]["kernel"])
    query.reshape(2, -1)[:, ::3] = 0
    np.testing.assert_array_equal(changed["blocks"]["attention"]["query"]["kernel"], query)
    np.testing.assert_array_equal(changed["embedding"], params["embedding"])
    np.testing.assert_array_equal(
        changed["blocks"]["attention_norm"]["scale"], params["blocks"]["attention_norm"]["scale"]
    )


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_maxima_are_those_of_the_inputs_of_a_plain_run(config, monkeypatch):
    graph, params = new_model(config)
    text = list(batches(3))
    inputs = eager_inputs(config, graph, params, text, monkeypatch)
    found = calibrate.input_maxima(graph, params, text)
    assert set(found) == set(names(config))
    for name, maxima_LI in found.items():
        assert len(maxima_LI) == (1 if name == "head" else config.num_layers)
        for layer in range(len(maxima_LI)):
            expected = np.abs(inputs[name, layer]).max(0)
            np.testing.assert_allclose(maxima_LI[layer], expected, rtol=1e-4)


def test_only_the_named_kernels_are_changed():
    graph, params = new_model(OPT)
    changed = calibrate.change_kernels(
        graph, params, list(batches(1)), ["blocks/attention/out/kernel"], lambda n, w, _: 0 * w
    )
    assert not changed["blocks"]["attention"]["out"]["kernel"].any()
    changed["blocks"]["attention"]["out"]["kernel"] = params["blocks"]["attention"]["out"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, changed, params)


def test_blocks_are_traced_once_for_all_layers_and_batches(monkeypatch):
    graph, params = new_model(LLAMA)
    calls, call = [], blocks.Block.__call__
    monkeypatch.setattr(
        blocks.Block, "__call__", lambda self, *a, **k: calls.append(1) or call(self, *a, **k)
    )
    calibrate.change_kernels(graph, params, list(batches(4)), names(LLAMA), lambda n, w, _: w)
    assert len(calls) == 2  # once to note the inputs, once to go on


def test_inputs_of_a_kernel_are_the_axes_that_its_einsum_sums_over():
    model = LLAMA.build(jax.random.key(0), Rules()).blocks
    count = {"query": 1, "key": 1, "value": 1, "out": 2}
    for name, inputs in count.items():
        assert calibrate.num_inputs(getattr(model.attention, name)) == inputs
    assert calibrate.num_inputs(model.feed_forward.down) == 1


@pytest.fixture
def text(tmp_path):
    (tmp_path / "corpus.txt").write_text("a cat sat on a mat. " * 50)
    source = TextFiles(train=str(tmp_path / "corpus.txt"))
    return TextData(
        sources=[source], seq_len=16, batch_size=6, cache_dir=str(tmp_path / "cache")
    ).prepare(0)


@pytest.mark.parametrize(("sequences", "rows"), [(12, 6), (9, 3), (8, 2), (7, 1), (1, 1)])
def test_calibration_text_is_the_first_that_training_sees(text, sequences, rows):
    found = calibrate.calibration_batches(text, sequences)
    assert {batch["inputs"].shape for batch in found} == {(rows, 16)}
    seen = np.concatenate([batch["inputs"] for batch in found])
    trained = np.concatenate([text.train_batch(step)["inputs"] for step in range(2)])
    np.testing.assert_array_equal(seen, trained[:sequences])


@pytest.mark.parametrize(
    ("sequences", "says"),
    [(0, "0 sequences; use 1 or more"), (100, r"has \d+ sequences of 16 tokens, not 100; use")],
)
def test_too_little_text_is_told_in_one_line(text, sequences, says):
    with pytest.raises(UserError, match=says) as raised:
        calibrate.calibration_batches(text, sequences)
    assert "\n" not in str(raised.value)
