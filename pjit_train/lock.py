"""A directory that one process of a machine holds at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from pjit_train.errors import UserError


@contextlib.contextmanager
def held(directory: Path, file: str, by: str) -> Iterator[None]:
    """Holds a run directory for this process; a process that dies holds nothing.

    Args:
      directory: made if missing.
      file: in it, what is locked; a path relative to it.
      by: who else could hold it, for the message.

    Raises:
      UserError: the directory cannot be written, or another process holds it.
    """
    path = directory / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise UserError(
            f"run directory {directory}: {error.strerror}; give one that can be written with --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"run directory {directory} is being trained in by {by}; wait for it, or use "
                "another --out"
            ) from error
        yield
