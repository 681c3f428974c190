"""A GGUF file as a folder of Hugging Face, written tensor by tensor."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pjit_train.errors import UserError
from pjit_train.files import write_sums
from pjit_train.huggingface.gguf_file import GGUF, Rounding
from pjit_train.huggingface.gguf_models import Source, read_model
from pjit_train.huggingface.gguf_tokenizer import GGUFTokenizer
from pjit_train.huggingface.weights import INDEX, WEIGHTS, check_new, new_folder, split_sizes

DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # of safetensors
_EXACT = {"F16": "float16", "BF16": "bfloat16"}  # types of GGUF; the values of others need float32


@dataclasses.dataclass(frozen=True)
class Imported:
    """Report of an import.

    Attributes:
      tensors: their number.
      bytes: of the safetensors files.
      types: of the file's tensors -> how many have it.
      rounding: None where every value is as it was.
      tokens: of its tokenizer; None where the file has none.
    """

    tensors: int
    bytes: int
    types: Counter[str]
    rounding: Rounding | None
    tokens: int | None


def import_gguf(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Imported:
    """Writes the model and the tokenizer of a GGUF file as a folder that `transformers` loads.

    One tensor at a time is in memory. The folder appears when all of it is written, or not at all.

    Args:
      path: of a file of an architecture of `gguf_models.ARCHITECTURES`.
      folder: new, or empty.
      dtype: of all weights; by default that in which each is exact: F16 and BF16 stay as they are,
        and all else is float32.
      max_shard_bytes: more than this goes into several files, none larger unless it holds a single
        tensor.
      progress: is told the bytes written and the bytes of all.

    Raises:
      UserError: the file is damaged, or a model that we do not have; a weight is not finite; the
        folder has something in it or cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; use {', '.join(DTYPES)}")
    check_new(folder)
    file = GGUF(path)
    document, sources = read_model(file)
    tokenizer = None
    if "tokenizer.ggml.tokens" in file.values:
        tokenizer = GGUFTokenizer(file)
        if len(tokenizer.tokens) != document["vocab_size"]:
            raise UserError(
                f"{file.path}: the tokenizer has {len(tokenizer.tokens):,} tokens, and the "
                f"embedding {document['vocab_size']:,} rows; they must be the same"
            )
        for use in ("bos", "eos", "pad"):
            document[f"{use}_token_id"] = tokenizer.ids.get(use)

    kinds = {name: file.tensors[source.name].type for name, source in sources.items()}
    dtypes = {name: dtype or _EXACT.get(kind, "float32") for name, kind in kinds.items()}
    found = set(dtypes.values())
    document["dtype"] = found.pop() if len(found) == 1 else "float32"
    rounding = Rounding() if dtype in ("float16", "bfloat16") else None
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        if tokenizer is not None:
            max_len = document.get("max_position_embeddings") or document.get("n_positions")
            tokenizer.write(temporary, max_len)
        size = _write_tensors(temporary, file, sources, dtypes, max_shard_bytes, rounding, progress)
        write_sums(temporary)
    return Imported(
        tensors=len(sources),
        bytes=size,
        types=Counter(kinds.values()),
        rounding=rounding,
        tokens=None if tokenizer is None else len(tokenizer.tokens),
    )


def _write_tensors(
    folder: Path,
    file: GGUF,
    sources: Mapping[str, Source],
    dtypes: Mapping[str, str],
    max_bytes: int,
    rounding: Rounding | None,
    progress: Callable[[int, int], None],
) -> int:
    """Writes the safetensors files and their index; returns the bytes of the tensors."""
    # The widest elements first, so that all of them are aligned.
    names = sorted(sources, key=lambda name: -DTYPES[dtypes[name]].itemsize)
    sizes = [math.prod(sources[n].shape) * DTYPES[dtypes[n]].itemsize for n in names]
    total, done = sum(sizes), 0

    def arrays(part: list[str]) -> Iterator[np.ndarray]:
        nonlocal done
        for name in part:
            source = sources[name]
            array = file.read(
                source.name, DTYPES[dtypes[name]], offset=source.offset, rounding=rounding
            )
            yield source.arrange(array)
            done += array.nbytes
            progress(done, total)

    shards = split_sizes(sizes, max_bytes)
    weight_map: dict[str, str] = {}
    at = 0
    for number, count in enumerate(shards, start=1):
        part = names[at : at + count]
        at += count
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header = {n: (dtypes[n], sources[n].shape) for n in part}
        write_safetensors(folder / name, header, arrays(part))
        weight_map |= dict.fromkeys(part, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def write_safetensors(
    path: Path,
    header: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterator[np.ndarray],
) -> None:
    """Writes a safetensors file from tensors that are made one after the other.

    Args:
      header: name -> dtype and shape, in the order of `arrays`.

    Raises:
      OSError: it cannot be written.
    """
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in header.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        document[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
