"""A GGUF file: what its header says, all of it checked against the file, and its tensors decoded.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
The header is read here and not by the package `gguf`, whose reader believes it; the blocks of
quantized tensors are decoded by that package.
"""

import dataclasses
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.errors import UserError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_MOST_STRINGS = 1 << 24  # of one list: more tokens than any vocabulary has
_MOST_NAMED = 1 << 20  # keys, and tensors
_STRING, _ARRAY = 8, 9
_SCALARS = {  # of values, by their number in the format
    **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_BOOL = 7
# Types of tensors that are decoded: number in the format -> name, elements and bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
_CHUNK = 1 << 20  # elements that are decoded at a time


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the file stores it.

    Attributes:
      shape: the slowest axis first, as numpy and Hugging Face have it.
      type: its name in `TYPES`.
      number: of the type in the format.
      start: where its bytes begin in the file.
      size: of its bytes.
    """

    shape: tuple[int, ...]
    type: str
    number: int
    start: int
    size: int


@dataclasses.dataclass
class Rounding:
    """Values that a dtype does not hold: how many it rounded, and by how much at most."""

    values: int = 0
    rounded: int = 0
    largest: float = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        off = np.abs(after.astype(np.float32) - before)
        self.values += off.size
        self.rounded += int(np.count_nonzero(off))
        self.largest = max(self.largest, float(off.max(initial=0)))


class GGUF:
    """A GGUF file, mapped into memory.

    Attributes:
      path: of the file.
      values: of its keys: numbers, texts, bools, lists of texts, and arrays of numbers.
      tensors: name -> `Stored`.

    Raises:
      UserError: the file cannot be read, or is not a whole GGUF file of a version and of types that
        are known; no memory is taken for what it only claims.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _map(self.path)
        cursor = _Cursor(self.path, self._data)
        tensors, keys = _counts(cursor)
        self.values: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.text("a key")
            if key in self.values:
                raise cursor.wrong(f"the key {key!r} stands in it twice")
            self.values[key] = cursor.value(key)
        if self.values.get("split.count", 1) not in (0, 1):
            raise cursor.wrong(
                f"is one of {self.values['split.count']} parts; join them with llama.cpp's "
                "`llama-gguf-split --merge`, and import that"
            )
        self.tensors = self._read_tensors(cursor, tensors)

    def read(
        self, name: str, dtype: Any, *, offset: float = 0, rounding: "Rounding | None" = None
    ) -> np.ndarray:
        """The values of a tensor, in its shape.

        Args:
          dtype: of the result; what it cannot hold is rounded to nearest even.
          offset: is subtracted from every value, in float32.
          rounding: counts what the dtype does not hold.

        Raises:
          UserError: one is not finite, in the file or in that dtype.
        """
        stored = self.tensors[name]
        found = np.empty(math.prod(stored.shape), dtype)
        at = 0
        for part in self._decoded(stored):
            _check_finite(part, self.path, name, stored, at)
            if offset:
                part = part - np.float32(offset)
            cast = found[at : at + part.size]
            with np.errstate(over="ignore"):
                cast[:] = part
            if found.dtype != np.float32:
                _check_finite(cast, self.path, name, stored, at, f" as {found.dtype.name}")
            if rounding is not None:
                rounding.add(part, cast)
            at += part.size
        self._forget(stored)
        return found.reshape(stored.shape)

    def same(self, name: str, other: str) -> bool:
        """Tells whether two tensors are stored as the same bytes of one type and shape."""
        a, b = self.tensors[name], self.tensors[other]
        if (a.shape, a.number) != (b.shape, b.number):
            return False
        left, right = (np.frombuffer(self._data, np.uint8, x.size, x.start) for x in (a, b))
        return all(
            np.array_equal(left[at : at + _CHUNK], right[at : at + _CHUNK])
            for at in range(0, a.size, _CHUNK)
        )

    def _forget(self, stored: Stored) -> None:
        """Gives the memory back into which the file's bytes of a tensor were mapped."""
        start = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (stored.start + stored.size) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if size > 0:
            self._data.madvise(mmap.MADV_DONTNEED, start, size)

    def _decoded(self, stored: Stored) -> Iterator[np.ndarray]:
        """The values of a tensor in float32, flat, some blocks at a time."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        _, elements, size = TYPES[stored.number]
        step = _CHUNK // elements * size
        kind = GGMLQuantizationType(stored.number)
        for start in range(0, stored.size, step):
            count = min(step, stored.size - start)
            part = np.frombuffer(self._data, np.uint8, count, stored.start + start)
            with np.errstate(all="ignore"):  # scales that are not finite are found afterwards
                yield dequantize(part.reshape(1, -1), kind).reshape(-1)

    def _read_tensors(self, cursor: "_Cursor", count: int) -> dict[str, Stored]:
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = cursor.text("a tensor's name")
            if name in found:
                raise cursor.wrong(f"the tensor {name!r} stands in it twice")
            found[name] = (cursor.shape(name), cursor.number("<u4"), cursor.number("<u8"))

        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.wrong(f"general.alignment={alignment!r} is no power of two")
        data = -(-cursor.at // alignment) * alignment
        tensors, expected = {}, 0
        for name, (shape, number, offset) in found.items():
            what = f"tensor {name!r}"
            if number not in TYPES:
                known = ", ".join(kind for kind, _, _ in TYPES.values())
                raise cursor.wrong(f"{what} has type {_type_name(number)}; {known} are read")
            kind, elements, size = TYPES[number]
            if shape[-1] % elements:
                raise cursor.wrong(
                    f"{what} is {list(shape)}, and {kind} stores rows of a multiple of {elements}"
                )
            if offset != expected:
                raise cursor.wrong(
                    f"{what} begins at {offset:,} of the data, and the tensors before it end at "
                    f"{expected:,}; the header is damaged"
                )
            length = math.prod(shape) // elements * size
            if data + offset + length > len(self._data):
                raise cursor.wrong(
                    f"is cut short, or its header is damaged: {what}, {kind}{list(shape)}, ends at "
                    f"byte {data + offset + length:,} and the file at {len(self._data):,}"
                )
            tensors[name] = Stored(shape, kind, number, data + offset, length)
            expected = -(-(offset + length) // alignment) * alignment
        return tensors


class _Cursor:
    """A place in the header, from which the next values are read."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data, self.at = path, data, 0

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        self.at += count
        return self._data[self.at - count : self.at]

    def need(self, count: int, what: str) -> None:
        """Raises a UserError unless so many bytes follow."""
        left = len(self._data) - self.at
        if count > left:
            raise self.wrong(
                f"is cut short, or its header is damaged: at byte {self.at:,} {what} of "
                f"{count:,} bytes should follow, and {left:,} do"
            )

    def number(self, kind: str, what: str = "a number") -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def text(self, what: str) -> str:
        data = self.take(self.number("<u8", f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.wrong(
                f"{what} that ends at byte {self.at:,} is no UTF-8 text; the header is damaged"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        axes = self.number("<u4")
        if not 1 <= axes <= _MOST_DIMENSIONS:
            raise self.wrong(
                f"tensor {name!r} has {axes:,} dimensions; 1 to {_MOST_DIMENSIONS} are possible"
            )
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        if 0 in shape:
            raise self.wrong(f"tensor {name!r} is {list(shape)}, without an element")
        return shape

    def value(self, key: str) -> Any:
        """The value of a key: its type, and then what is of that type."""
        kind = self.number("<u4", f"the type of {key!r}")
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            return self._scalars(key, kind, 1)[0].item()
        kind, count = self.number("<u4", what), self.number("<u8", what)
        if kind != _STRING:
            return self._scalars(key, kind, count)
        self.need(8 * count, what)  # the length of each
        if count > _MOST_STRINGS:
            raise self.wrong(f"{key!r} has {count:,} texts; at most {_MOST_STRINGS:,} are read")
        return [self.text(what) for _ in range(count)]

    def _scalars(self, key: str, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self.wrong(f"the value of {key!r} has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self.need(count * dtype.itemsize, f"the value of {key!r}")
        found = np.frombuffer(self._data, dtype, count, self.at)
        self.at += count * dtype.itemsize
        return found.astype(bool) if kind == _BOOL else found


def _map(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file; give a .gguf file")
        with path.open("rb") as file:
            begin = file.read(8)
            if begin[:4] == MAGIC:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a .gguf file") from error
    raise UserError(f"{path}: {_what_begins_with(begin)}")


def _what_begins_with(begin: bytes) -> str:
    """Says what a file is that is no GGUF file."""
    if begin[:2] == b"PK" or (begin[:1] == b"\x80" and begin[1:2] <= b"\x05"):
        return "is a PyTorch pickle, which is never loaded; give a .gguf file, or safetensors"
    if begin[:4] == MAGIC[::-1]:
        return "is a GGUF file of the other byte order; little-endian ones are read"
    return f"is no GGUF file: it begins with {begin[:4]!r}, not with {MAGIC!r}"


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of keys, after the magic and the version."""
    cursor.take(len(MAGIC), "the magic")
    version = cursor.number("<u4", "the version")
    if version and not version & 0xFFFF:
        raise cursor.wrong("is a big-endian GGUF file; only little-endian ones are read")
    if version not in _VERSIONS:
        raise cursor.wrong(
            f"is a GGUF file of version {version}; 2 and 3 are read: convert the model again"
        )
    counts = cursor.number("<u8", "a count"), cursor.number("<u8", "a count")
    for count, what, least in zip(counts, ("tensors", "keys"), (24, 13), strict=True):
        cursor.need(count * least, f"{count:,} {what}")
        if count > _MOST_NAMED:
            raise cursor.wrong(f"has {count:,} {what}; at most {_MOST_NAMED:,} are read")
    return counts


def _type_name(number: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"{number}, which is unknown"


def _check_finite(
    part: np.ndarray, path: Path, name: str, stored: Stored, start: int, what: str = ""
) -> None:
    """Raises a UserError where a value of a part of a tensor, from `start` on, is not finite."""
    finite = np.isfinite(part)
    if not finite.all():
        bad = int(np.argmin(finite))
        at = [int(i) for i in np.unravel_index(start + bad, stored.shape)]
        raise UserError(
            f"{path}: tensor {name} holds {part[bad]} at {at}{what}; weights must be finite"
        )
