"""Files that are written whole or not at all, and JSON that holds its own digest."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.signals import deferred


def write_whole(path: Path, content: str) -> None:
    """Writes a file of UTF-8 text whole or not at all, also where the machine stops meanwhile.

    Raises:
      UserError: it cannot be written; what was there before still is.
    """
    new = path.with_name(path.name + ".new")
    try:
        with deferred():
            with new.open("w", encoding="utf-8", newline="") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room for it") from error


def json_sha256(body: dict[str, Any]) -> str:
    """The digest of what can be written as JSON, the same in whatever order its keys stand."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
