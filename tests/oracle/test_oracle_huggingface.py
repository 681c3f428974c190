"""Logits of live, randomly initialised models against `transformers`, both ways."""

import dataclasses
import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is to be fetched

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pjit_train.data import Bytes, train_tokenizer
from pjit_train.huggingface import check
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.config import read_config
from pjit_train.huggingface.families import FAMILIES, REQUIRED
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig
from pjit_train.sharding import Rules
from pjit_train.step import split_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"
pytestmark = pytest.mark.oracle

TEXT = {"vocab_size": 100, "max_len": 32, "d_model": 32, "num_layers": 3, "num_heads": 4}
LLAMA_LIKE = {**TEXT, "d_ff": 48, "num_kv_heads": 2, "head_dim": 16}
GEMMA_LIKE = {
    **LLAMA_LIKE,
    "norm_placement": "both",
    "norm_unit_offset": True,
    "activation": "geglu",
    "scale_embedding": True,
    "attention_scale": 64**-0.5,
    "window": 5,
    "local_layers": (True, False),
    "tie_head": True,
}
CONFIGS = {
    "llama": TransformerConfig(
        **TEXT, d_ff=48, num_kv_heads=2, head_dim=16, rope_theta=500_000.0, norm_epsilon=1e-6
    ),
    # Of the 8 frequencies 2 stay, 2 are interpolated and 4 are divided.
    "llama3": TransformerConfig(
        **TEXT, d_ff=48, head_dim=16, rope_theta=100.0, rope_scaling=(8.0, 0.5, 2.0, 24)
    ),
    "llama_tied": TransformerConfig(**TEXT, d_ff=48, num_kv_heads=1, tie_head=True),
    "opt": TransformerConfig(
        **TEXT,
        d_ff=48,
        positions="learned",
        position_offset=2,
        norm="layernorm",
        activation="relu",
        use_bias=True,
        tie_head=True,
    ),
    "opt_no_bias_untied": TransformerConfig(
        **TEXT,
        d_ff=48,
        positions="learned",
        position_offset=2,
        norm="layernorm",
        activation="gelu",
    ),
    "gpt2": TransformerConfig(
        **TEXT,
        d_ff=80,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-4,
        activation="gelu_tanh",
        use_bias=True,
        tie_head=True,
    ),
    "mistral": TransformerConfig(**LLAMA_LIKE, window=5),
    "mistral_no_window": TransformerConfig(**LLAMA_LIKE | {"head_dim": 12, "num_heads": 6}),
    "qwen2": TransformerConfig(**LLAMA_LIKE | {"head_dim": 8}, qkv_bias=True, tie_head=True),
    "qwen2_window": TransformerConfig(
        **LLAMA_LIKE, qkv_bias=True, window=4, local_layers=(False, True, True)
    ),
    "qwen3": TransformerConfig(**LLAMA_LIKE, qk_norm="head", rope_scaling=(4.0,)),
    "qwen3_tied": TransformerConfig(
        **LLAMA_LIKE | {"num_heads": 6}, qk_norm="head", tie_head=True, window=3
    ),
    "gemma2": TransformerConfig(**GEMMA_LIKE, attention_softcap=0.7, logit_softcap=1.5),
    "gemma2_untied": TransformerConfig(**GEMMA_LIKE | {"tie_head": False}),
    "gemma3_text": TransformerConfig(
        **GEMMA_LIKE
        | {"num_layers": 8, "local_layers": (True, True, False), "attention_scale": 20**-0.5},
        qk_norm="head",
        rope_theta=500_000.0,
        rope_scaling=(8.0,),
        rope_local_theta=100.0,
    ),
    "gemma3_text_caps": TransformerConfig(
        **GEMMA_LIKE | {"local_layers": (False, True, True)},
        qk_norm="head",
        rope_local_theta=100.0,
        logit_softcap=2.0,
    ),
    "phi3": TransformerConfig(**LLAMA_LIKE | {"head_dim": 8}, partial_rotary_factor=0.5),
    "phi3_window": TransformerConfig(
        **LLAMA_LIKE | {"head_dim": 8}, partial_rotary_factor=0.75, window=6, tie_head=True
    ),
    "olmo2": TransformerConfig(
        **LLAMA_LIKE | {"head_dim": 8}, qk_norm="all", norm_placement="post"
    ),
    "olmo2_tied": TransformerConfig(
        **LLAMA_LIKE, qk_norm="all", norm_placement="post", tie_head=True
    ),
    "vit": ViTConfig(
        d_model=32,
        num_layers=3,
        num_heads=4,
        d_ff=48,
        image_size=24,
        patch_size=8,
        channels=2,
        num_classes=7,
    ),
}


@pytest.fixture(scope="module")
def torch():
    import torch  # here, since the plain suite collects this file too

    return torch


@pytest.fixture(scope="module")
def transformers(torch):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


