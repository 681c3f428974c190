"""Architectures of llama.cpp: what their keys are in config.json, and what its converter changes.

`ARCHITECTURES` has those of the families of Hugging Face that are supported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.huggingface.gguf_file import GGUF

_LARGEST = 2**40  # of any number of a model; a float that is none is not below it
ROPE = "rope_freqs.weight"  # a tensor that says a scaling of rotary positions
# Keys of an architecture that say nothing of what the model computes, or say it again.
_FREE = {
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"),
    "rope.scaling.original_context_length",  # counts where a scaling needs it, and is read there
}
# Keys that may be there where they have this value, and then change nothing.
_NONE = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "attention.causal": True,
    "use_parallel_residual": True,  # which is read for other architectures
}


class Keys:
    """Keys of an architecture, and which of them have been read."""

    def __init__(self, file: GGUF, architecture: str):
        self.file, self._prefix = file, f"{architecture}."
        self._read: set[str] = set()

    def wrong(self, key: str, what: str) -> UserError:
        return UserError(f"{self.file.path}: {self._prefix}{key}={what}")

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.file.values.get(self._prefix + key, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number; a list of the same one for all layers is it too."""
        value = self._one(key, default)
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise self.wrong(key, f"{value!r:.60} is not supported; a size of a model is")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number, in the fewest digits that say its float32."""
        value = self._one(key, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise self.wrong(key, f"{value!r:.60} is not supported; a positive number is")
        return float(str(np.float32(value)))

    def _one(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise UserError(f"{self.file.path}: {self._prefix}{key} is missing")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()
        return value

    def check_all_read(self) -> None:
        """Raises a UserError where a key says something that nobody has read."""
        for name, value in self.file.values.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._read | _FREE:
                continue
            if key in _NONE and type(value) is type(_NONE[key]) and value == _NONE[key]:
                continue
            raise self.wrong(key, f"{value!r:.60} is not supported")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
      model_type: of `transformers`.
      keys: of config.json -> the key of the file, after the name of the architecture.
      theirs: what config.json says besides.
      more: reads what else config.json says.
      interleaves: whether the rows of queries and keys are stored with the two halves of each head
        interleaved, as rotary positions of llama.cpp pair them.
      offset_norms: whether 1 is added to the scales of norms.
      transposed: tensors that are stored transposed, by a regular expression of their names.
    """

    model_type: str
    keys: Mapping[str, str]
    theirs: Mapping[str, Any]
    more: Callable[[Keys], dict[str, Any]]
    interleaves: bool = False
    offset_norms: bool = False
    transposed: str = "$^"


def _rope(keys: Keys, head_dim: int) -> dict[str, Any]:
    """The rope_parameters that the keys and the tensor of frequencies say."""
    theta = keys.real("rope.freq_base", 10_000.0)
    if ROPE in keys.file.tensors:
        return _llama3(keys.file, theta, head_dim)
    kind = keys.get("rope.scaling.type", "none")
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": theta}
    if kind != "none" and keys.get("rope.scaling.factor") is not None:
        rope["factor"] = keys.real("rope.scaling.factor")
    if kind not in ("none", "linear"):
        length = keys.get("rope.scaling.original_context_length")
        rope |= {} if length is None else {"original_max_position_embeddings": length}
    return rope


