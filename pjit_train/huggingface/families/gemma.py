"""Gemma 2, and the text models of Gemma 3."""

from collections.abc import Mapping
from typing import Any

from pjit_train.errors import UserError
from pjit_train.huggingface.families import rope
from pjit_train.huggingface.families.layers import pattern
from pjit_train.huggingface.families.llama import (
    ATTENTION,
    ENDS,
    FEED_FORWARD,
    HEAD_NORMS,
    LAYER,
    like_llama,
)
from pjit_train.huggingface.families.table import Derived, Key, norm

_FULL, _LOCAL = "full_attention", "sliding_attention"


def _scale(document: Mapping[str, Any]) -> dict[str, Any]:
    """Attention's scale, 1 / sqrt(query_pre_attn_scalar)."""
    return {"attention_scale": Key("query_pre_attn_scalar", int, 256).read(document) ** -0.5}


def _scalar(config: Any) -> dict[str, Any]:
    scale = config.attention_scale
    scalar = config.head_dim if scale is None else round(scale**-2)
    if scale is not None and (scalar < 1 or scalar**-0.5 != scale):
        raise UserError(
            f"has no attention_scale={scale!r}; use one over the square root of a whole number"
        )
    return {"query_pre_attn_scalar": scalar}


_SCALE = Derived(("attention_scale",), ("query_pre_attn_scalar",), _scale, _scalar)


def _read_ropes(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the rotary positions of Gemma 3, whose local layers have their own."""
    name = "rope_parameters"
    given = document.get(name) or {}
    if not isinstance(given, Mapping) or given.keys() - {_FULL, _LOCAL}:
        raise UserError(f"{name}={given!r} must have {_FULL} and {_LOCAL}, and no others")
    scaling, within = document.get("rope_scaling"), given.get(_FULL)
    theta = Key("rope_theta", float, 1_000_000.0).read(document)
    outside = rope.standard(document, scaling or {}, "rope_scaling", theta)
    full = rope.standard(document, within or {}, f"{name}.{_FULL}", theta)
    if scaling and within and full != outside:
        raise UserError(f"rope_scaling and {name}.{_FULL} do not say the same; remove one")
    full = outside if scaling else full
    theta = Key("rope_local_base_freq", float, 10_000.0).read(document)
    local = rope.standard(document, given.get(_LOCAL) or {}, f"{name}.{_LOCAL}", theta)
    for of, part in ((_FULL, full), (_LOCAL, local)):
        if part.get("partial_rotary_factor", 1) != 1 or (of == _LOCAL and rope.scaling(part)):
            raise UserError(f"{name}.{of}={part!r} is not supported")
    return {
        "rope_theta": Key("rope_theta", float).read(full),
        "rope_scaling": rope.scaling(full),
        "rope_local_theta": Key("rope_theta", float).read(local),
    }


def _write_ropes(config: Any) -> dict[str, Any]:
    theta, full = config.rope_local_theta, rope.parameters(config.rope_theta, config.rope_scaling)
    if theta is None:
        theta = config.rope_theta
        if config.rope_scaling is not None and config.window is not None:
            raise UserError("has no rope_local_theta=None with rope_scaling; say rope_local_theta")
    written = {
        "rope_parameters": {_FULL: full, _LOCAL: rope.parameters(theta, None)},
        "rope_theta": config.rope_theta,  # and where transformers 4 looks for them
        "rope_local_base_freq": theta,
    }
    if config.rope_scaling is not None:
        written["rope_scaling"] = {k: v for k, v in full.items() if k != "rope_theta"}
    return written


def _read_layers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the layers of Gemma 3 and of their rotary positions."""
    fields = _PATTERN.read(document) | _read_ropes(document)
    if fields["window"] is None:  # no layer is local
        fields["rope_local_theta"] = None
    return fields


_PATTERN = pattern(6)
_ROPES_AND_LAYERS = Derived(
    (*_PATTERN.fields, "rope_theta", "rope_scaling", "rope_local_theta"),
    (
        *_PATTERN.keys,
        *("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"),
        *("original_max_position_embeddings", "_sliding_window_pattern"),
    ),
    _read_layers,
    lambda config: _PATTERN.write(config) | _write_ropes(config),
)


GEMMA2 = like_llama(
    "Gemma2ForCausalLM",
    ours={
        "positions": "rope",
        "norm": "rmsnorm",
        "norm_placement": "both",
        "norm_unit_offset": True,
        "activation": "geglu",
        "use_bias": False,
        "scale_embedding": True,
    },
    keys={
        "num_kv_heads": Key("num_key_value_heads", int, 4),
        "head_dim": Key("head_dim", int, 256),
        "max_len": Key("max_position_embeddings", int, 8192),
        "tie_head": Key("tie_word_embeddings", bool, True),
        "attention_softcap": Key("attn_logit_softcapping", float, 50.0, nullable=True),
        "logit_softcap": Key("final_logit_softcapping", float, 30.0, nullable=True),
    },
    theirs={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    tensors=(
        *ENDS,
        *ATTENTION,
        *FEED_FORWARD,
        *norm("blocks.attention_norm", LAYER + "input_layernorm"),
        *norm("blocks.attention_post_norm", LAYER + "post_attention_layernorm"),
        *norm("blocks.feed_forward_norm", LAYER + "pre_feedforward_layernorm"),
        *norm("blocks.feed_forward_post_norm", LAYER + "post_feedforward_layernorm"),
    ),
    derived=(rope.ROPE, pattern(2), _SCALE),
    harmless=("hidden_act",),
    heads_divide=True,
)

GEMMA3 = like_llama(
    "Gemma3ForCausalLM",
    ours=GEMMA2.ours | {"qk_norm": "head"},
    keys={ours: key for ours, key in GEMMA2.keys.items() if ours != "attention_softcap"}
    | {
        "max_len": Key("max_position_embeddings", int, 131_072),
        "logit_softcap": Key("final_logit_softcapping", float, None),
    },
    # The class of `transformers` has a key for a cap of attention, and does not cap.
    theirs=GEMMA2.theirs | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    tensors=(*GEMMA2.tensors, *HEAD_NORMS),
    derived=(_ROPES_AND_LAYERS, _SCALE),
    harmless=GEMMA2.harmless,
    heads_divide=True,
)
