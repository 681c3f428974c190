"""Columns of text in Parquet and Arrow files, read a batch of rows at a time."""

from collections.abc import Iterator
from typing import Any

from pjit_train.errors import UserError

ENDINGS = (".parquet", ".arrow", ".feather")
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
    import pyarrow as pa

    row = 0
    try:
        for texts in _batches(path, name):
            if texts.null_count:
                null = row + texts.is_null().to_pylist().index(True) + 1
                raise UserError(
                    f'{path}: row {null}: {name!r} is null, not a text; give it one ("" for none), '
                    "or leave the row out"
                )
            for text in texts.to_pylist():
                row += 1
                if "\0" in text:
                    raise UserError(f"{path}: row {row}: {name!r} has a NUL byte; give it text")
                yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {name!r} is not UTF-8 text after row {row}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (pa.ArrowException, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path}: is damaged, or none of its kind: {said[0][:200]}; give a whole file"
        ) from error


def _batches(path: str, name: str) -> Iterator[Any]:
    """The arrays of the column, a batch of rows each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.lower().endswith(".parquet"):
        with pq.ParquetFile(path) as file:
            _check_column(path, name, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[name]):
                yield _texts(batch.column(0))
        return
    with pa.OSFile(path) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        _check_column(path, name, reader.schema)
        for batch in batches:
            whole = _texts(batch.column(name))
            yield from (whole[i : i + _ROWS] for i in range(0, len(whole), _ROWS))


def _texts(column: Any) -> Any:
    import pyarrow as pa

    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _check_column(path: str, name: str, schema: Any) -> None:
    import pyarrow as pa

    def is_text(of: Any) -> bool:
        of = of.value_type if pa.types.is_dictionary(of) else of
        return bool(
            pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of)
        )

    columns = schema.names
    if columns.count(name) != 1 or not is_text(schema.field(name).type):
        texts = [field.name for field in schema if is_text(field.type)]
        what = "has no column" if name not in columns else "has no text in its one column"
        if columns.count(name) == 1:
            what = f"holds {schema.field(name).type} in its column"
        raise UserError(
            f"{path}: {what} {name!r}: set text_field to a column of text "
            f"(it has {', '.join(map(repr, texts[:8])) or 'none'})"
        )
