"""Hugging Face folders read: the logits of `transformers`, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from huggingface_folders import (
    FIXTURES,
    LLAMA,
    NAMES,
    assert_same,
    random_params,
    shapes_of,
    stored,
)
from safetensors.numpy import save_file

from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.config import read_config
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from pjit_train.step import split_model


def logits_of(config, params, inputs):
    graph = split_model(config, Rules())[0]
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, inputs)


@pytest.fixture
def copy(tmp_path):
    """Copies a fixture, with changes to config.json, and returns its folder."""

    def make(name, **changes):
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder)
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, **changes}))
        return folder

    return make


@pytest.fixture
def rewrite(copy):
    """Copies a fixture whose tensors a function has changed, a dict in place."""

    def make(name, change):
        folder = copy(name)
        tensors = stored(folder)
        change(tensors)
        for path in folder.glob("model*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    config, params = huggingface.load(FIXTURES / name)
    expected = np.load(FIXTURES / f"{name}.npz")
    inputs = expected["inputs"]
    inputs = inputs.transpose(0, 2, 3, 1) if name == "vit" else inputs.astype(np.int32)
    logits = logits_of(config, params, inputs)
    assert np.abs(expected["logits"]).max() > 1  # large enough for 1e-4 to mean something
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_that_the_configuration_builds(name):
    config, params = huggingface.load(FIXTURES / name)
    loaded = {path: (x.shape, x.dtype) for path, x in flatten_dict(params).items()}
    assert loaded == shapes_of(config)


def test_configurations_are_those_of_the_folders():
    llama = read_config(FIXTURES / "llama" / "config.json")[1]
    assert llama == TransformerConfig(
        vocab_size=48,
        d_model=16,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_len=32,
    )
    tied = read_config(FIXTURES / "llama_tied" / "config.json")[1]
    assert (tied.rope_theta, tied.tie_head, tied.head_dim) == (500.0, True, 4)
    gpt2 = read_config(FIXTURES / "gpt2" / "config.json")[1]
    assert (gpt2.d_ff, gpt2.activation, gpt2.positions) == (64, "gelu_tanh", "learned")


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("llama_tied", "model."), ("opt", "model."), ("gpt2", "transformer."), ("vit", "vit.")],
)
def test_names_without_the_prefix_of_older_files(name, prefix, rewrite):
    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix(prefix)] = tensors.pop(key)
        assert not any(key.startswith(prefix) for key in tensors)

    assert_same(huggingface.load(rewrite(name, change))[1], huggingface.load(FIXTURES / name)[1])


def test_constants_beside_the_weights_are_passed_over(rewrite):
    def change(tensors):
        for layer in range(2):
            tensors[f"transformer.h.{layer}.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.zeros((), np.float32)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    assert_same(
        huggingface.load(rewrite("gpt2", change))[1], huggingface.load(FIXTURES / "gpt2")[1]
    )


def test_a_head_that_is_said_to_be_tied_and_is_not(rewrite):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        huggingface.load(rewrite("llama_tied", change))


def test_older_spellings_of_config_json(copy):
    folder = copy("llama_tied", rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    assert huggingface.load(folder)[0] == huggingface.load(FIXTURES / "llama_tied")[0]
    folder = copy("vit", id2label=None, num_labels=5, image_size=[12, 12])
    assert huggingface.load(folder)[0] == huggingface.load(FIXTURES / "vit")[0]


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}},
        {"rope_parameters": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 5e5},
        {"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "rope_theta": 5e5},
        {"rope_scaling": {**LLAMA3, "type": "llama3"}, "rope_theta": 5e5},
    ],
    ids=["rope_parameters", "theta_beside", "rope_scaling", "type"],
)
def test_llama_3_1_rotary_scaling_in_every_spelling(changes, copy):
    original = "original_max_position_embeddings"
    for spelled in (rope for rope in changes.values() if isinstance(rope, dict)):
        spelled[original] = 16
    config = read_config(copy("llama", **{"rope_parameters": None, **changes}) / "config.json")[1]
    assert (config.rope_theta, config.rope_scaling) == (5e5, (8.0, 1.0, 4.0, 16))
    assert [type(x) for x in config.rope_scaling] == [float, float, float, int]


def test_rotary_scaling_without_its_original_length_is_of_the_longest_sequence(copy):
    rope = {**LLAMA3, "rope_type": "llama3"}
    folder = copy("llama", rope_parameters=rope, max_position_embeddings=24)
    assert read_config(folder / "config.json")[1].rope_scaling == (8.0, 1.0, 4.0, 24)


@pytest.mark.parametrize("scaling", [None, (8.0, 1.0, 4.0, 16)])
def test_rotary_scaling_is_written_in_both_spellings_and_read_again(scaling, tmp_path):
    config = dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=scaling)
    huggingface.save(tmp_path / "out", config, random_params(config))
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = {"rope_type": "default"}
    if scaling:
        theirs = {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16}
    assert document["rope_parameters"] == {**theirs, "rope_theta": 5e5}
    assert document["rope_theta"] == 5e5
    assert document.get("rope_scaling") == (theirs if scaling else None)
    assert huggingface.load(tmp_path / "out")[0].rope_scaling == scaling
    del document["rope_parameters"]  # as transformers 4 has it
    (tmp_path / "out" / "config.json").write_text(json.dumps(document))
    again = huggingface.load(tmp_path / "out")[0]
    assert (again.rope_scaling, again.rope_theta) == (scaling, 5e5)
    with pytest.raises(UserError, match=r"its model has rope_scaling=.*, not \(2.0, 1.0, 4.0, 8\)"):
        huggingface.load(
            tmp_path / "out", dataclasses.replace(config, rope_scaling=(2.0, 1.0, 4.0, 8))
        )


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is unknown; use llama, mistral"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported; only False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' is not supported; default, linear, llama3 are",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
            "rope_type='yarn' is not supported; default, linear, llama3 are",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
            "rope_parameters.low_freq_factor is missing",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "factor": "8"}},
            "rope_parameters.factor='8' must be a number",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "beta_fast": 32}},
            "rope_parameters: beta_fast is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
            r"rope_scaling=\(8.0, 1.0, 0.5, 32\) must be \(factor >= 1",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a positive integer"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim=8 is not supported"),
        ("gpt2", {"activation_function": "silu"}, "activation_function='silu' is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("vit", {"qkv_bias": False}, "qkv_bias=False is not supported"),
        ("vit", {"image_size": [12, 16]}, r"image_size=\[12, 16\] must be a positive integer"),
        # The files are right, and config.json says otherwise.
        (
            "llama",
            {"num_hidden_layers": 3},
            "tensors model.layers.2.input_layernorm.weight, .* more",
        ),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.* are not of this model"),
        ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight"),
        ("llama", {"vocab_size": 47}, r"embed_tokens.weight is \[48, 16\]; .* \[47, 16\]"),
        (
            "gpt2",
            {"n_inner": 32},
            r"mlp.c_fc.weight is \[16, 64\]; config.json makes it \[16, 32\]",
        ),
    ],
)
def test_what_we_do_not_have_is_refused_in_one_line(name, changes, said, copy):
    with pytest.raises(UserError, match=said) as error:
        huggingface.load(copy(name, **changes))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "vit"])
def test_config_json_of_odd_values_is_refused_or_read(name, copy):
    folder = copy(name)
    document = json.loads((folder / "config.json").read_text())
    for key in document:
        for value in (None, -1, 0, 1.5, "x", [], [1], {}, True):
            (folder / "config.json").write_text(json.dumps({**document, key: value}))
            try:
                read_config(folder / "config.json")
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017 (both ways are right)


def test_broken_folders_are_refused_by_name(copy, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config.json: cannot be read \(No such file"):
        huggingface.load(tmp_path / "nowhere")
    folder = copy("llama_tied")
    shard = folder / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: is no whole"):
        huggingface.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors is missing, which"):
        huggingface.load(folder)
    index = folder / huggingface.INDEX
    index.write_text(json.dumps({"weight_map": {"norm": "../llama/model.safetensors"}}))
    with pytest.raises(UserError, match="must give every tensor a file in the folder"):
        huggingface.load(folder)
    index.unlink()
    with pytest.raises(UserError, match=r"has neither model.safetensors nor"):
        huggingface.load(folder)


def test_tensors_that_are_missing_unexpected_or_quantized_are_named(rewrite):
    def drop(tensors):
        del tensors["model.decoder.layers.1.fc1.bias"]

    with pytest.raises(UserError, match=r"tensors model.decoder.layers.1.fc1.bias are missing"):
        huggingface.load(rewrite("opt", drop))

    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    with pytest.raises(UserError, match=r"q_proj.bias are not of this model"):
        huggingface.load(rewrite("llama", add))

    def quantize(tensors):
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.int8)

    with pytest.raises(UserError, match=r"transformer.wpe.weight is I8"):
        huggingface.load(rewrite("gpt2", quantize))


def test_half_precision_files_are_widened_exactly(rewrite):
    def halve(tensors):
        for i, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].astype(jnp.bfloat16 if i % 2 else np.float16)

    folder = rewrite("llama", halve)
    params = huggingface.load(folder)[1]
    np.testing.assert_array_equal(
        params["blocks"]["attention"]["query"]["kernel"][1].reshape(16, 32).T,
        stored(folder)["model.layers.1.self_attn.q_proj.weight"].astype(np.float32),
    )


def test_a_given_configuration_says_how_to_run_and_must_be_the_same_model():
    found = huggingface.load(FIXTURES / "llama")[0]
    wanted = dataclasses.replace(
        found, layers="unroll", param_dtype="bfloat16", max_len=8, remat="full"
    )
    config, params = huggingface.load(FIXTURES / "llama", wanted)
    assert config == wanted
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    with pytest.raises(UserError, match=r"its model has rope_theta=10000.0, not 9.0"):
        huggingface.load(FIXTURES / "llama", dataclasses.replace(found, rope_theta=9.0))
    learned = huggingface.load(FIXTURES / "gpt2")[0]
    with pytest.raises(UserError, match=r"its model has max_len=32, not 16; use 32"):
        huggingface.load(FIXTURES / "gpt2", dataclasses.replace(learned, max_len=16))
    with pytest.raises(UserError, match="holds a ViTConfig, not a TransformerConfig"):
        huggingface.load(FIXTURES / "vit", found)
