"""Sources of samples with clicks: made up, Criteo's files, any Parquet table, pairs of words."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pjit_train.data import stdlib_files
from pjit_train.embeddings.bijection import mixed
from pjit_train.errors import UserError
from sparsity.ranges import Count, NonNegative, Whole, check_fields

Samples = dict[str, np.ndarray]
_CRITEO_DENSE, _CRITEO_IDS = 13, 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticClicks:
    """Samples that are made up, as MLPerf's generator of multi-hot features does.

    A feature's first id follows a Zipf distribution, the lowest the most frequent; a fixed map
    takes it to the other ids of its bag, uniform in the table, so that an id brings its bundle.
    Whether a sample is clicked on is drawn with a probability that its dense features and first ids
    have, so that there is something to learn.

    Attributes:
      rows: ids of each feature.
      hotness: ids of each feature's bags.
      num_dense: features that are numbers.
      skew: Zipf's exponent; 0 for uniform ids.
      train, validation: samples of the splits.
      seed: of the map and of the samples.
    """

    rows: Sequence[Count]
    hotness: Sequence[Count]
    num_dense: Whole = 13
    skew: NonNegative = 1.05
    train: Count = 4_000_000
    validation: Count = 65_536
    seed: Whole = 0

    def __post_init__(self):
        check_fields(self, UserError)
        if len(self.rows) != len(self.hotness):
            raise UserError(
                f"SyntheticClicks: rows of {len(self.rows)} features and hotness of "
                f"{len(self.hotness)}; give both for each feature"
            )

    def open(self) -> "_Synthetic":
        """Makes nothing yet."""
        return _Synthetic(self)

    def seen_from(self, folder: Path) -> "SyntheticClicks":
        """Returns the source itself, which reads no file."""
        return self


class _Synthetic:
    def __init__(self, source: SyntheticClicks):
        self.source = source
        self.sizes = {"train": source.train, "validation": source.validation}
        self.digest = _digest(["SyntheticClicks", 1, dataclasses.asdict(source)])

    def samples(self, split: str, indices: np.ndarray) -> Samples:
        source = self.source
        salt = np.uint32((source.seed * 2 + (split == "validation")) % 2**32)
        base = mixed(indices.astype(np.uint32) ^ mixed(np.full(1, salt)))
        ids, score = [], np.zeros(len(indices))
        for feature, (rows, hotness) in enumerate(zip(source.rows, source.hotness, strict=True)):
            first = zipf(_unit(base, feature), rows, source.skew)
            bag = [first]
            name = np.uint32(feature * 2**16 + source.seed % 2**16)
            for place in range(1, hotness):
                bits = mixed(first.astype(np.uint32) ^ mixed(np.full(1, name + np.uint32(place))))
                bag.append((bits % np.uint32(rows)).astype(np.int32))
            ids += bag
            taste = mixed(first.astype(np.uint32) + mixed(np.full(1, ~name)))
            score += taste * 2.0**-31 - 1
        dense = [_unit(base, 2**20 + column) for column in range(source.num_dense)]
        score = 2 * score / len(source.rows) ** 0.5
        if dense:
            score += np.sum([(x - 0.5) * (-1) ** i for i, x in enumerate(dense)], axis=0)
        clicked = _unit(base, 2**21) < 1 / (1 + np.exp(1 - score))
        made = {"labels": clicked.astype(np.float32), "ids": np.stack(ids, axis=1)}
        if dense:  # Criteo's are counts, of which the logarithm is taken
            counts = -np.log1p(-np.stack(dense, axis=1))
            made["dense"] = np.log1p(counts).astype(np.float32)
        return made

    @property
    def num_dense(self) -> int:
        return self.source.num_dense


def zipf(unit: np.ndarray, rows: int, skew: float) -> np.ndarray:
    """Ids below `rows`, int32, of numbers uniform in [0, 1): about (id + 1)^-skew."""
    if abs(skew - 1) < 1e-6:
        rank = np.exp(unit * np.log(rows + 1.0))
    else:
        power = 1 - skew
        rank = (1 + unit * ((rows + 1.0) ** power - 1)) ** (1 / power)
    return np.minimum(rank.astype(np.int64) - 1, rows - 1).astype(np.int32)


def _unit(base: np.ndarray, column: int) -> np.ndarray:
    """Numbers uniform in [0, 1), float64, one for each sample."""
    return mixed(base ^ mixed(np.full(1, column + 1, np.uint32))) * 2.0**-32


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriteoFiles:
    """Files in the format of Criteo's: a line a sample, of a label, 13 integers and 26 categories
    in hexadecimal, between tabs; any but the label may be missing.

    Integers x give log(1 + max(x, 0)); categories their number modulo the feature's rows.

    Attributes:
      train, validation: paths of files.
      rows: ids of each of the 26 features.
    """

    train: Sequence[str]
    validation: Sequence[str]
    rows: Sequence[Count]

    def __post_init__(self):
        check_fields(self, UserError)
        if len(self.rows) != _CRITEO_IDS:
            raise UserError(f"CriteoFiles.rows has {len(self.rows)} numbers; use {_CRITEO_IDS}")
        for name in ("train", "validation"):
            paths = getattr(self, name)
            if isinstance(paths, str) or not paths:
                raise UserError(f"CriteoFiles.{name}={paths!r}; use a list of paths")

    @property
    def num_dense(self) -> int:
        return _CRITEO_DENSE

    @property
    def hotness(self) -> tuple[int, ...]:
        return (1,) * _CRITEO_IDS

    def open(self) -> "_Criteo":
        """Finds the lines of all files, reading each once."""
        return _Criteo(self)

    def seen_from(self, folder: Path) -> "CriteoFiles":
        """Returns the source with relative paths taken from a folder, where one is there."""
        return dataclasses.replace(
            self,
            train=_seen_from(folder, self.train),
            validation=_seen_from(folder, self.validation),
        )


class _Criteo:
    def __init__(self, source: CriteoFiles):
        self.source, digest = source, hashlib.sha256()
        self._files = {s: [_Lines(path, digest) for path in getattr(source, s)] for s in _SPLITS}
        self.sizes = {s: sum(len(file) for file in files) for s, files in self._files.items()}
        self.digest = digest.hexdigest()

    def samples(self, split: str, indices: np.ndarray) -> Samples:
        fields = [self._fields(split, int(index)) for index in indices]
        labels, dense, ids = zip(*fields, strict=True)
        return {
            "labels": np.array(labels, np.float32),
            "dense": np.log1p(np.maximum(np.array(dense, np.float32), 0)),
            "ids": np.array(ids, np.int32),
        }

    def _fields(self, split: str, index: int) -> tuple[int, list[int], list[int]]:
        for file in self._files[split]:
            if index < len(file):
                break
            index -= len(file)
        line = file.line(index)
        parts = line.rstrip("\r\n").split("\t")
        try:
            if len(parts) != 1 + _CRITEO_DENSE + _CRITEO_IDS:
                raise ValueError(f"{len(parts)} fields")
            label, *numbers = [int(x) if x else 0 for x in parts[: 1 + _CRITEO_DENSE]]
            if label not in (0, 1):
                raise ValueError(f"label {label}")
            categories = [int(x, 16) if x else 0 for x in parts[1 + _CRITEO_DENSE :]]
        except ValueError as error:
            raise UserError(
                f"{file.path}: line {index + 1}: {error}; a line is a label 0 or 1, 13 integers "
                "and 26 categories in hexadecimal, between tabs"
            ) from error
        return label, numbers, [x % n for x, n in zip(categories, self.source.rows, strict=True)]


_SPLITS = ("train", "validation")


class _Lines:
    """The lines of a file, by index."""

    def __init__(self, path: str, digest):
        self.path, starts, size = path, [np.zeros(1, np.int64)], 0
        try:
            with open(path, "rb") as file:
                while chunk := file.read(2**24):
                    digest.update(chunk)
                    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                    starts.append(ends + size + 1)
                    size += len(chunk)
            self._bytes = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give a file of Criteo's format") from error
        every = np.concatenate(starts)
        self._starts = every if every[-1] == size else np.append(every, size)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def line(self, index: int) -> str:
        start, end = self._starts[index], self._starts[index + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickTable:
    """Parquet files with a column for each feature, one id a sample and feature.

    Categories that are integers give these modulo the feature's rows, others the hash of their text
    modulo that; missing ones are id 0. Missing numbers are 0.

    Attributes:
      train, validation: paths of files.
      label: column of 0 and 1.
      dense: columns of numbers, taken as they are.
      categorical: columns of categories; rows: ids of each.
    """

    train: Sequence[str]
    validation: Sequence[str]
    label: str
    categorical: Sequence[str]
    rows: Sequence[Count]
    dense: Sequence[str] = ()

    def __post_init__(self):
        check_fields(self, UserError)
        if len(self.rows) != len(self.categorical):
            raise UserError(
                f"ClickTable: {len(self.categorical)} categorical columns and rows of "
                f"{len(self.rows)}; give rows for each column"
            )

    @property
    def num_dense(self) -> int:
        return len(self.dense)

    @property
    def hotness(self) -> tuple[int, ...]:
        return (1,) * len(self.categorical)

    def open(self) -> "_Table":
        """Reads the columns into memory."""
        return _Table(self)

    def seen_from(self, folder: Path) -> "ClickTable":
        """Returns the source with relative paths taken from a folder, where one is there."""
        return dataclasses.replace(
            self,
            train=_seen_from(folder, self.train),
            validation=_seen_from(folder, self.validation),
        )


class _Table:
    def __init__(self, source: ClickTable):
        self._splits = {s: self._read(source, getattr(source, s)) for s in _SPLITS}
        self.sizes = {s: len(arrays["labels"]) for s, arrays in self._splits.items()}
        digest = hashlib.sha256(_digest(["ClickTable", source.label]).encode())
        for arrays in self._splits.values():
            for name, array in sorted(arrays.items()):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        self.digest = digest.hexdigest()

    def samples(self, split: str, indices: np.ndarray) -> Samples:
        return {name: array[indices] for name, array in self._splits[split].items()}

    @staticmethod
    def _read(source: ClickTable, paths: Iterable[str]) -> Samples:
        import pyarrow as pa
        import pyarrow.parquet as pq

        wanted = [source.label, *source.dense, *source.categorical]
        tables = []
        for path in paths:
            try:
                names = pq.read_schema(path).names
                if missing := [name for name in wanted if name not in names]:
                    raise UserError(f"{path}: no column {missing[0]}; it has {', '.join(names)}")
                tables.append(pq.read_table(path, columns=wanted))
            except OSError as error:
                said = error.strerror or str(error).splitlines()[0]
                raise UserError(f"{path}: {said}; give a Parquet file") from error
            except pa.ArrowInvalid as error:
                said = str(error).splitlines()[0]
                raise UserError(f"{path}: {said}; give a Parquet file") from error
        columns = {name: [table.column(name) for table in tables] for name in wanted}

        def numbers(name):
            try:
                parts = [np.asarray(c.to_pandas(), np.float32) for c in columns[name]]
            except (TypeError, ValueError) as error:
                raise UserError(f"ClickTable: column {name} is not of numbers") from error
            return np.nan_to_num(np.concatenate(parts))

        labels = numbers(source.label)
        if not np.isin(labels, (0, 1)).all():
            raise UserError(f"ClickTable: column {source.label} has values other than 0 and 1")
        of_columns = zip(source.categorical, source.rows, strict=True)
        ids = [_categories(columns[name], rows) for name, rows in of_columns]
        read = {"labels": labels, "ids": np.stack(ids, axis=1)}
        if source.dense:
            read["dense"] = np.stack([numbers(name) for name in source.dense], axis=1)
        return read


def _categories(parts: Sequence, rows: int) -> np.ndarray:
    """Ids of a column of categories, int32."""
    values = [value for part in parts for value in part.to_pylist()]
    ids = {None: 0}
    for value in set(values) - {None}:
        whole = isinstance(value, int) and not isinstance(value, bool)
        ids[value] = (value if whole else fnv(str(value).encode())) % rows
    return np.array([ids[value] for value in values], np.int32)


def fnv(text: bytes) -> int:
    """The 32-bit FNV-1a hash, by which fastText finds the row of an n-gram."""
    value = 0x811C9DC5
    for byte in text:
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordPairs:
    """Pairs of words of the standard library's text, each as the bag of its n-grams of characters.

    A word and its neighbour are a click; a word and one of anywhere, drawn by frequency, are none:
    fastText's skip-grams (Bojanowski et al., 2017), of real skew and text that every machine has.
    Two features, the word and the other, are to share one table.

    Attributes:
      rows: hash buckets of n-grams.
      most: n-grams of a bag, the first of the word; the whole word is one of them.
      window: most words between a word and its neighbour, and one.
    """

    rows: Count = 100_000
    most: Count = 24
    window: Count = 4

    def __post_init__(self):
        check_fields(self, UserError)

    @property
    def num_dense(self) -> int:
        return 0

    @property
    def hotness(self) -> tuple[int, ...]:
        return (self.most, self.most)

    def open(self) -> "_Pairs":
        """Reads the library's text."""
        return _Pairs(self)

    def seen_from(self, folder: Path) -> "WordPairs":
        """Returns the source itself: Python's files are not in a folder of the run."""
        return self


