"""Files that a study leaves in its directory: table.md, results.json and its figures."""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.files import replacing

Draw = Callable[[dict[str, Any], Path], Any]


def compute_and_write(
    out: Path,
    find: Callable[[Callable[[str], None]], dict[str, Any]],
    make_table: Callable[[dict[str, Any]], str],
    figures: Mapping[str, Draw],
    *,
    as_json: bool,
) -> int:
    """The command of a study that trains nothing: finds, writes and prints its results.

    Args:
      out: directory, made if missing.
      find: makes what stands in results.json; it tells its argument the name of each part.
      make_table: of it.
      figures: by file name, what draws it.
      as_json: print results.json, not the table.

    Returns:
      The exit code.

    Raises:
      UserError: the directory cannot be written.
    """
    try:  # a mistake shows now, not in the end
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; take another directory") from error
    results = find(lambda part: print(f"{part} ...", file=sys.stderr))
    table = make_table(results)
    write(out, table, results, figures)
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        print(table)
        print(f"written to {out}: table.md, results.json, {', '.join(figures)}")
    return 0


def write(out: Path, table: str, results: dict[str, Any], figures: Mapping[str, Draw]) -> None:
    """Writes a study's files, each whole or not at all.

    Raises UserError where there is no room for one.
    """
    document = json.dumps(results, indent=1) + "\n"
    _replace(out / "table.md", lambda path: path.write_text(table, encoding="utf-8"))
    _replace(out / "results.json", lambda path: path.write_text(document, encoding="utf-8"))
    for name, draw in figures.items():
        _replace(out / name, functools.partial(draw, results))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets a file be written beside its place, and then puts it there."""
    try:
        with replacing(path) as new:
            write(new)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from error
