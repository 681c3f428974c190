"""Random models of `transformers`, converted to GGUF as llama.cpp does, and imported again."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import gguf_files, gguf_models

from pjit_train.huggingface import weights
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
# Architecture -> model_type, more of the configuration, more keys.
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 24}, {"attention.key_length": 24}),
    "olmo2": ("olmo2", {}, {}),
    "phi3": (
        "phi3",
        {"sliding_window": 10, "pad_token_id": 0, "original_max_position_embeddings": 128},
        {"attention.sliding_window": 10, "rope.scaling.original_context_length": 128},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 10}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 10}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 10}
        | {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"attention.key_length": 24, "attention.value_length": 24, "attention.sliding_window": 10}
        | {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gpt2": ("gpt2", {}, {}),
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_random_model_comes_back(architecture, tmp_path):
    import torch
    import transformers

    model_type, changes, more = FAMILIES[architecture]
    sizes = dict(SIZES) if architecture != "gpt2" else {"vocab_size": VOCAB, "n_positions": 128}
    if architecture == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 3, "n_head": 4}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # not the zeros and ones that they begin with
            parameter.add_(torch.randn_like(parameter) / 8)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    path, tokenizer = tmp_path / "x.gguf", gguf_files.add_tokenizer
    gguf_models.write(path, architecture, config.to_dict(), tensors, more, tokenizer=tokenizer)
    import_gguf(path, tmp_path / "out")

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
