"""Families of Hugging Face `transformers` (Llama, OPT, GPT-2, ViT): their keys and tensors.

`FAMILIES` pairs Torsion's configuration with the keys of config.json, and Torsion's parameters with
the tensors of the safetensors files. `huggingface.load` and `huggingface.save` both read it off
here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pjit_train.models.block_config import BlockConfig
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig

REQUIRED = object()
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Key:
    """Key of config.json, and how its value is read.

    Attributes:
      name: dots lead into objects.
      kind: int, float, bool, or Hugging Face's name of each choice -> Torsion's; a tuple of values
        is that of the keys in it.
      default: what `transformers` takes where the key is absent.
    """

    name: str
    kind: type | Mapping[str, Any] = int
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a Hugging Face folder and the parameters of Torsion that it holds.

    Attributes:
      name: "{}" stands for the number of the layer, and the parameters then have a leading axis of
        layers.
      layout: axes of a parameter -> axes of the tensor, each the product of those it lists ("1"
        lists none): "dhk -> hk,d" is a tensor [heads * head_dim, d_model].
      paths: the parameters; more than one are joined along the last axis of the tensor.
    """

    name: str
    layout: str
    paths: tuple[str, ...]

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of one layer; `ours` is that of each parameter in it."""
        *shape, last = (math.prod(ours[i] for i in group) for group in self._groups())
        return (*shape, last * len(self.paths))

    def join(self, ours: list[np.ndarray]) -> np.ndarray:
        """Makes the tensor of one layer from its parameters."""
        groups = self._groups()
        order = [i for group in groups for i in group]
        parts = [
            x.transpose(order).reshape([math.prod(x.shape[i] for i in group) for group in groups])
            for x in ours
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def split(self, theirs: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Splits the tensor of one layer into its parameters, each of `shape`."""
        order = [i for group in self._groups() for i in group]
        back = np.argsort(order)
        parts = np.split(theirs, len(self.paths), axis=-1)
        return [part.reshape([shape[i] for i in order]).transpose(back) for part in parts]

    def _groups(self) -> list[list[int]]:
        ours, theirs = self.layout.split(" -> ")
        return [[ours.index(a) for a in group if a != "1"] for group in theirs.split(",")]


@dataclasses.dataclass(frozen=True)
class Family:
    """Family of models, by `model_type` of `transformers`, in the terms of Torsion.

    Attributes:
      architecture: the class of `transformers` that has these tensors.
      ours: fields of Torsion's configuration that are the same in all of the family.
      keys: the other fields -> keys of config.json.
      theirs: keys of config.json that must have these values where they are present.
      base: the prefix of names that files of the model without its head leave out.
    """

    architecture: str
    config: type[BlockConfig]
    ours: dict[str, Any]
    keys: dict[str, Key]
    theirs: dict[str, Any]
    base: str
    tensors: tuple[Tensor, ...]


def _linear(path: str, name: str, kernel: str = "io -> o,i", bias: str = "o -> o"):
    return (
        Tensor(f"{name}.weight", kernel, (f"{path}.kernel",)),
        Tensor(f"{name}.bias", bias, (f"{path}.bias",)),
    )


def _norm(path: str, name: str):
    return (
        Tensor(f"{name}.weight", "d -> d", (f"{path}.scale",)),
        Tensor(f"{name}.bias", "d -> d", (f"{path}.bias",)),
    )


def _attention(query: str, key: str, value: str, out: str):
    names = {"query": query, "key": key, "value": value}
    projections = [
        _linear(f"blocks.attention.{ours}", theirs, "dhk -> hk,d", "hk -> hk")
        for ours, theirs in names.items()
    ]
    return (*sum(projections, ()), *_linear("blocks.attention.out", out, "hkd -> d,hk"))


ROPE_SCALING = (  # in the order of `TransformerConfig.rope_scaling`
    Key("rope_parameters.factor", float),
    Key("rope_parameters.low_freq_factor", float),
    Key("rope_parameters.high_freq_factor", float),
    Key("rope_parameters.original_max_position_embeddings"),
)
_LLAMA = "model.layers.{}."
_OPT = "model.decoder.layers.{}."
_GPT2 = "transformer.h.{}."
_VIT = "vit.encoder.layer.{}."

FAMILIES = {
    "llama": Family(
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
            "rope_theta": Key("rope_parameters.rope_theta", float, 10_000.0),
            "rope_scaling": Key(
                "rope_parameters.rope_type", {"default": None, "llama3": ROPE_SCALING}, "default"
            ),
            "norm_epsilon": Key("rms_norm_eps", float, 1e-6),
            "init_std": Key("initializer_range", float, 0.02),
            "tie_head": Key("tie_word_embeddings", bool, False),
        },
        theirs={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        },
        base="model.",
        tensors=(
            Tensor("model.embed_tokens.weight", "vd -> v,d", ("embedding",)),
            *_attention(*(f"{_LLAMA}self_attn.{x}_proj" for x in "qkvo")),
            *_linear("blocks.feed_forward.gate", _LLAMA + "mlp.gate_proj"),
            *_linear("blocks.feed_forward.up", _LLAMA + "mlp.up_proj"),
            *_linear("blocks.feed_forward.down", _LLAMA + "mlp.down_proj"),
            *_norm("blocks.attention_norm", _LLAMA + "input_layernorm"),
            *_norm("blocks.feed_forward_norm", _LLAMA + "post_attention_layernorm"),
            *_norm("norm", "model.norm"),
            Tensor("lm_head.weight", "dv -> v,d", ("head",)),
        ),
    ),
    "opt": Family(
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
            *_attention(*(f"{_OPT}self_attn.{x}_proj" for x in ("q", "k", "v", "out"))),
            *_linear("blocks.feed_forward.up", _OPT + "fc1"),
            *_linear("blocks.feed_forward.down", _OPT + "fc2"),
            *_norm("blocks.attention_norm", _OPT + "self_attn_layer_norm"),
            *_norm("blocks.feed_forward_norm", _OPT + "final_layer_norm"),
            *_norm("norm", "model.decoder.final_layer_norm"),
            Tensor("lm_head.weight", "dv -> v,d", ("head",)),
        ),
    ),
    "gpt2": Family(
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
            *_linear("blocks.attention.out", _GPT2 + "attn.c_proj", "hkd -> hk,d"),
            *_linear("blocks.feed_forward.up", _GPT2 + "mlp.c_fc", "io -> i,o"),
            *_linear("blocks.feed_forward.down", _GPT2 + "mlp.c_proj", "io -> i,o"),
            *_norm("blocks.attention_norm", _GPT2 + "ln_1"),
            *_norm("blocks.feed_forward_norm", _GPT2 + "ln_2"),
            *_norm("norm", "transformer.ln_f"),
            Tensor("lm_head.weight", "dv -> v,d", ("head",)),
        ),
    ),
    "vit": Family(
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
            *_linear("patches", "vit.embeddings.patch_embeddings.projection", "hwcd -> d,c,h,w"),
            *_attention(
                _VIT + "attention.attention.query",
                _VIT + "attention.attention.key",
                _VIT + "attention.attention.value",
                _VIT + "attention.output.dense",
            ),
            *_linear("blocks.feed_forward.up", _VIT + "intermediate.dense"),
            *_linear("blocks.feed_forward.down", _VIT + "output.dense"),
            *_norm("blocks.attention_norm", _VIT + "layernorm_before"),
            *_norm("blocks.feed_forward_norm", _VIT + "layernorm_after"),
            *_norm("norm", "vit.layernorm"),
            *_linear("head", "classifier"),
        ),
    ),
}
