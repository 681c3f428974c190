"""Sources of a pretrained model: a Hugging Face folder, or a GGUF file."""

import contextlib
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path

from pjit_train.data.cache import default_cache_dir, locked
from pjit_train.errors import UserError
from pjit_train.huggingface.gguf_import import import_gguf

_FORMAT = 1  # of what is imported into the cache: another one is imported anew
Progress = Callable[[int, int], None]


def folder_of(source: str | Path, *, progress: Progress = lambda done, of: None) -> Path:
    """The Hugging Face folder of a source, which is imported into the cache where that is needed.

    Args:
      source: a folder, which is returned as it is, whatever is in it; or a .gguf file, which is
        imported once into $TORSION_CACHE, under the digest of its bytes.
      progress: is told how many bytes of how many are done.

    Raises:
      UserError: the file is no model that we have, or the cache cannot be written.
    """
    path = Path(source)
    if path.suffix != ".gguf" and not path.is_file():
        return path
    key = f"{_digest(path)[:24]}-{_FORMAT}"
    kept = default_cache_dir() / f"model-{key}"
    if kept.is_dir():
        return kept
    with locked(kept):
        if not kept.is_dir():  # another process may have made it while this one waited
            # Hosts may share the directory, and not the lock.
            made = kept.with_name(f"{kept.name}.{socket.gethostname()}.tmp")
            import_gguf(path, made, progress=progress)
            with contextlib.suppress(OSError):  # another host was faster
                made.rename(kept)
    return kept


def _digest(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; give a .gguf file, or a folder of Hugging Face")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from error
