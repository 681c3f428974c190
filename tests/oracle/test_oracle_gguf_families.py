"""Random models of `transformers`, converted to GGUF as llama.cpp does, and imported again."""

import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGUFWriter
from helpers import gguf_files

from pjit_train.huggingface import weights
from pjit_train.huggingface.gguf_architectures import ARCHITECTURES
from pjit_train.huggingface.gguf_import import import_gguf
from pjit_train.sharding import Rules
from pjit_train.step import split_model

pytestmark = pytest.mark.oracle
VOCAB = len(gguf_files.TOKENS)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,  # of Gemma 3 the sixth is global
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYERS = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
BOTH_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# Architecture -> model_type, more of the configuration, names of tensors, more keys.
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "qwen2": ("qwen2", {}, {}, {}),
    "qwen3": ("qwen3", {"head_dim": 24}, HEAD_NORMS, {"attention.key_length": 24}),
    "olmo2": (
        "olmo2",
        {},
        HEAD_NORMS | {k: BOTH_NORMS[k] for k in BOTH_NORMS if k.startswith("post")},
        {},
    ),
    "phi3": (
        "phi3",
        {"sliding_window": 10, "pad_token_id": 0, "original_max_position_embeddings": 128},
        {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        {"attention.sliding_window": 10, "rope.scaling.original_context_length": 128},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 10}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        BOTH_NORMS,
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 10}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 10}
        | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        BOTH_NORMS | HEAD_NORMS,
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 10}
        | {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gpt2": ("gpt2", {}, GPT2, {}),
}


def converted(theirs, names, architecture):
    """The name in GGUF of a tensor of `transformers`."""
    stem, _, suffix = theirs.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{suffix}"
    layer, part = stem.split(".", 3)[2:]
    return f"blk.{layer}.{names[part]}.{suffix}"


def write(path, architecture, model, names, more):
    config = model.config
    writer = GGUFWriter(path, architecture)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if architecture == "gpt2":
        numbers |= {"feed_forward_length": 256, "attention.layer_norm_epsilon": 1e-5}
    else:
        numbers |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": 10_000.0,
        }
    for key, value in (numbers | more).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    gguf_files.add_tokenizer(writer)
    for theirs, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (".q_proj" in theirs or ".k_proj" in theirs):
            array = gguf_files.interleaved(array, 4 if ".q_proj" in theirs else 2)
        if architecture.startswith("gemma") and "norm" in theirs:
            array = array + 1
        if architecture == "gpt2" and theirs.startswith("transformer.h.") and array.ndim == 2:
            array = array.T
        writer.add_tensor(converted(theirs, names, architecture), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_random_model_comes_back(architecture, tmp_path):
    import torch
    import transformers

    if architecture not in ARCHITECTURES:
        pytest.skip("its family is not supported yet")
    model_type, changes, names, more = FAMILIES[architecture]
    sizes = dict(SIZES) if architecture != "gpt2" else {"vocab_size": VOCAB, "n_positions": 128}
    if architecture == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 3, "n_head": 4}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # not the zeros and ones that they begin with
            parameter.add_(torch.randn_like(parameter) / 8)
    names = GPT2 if architecture == "gpt2" else ENDS | LAYERS | names
    write(tmp_path / "x.gguf", architecture, model, names, more)
    import_gguf(tmp_path / "x.gguf", tmp_path / "out")

    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(found) is type(model)
    tokens = torch.randint(VOCAB, (2, 24))
    with torch.no_grad():
        expected, logits = model(tokens).logits, found(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    config, params = weights.load(tmp_path / "out")
    graph = split_model(config, Rules())[0]
    ours = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, tokens.numpy())
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
