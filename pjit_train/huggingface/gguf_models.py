"""The models of GGUF files in the terms of Hugging Face: config.json, and a tensor for each tensor.

`ARCHITECTURES` has what the converter of llama.cpp changes in each architecture; the names of its
tensors are those of the package `gguf`, whose table has Hugging Face's beside them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.huggingface.config import parse_config, some
from pjit_train.huggingface.gguf_file import GGUF
from pjit_train.huggingface.weights import tensor_shapes

_EMBEDDING, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Keys of an architecture that say nothing of what the model computes, or say it again.
_FREE = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
# Keys that may be there where they have this value, and then change nothing.
_NONE = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "attention.causal": True,
    "use_parallel_residual": True,  # which is read for other architectures
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
      model_type: of `transformers`.
      keys: of config.json -> the key of the file, after the name of the architecture.
      theirs: what config.json says besides.
      rotary: whether positions are rotary.
      interleaves: whether the rows of queries and keys are stored with the two halves of each head
        interleaved, as rotary positions of llama.cpp pair them.
      offset_norms: whether 1 is added to the scales of norms.
      transposed: tensors that are stored transposed, by a regular expression of their names.
    """

    model_type: str
    keys: Mapping[str, str]
    theirs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rotary: bool = True
    interleaves: bool = False
    offset_norms: bool = False
    transposed: str = "$^"


_DECODER = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
ARCHITECTURES = {
    "llama": Architecture("llama", _DECODER, {"hidden_act": "silu"}, interleaves=True),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": "embedding_length",
            "n_inner": "feed_forward_length",
            "n_layer": "block_count",
            "n_head": "attention.head_count",
            "n_positions": "context_length",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
        {"activation_function": "gelu_new"},
        rotary=False,
        transposed=r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$",
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor of a GGUF file that becomes one of Hugging Face's, of its `shape`.

    Attributes:
      heads: in which rows are interleaved; None where they are not.
      offset: is subtracted.
    """

    name: str
    shape: tuple[int, ...]
    heads: int | None
    offset: float
    transposed: bool

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Brings the elements of the file's tensor into Hugging Face's order."""
        if self.transposed:
            return array.T
        if self.heads is None:
            return array
        split = array.reshape(self.heads, -1, 2, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)


def read_model(file: GGUF) -> tuple[dict[str, Any], dict[str, Source]]:
    """The config.json of a file's model, and each of Hugging Face's tensors -> where it is from.

    Raises:
      UserError: the architecture is not known, a key says what is not done, or the tensors are not
        those of the model.
    """
    values = file.values
    if values.get("general.type", "model") != "model":
        raise UserError(f"{file.path}: general.type={values['general.type']!r} is no model")
    name = values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: general.architecture={name!r} is not supported; "
            f"{', '.join(ARCHITECTURES)} are"
        )
    architecture = ARCHITECTURES[name]
    document = _document(file, name, architecture)
    family, config = parse_config(f"{file.path}, as config.json", document)
    document = {"architectures": [family.architecture], **document}

    if config.num_layers > len(file.tensors):  # not to list what cannot be there
        raise UserError(
            f"{file.path}: {name}.block_count={config.num_layers} and there are "
            f"{len(file.tensors)} tensors; the header is damaged"
        )
    names = _names(name, config.num_layers)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads or config.num_heads}
    sources = {}
    for theirs, shape in tensor_shapes(family, config).items():
        stem, _, suffix = theirs.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        part = stored.split(".")[-2]
        sources[theirs] = Source(
            name=stored,
            shape=shape,
            heads=heads.get(part) if architecture.interleaves else None,
            offset=float(architecture.offset_norms and part.endswith("norm")),
            transposed=re.search(architecture.transposed, stored) is not None,
        )
    _check_tensors(file, sources)
    return document, sources


def _check_tensors(file: GGUF, sources: Mapping[str, Source]) -> None:
    """Raises a UserError unless the file has the tensors of the model, and no others."""
    wanted = {source.name: source for source in sources.values()}
    tied = {_HEAD} - wanted.keys() if _is_tied(file) else set()
    if missing := sorted(wanted.keys() - file.tensors.keys()):
        raise UserError(f"{file.path}: tensors {some(missing)} are missing")
    if odd := sorted(file.tensors.keys() - wanted.keys() - tied - {_ROPE}):
        raise UserError(f"{file.path}: tensors {some(odd)} are not of this model")
    for name, source in wanted.items():
        shape = source.shape[::-1] if source.transposed else source.shape
        if (found := file.tensors[name].shape) != shape:
            raise UserError(
                f"{file.path}: tensor {name} is {list(found)}; the keys make it {list(shape)}"
            )


