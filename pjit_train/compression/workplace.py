"""The folder in which a compressed folder is made: it can be killed at any moment, and gone on in.

It stands beside the folder that is to appear, as `.NAME.saving`, and becomes that one when all is
written and read back. Under "work" is what is done: the plan, and of each part the tensors and a
record, which is written last, when the tensors are on the disk itself.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pjit_train.errors import UserError
from pjit_train.files import json_sha256, sync_tree, write_whole
from pjit_train.huggingface.stored import Place, places

CERTIFICATE = "torsion.json"


class Workplace:
    """See above.

    Attributes:
      out: the folder that is to appear.
      folder: the one that becomes it.
    """

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.parent / f".{out.name}.saving"
        self.work = self.folder / "work"

    @contextlib.contextmanager
    def opened(self, plan: Mapping[str, Any]) -> Iterator[None]:
        """Holds the folder for this process; what was done in it for another plan is cleared.

        Raises:
          UserError: another process holds it, or it cannot be written. What is done stays.
        """
        digest = json_sha256(dict(plan))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                if self._plan() != digest:
                    for path in self.folder.iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    self.work.mkdir()
                    write_whole(self.work / "plan.json", json.dumps({"sha256": digest}) + "\n")
                yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.out}: cannot be written ({error}); {self.folder} has what is done: make "
                "room and give the same command again, or remove it"
            ) from error

    def _plan(self) -> str | None:
        """The digest of the plan for which something is here."""
        for path in (self.work / "plan.json", self.folder / CERTIFICATE):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                document = json.loads(path.read_text())
                return str(document["sha256" if path.name == "plan.json" else "plan"])
        return None

    @property
    def complete(self) -> bool:
        """Tells whether only the name of the folder is missing."""
        return (self.folder / CERTIFICATE).is_file() and not self.work.exists()

    def path(self, name: str) -> Path:
        return self.work / name

    def _files(self, part: int) -> tuple[Path, Path]:
        return self.path(f"part-{part:05}.safetensors"), self.path(f"part-{part:05}.json")

    def save(self, part: int, tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Writes a part that is done; when this returns, it stays."""
        path, said = self._files(part)
        beside = path.with_suffix(".new")
        save_file(dict(tensors), beside)
        with beside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        beside.rename(path)
        write_whole(said, json.dumps({"sha256": digest, **record}) + "\n")

    def done(self, part: int) -> dict[str, Any] | None:
        """The record of a part; None where it is not done, or not what it was."""
        path, said = self._files(part)
        try:
            record = json.loads(said.read_text())
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == record["sha256"]
        except (OSError, ValueError, KeyError):
            return None
        return record if whole else None

    def tensors(self, part: int) -> dict[str, Place]:
        """The tensors of a part that is done."""
        return places(self._files(part)[0])

    def finish(self) -> None:
        """Gives the folder its name."""
        shutil.rmtree(self.work, ignore_errors=True)
        sync_tree(self.folder)
        if self.out.is_dir():
            self.out.rmdir()  # an empty one
        self.folder.rename(self.out)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"{folder} is being written by another torsion compress; wait for it, or use another "
            "--out"
        ) from error
    finally:
        os.close(descriptor)


def write_shards(
    folder: Path, tensors: Mapping[str, Place], max_bytes: int, weights: str, index: str
) -> None:
    """Copies stored tensors into safetensors files, as `transformers` names them.

    Args:
      tensors: by name, in their order.
      max_bytes: of tensors in a file, unless a single one has more.
      weights, index: names of the file where one is enough, and of the index where it is not.
    """
    shards: list[dict[str, Place]] = []
    room = 0
    for name, place in tensors.items():
        if not shards or place.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = place
        room -= place.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = weights if len(shards) == 1 else several
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(place.nbytes for place in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(document, indent=2) + "\n")


def _write_file(path: Path, tensors: Mapping[str, Place]) -> None:
    """Writes a safetensors file, a tensor at a time; wide elements come first, as there."""
    ordered = sorted(tensors.items(), key=lambda x: (-_itemsize(x[1]), x[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in ordered:
        offsets = [end, end + place.nbytes]
        header[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, place in ordered:
            file.write(np.ascontiguousarray(place.read()).view(np.uint8).data)


def _itemsize(place: Place) -> int:
    return place.nbytes // max(1, int(np.prod(place.shape)))
