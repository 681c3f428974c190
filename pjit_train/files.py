"""Files that are written whole or not at all, and digests that tell what has been changed."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.signals import deferred

log = logging.getLogger("torsion")
SUMS = "SHA256SUMS"  # the digests of a folder's files


@contextlib.contextmanager
def replacing(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Gives a path to write at, and puts what is there in the place of `path` when this ends.

    A signal waits meanwhile. After an error what was there before still is, and nothing else.

    Args:
      path: of the file.
      beside: where to write; by default a name of this process's own, with the suffix of `path`.
    """
    beside = beside or path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with deferred():
            yield beside
            os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_whole(path: Path, content: str) -> None:
    """Writes a file of UTF-8 text whole or not at all, also where the machine stops meanwhile.

    Raises:
      UserError: it cannot be written; what was there before still is.
    """
    try:
        with (
            replacing(path, path.with_name(path.name + ".new")) as new,
            new.open("w", encoding="utf-8", newline="") as file,
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room for it") from error


def sync_tree(folder: Path) -> None:
    """Waits until all that is in a folder is on the disk itself."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_sha256(body: dict[str, Any]) -> str:
    """The digest of what can be written as JSON, the same in whatever order its keys stand."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; UserError where there is none, or one that says a thing twice."""
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); a JSON object is needed") from error


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON text that has to be an object.

    Raises:
      ValueError: there is none, or its brackets are too deep, or an object in it has a key twice,
        of which the `json` module takes the last without a word.
    """

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return found

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    return document


def write_sums(folder: Path) -> None:
    """Writes `SHA256SUMS` of the files of a folder, as `sha256sum -c SHA256SUMS` reads it."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SUMS]
    lines = [f"{_sha256(path)}  {path.name}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Compares the files of a folder with its `SHA256SUMS`, where it has one.

    A JSON file that was changed is named in a warning, and counts.

    Raises:
      UserError: another file was changed, one is missing, or the list is damaged.
    """
    path = folder / SUMS
    if not path.exists():
        return
    try:
        pairs = [line.split("  ", 1) for line in path.read_text().splitlines()]
        wanted = {name: digest for digest, name in pairs}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; delete it, and the files count unchecked") from error
    for name, digest in wanted.items():
        file = folder / name
        if Path(name).name == name and file.is_file() and _sha256(file) == digest:
            continue
        what = f"{folder}: {name} {'was changed' if file.exists() else 'is missing'} since {SUMS}"
        if file.is_file() and file.suffix == ".json":  # which people edit
            log.warning("%s was written; it is taken as it is", what)
            continue
        raise UserError(
            f"{what} was written; put back a copy, or delete {SUMS} where the change was meant"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
