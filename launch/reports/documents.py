"""JSON documents that users write: reading them, and their keys; a mistake is one line."""

import difflib
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError

MOST_BYTES = 2**26  # of a document


def read_text(name: str, what: str, *, most: int = MOST_BYTES) -> str:
    """Reads a UTF-8 file.

    Args:
      what: the file is, such as "a JSON file of tables", for the message.
      most: bytes that it may have.

    Raises:
      UserError: there is none, it cannot be read, or is too large to be one.
    """
    try:
        with Path(name).open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UserError(f"{name}: is larger than {most >> 20} MiB; give {what}")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such file; give {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is no text in UTF-8 ({error}); give {what}") from error
    except ValueError as error:  # a path with a null character
        raise UserError(f"{name}: {error}; give {what}") from error
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; give {what}") from error


def read_json(name: str, what: str) -> Any:
    """Reads a JSON document; no key of it may be lost.

    Args:
      what: as in `read_text`.

    Raises:
      UserError: as `read_text`; or it is no JSON, or an object has a key twice.
    """
    text = read_text(name, what)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise UserError(f"{name}: is no JSON document: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{name}: is no JSON document: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a document; no key of it may be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} stands twice in an object; give it once")
    return found


def keyed(
    where: str, value: Any, known: Collection[str], needed: Collection[str] = ()
) -> dict[str, Any]:
    """The value, which is an object with known keys.

    Args:
      where: it stands, such as "traffic.json: entry 2", for the message.

    Raises:
      UserError: it is no object, has another key, or one that is needed is missing.
    """
    wanted = f"an object with {', '.join(needed or known)}"
    if not isinstance(value, dict):
        raise UserError(f"{where}: {short(value)}: want {wanted}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {short(key)}; {hint}")
    if missing := [key for key in needed if key not in value]:
        raise UserError(f"{where}: {missing[0]} is missing; want {wanted}")
    return value


def short(value: Any) -> str:
    """A value of a document in a message, of 60 characters at most."""
    text = "true" if value is True else "false" if value is False else None
    if text is None:
        large = isinstance(value, int) and abs(value) > 10**40
        text = "of thousands of digits" if large else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