def _llama3(file: GGUF, theta: float, head_dim: int) -> dict[str, Any]:
    """Finds the scaling of Llama 3.1 that gives the factors by which frequencies are divided.

    The file has the factors alone. They say three of the four parameters: lengths and both bounds
    of frequency together may be scaled, so the lower bound is taken to be 1, as in every release.
    """
    stored = file.tensors[ROPE]
    if stored.shape != (head_dim // 2,):
        raise UserError(f"{file.path}: tensor {ROPE} is {list(stored.shape)}, not {head_dim // 2}")
    factors = file.read(ROPE, np.float64)
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # a position
    factor = float(factors.max())
    between = (factors > 1) & (factors < factor * (1 - 1e-6))
    # 1 / factors = smooth + (1 - smooth) / factor, and smooth is linear in the turns
    smooth, at = (1 / factors[between] - 1 / factor) / (1 - 1 / factor), turns[between]
    highs = [4.0, 8.0, 3.0, 2.0]
    if between.sum() > 1:
        _, start = np.polyfit(at, smooth, 1)
        highs += [round(1 - 1 / start, 3)] if start < 0 else []
    guesses = [(4.0, 8192)]
    for high in highs:
        if between.any():
            guesses.append((high, round(float(np.median((1 + (high - 1) * smooth) / at)))))
        elif (factors == 1).any():
            guesses.append((high, math.ceil(high / turns[factors == 1].min())))
    for high, length in guesses:
        smooth = np.clip((length * turns - 1) / (high - 1), 0, 1)
        if np.allclose(factors, 1 / (smooth + (1 - smooth) / factor), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": float(str(np.float32(factor))),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise UserError(f"{file.path}: tensor {ROPE} is not Llama 3's scaling, the only supported one")


_DECODER = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GPT2 = {
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_SILU = {"hidden_act": "silu"}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}


def _rotary(keys: Keys, *, partial: bool = False) -> dict[str, Any]:
    """Heads and rotary positions that turn all of a head, or where `partial` a part of it."""
    head_dim = _head_dim(keys)
    turned = keys.whole("rope.dimension_count", head_dim)
    if turned != head_dim and not partial:
        raise keys.wrong(
            "rope.dimension_count", f"{turned} is not supported; only {head_dim}, of a head, is"
        )
    rope = _rope(keys, head_dim)
    found = {**_heads(keys), "rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":  # and where transformers 4 looks for it
        found["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if turned != head_dim:
        rope["partial_rotary_factor"] = found["partial_rotary_factor"] = turned / head_dim
    return found


def _heads(keys: Keys) -> dict[str, Any]:
    heads = keys.whole("attention.head_count")
    kv_heads = keys.whole("attention.head_count_kv", heads)
    return {"num_key_value_heads": kv_heads, "head_dim": _head_dim(keys)}


def _head_dim(keys: Keys) -> int:
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", width // heads)
    if (value := keys.whole("attention.value_length", head_dim)) != head_dim:
        raise keys.wrong("attention.value_length", f"{value} is not supported; only {head_dim} is")
    return head_dim


def _learned(keys: Keys) -> dict[str, Any]:
    heads = keys.whole("attention.head_count")
    if (found := keys.whole("attention.head_count_kv", heads)) != heads:
        raise keys.wrong(
            "attention.head_count_kv", f"{found} is not supported; only {heads}, of all heads, is"
        )
    return {}


def _phi3(keys: Keys) -> dict[str, Any]:
    found = _rotary(keys, partial=True)
    length = keys.whole("context_length")
    original = keys.whole("rope.scaling.original_context_length", length)
    if original != length:
        raise keys.wrong(
            "rope.scaling.original_context_length",
            f"{original} is not supported; only {length}, of a model without LongRoPE, is",
        )
    return found | {
        "original_max_position_embeddings": length,
        "sliding_window": keys.get("attention.sliding_window") or None,  # 0 is none
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    found = _rotary(keys)
    for ours in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[ours] = keys.real(ours) if keys.get(ours) else None
    found["sliding_window"] = keys.whole("attention.sliding_window", 4096)
    return found | _scalar(keys, found, large=46)


def _gemma3(keys: Keys) -> dict[str, Any]:
    found = _rotary(keys)
    theta = keys.real("rope.freq_base_swa", 10_000.0)
    local = {"rope_type": "default", "rope_theta": theta}
    rope = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    layers = range(min(keys.whole("block_count"), len(keys.file.tensors)))  # more cannot be there
    every = keys.whole("attention.sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    cap = keys.real("final_logit_softcapping") if keys.get("final_logit_softcapping") else None
    return (
        found
        | {"rope_parameters": rope, "rope_local_base_freq": theta, "layer_types": kinds}
        | {
            "sliding_window": keys.whole("attention.sliding_window"),
            "sliding_window_pattern": every,
        }
        | {"final_logit_softcapping": cap}
        | _scalar(keys, found, large=62)
    )


def _scalar(keys: Keys, found: dict[str, Any], *, large: int) -> dict[str, Any]:
    """Gemma's scale of attention, which no key says: llama.cpp knows the 27B models by depth."""
    width, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    depth = keys.whole("block_count")
    return {"query_pre_attn_scalar": width // heads if depth == large else found["head_dim"]}


ARCHITECTURES = {
    "llama": Architecture("llama", _DECODER, _SILU, _rotary, interleaves=True),
    "qwen2": Architecture("qwen2", _DECODER, _SILU, _rotary),
    "qwen3": Architecture("qwen3", _DECODER, _SILU, _rotary),
    "gemma2": Architecture("gemma2", _DECODER, _GEMMA, _gemma2, offset_norms=True),
    "gemma3": Architecture("gemma3_text", _DECODER, _GEMMA, _gemma3, offset_norms=True),
    "phi3": Architecture("phi3", _DECODER, _SILU, _phi3),
    "olmo2": Architecture("olmo2", _DECODER, _SILU, _rotary),
    "gpt2": Architecture(
        "gpt2",
        _GPT2,
        {"activation_function": "gelu_new"},
        _learned,
        transposed=r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$",
    ),
}
