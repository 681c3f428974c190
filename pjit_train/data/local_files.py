"""Local files that a source reads: of each split, by paths and globs."""

import dataclasses
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pjit_train.data.files import is_text_file
from pjit_train.errors import UserError
from sparsity.ranges import Part, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Local files of a source, of both splits.

    Attributes:
      train: a path or a glob ("corpus/**/*.txt"), or several.
      validation: likewise; if None, a part of `train` is kept for it.
      validation_fraction: how large a part.
    """

    train: str | Sequence[str]
    validation: str | Sequence[str] | None = None
    validation_fraction: Part = 0.05

    def __post_init__(self):
        check_fields(self, UserError)

    def key(self, cache_dir: Path | None = None) -> Any:
        """Returns the path, size and time of every file, and the options."""
        key = dataclasses.asdict(self)
        for split in ("train", "validation"):
            if (patterns := getattr(self, split)) is not None:
                stats = [(path, os.stat(path)) for path in self._paths(patterns)]
                key[split] = [[path, s.st_size, s.st_mtime_ns] for path, s in stats]
        return [type(self).__name__, key]

    def seen_from(self, folder: Path) -> Self:
        """Returns the source with relative paths taken from a folder, if some files are found
        there."""

        def there(patterns):
            if patterns is None or not isinstance(patterns, str):
                return patterns and [there(pattern) for pattern in patterns]
            path = os.path.join(folder, os.path.expanduser(patterns))
            found = os.path.exists(path) or glob.glob(path, recursive=True)
            return path if found else patterns

        return dataclasses.replace(self, train=there(self.train), validation=there(self.validation))

    def _paths(self, patterns: str | Sequence[str]) -> list[str]:
        """Returns the sorted absolute paths that the patterns name."""
        what, found = type(self).__name__, set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            path = os.path.abspath(os.path.expanduser(pattern))
            # A path that exists is taken as it is, though it may hold a "[" or a "*".
            matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
            if not matches:
                where = "" if os.path.isabs(pattern) else f" in {os.getcwd()}"
                raise UserError(f"{what}: {pattern!r} matches no file{where}")
            found.update(matches)
        for path in sorted(found):
            if os.path.isdir(path):
                raise UserError(
                    f"{what}: {path!r} is a folder: give a glob such as {path + '/**/*.txt'!r}"
                )
            if not os.path.isfile(path):
                raise UserError(f"{what}: {path!r} is not a file that can be read")
            if not is_text_file(path):
                raise UserError(
                    f"{what}: {path!r} is neither .txt nor .jsonl, nor one of them as .gz or "
                    ".zst, nor .parquet, .arrow or .feather"
                )
        return sorted(found)