def auto_class(transformers, name):
    if name == "vit":
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForCausalLM


def inputs_of(name, config):
    """Ours and theirs."""
    draw = np.random.default_rng(1)
    if name != "vit":
        tokens = draw.integers(config.vocab_size, size=(2, 24))
        return tokens.astype(np.int32), tokens
    images = draw.normal(size=(2, config.channels, config.image_size, config.image_size))
    images = images.astype(np.float32)
    return images.transpose(0, 2, 3, 1), images


def compare(torch, config, params, model, name):
    ours, theirs = inputs_of(name, config)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(theirs)).logits.numpy()
    graph = split_model(config, Rules())[0]
    logits = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, ours)
    assert np.abs(expected).max() > 1
    assert expected.shape[-1] == (config.num_classes if name == "vit" else config.vocab_size)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def randomise(torch, model, seed, unit_offset=False):
    """Every parameter: their initial biases and norms would hide one that is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if ("norm" in path or ".ln_" in path) and path.endswith("weight"):
                parameter.add_(0.0 if unit_offset else 1.0)


def random_params(config):
    """Every parameter random, as `randomise` makes theirs."""
    draw = np.random.default_rng(0)

    def make(path, x):
        offset = path[-1].key == "scale" and not config.norm_unit_offset
        return (0.2 * draw.normal(size=x.shape) + offset).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, nnx.to_pure_dict(split_model(config, Rules())[1]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 10_000], ids=["whole", "sharded"])
def test_what_we_write_they_read(name, max_shard_bytes, tmp_path, torch, transformers):
    config = CONFIGS[name]
    params = random_params(config)
    huggingface.save(tmp_path / "out", config, params, max_shard_bytes=max_shard_bytes)
    model, report = auto_class(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    compare(torch, config, params, model, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"], ids=["whole", "sharded"])
def test_what_they_write_we_read(name, shard_size, tmp_path, torch, transformers):
    """Their model from a config.json of ours, with weights of theirs, saved by them."""
    config = CONFIGS[name]
    shapes = nnx.to_pure_dict(split_model(config, Rules())[1])
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    huggingface.save(tmp_path / "ours", config, zeros)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    model = auto_class(transformers, name).from_config(theirs)
    randomise(torch, model, 2, getattr(config, "norm_unit_offset", False))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    found, params = huggingface.load(tmp_path / "theirs")
    assert found == config
    compare(torch, found, params, model, name)


def at(config, dotted):
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def test_their_defaults_are_those_that_we_take(tmp_path, torch, transformers):
    """A config.json that leaves out every key with a default means the same to both."""
    for model_type, family in FAMILIES.items():
        defaults = transformers.AutoConfig.for_model(model_type)
        for ours, key in family.keys.items():
            theirs = at(defaults, key.name)
            if key.default is not REQUIRED and key.default is not None:
                assert theirs == key.default, (model_type, ours)
        for dotted, value in family.theirs.items():
            assert at(defaults, dotted) in (value, None), (model_type, dotted)
        defaults.save_pretrained(tmp_path / model_type)
        path = tmp_path / model_type / "config.json"
        whole = read_config(path)[1]
        required = [key.name for key in family.keys.values() if key.default is REQUIRED]
        document = {name: at(defaults, name) for name in ("model_type", *required)}
        path.write_text(json.dumps(document))
        assert read_config(path)[1] == whole, model_type


def test_the_fixtures_are_still_what_transformers_computes(torch, transformers):
    for name in ("llama", "llama_tied", "opt", "gpt2", "vit"):
        expected = np.load(FIXTURES / f"{name}.npz")
        model = auto_class(transformers, name).from_pretrained(FIXTURES / name).eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(expected["inputs"])).logits.numpy()
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_transformers_reads_the_tokenizer_of_a_saved_model(kind, tmp_path, transformers):
    text = "the cat sat on the mat, für Elise "
    tokenizer = Bytes()
    if kind == "trained":
        tokenizer = train_tokenizer([text * 9], vocab_size=280, path=str(tmp_path / "t.json"))
    config = dataclasses.replace(CONFIGS["llama"], vocab_size=tokenizer.vocab_size)
    params = random_params(config)
    huggingface.save(tmp_path / "out", config, params, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.separator
    assert theirs.model_max_length == config.max_len


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "phi3", "vit"])
def test_check_finds_a_folder_equal_and_one_that_was_changed_not(name, tmp_path, transformers):
    found = check.compare(FIXTURES / name)
    assert found.version == transformers.__version__
    assert found.difference < 1e-5 < found.largest
    assert found.agreeing == found.positions
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    document = json.loads((folder / "config.json").read_text())
    changed = {"layer_norm_eps" if name == "vit" else "rms_norm_eps": 0.5}
    (folder / "config.json").write_text(json.dumps(document | changed))
    assert check.compare(folder).within(1e-4)  # both read it
    assert abs(check.compare(folder).largest - found.largest) > 1e-3