class _Pairs:
    def __init__(self, source: WordPairs):
        self.source = source
        files = stdlib_files.select_files(stdlib_files.stdlib_dir())
        index: dict[str, int] = {}
        self._words = {}
        for split in _SPLITS:
            texts = (file.text for file in files if file.split == split)
            found = (w.lower() for text in texts for w in re.findall(r"[A-Za-z]{2,}", text))
            self._words[split] = np.array([index.setdefault(w, len(index)) for w in found])
        bags = [ngrams(word, source.rows)[: source.most] for word in index]
        self._lengths = np.array([len(bag) for bag in bags], np.int32)
        self._bags = np.zeros((len(bags), source.most), np.int32)
        for row, bag in zip(self._bags, bags, strict=True):
            row[: len(bag)] = bag
        self.sizes = {split: len(words) for split, words in self._words.items()}
        contents = [file.sha256 for file in files]
        self.digest = _digest(["WordPairs", 1, dataclasses.asdict(source), contents])

    def samples(self, split: str, indices: np.ndarray) -> Samples:
        words, window = self._words[split], self.source.window
        base = mixed(indices.astype(np.uint32))
        near = 1 + (_unit(base, 0) * window).astype(np.int64)
        near = indices + np.where(_unit(base, 1) < 0.5, near, -near)
        far = (_unit(base, 2) * len(words)).astype(np.int64)
        clicked = _unit(base, 3) < 0.5
        pair = words[indices], words[np.where(clicked, near % len(words), far)]
        return {
            "labels": clicked.astype(np.float32),
            "ids": np.concatenate([self._bags[word] for word in pair], axis=1),
            "lengths": np.stack([self._lengths[word] for word in pair], axis=1),
        }


def ngrams(word: str, rows: int) -> list[int]:
    """Rows of a word itself and of its n-grams of 3 to 6 characters between "<" and ">"."""
    whole = f"<{word}>"
    parts = [whole[i : i + n] for n in range(3, 7) for i in range(len(whole) - n + 1)]
    return [fnv(part.encode()) % rows for part in dict.fromkeys([whole, *parts])]


def _seen_from(folder: Path, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(folder / path) if (folder / path).exists() else path for path in paths)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
