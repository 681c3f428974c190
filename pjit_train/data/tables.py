"""Columns of text and of conversations in Parquet and Arrow files, read some rows at a time."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pjit_train.errors import UserError

ENDINGS = (".parquet", ".arrow", ".feather")
Kind = Literal["text", "messages"]
_ROWS = 1024  # of a batch


def read_column(path: str, name: str) -> Iterator[str]:
    """Yields the texts of a column, the empty ones too.

    Args:
      path: its ending, in letters of any case, says how it is read: .parquet as Parquet; .arrow and
        .feather as Arrow's file or stream, as the library datasets keeps them.

    Raises:
      UserError: it cannot be read, has no such column, the column is not of text, or a text is
        null; names file, column and row, from 1.
    """
    for _, row in read_rows(path, {name: "text"}, setting="text_field"):
        yield row[name]


def read_rows(
    path: str, kinds: Mapping[str, Kind], *, setting: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each row, for messages, and its values in some columns.

    Args:
      path: as of `read_column`.
      kinds: of the columns by their names: "text", or "messages" for lists of objects.
      setting: the option that names the column, for messages; by default that of the kind.

    Raises:
      UserError: as `read_column`.
    """
    import pyarrow as pa

    row = 0
    try:
        for batch in _batches(path, kinds, setting):
            values = {name: batch.column(name).to_pylist() for name in kinds}
            for i in range(batch.num_rows):
                row += 1
                found = {name: column[i] for name, column in values.items()}
                for name, kind in kinds.items():
                    _check_value(f"{path}: row {row}: {name!r}", found[name], kind)
                yield f"{path}: row {row}", found
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text after row {row}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (pa.ArrowException, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: is damaged, or none of its kind: {said[0][:200]}; give a whole file"
        ) from error


def _check_value(what: str, value: Any, kind: Kind) -> None:
    if value is None:
        wanted = 'a text; give it one ("" for none)' if kind == "text" else "a list; give it one"
        raise UserError(f"{what} is null, not {wanted}, or leave the row out")
    if kind == "text" and "\0" in value:
        raise UserError(f"{what} has a NUL byte; give it text")


def _batches(path: str, kinds: Mapping[str, Kind], setting: str | None) -> Iterator[Any]:
    """The columns, as a record batch of some rows each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            _check_columns(path, kinds, file.schema_arrow, setting)
            yield from file.iter_batches(batch_size=_ROWS, columns=list(kinds))
        return
    with pa.OSFile(path) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        _check_columns(path, kinds, reader.schema, setting)
        for batch in batches:
            whole = batch.select(list(kinds))
            yield from (whole.slice(i, _ROWS) for i in range(0, whole.num_rows, _ROWS))


def _is_of(type_: Any, kind: Kind) -> bool:
    import pyarrow as pa

    if kind == "text":
        of = type_.value_type if pa.types.is_dictionary(type_) else type_
        return bool(
            pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of)
        )
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    return bool(is_list and pa.types.is_struct(type_.value_type))


def _check_columns(path: str, kinds: Mapping[str, Kind], schema: Any, setting: str | None) -> None:
    columns = schema.names
    for name, kind in kinds.items():
        if columns.count(name) == 1 and _is_of(schema.field(name).type, kind):
            continue
        plural = "text" if kind == "text" else "lists of messages"
        right = [field.name for field in schema if _is_of(field.type, kind)]
        what = "has no column" if name not in columns else f"has no {plural} in its one column"
        if columns.count(name) == 1:
            what = f"holds {schema.field(name).type} in its column"
        setting = setting or ("messages" if kind == "messages" else "prompt and answer")
        raise UserError(
            f"{path}: {what} {name!r}: set {setting} to a column of {plural} "
            f"(it has {', '.join(map(repr, right[:8])) or 'none'})"
        )
