"""Documents of a file: .txt or .jsonl, also as .gz or .zst, or a column of Parquet or Arrow.

What is wrong is said with its line, or row.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

from pjit_train.data import tables
from pjit_train.errors import UserError

DOCUMENT_CHARACTERS = 1 << 20  # a .txt file longer than this is read in documents of this length
LINE_BYTES = 1 << 28  # of .jsonl, at most: a small .gz may unfold to any length
_CHUNK = 1 << 20
_COMPRESSED = (".gz", ".zst")


def is_text_file(path: str) -> bool:
    """Tells whether a file of this name holds documents, as `read_documents` reads them."""
    return _unfolded(path).endswith((".txt", ".jsonl")) or path.lower().endswith(tables.ENDINGS)


def _unfolded(path: str) -> str:
    """The name in small letters, without the ending that says how the file is compressed."""
    name = path.lower()
    return name.removesuffix(next(filter(name.endswith, _COMPRESSED), ""))


def read_documents(path: str, text_field: str = "text") -> Iterator[str]:
    """Yields the documents of a file, the empty ones too.

    Args:
      path: its ending, in letters of any case, says how it is read: .txt as one document, or
        several of `DOCUMENT_CHARACTERS`; .jsonl as a document a line; .gz and .zst are unfolded;
        .parquet, .arrow and .feather as a document a row.
      text_field: the key of a .jsonl line under which its text is, or the column of a table.

    Raises:
      UserError: it cannot be read, is no UTF-8 text, or a line has no text; names file and line.
    """
    if path.lower().endswith(tables.ENDINGS):
        yield from tables.read_column(path, text_field)
        return
    by_line = _unfolded(path).endswith(".jsonl")

    def read(file, place):
        if not by_line:
            return _pieces(file, place)
        return (_text_of(row, place, text_field) for row in _lines(file, place, text_field))

    yield from _unfold(path, read)


def read_rows(path: str, kinds: Mapping[str, tables.Kind]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a .jsonl file or a table: where each stands, for messages, and its values.

    Args:
      path: as of `read_documents`, but for .txt.
      kinds: of the wanted keys of a line or columns, each "text" or "messages"; a table is checked
        for them, a line of .jsonl may hold anything under them.

    Raises:
      UserError: as `read_documents`; or a line lacks a key.
    """
    if path.lower().endswith(tables.ENDINGS):
        yield from tables.read_rows(path, kinds)
        return

    def read(file, place):
        for row in _lines(file, place, *kinds):
            for name in kinds:
                if not isinstance(row, dict) or name not in row:
                    has = ", ".join(map(repr, sorted(row)[:8])) if isinstance(row, dict) else ""
                    raise place.wrong(f"has no {name!r} (its fields are: {has or 'none'})")
            yield f"{path}:{place.line}", {name: row[name] for name in kinds}

    yield from _unfold(path, read)


def _unfold(path: str, read: Callable[[BinaryIO, "_Place"], Iterator[Any]]) -> Iterator[Any]:
    """Yields what `read` does of a file; says what is wrong with the file itself."""
    place = _Place(path)
    try:
        with _open(path) as file:
            yield from read(file, place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}:{place.line + 1}: the gzip file is damaged or cut short from here on ({error})"
        ) from error
    except OSError as error:
        if path.lower().endswith(".zst") and error.strerror is None:  # of Arrow, which unfolds it
            raise UserError(
                f"{path}:{place.line + 1}: the zstd file is damaged or cut short from here on"
            ) from error
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class _Place:
    """Place of a reader in a file: `line` lines are read."""

    def __init__(self, path: str):
        self.path, self.line = path, 0

    def wrong(self, what: str, line: int | None = None) -> UserError:
        return UserError(f"{self.path}:{line or self.line}: {what}")


def _open(path: str) -> Any:
    if path.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(path), "zstd"))
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def _pieces(file: BinaryIO, place: _Place) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    with contextlib.closing(text):
        try:
            while piece := text.read(DOCUMENT_CHARACTERS):
                if (at := piece.find("\0")) >= 0:
                    raise place.wrong(_NUL, place.line + 1 + piece[:at].count("\n"))
                place.line += piece.count("\n")
                yield piece
        except UnicodeDecodeError as error:
            raise _first_not_utf8(place.path) or error from error


def _first_not_utf8(path: str) -> UserError | None:
    """Error of the first byte of a file that is no UTF-8; None where all are."""
    place, decoder = _Place(path), codecs.getincrementaldecoder("utf-8")()
    place.line = 1
    with _open(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                place.line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                return _not_utf8(
                    place, error, place.line + error.object[: error.start].count(b"\n")
                )
            if not chunk:
                return None


def _lines(file: BinaryIO, place: _Place, *names: str) -> Iterator[Any]:
    """Yields the value of each line of .jsonl; a key of `names` stands in it once at most."""
    while line := file.readline(LINE_BYTES + 1):
        place.line += 1
        if len(line) > LINE_BYTES:
            raise place.wrong(
                f"the line is longer than {LINE_BYTES:,} bytes; give shorter documents"
            )
        if line.strip():
            yield _value_of(line, place, names)


def _value_of(line: bytes, place: _Place, names: Collection[str]) -> Any:
    try:
        text = line.decode("utf-8-sig" if place.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error
    if "\0" in text:
        raise place.wrong(_NUL)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            given = [name for name, _ in pairs]
            if twice := next((name for name in names if given.count(name) > 1), None):
                raise place.wrong(f"gives {twice!r} twice; give one text a line")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        what = str(error).partition(": line 1 column")[0]
        at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise place.wrong(f"is not a line of JSON: {what}{at}") from error


def _text_of(row: Any, place: _Place, text_field: str) -> str:
    """Reads the text from the value of a line."""
    if not isinstance(row, dict):
        raise place.wrong(f"is {kind(row)}, not an object with a text under {text_field!r}")
    if text_field not in row:
        fields = ", ".join(map(repr, sorted(row)[:8])) + (", ..." if len(row) > 8 else "")
        raise place.wrong(
            f"has no text under {text_field!r} (its fields are: {fields or 'none'}): "
            "set text_field to the key of the text"
        )
    if not isinstance(row[text_field], str):
        raise place.wrong(
            f'{text_field!r} is {kind(row[text_field])}, not a text; give it one ("" for none), '
            "or leave the line out"
        )
    return row[text_field]


_NUL = "has a NUL byte: the file is damaged, or in another encoding; convert it to UTF-8 text"


def _not_utf8(place: _Place, error: UnicodeDecodeError, line: int | None = None) -> UserError:
    byte, start = error.object[error.start], error.object[:2]
    hint = "convert it to UTF-8"
    if start == b"\x1f\x8b":
        hint = "it is a gzip file: give its name the ending .gz"
    elif error.object[:4] == b"\x28\xb5\x2f\xfd":
        hint = "it is a zstd file: give its name the ending .zst"
    elif start in (b"\xff\xfe", b"\xfe\xff"):
        hint = "it is UTF-16: convert it to UTF-8"
    return place.wrong(f"is not UTF-8 text ({error.reason}, byte 0x{byte:02x}): {hint}", line)


def kind(value: Any) -> str:
    """Names the type of a JSON value, in JSON's own words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
    return names.get(type(value), "a number")
