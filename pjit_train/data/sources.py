"""Sources of documents: local files, a TFDS dataset, or the Python standard library.

A source has `documents(split, cache_dir)`, an iterator over the texts of "train" or "validation";
`key(cache_dir)`, JSON that changes when those texts may have; and `seen_from(folder)`, the source
as a process in that folder has it. `cache_dir` is where a source that has to prepare something
keeps it, `cache.default_cache_dir()` if None.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pjit_train.data import stdlib_files
from pjit_train.data.cache import default_cache_dir, locked
from pjit_train.data.files import read_documents
from pjit_train.data.local_files import Files
from pjit_train.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """Local files: .txt, a document each; .jsonl, a document a line; either also as .gz or .zst;
    .parquet, .arrow and .feather, a document a row.

    A .txt file longer than 1 Mi characters is cut into documents of that length, so that no corpus
    need fit in memory. Files are read in the order of their sorted paths. Empty documents count
    for nothing.

    Attributes:
      train: a path or a glob ("corpus/**/*.txt"), or several.
      validation: likewise; if None, a part of `train` is kept for it.
      validation_fraction: how large a part. A document goes by the hash of its text, so equal
        documents go together. A corpus of fewer than 20 / validation_fraction documents, which
        that might leave with none, gives the end of each document instead.
      text_field: the key of a .jsonl line under which its text is, or the column of a table.
    """

    text_field: str = "text"

    def documents(self, split: str, cache_dir: Path | None = None) -> Iterator[str]:
        """Yields the texts of a split; raises UserError for a file or line it cannot read, and at
        the end where the split has no text."""
        if self.validation is None:
            documents = self._part(split)
        else:
            documents = self._read(self.train if split == "train" else self.validation)
        empty = True
        for text in filter(None, documents):
            empty = False
            yield text
        if empty:
            raise UserError(self._why_empty(split))

    def _part(self, split: str) -> Iterator[str]:
        """The part of `train` that a split gets."""
        few = self._is_few()
        for text in self._read(self.train):
            if few:
                cut = len(text) - max(1, int(len(text) * self.validation_fraction))
                yield text[:cut] if split == "train" else text[cut:]
            elif falls_below(self.validation_fraction, text) == (split == "validation"):
                yield text

    def _is_few(self) -> bool:
        enough = int(20 / self.validation_fraction)  # one in e^20 such corpora has no validation
        texts = filter(None, self._read(self.train))
        return sum(1 for _ in itertools.islice(texts, enough)) < enough

    def _why_empty(self, split: str) -> str:
        own = split == "train" or self.validation is not None
        what = f"TextFiles.{split if own else 'train'}={getattr(self, split if own else 'train')!r}"
        count, distinct = 0, set()
        for text in filter(None, self._read(getattr(self, split if own else "train"))):
            count += 1
            distinct.add(_digest(text))
        if not count:
            return f"{what} has no text: its documents are empty, or there are none"
        if self._is_few():
            return (
                f"{what}: its {count} documents are too short to keep the end of each for "
                "validation; give more text, or files for TextFiles.validation"
            )
        alike = "all equal" if len(distinct) == 1 else f"only {len(distinct)} different ones"
        return (
            f"{what}: its {count} documents are {alike}, and as equal documents go to one split "
            f"none is left for {split}; give different documents, or files for TextFiles.validation"
        )

    def _read(self, patterns: str | Sequence[str]) -> Iterator[str]:
        for path in self._paths(patterns):
            yield from read_documents(path, self.text_field)


_ARRAY_RECORD = {"file_format": "array_record"}  # the one that is read without TensorFlow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A TensorFlow Datasets dataset that has a feature of text.

    A dataset that is prepared as ArrayRecord is read without TensorFlow, with or without the code
    that made it. Preparing one that TFDS ships takes TensorFlow (pip install
    'torsion[tfds-prepare]') and a network.

    Attributes:
      name: as `tfds.data_source` takes it: "name", "name/config" or "name/config:version".
      data_dir: where datasets are; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      text_field: the feature with the text.
      train_split, validation_split: names of splits, or slices of them such as "train[95%:]".
    """

    name: str
    data_dir: str | None = None
    text_field: str = "text"
    train_split: str = "train"
    validation_split: str = "validation"

    def documents(self, split: str, cache_dir: Path | None = None) -> Iterator[str]:
        """Yields the texts of a split; raises UserError where TFDS cannot give them."""
        import grain

        part = self.train_split if split == "train" else self.validation_split
        rows = self.rows(part)
        features = rows[0] if len(rows) and isinstance(rows[0], dict) else {}
        if len(rows) and not isinstance(features.get(self.text_field), bytes):
            texts = sorted(name for name, value in features.items() if isinstance(value, bytes))
            raise UserError(
                f"Tfds {self.name!r} has no text under {self.text_field!r}: set text_field to a "
                f"feature of text (it has {', '.join(texts) or 'none'})"
            )
        for row in grain.MapDataset.source(rows):
            yield row[self.text_field].decode("utf-8", "replace")

    def key(self, cache_dir: Path | None = None) -> Any:
        """Returns the options and the metadata of the prepared files, without importing TFDS."""
        infos = self._metadata_files()
        if not infos:
            self.rows(self.train_split)  # prepares it, or says why it cannot
            infos = self._metadata_files()
        key = dataclasses.asdict(self) | {"data_dir": str(self._directory())}
        return ["Tfds", key, [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in infos]]

    def seen_from(self, folder: Path) -> "Tfds":
        """Returns the source with a relative `data_dir` taken from a folder, if it is found
        there."""
        if self.data_dir is None:
            return self
        path = folder / Path(self.data_dir).expanduser()
        return dataclasses.replace(self, data_dir=str(path)) if path.is_dir() else self

    def _directory(self) -> Path:
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        return Path(self.data_dir or default).expanduser().absolute()

    def _metadata_files(self) -> list[Path]:
        dataset = self.name.split("/")[0].split(":")[0]
        return sorted((self._directory() / dataset).glob("**/dataset_info.json"))

    def rows(self, split: str) -> Sequence[dict[str, Any]]:
        """The rows of a split, by index; raises UserError where TFDS cannot give them."""
        import tensorflow_datasets as tfds

        directory, builder = self._directory(), self._builder()
        stock = type(builder).__module__.startswith("tensorflow_datasets.")
        if not builder.is_prepared() and stock and importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                f"Tfds.name={self.name!r} is not prepared in {str(directory)!r}, and preparing it "
                "needs TensorFlow: pip install 'torsion[tfds-prepare]'"
            )
        try:
            with _quiet_tfds():
                return tfds.data_source(
                    self.name, split=split, data_dir=str(directory), builder_kwargs=_ARRAY_RECORD
                )
        except Exception as error:  # TFDS raises a dozen kinds, for a split, a format, a download
            raise UserError(
                f"Tfds.name={self.name!r}, split {split!r}: {_first_line(error)}"
            ) from error

    def features(self) -> Mapping[str, Any]:
        """Features of a row, by their names, as TFDS describes them."""
        return self._builder().info.features

    def _builder(self):
        import tensorflow_datasets as tfds

        directory = self._directory()
        try:
            return tfds.builder(self.name, data_dir=str(directory), **_ARRAY_RECORD)
        except tfds.core.DatasetNotFoundError as error:
            known = set(tfds.list_builders(with_community_datasets=False))
            if directory.is_dir():
                known |= {path.name for path in directory.iterdir() if path.is_dir()}
            near = difflib.get_close_matches(self.name, known, n=1, cutoff=0)
            raise UserError(
                f"Tfds.name={self.name!r} is no dataset of TFDS nor one in {str(directory)!r}: "
                f"the nearest name is {near[0]!r}"
            ) from error
        except Exception as error:
            hint = ""
            if "file format" in str(error):
                hint = " Prepare it with file_format='array_record', read without TensorFlow"
            raise UserError(f"Tfds.name={self.name!r}: {_first_line(error)}{hint}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The text of the standard library of the Python that runs: a corpus every machine has.

    Some 700 files and 11 MB: see `stdlib_files` for which. Prepared once, through TFDS, under the
    cache directory, in python-stdlib-VERSION-DIGEST; files.json there lists the files with their
    digests and splits, since another Python has other ones.
    """

    def documents(self, split: str, cache_dir: Path | None = None) -> Iterator[str]:
        """Yields the text of each file of a split, in the order of the paths."""
        import grain

        from pjit_train.data.stdlib_builder import StdlibText

        digest = hashlib.sha256(json.dumps(self.key()).encode()).hexdigest()[:8]
        name = f"python-stdlib-{platform.python_version()}-{digest}"
        directory = (cache_dir or default_cache_dir()) / name
        with locked(directory), _quiet_tfds():
            builder = StdlibText(data_dir=str(directory), file_format="array_record")
            builder.download_and_prepare()
        for row in grain.MapDataset.source(builder.as_data_source(split)):
            yield row["text"].decode("utf-8")

    def key(self, cache_dir: Path | None = None) -> Any:
        """Returns which Python this is and which version of the choice of files."""
        python = [platform.python_implementation(), platform.python_version()]
        return ["PythonStdlib", stdlib_files.VERSION, *python, str(stdlib_files.stdlib_dir())]

    def seen_from(self, folder: Path) -> "PythonStdlib":
        """Returns the source itself: Python's files are not in a folder of the run."""
        return self


def falls_below(fraction: float, text: str) -> bool:
    """Tells whether the hash of `text`, as a number in [0, 1), is less than `fraction`."""
    return int.from_bytes(_digest(text), "big") < fraction * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8]


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's progress bars away, and what it prints off stdout, which belongs to results."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
