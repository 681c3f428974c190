"""OPT, GPT-2 and ViT."""

from typing import Any

from pjit_train.errors import UserError
from pjit_train.huggingface.families.table import Family, Key, Tensor, attention, linear, norm
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}
_OPT = "model.decoder.layers.{}."
_GPT2 = "transformer.h.{}."
_VIT = "vit.encoder.layer.{}."


def _opt(document: dict[str, Any]) -> dict[str, Any]:
    width = document.get("hidden_size")
    if (projected := document.get("word_embed_proj_dim")) not in (None, width):
        raise UserError(
            f"word_embed_proj_dim={projected!r} is not supported; only hidden_size={width!r} is"
        )
    return document


def _gpt2(document: dict[str, Any]) -> dict[str, Any]:
    width = document.get("n_embd")
    if document.get("n_inner") is None and isinstance(width, int):
        return {**document, "n_inner": 4 * width}
    return document


def _vit(document: dict[str, Any]) -> dict[str, Any]:
    if isinstance(labels := document.get("id2label"), dict):
        document = {**document, "num_labels": len(labels)}
    for name in ("image_size", "patch_size"):
        match document.get(name):
            case [height, width] if height == width:
                document = {**document, name: height}
    return document


OPT = Family(
    architecture="OPTForCausalLM",
    config=TransformerConfig,
    ours={
        "positions": "learned",
        "position_offset": 2,
        "norm": "layernorm",
        "norm_epsilon": 1e-5,
    },
    keys={
        "vocab_size": Key("vocab_size"),
        "d_model": Key("hidden_size"),
        "d_ff": Key("ffn_dim"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "max_len": Key("max_position_embeddings", int, 2048),
        "activation": Key("activation_function", _ACTIVATIONS, "relu"),
        "use_bias": Key("enable_bias", bool, True),
        "init_std": Key("init_std", float, 0.02),
        "tie_head": Key("tie_word_embeddings", bool, True),
    },
    theirs={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
    base="model.",
    tensors=(
        Tensor("model.decoder.embed_tokens.weight", "vd -> v,d", ("embedding",)),
        Tensor("model.decoder.embed_positions.weight", "td -> t,d", ("position_embedding",)),
        *attention(*(f"{_OPT}self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
        *linear("blocks.feed_forward.up", _OPT + "fc1"),
        *linear("blocks.feed_forward.down", _OPT + "fc2"),
        *norm("blocks.attention_norm", _OPT + "self_attn_layer_norm"),
        *norm("blocks.feed_forward_norm", _OPT + "final_layer_norm"),
        *norm("norm", "model.decoder.final_layer_norm"),
        Tensor("lm_head.weight", "dv -> v,d", ("head",)),
    ),
    modern=_opt,
    harmless=("word_embed_proj_dim",),
)

GPT2 = Family(
    architecture="GPT2LMHeadModel",
    config=TransformerConfig,
    ours={
        "positions": "learned",
        "position_offset": 0,
        "norm": "layernorm",
        "use_bias": True,
    },
    keys={
        "vocab_size": Key("vocab_size"),
        "d_model": Key("n_embd"),
        "d_ff": Key("n_inner", int, None),
        "num_layers": Key("n_layer"),
        "num_heads": Key("n_head"),
        "max_len": Key("n_positions", int, 1024),
        "activation": Key("activation_function", _ACTIVATIONS, "gelu_new"),
        "norm_epsilon": Key("layer_norm_epsilon", float, 1e-5),
        "init_std": Key("initializer_range", float, 0.02),
        "tie_head": Key("tie_word_embeddings", bool, True),
    },
    theirs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    base="transformer.",
    tensors=(
        Tensor("transformer.wte.weight", "vd -> v,d", ("embedding",)),
        Tensor("transformer.wpe.weight", "td -> t,d", ("position_embedding",)),
        Tensor(
            _GPT2 + "attn.c_attn.weight",
            "dhk -> d,hk",
            tuple(f"blocks.attention.{x}.kernel" for x in ("query", "key", "value")),
        ),
        Tensor(
            _GPT2 + "attn.c_attn.bias",
            "hk -> hk",
            tuple(f"blocks.attention.{x}.bias" for x in ("query", "key", "value")),
        ),
        *linear("blocks.attention.out", _GPT2 + "attn.c_proj", "hkd -> hk,d"),
        *linear("blocks.feed_forward.up", _GPT2 + "mlp.c_fc", "io -> i,o"),
        *linear("blocks.feed_forward.down", _GPT2 + "mlp.c_proj", "io -> i,o"),
        *norm("blocks.attention_norm", _GPT2 + "ln_1"),
        *norm("blocks.feed_forward_norm", _GPT2 + "ln_2"),
        *norm("norm", "transformer.ln_f"),
        Tensor("lm_head.weight", "dv -> v,d", ("head",)),
    ),
    modern=_gpt2,
)

VIT = Family(
    architecture="ViTForImageClassification",
    config=ViTConfig,
    ours={"norm": "layernorm", "use_bias": True},
    keys={
        "d_model": Key("hidden_size"),
        "d_ff": Key("intermediate_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_heads": Key("num_attention_heads"),
        "activation": Key("hidden_act", _ACTIVATIONS, "gelu"),
        "norm_epsilon": Key("layer_norm_eps", float, 1e-12),
        "init_std": Key("initializer_range", float, 0.02),
        "image_size": Key("image_size", int, 224),
        "patch_size": Key("patch_size", int, 16),
        "channels": Key("num_channels", int, 3),
        "num_classes": Key("num_labels", int, 2),
    },
    theirs={"qkv_bias": True},
    base="vit.",
    tensors=(
        Tensor("vit.embeddings.cls_token", "d -> 1,1,d", ("class_token",)),
        Tensor("vit.embeddings.position_embeddings", "td -> 1,t,d", ("position_embedding",)),
        *linear("patches", "vit.embeddings.patch_embeddings.projection", "hwcd -> d,c,h,w"),
        *attention(
            _VIT + "attention.attention.query",
            _VIT + "attention.attention.key",
            _VIT + "attention.attention.value",
            _VIT + "attention.output.dense",
        ),
        *linear("blocks.feed_forward.up", _VIT + "intermediate.dense"),
        *linear("blocks.feed_forward.down", _VIT + "output.dense"),
        *norm("blocks.attention_norm", _VIT + "layernorm_before"),
        *norm("blocks.feed_forward_norm", _VIT + "layernorm_after"),
        *norm("norm", "vit.layernorm"),
        *linear("head", "classifier"),
    ),
    modern=_vit,
)
