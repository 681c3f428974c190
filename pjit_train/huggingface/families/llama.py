"""Llama, and the families that change little of it: Mistral, Qwen2 and 3, Phi-3, OLMo 2."""

import dataclasses
from typing import Any

from pjit_train.huggingface.families.layers import WINDOW, WINDOW_FROM
from pjit_train.huggingface.families.rope import PARTIAL_ROPE, ROPE
from pjit_train.huggingface.families.table import Family, Key, Tensor, attention, linear, norm
from pjit_train.models.transformer import TransformerConfig

LAYER = "model.layers.{}."
FEED_FORWARD = (
    *linear("blocks.feed_forward.gate", LAYER + "mlp.gate_proj"),
    *linear("blocks.feed_forward.up", LAYER + "mlp.up_proj"),
    *linear("blocks.feed_forward.down", LAYER + "mlp.down_proj"),
)
ATTENTION = attention(*(f"{LAYER}self_attn.{x}_proj" for x in "qkvo"))
HEAD_NORMS = (
    *norm("blocks.attention.query_norm", LAYER + "self_attn.q_norm"),
    *norm("blocks.attention.key_norm", LAYER + "self_attn.k_norm"),
)
ENDS = (
    Tensor("model.embed_tokens.weight", "vd -> v,d", ("embedding",)),
    *norm("norm", "model.norm"),
    Tensor("lm_head.weight", "dv -> v,d", ("head",)),
)
_PRE_NORMS = (
    *norm("blocks.attention_norm", LAYER + "input_layernorm"),
    *norm("blocks.feed_forward_norm", LAYER + "post_attention_layernorm"),
)

LLAMA = Family(
    architecture="LlamaForCausalLM",
    config=TransformerConfig,
    ours={"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False},
    keys={
        "vocab_size": Key("vocab_size"),
        "d_model": Key("hidden_size"),
        "d_ff": Key("intermediate_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "num_kv_heads": Key("num_key_value_heads", int, None),
        "head_dim": Key("head_dim", int, None),
        "max_len": Key("max_position_embeddings", int, 2048),
        "norm_epsilon": Key("rms_norm_eps", float, 1e-6),
        "init_std": Key("initializer_range", float, 0.02),
        "tie_head": Key("tie_word_embeddings", bool, False),
    },
    theirs={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    base="model.",
    tensors=(*ENDS, *ATTENTION, *FEED_FORWARD, *_PRE_NORMS),
    derived=(ROPE,),
    heads_divide=True,
)


def like_llama(architecture: str, *, keys: dict[str, Key], **changes: Any) -> Family:
    """A family that differs from Llama in some keys, and in the fields of `changes`."""
    changes = {"heads_divide": False} | changes
    return dataclasses.replace(LLAMA, architecture=architecture, keys=LLAMA.keys | keys, **changes)


def _mistral(document: dict[str, Any]) -> dict[str, Any]:
    return {"sliding_window": 4096, **document}


MISTRAL = like_llama(
    "MistralForCausalLM",
    keys={
        "num_kv_heads": Key("num_key_value_heads", int, 8, nullable=True),
        "max_len": Key("max_position_embeddings", int, 131_072),
    },
    theirs={"hidden_act": "silu"},
    derived=(ROPE, WINDOW),
    modern=_mistral,
)

QWEN2 = like_llama(
    "Qwen2ForCausalLM",
    ours=LLAMA.ours | {"qkv_bias": True},
    keys={
        "num_kv_heads": Key("num_key_value_heads", int, 32, nullable=True),
        "max_len": Key("max_position_embeddings", int, 32_768),
    },
    theirs={"hidden_act": "silu", "use_mrope": False},
    derived=(ROPE, WINDOW_FROM),
)

QWEN3 = like_llama(
    "Qwen3ForCausalLM",
    ours=LLAMA.ours | {"qk_norm": "head"},
    keys={
        "num_kv_heads": Key("num_key_value_heads", int, 32, nullable=True),
        "head_dim": Key("head_dim", int, 128),
        "max_len": Key("max_position_embeddings", int, 32_768),
    },
    theirs={"hidden_act": "silu", "attention_bias": False},
    derived=(ROPE, WINDOW_FROM),
    tensors=(*LLAMA.tensors, *HEAD_NORMS),
)

PHI3 = like_llama(
    "Phi3ForCausalLM",
    keys={
        "max_len": Key("max_position_embeddings", int, 4096),
        "norm_epsilon": Key("rms_norm_eps", float, 1e-5),
    },
    theirs={"hidden_act": "silu", "attention_bias": False, "lm_head_bias": False},
    derived=(PARTIAL_ROPE, WINDOW),
    tensors=(
        *ENDS,
        Tensor(
            LAYER + "self_attn.qkv_proj.weight",
            "dhk -> hk,d",
            tuple(f"blocks.attention.{x}.kernel" for x in ("query", "key", "value")),
            axis=0,
        ),
        *linear("blocks.attention.out", LAYER + "self_attn.o_proj", "hkd -> d,hk"),
        Tensor(
            LAYER + "mlp.gate_up_proj.weight",
            "io -> o,i",
            ("blocks.feed_forward.gate.kernel", "blocks.feed_forward.up.kernel"),
            axis=0,
        ),
        *linear("blocks.feed_forward.down", LAYER + "mlp.down_proj"),
        *_PRE_NORMS,
    ),
)

OLMO2 = like_llama(
    "Olmo2ForCausalLM",
    ours=LLAMA.ours | {"qk_norm": "all", "norm_placement": "post"},
    keys={"norm_epsilon": Key("rms_norm_eps", float, 1e-5)},
    theirs={"hidden_act": "silu", "attention_bias": False},
    tensors=(
        *ENDS,
        *ATTENTION,
        *FEED_FORWARD,
        *norm("blocks.attention.query_norm", LAYER + "self_attn.q_norm", "hd -> hd"),
        *norm("blocks.attention.key_norm", LAYER + "self_attn.k_norm", "hd -> hd"),
        *norm("blocks.attention_post_norm", LAYER + "post_attention_layernorm"),
        *norm("blocks.feed_forward_post_norm", LAYER + "post_feedforward_layernorm"),
    ),
)
