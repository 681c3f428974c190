"""Models of `transformers` as GGUF files, changed as llama.cpp's converter changes them.

The names are written out here, and not taken from the tables under test.
"""

import numpy as np
from gguf import GGUFWriter

from helpers import gguf_files

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
_GPT2 = {
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
_NAMES = {
    "gpt2": _GPT2,
    "qwen3": HEAD_NORMS,
    "olmo2": HEAD_NORMS | {k: BOTH_NORMS[k] for k in BOTH_NORMS if k.startswith("post")},
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
    "gemma2": BOTH_NORMS,
    "gemma3": BOTH_NORMS | HEAD_NORMS,
}


def _name(theirs, architecture):
    """The name in GGUF of a tensor of `transformers`."""
    more = _NAMES.get(architecture, {})
    names = more if architecture == "gpt2" else ENDS | LAYERS | more
    stem, _, suffix = theirs.rpartition(".")
    if stem in names:
        return f"{names[stem]}.{suffix}"
    layer, part = stem.split(".", 3)[2:]
    return f"blk.{layer}.{names[part]}.{suffix}"


def write(path, architecture, config, tensors, more, *, tokenizer=None):
    """Writes a file of a model.

    Args:
      config: its config.json.
      tensors: of `transformers`, float32, without a head that is the embedding.
      more: keys that the sizes of `config` do not say.
      tokenizer: adds one to the writer.
    """
    writer = GGUFWriter(path, architecture)
    if architecture == "gpt2":
        numbers = {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    else:
        numbers = {
            "block_count": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "rope.freq_base": 10_000.0,
        }
    for key, value in (numbers | more).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    if tokenizer is not None:
        tokenizer(writer)
    for theirs, array in tensors.items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and part in theirs:
                array = gguf_files.interleaved(array, config[heads])
        if architecture.startswith("gemma") and "norm" in theirs:
            array = array + 1
        if architecture == "gpt2" and theirs.startswith("transformer.h.") and array.ndim == 2:
            array = array.T
        writer.add_tensor(_name(theirs, architecture), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
