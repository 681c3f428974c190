"""Models of GGUF files in the terms of Hugging Face: config.json, and a tensor for each tensor.

The names of tensors are those of the package `gguf`, whose table has Hugging Face's beside them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.huggingface.config import parse_config, some
from pjit_train.huggingface.gguf_architectures import ARCHITECTURES, ROPE, Architecture, Keys
from pjit_train.huggingface.gguf_file import GGUF
from pjit_train.huggingface.weights import tensor_shapes

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


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
    if odd := sorted(file.tensors.keys() - wanted.keys() - tied - {ROPE}):
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
    keys = Keys(file, name)
    document: dict[str, Any] = {"model_type": architecture.model_type, **architecture.theirs}
    for theirs, key in architecture.keys.items():
        document[theirs] = keys.real(key) if key.endswith("epsilon") else keys.whole(key)
    if _EMBEDDING not in file.tensors:
        raise UserError(f"{file.path}: tensor {_EMBEDDING} is missing")
    document["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    document["tie_word_embeddings"] = _is_tied(file)
    document |= architecture.more(keys)
    keys.check_all_read()
    return document


def _is_tied(file: GGUF) -> bool:
    """Tells whether the head is the embedding: it is not there, or the same bytes."""
    return _HEAD not in file.tensors or file.same(_HEAD, _EMBEDDING)
