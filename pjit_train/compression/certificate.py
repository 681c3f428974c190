"""The certificate of a compressed folder, torsion.json: what was done, counted in what is stored.

`verify` counts it again, and finds any byte of the folder that is another one than was written.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pjit_train.compression.kernels import as_matrices, parse_format
from pjit_train.compression.workplace import CERTIFICATE
from pjit_train.errors import UserError
from pjit_train.files import SUMS, json_sha256
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.families import Tensor
from pjit_train.huggingface.stored import StoredTensors, places, shard_files
from pjit_train.models.roles import param_roles
from sparsity.masks.nm import nm_violations
from sparsity.post_training.one_shot import parse_pattern
from sparsity.sparsity_types import NByM


def kernel_names(tensor: Tensor, name: str) -> list[tuple[str, str]]:
    """(name of a row, Torsion's name of the kernel) of what a Hugging Face tensor holds."""
    kernels = [path.replace(".", "/") for path in tensor.paths]
    if len(kernels) == 1:
        return [(name, kernels[0])]
    return [(f"{name}[{kernel.split('/')[-2]}]", kernel) for kernel in kernels]


def count(kernel_IO: np.ndarray, pattern: str | None, *, transposable: bool) -> dict[str, Any]:
    """Counts of a stored kernel [inputs, outputs]: what a row of the certificate says of it."""
    kernel_IO = np.asarray(kernel_IO, np.float32)
    zero = kernel_IO == 0
    found: dict[str, Any] = {
        "shape": list(kernel_IO.shape),
        "zeros": int(zero.sum()),
        "negative_zeros": int((zero & np.signbit(kernel_IO)).sum()),
        "groups": None,
        "violations": None,
    }
    kind = None if pattern is None else parse_pattern(pattern)
    if isinstance(kind, NByM):
        axes = (0, 1) if transposable else (0,)
        found["groups"] = len(axes) * kernel_IO.size // kind.m
        kernel = jnp.asarray(kernel_IO)
        counts = [int(nm_violations(kernel, kind.n, kind.m, axis=axis)) for axis in axes]
        found["violations"] = sum(counts)
    elif kind is not None:
        found["violations"] = int(found["zeros"] < int(kind * kernel_IO.size) - kernel_IO.shape[1])
    return found


def parts_of(
    folder: Path, stored: StoredTensors | None = None
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name of a row, name of the kernel, kernel [inputs, outputs]) of all matmuls of a folder."""
    family, config = huggingface.check(folder)
    stored = stored or huggingface.open_stored(folder, family, config)
    roles = param_roles(config)
    params = huggingface.abstract_params(config, huggingface.Rules())
    for name, tensor, layer in huggingface.tensors_of(family, params):
        rows = kernel_names(tensor, name)
        if roles[rows[0][1]].kind not in ("kernel", "head"):
            continue
        shapes = huggingface.layer_shapes(tensor, params, layer)
        parts = tensor.split(stored.read(name), shapes)
        for (row, kernel), part in zip(rows, parts, strict=True):
            yield row, kernel, as_matrices(roles[kernel], part)[0]


def tensor_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the bytes of every stored tensor, by name."""
    found = {}
    for path in shard_files(folder):
        for name, place in places(path).items():
            data = np.ascontiguousarray(place.read()).view(np.uint8)
            found[name] = hashlib.sha256(data.data).hexdigest()
    return found


def write(folder: Path, body: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes torsion.json of a folder of which all other files are written, save the digests.

    Args:
      body: what is to be said of the whole.
      rows: of each kernel what was asked for and found on the way; what is counted is added.
    """
    kernels = {}
    for row, _, kernel_IO in parts_of(folder):
        if row in rows:
            said = rows[row]
            found = count(kernel_IO, said["pattern"], transposable=said["transposable"])
            kernels[row] = {**said, **found}
    document = {
        **body,
        "kernels": kernels,
        "tensors": tensor_digests(folder),
        "files": {path.name: _file(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }
    (folder / CERTIFICATE).write_text(_text(document))


def _text(document: dict[str, Any]) -> str:
    body = {name: value for name, value in document.items() if name != "sha256"}
    return json.dumps({**body, "sha256": json_sha256(body)}, indent=1) + "\n"


def _file(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def verify(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Checks a folder against its certificate again.

    Returns:
      The certificate, and what is wrong, a line each; none where the folder is as it was written.

    Raises:
      UserError: there is no certificate.
    """
    document = _read(folder)
    wrong = _wrong_files(folder, document)
    if not wrong:
        wrong = _wrong_tensors(folder, document)
    if not wrong:
        wrong = _wrong_kernels(folder, document)
    return document, wrong


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CERTIFICATE
    if not path.is_file():
        what = f"has no {CERTIFICATE}" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}; give a folder that torsion compress wrote")
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        named = isinstance(document, dict) and all(
            isinstance(document.get(part), dict) for part in ("files", "tensors", "kernels")
        )
        if named and _text(document) == text:
            return document
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{path} is damaged: it is not what was written; compress the model again")


def _wrong_files(folder: Path, document: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name, said in document["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != said["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, not {said['bytes']:,}")
        elif _file(path)["sha256"] != said["sha256"]:
            wrong.append(f"{name} was changed: its SHA-256 is another")
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in document["files"]:
            wrong.append(f"{path.name} is no file of this model")
    sums = {name: said["sha256"] for name, said in document["files"].items()}
    sums[CERTIFICATE] = _file(folder / CERTIFICATE)["sha256"]
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    try:
        if (folder / SUMS).read_bytes() != text.encode():
            wrong.append(f"{SUMS} was changed")
    except OSError:
        wrong.append(f"{SUMS} is missing")
    return wrong


def _wrong_tensors(folder: Path, document: Mapping[str, Any]) -> list[str]:
    said, found = document["tensors"], tensor_digests(folder)
    wrong = [f"tensor {name} is missing" for name in said.keys() - found.keys()]
    wrong += [f"tensor {name} is no tensor of it" for name in found.keys() - said.keys()]
    wrong += [f"tensor {n} was changed" for n in said.keys() & found.keys() if said[n] != found[n]]
    return sorted(wrong)


def _wrong_kernels(folder: Path, document: Mapping[str, Any]) -> list[str]:
    wrong, left = [], dict(document["kernels"])
    for row, _, kernel_IO in parts_of(folder):
        if (said := left.pop(row, None)) is None:
            continue
        found = count(kernel_IO, said["pattern"], transposable=said["transposable"])
        wrong += [
            f"{row}: {what} is {value}, and the certificate says {said[what]}"
            for what, value in found.items()
            if value != said[what]
        ]
        if found["violations"]:
            wrong.append(f"{row}: {found['violations']} groups have more than {said['pattern']}")
        if found["negative_zeros"]:
            wrong.append(f"{row}: {found['negative_zeros']} zeros are negative")
        if said["format"] is not None:
            parse_format(said["format"])
    return wrong + [f"{row} is missing" for row in left]
