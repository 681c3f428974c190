"""Families of models after Llama: trained on a mesh, decoded with a cache, and what is refused.

The models are those of tests/fixtures/huggingface, whose logits `test_huggingface` compares.
"""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import make_batch, make_program
from huggingface_folders import FIXTURES, LATER, random_params

from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.config import read_config, write_config
from pjit_train.models.roles import param_roles
from pjit_train.models.transformer import TransformerConfig, count_params
from pjit_train.sharding import Rules
from pjit_train.step import split_model

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def loaded(name):
    return huggingface.load(FIXTURES / name)


def model_of(config, params):
    return nnx.merge(split_model(config, Rules())[0], params)


@functools.cache
def trainable(name) -> TransformerConfig:
    """The family's model in sizes that a mesh divides; Gemma 2 with two periods and a half."""
    config = loaded(name)[0]
    sizes = dict(d_model=16, d_ff=12, num_heads=4, num_kv_heads=2, vocab_size=56)
    layers = 5 if name == "gemma2" else max(2, config.period)
    return dataclasses.replace(config, **sizes, num_layers=layers, init_std=0.3)


def losses(model, mesh, steps=3):
    program = make_program(model, mesh)
    batch, state, found = make_batch(program, 0), program.new_state(), []
    step = program.compile_step(batch)
    for i in range(steps):
        state, metrics = step(state, make_batch(program, i))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LATER)
