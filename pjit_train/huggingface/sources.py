"""Sources of a pretrained model: a Hugging Face folder, a GGUF file, a repository of the Hub."""

import contextlib
import hashlib
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from pjit_train.data.cache import default_cache_dir, locked
from pjit_train.errors import UserError
from pjit_train.files import write_sums
from pjit_train.huggingface.gguf_import import Imported, import_gguf
from pjit_train.huggingface.hub import PREFIX, Repository, fetch, files_of
from pjit_train.huggingface.weights import check_new, new_folder
from pjit_train.signals import unfinished

_FORMAT = 1  # of what is imported into the cache: another one is imported anew
Progress = Callable[[int, int], None]


def folder_of(source: str | Path, *, progress: Progress = lambda done, of: None) -> Path:
    """The Hugging Face folder of a source, which is fetched or imported where that is needed.

    Args:
      source: a folder, which is returned as it is, whatever is in it; a .gguf file, which is
        imported once into $TORSION_CACHE, under the digest of its bytes; or
        `hf:OWNER/NAME[@REVISION][:FILE.gguf]`, which is fetched into `huggingface_hub`'s cache.
      progress: is told how many bytes of how many are done.

    Raises:
      UserError: it is no model that we have, cannot be fetched, or the cache cannot be written.
    """
    path = _fetched(source, progress)
    if path.suffix != ".gguf" and not path.is_file():
        return path
    kept = default_cache_dir() / f"model-{_digest(path)[:24]}-{_FORMAT}"
    if kept.is_dir():
        return kept
    with locked(kept):
        if not kept.is_dir():  # another process may have made it while this one waited
            # Hosts may share the directory, and not the lock.
            made = kept.with_name(f"{kept.name}.{socket.gethostname()}.tmp")
            with unfinished(made):
                import_gguf(path, made, progress=progress)
                with contextlib.suppress(OSError):  # another host was faster
                    made.rename(kept)
    return kept


def import_source(
    source: str,
    folder: str | Path,
    *,
    dtype: str | None = None,
    progress: Progress = lambda done, of: None,
) -> Imported | None:
    """Writes the model of a GGUF file, or of a repository of the Hub, as a new folder.

    Args:
      folder: new, or empty; it appears when all of it is written, or not at all.
      dtype: of the weights of a GGUF file; see `import_gguf`.

    Returns:
      What `import_gguf` says of a GGUF file; None for a folder that was copied as it is.

    Raises:
      UserError: as `folder_of`; or the folder has something in it or cannot be written.
    """
    if Path(source).is_dir():
        raise UserError(f"{source}: is a folder; give a .gguf file, or hf:OWNER/NAME")
    folder = check_new(folder)
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: the folder {folder.parent} is missing; make it first")
    whole = source.startswith(PREFIX) and Repository.parse(source).file is None
    if whole and dtype is not None:
        raise UserError(f"dtype={dtype}: {source} is copied as it is; a GGUF file can be cast")
    path = _fetched(source, progress)
    if not whole:
        return import_gguf(path, folder, dtype=dtype, progress=progress)
    with new_folder(folder) as temporary:
        for file in files_of(path):
            shutil.copyfile(file, temporary / file.name)
        write_sums(temporary)
    return None


def _fetched(source: str | Path, progress: Progress) -> Path:
    if not str(source).startswith(PREFIX):
        return Path(source)
    return fetch(Repository.parse(str(source)), progress)


def _digest(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; give a .gguf file, or a folder of Hugging Face")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from error
