"""The tensors that a Hugging Face folder stores: names, shapes, and values read one at a time.

Quantized weights of the compressed-tensors formats are read as the float32 values that their codes
and scales stand for.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pjit_train.errors import UserError
from pjit_train.files import parse_json, read_json
from pjit_train.huggingface.compressed_tensors_codes import decode
from pjit_train.huggingface.config import some
from pjit_train.huggingface.families import Family
from pjit_train.huggingface.quantization_config import stored_as

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # which can run code
# Constants that older files keep beside the weights, and what the class head does not use.
_IGNORED = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|^vit\.pooler\.")
_PLAIN = ("F32", "F16", "BF16")
# What a quantized layer stores beside what it stores as weight or weight_packed.
_BESIDE = (
    *("weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)


class Place(NamedTuple):
    """Place of a stored tensor: its file, its name there, its dtype, shape and first byte."""

    path: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    def read(self) -> np.ndarray:
        """Reads the tensor into memory of its own; nothing of the file stays mapped."""
        count = math.prod(self.shape)
        found = np.fromfile(self.path, DTYPES[self.dtype], count, offset=self.start)
        if len(found) != count:
            raise UserError(f"{self.path}: tensor {self.stored} is cut off; it is no whole file")
        return found.reshape(self.shape)


def places(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file, whose header is a JSON object, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


class StoredTensors:
    """The tensors of a folder, under the names of the family's table; each is read when asked for.

    A quantized layer is one tensor, its weight.

    Args:
      folder: of `transformers`.

    Raises:
      UserError: a file is no whole safetensors file, a tensor is there twice, or the quantization
        that config.json says is not known.
    """

    def __init__(self, folder: Path, family: Family):
        self._folder = folder
        self._at: dict[str, Place] = {}
        heads = tuple(t.name for t in family.tensors if not t.name.startswith(family.base))
        for path, claimed in shard_files(folder).items():
            _check_file(path)
            found = places(path)
            if absent := sorted(claimed.difference(found)):
                raise UserError(f"{path}: holds no tensors {some(absent)}, which {INDEX} says")
            for stored, place in found.items():
                full = stored.startswith((family.base, *heads))
                name = stored if full else family.base + stored
                if name in self._at:
                    before = self._at[name]
                    raise UserError(
                        f"{folder}: tensor {name} is there twice, as {before.stored} in "
                        f"{before.path.name} and as {stored} in {path.name}; remove one"
                    )
                self._at[name] = place
        quantization = read_json(folder / "config.json").get("quantization_config")
        self._quantized: dict[str, tuple[str, Mapping[str, Any], dict[str, Place]]] = {}
        if quantization is not None:
            self._gather(quantization)

    def _gather(self, quantization: Mapping[str, Any]) -> None:
        """Takes what quantized layers store together as one tensor each."""
        suffix = ".weight_scale"
        modules = [name.removesuffix(suffix) for name in self._at if name.endswith(suffix)]
        for module in modules:
            parts = {
                part: place
                for part in ("weight", "weight_packed", *_BESIDE)
                if (place := self._at.pop(f"{module}.{part}", None)) is not None
            }
            name, arguments = stored_as(quantization, module, f"{self._folder}/config.json")
            needed = "weight_packed" if "pack" in name else "weight"
            if needed not in parts or (name == "pack-quantized" and "weight_shape" not in parts):
                raise UserError(
                    f"{self._folder}: layer {module} has {', '.join(parts)}, which are not the "
                    f"tensors of {name}"
                )
            self._quantized[f"{module}.weight"] = name, arguments, parts

    def names(self) -> set[str]:
        return {*self._at, *self._quantized}

    def is_quantized(self, name: str) -> bool:
        return name in self._quantized

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._quantized:
            place = self._at[name]
            return place.shape, place.dtype
        scheme, arguments, parts = self._quantized[name]
        if scheme == "pack-quantized":
            return tuple(map(int, parts["weight_shape"].read())), "F32"
        if "weight_packed" in parts:
            outputs, stored = parts["weight_packed"].shape
            return (outputs, stored * 8 // arguments["num_bits"]), "F32"
        return parts["weight"].shape, "F32"

    def read(self, name: str) -> np.ndarray:
        """The tensor; UserError where a value of it is not finite."""
        if name in self._quantized:
            scheme, arguments, parts = self._quantized[name]
            stored = {part: place.read() for part, place in parts.items()}
            array = decode(stored, arguments, scheme)
        else:
            array = self._at[name].read()
        check_finite(array, f"{self._path(name)}: tensor {name}")
        return array

    def _path(self, name: str) -> Path:
        if name in self._quantized:
            return next(iter(self._quantized[name][2].values())).path
        return self._at[name].path

    def check(self, wanted: Mapping[str, tuple[int, ...]], *, tied: str | None) -> None:
        """Raises a UserError unless the files hold the wanted tensors and no others.

        Args:
          wanted: the shape of each, by name.
          tied: the tensor that lm_head.weight is to equal where it is there too; or None.
        """
        folder, found = self._folder, self.names()
        spare = {name for name in found - wanted.keys() if not _IGNORED.search(name)}
        if missing := sorted(wanted.keys() - found):
            raise UserError(f"{folder}: tensors {some(missing)} are missing")
        if unexpected := sorted(spare - ({"lm_head.weight"} if tied is not None else set())):
            raise UserError(f"{folder}: tensors {some(unexpected)} are not of this model")
        for name, expected in wanted.items():
            shape, dtype = self.shape_and_dtype(name)
            if shape != expected:
                raise UserError(
                    f"{folder}: tensor {name} is {list(shape)}; config.json makes it "
                    f"{list(expected)}"
                )
            if dtype not in _PLAIN:
                raise UserError(
                    f"{folder}: tensor {name} is {dtype}; F32, F16 and BF16 are supported"
                )
        if tied is None or "lm_head.weight" not in spare:
            return
        if not np.array_equal(self.read("lm_head.weight"), self.read(tied)):
            raise UserError(
                f"{folder}: lm_head.weight is not {tied}, and config.json ties them; "
                "set its tie_word_embeddings to false"
            )


def _check_file(path: Path) -> None:
    """Refuses a file whose sizes are not true, and a name twice in its header."""
    try:
        with safe_open(path, "numpy"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no whole safetensors file ({error})") from error
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        parse_json(header)
    except ValueError as error:
        raise UserError(f"{path}: its header is not that of a whole file: {error}") from error


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises a UserError that names the first value of an array that is not finite, if any is not.

    Args:
      what: it is, for the message.
    """
    finite = np.isfinite(array)
    if not finite.all():
        at = tuple(map(int, np.unravel_index(int(np.argmin(finite)), array.shape)))
        raise UserError(
            f"{what} holds {array[at]} at {list(at)}, and in {array.size - finite.sum():,} of "
            f"{array.size:,} places what is not finite; weights must be finite"
        )