def test_training_on_a_mesh_is_that_of_one_device(name):
    """Three layouts at once: fsdp, sequence and tensor split it; layers are scanned or not."""
    model = trainable(name)
    want = losses(dataclasses.replace(model, layers="unroll"), {})
    got = losses(dataclasses.replace(model, remat="full"), {"fsdp": 2, "sequence": 2, "tensor": 2})
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert len(set(want)) == 3  # it moves


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_ring_trains_as_one_device_does(name):
    model = dataclasses.replace(trainable(name), attention_sequence="ring")
    np.testing.assert_allclose(
        losses(model, {"sequence": 4}, 2), losses(trainable(name), {}, 2), rtol=2e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("name", LATER)
def test_decoding_with_a_cache_takes_the_likeliest_tokens_of_whole_passes(name, layers):
    config, params = loaded(name)
    model = model_of(dataclasses.replace(config, layers=layers), params)
    prompt, more = np.load(FIXTURES / f"{name}.npz")["inputs"][:, :7].astype(np.int32), 8

    @jax.jit
    def step(tokens, cache, position):
        hidden, cache = model.hidden(tokens, cache=cache, position=position)
        return jnp.argmax(model.logits(hidden[:, -1:])[:, 0], axis=-1), cache

    token, cache = step(prompt, model.empty_cache(2, 7 + more), 0)
    got = [token]
    for position in range(7, 7 + more - 1):
        token, cache = step(token[:, None], cache, position)
        got.append(token)
    text, whole = prompt, jax.jit(lambda tokens: model(tokens))
    text = np.concatenate([prompt, np.stack(got, axis=1)], axis=1)
    want = np.argmax(whole(text), axis=-1)  # causal: of every prefix at once
    np.testing.assert_array_equal(text[:, 7:], want[:, 6:-1])


@pytest.mark.parametrize("name", LATER)
def test_sizes_and_roles(name):
    config, params = loaded(name)
    assert config.num_params == count_params(params)
    roles = param_roles(config)
    norms = {n for n, role in roles.items() if n.endswith("scale")}
    assert norms == {n for n, role in roles.items() if role.kind == "norm"}
    read = {role.norm for role in roles.values()} - {None}
    assert read == (set() if name == "olmo2" else {"attention_norm", "feed_forward_norm"})


def test_flops_count_the_columns_that_windows_leave():
    model = trainable("gemma2")  # layers 1, 3 and 5 see 4 tokens
    everywhere = dataclasses.replace(model, window=None, local_layers=(False,))
    sizes = model.num_heads * model.head_dim
    seen = sum(min(t + 1, 4) for t in range(24)) / 24
    less = 3 * 6 * 2 * sizes * (25 / 2 - seen)
    assert everywhere.flops_per_token(24) - model.flops_per_token(24) == pytest.approx(less)


LAYERS = {
    ((True, False), 6): (True, False),
    ((True, False, True, False, True), 5): (True, False),
    ((True, True, False) * 2, 6): (True, True, False),
    ((True, True, False, True), 5): (True, True, False),
    ((False, False, True), 3): (False, False, True),
    ((True,) * 4, 4): (True,),
}


@pytest.mark.parametrize(("given", "kept"), LAYERS.items())
def test_a_pattern_of_layers_is_kept_as_its_shortest_period(given, kept):
    local, layers = given
    sizes = dict(vocab_size=8, max_len=8, d_model=4, num_heads=1, d_ff=4, window=2)
    config = TransformerConfig(**sizes, num_layers=layers, local_layers=local)
    assert config.local_layers == kept


@pytest.mark.parametrize("name", LATER)
def test_configurations_come_back_from_config_json(name, tmp_path):
    config = loaded(name)[0]
    family, document = write_config(config)
    assert (document["model_type"], family.architecture) == (name, document["architectures"][0])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    assert read_config(path)[1] == config


def test_qwen3_has_heads_whose_sizes_do_not_make_up_the_width(tmp_path):
    """16 heads of 128 and a width of 1024, as in Qwen3-0.6B; head_dim left out of config.json."""
    document = dict(model_type="qwen3", vocab_size=16, hidden_size=32, num_hidden_layers=1)
    document |= dict(intermediate_size=8, num_attention_heads=3, num_key_value_heads=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    config = read_config(path)[1]
    assert (config.head_dim, config.num_kv_heads) == (128, 1)
    huggingface.save(tmp_path / "out", config, random_params(config))
    assert huggingface.load(tmp_path / "out")[0] == config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
REFUSED = [
    ("mistral", {"sliding_window": 0}, "sliding_window=0 must be a positive integer"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types=.* is not supported where"),
    ("mistral", {"rope_parameters": YARN}, "rope_type='yarn' is not supported"),
    ("mistral", {"attention_bias": True}, "attention_bias=True is not supported where"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts=8 is not supported"),
    ("qwen2", {"max_window_layers": -1, "layer_types": None}, "max_window_layers=-1 must be"),
    ("qwen2", {"use_sliding_window": False}, "sliding_window is null, and layer_types has"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name the kind of each"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention', which is not"),
    ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type='mrope'"),
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "do not say the same"),
    ("qwen2", {"num_hidden_layers": 10**9, "layer_types": None}, "more than any model has"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported; only False"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("qwen3", {"num_experts": 4}, "num_experts=4 is not supported"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "logit_softcap=-1.0"),
    ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping='50' must be a number"),
    ("gemma2", {"rope_local_base_freq": 10.0}, "rope_local_base_freq=10.0 is not supported"),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 is not"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "must have full_attention and"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window is null, and layer_types has"),
    ("phi3", {"rope_parameters": None, "rope_scaling": LONG}, "rope_type='longrope' is not"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is not"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "partial_rotary_factor=0.2 rot"),
    ("phi3", {"attention_bias": True}, "attention_bias=True is not supported"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    ("olmo2", {"sliding_window": 4}, "sliding_window=4 is not supported where"),
    ("llama", {"sliding_window": 4}, "sliding_window=4 is not supported where"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures=.* is not"),
    ("llama", {"architectures": [["x"]]}, "architectures=.* is not supported"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not supported"),
]


def changed(name, changes, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    document = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(document))
    for path in (FIXTURES / name).glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(("name", "changes", "says"), REFUSED)
def test_what_a_configuration_says_and_we_do_not_do_is_named(name, changes, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        huggingface.load(changed(name, changes, tmp_path))
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value) or name in str(error.value)


@pytest.mark.parametrize("name", LATER)
def test_odd_values_of_every_key_are_refused_or_read(name, tmp_path):
    folder = changed(name, {}, tmp_path)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for key in document:
        for value in (
            None,
            -1,
            0,
            1.5,
            "x",
            [],
            [1],
            {},
            True,
            {"full_attention": 1},
            2**60,
            10**9,
        ):
            path.write_text(json.dumps({**document, key: value}))
            try:
                read_config(path)
                if type(value) is int and value > 1:  # what files of this size cannot hold
                    huggingface.load(folder)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017 (both ways are right)


def test_a_key_that_nobody_knows_is_named_once(tmp_path, caplog):
    folder = changed("mistral", {"unheard_of": 3, "rope_interleaved": False}, tmp_path)
    with caplog.at_level(logging.WARNING):
        huggingface.load(folder)
        huggingface.load(folder)
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "unheard_of: not known, and passed over, as `transformers` does"
    ]
    assert read_config(folder / "config.json")[1] == loaded("mistral")[0]


def test_a_model_that_two_families_have_is_written_as_the_first(tmp_path):
    config = dataclasses.replace(loaded("mistral")[0], window=None)
    assert write_config(config)[1]["model_type"] == "llama"
    config = dataclasses.replace(config, num_heads=5, num_kv_heads=5)  # 12 has no five heads
    assert write_config(config)[1]["model_type"] == "mistral"