def _names(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(n for n, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, layers)


def _document(file: GGUF, name: str, architecture: Architecture) -> dict[str, Any]:
    """The config.json that the keys of a file say; what they do not say is not in it."""
    keys = _Keys(file, name)
    document: dict[str, Any] = {"model_type": architecture.model_type, **architecture.theirs}
    for theirs, key in architecture.keys.items():
        document[theirs] = keys.number(key)
    if _EMBEDDING not in file.tensors:
        raise UserError(f"{file.path}: tensor {_EMBEDDING} is missing")
    document["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    document["tie_word_embeddings"] = _is_tied(file)
    heads = keys.number("attention.head_count")
    kv_heads = keys.number("attention.head_count_kv", heads)
    if architecture.rotary:
        width = keys.number("embedding_length")
        head_dim = keys.number("attention.key_length", width // max(heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := keys.number(key, head_dim)) != head_dim:
                raise keys.wrong(key, f"{found} is not supported; only {head_dim}, of a head, is")
        document |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
        document["rope_parameters"] = _rope(file, keys, head_dim)
    elif kv_heads != heads:
        raise keys.wrong("attention.head_count_kv", f"{kv_heads} is not {heads}, of the heads")
    keys.check_all_read()
    return document


class _Keys:
    """The keys of an architecture, and which of them have been read."""

    def __init__(self, file: GGUF, architecture: str):
        self._file, self._prefix = file, f"{architecture}."
        self._read: set[str] = set()

    def wrong(self, key: str, what: str) -> UserError:
        return UserError(f"{self._file.path}: {self._prefix}{key}={what}")

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._file.values.get(self._prefix + key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, in the fewest digits that say its float32; one list of the same one is it."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None:
            raise UserError(f"{self._file.path}: {self._prefix}{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, f"{value!r:.60} is not supported; one number is")
        if not math.isfinite(value) or not 0 < value <= 2**40:
            raise self.wrong(key, f"{value} is no size of a model")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def check_all_read(self) -> None:
        """Raises a UserError where a key says something that nobody has read."""
        for name, value in self._file.values.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in self._read | _FREE:
                continue
            if key in _NONE and type(value) is type(_NONE[key]) and value == _NONE[key]:
                continue
            raise self.wrong(key, f"{value!r:.60} is not supported")


def _rope(file: GGUF, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """The rope_parameters that the keys and the tensor of frequencies say."""
    theta = keys.number("rope.freq_base", 10_000.0)
    if _ROPE in file.tensors:
        return _llama3(file, theta, head_dim)
    kind = keys.get("rope.scaling.type", "none")
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": theta}
    for ours, key in (
        ("factor", "rope.scaling.factor"),
        ("original_max_position_embeddings", "rope.scaling.original_context_length"),
    ):
        if (value := keys.get(key)) is not None and kind != "none":
            rope[ours] = value
    return rope


def _llama3(file: GGUF, theta: float, head_dim: int) -> dict[str, Any]:
    """Finds the scaling of Llama 3.1 that gives the factors by which frequencies are divided.

    The file has the factors alone. They say three of the four parameters: lengths and both bounds
    of frequency together may be scaled, so the lower bound is taken to be 1, as in every release.
    """
    stored = file.tensors[_ROPE]
    if stored.shape != (head_dim // 2,):
        raise UserError(f"{file.path}: tensor {_ROPE} is {list(stored.shape)}, not {head_dim // 2}")
    factors = file.read(_ROPE, np.float64)
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
    raise UserError(f"{file.path}: tensor {_ROPE} is not Llama 3's scaling, the only supported one")


def _is_tied(file: GGUF) -> bool:
    """Tells whether the head is the embedding: it is not there, or the same bytes."""
    return _HEAD not in file.tensors or file.same(_HEAD, _EMBEDDING)