def shard_files(folder: Path) -> dict[Path, set[str]]:
    """The files of tensors, and which the index says are in each; without an index, none."""
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            pickles = [path.name for path in paths if path.suffix in _PICKLES]
            what = f", but {some(pickles)}, pickles, which are never loaded" if pickles else ""
            raise UserError(
                f"{folder}: has neither {WEIGHTS} nor {INDEX}{what}; weights must be safetensors"
            )
        return {folder / WEIGHTS: set()}
    files_of = read_json(folder / INDEX).get("weight_map")
    named = isinstance(files_of, dict) and all(isinstance(s, str) for s in files_of.values())
    if not named or not files_of or any(map(_is_elsewhere, files_of.values())):
        raise UserError(f"{folder / INDEX}: weight_map must give every tensor a file in the folder")
    files = sorted(set(files_of.values()))
    if (folder / WEIGHTS).exists() and WEIGHTS not in files:
        raise UserError(f"{folder}: has both {WEIGHTS} and {INDEX}; remove one of them")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder}: {some(missing)} is missing, which {INDEX} names")
    return {folder / f: {name for name, at in files_of.items() if at == f} for f in files}


def _is_elsewhere(file: str) -> bool:
    """Tells whether a text is more than the name of a file, and so could lead elsewhere."""
    return Path(file).name != file or file in ("", "..") or "\0" in file
