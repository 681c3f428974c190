"""Arrays in files of which no damaged byte is ever read: a block is checked when it is first used.

Reading a whole corpus to check it would make every host of a large run wait at each start; a block
of 64 KiB costs 0.05 ms, once.
"""

import zlib
from pathlib import Path

import numpy as np

from pjit_train.errors import UserError

BLOCK_BYTES = 1 << 16
_SUMS = ".crc32"  # beside the file: the CRC-32 of each block, uint32, little-endian


class CheckedArray:
    """A one-dimensional array in a file, memory-mapped, whose blocks are checked as they are read.

    `len` and slices of step 1, as of a numpy array: `array[start:stop]` is a view of the map.
    """

    def __init__(self, path: Path, dtype: np.typing.DTypeLike):
        """Maps a file that a `Writer` made. OSError or ValueError where it is not whole."""
        # A plain array, still mapped: slicing a memmap object is several times slower.
        self._array = np.memmap(path, dtype, "r").view(np.ndarray)
        self._bytes = self._array.view(np.uint8)
        self._sums = np.fromfile(f"{path}{_SUMS}", "<u4")
        if len(self._sums) != -(-len(self._bytes) // BLOCK_BYTES):
            raise ValueError(f"{path}{_SUMS} is not of the size of {path}")
        self._checked = np.zeros(len(self._sums), bool)
        self._path = path

    def __len__(self) -> int:
        return len(self._array)

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def __getitem__(self, index: slice) -> np.ndarray:
        """Values start .. stop. UserError naming the directory where a block of them is damaged."""
        start, stop, _ = index.indices(len(self))
        size = self._array.itemsize
        first, last = start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES)
        if start < stop and not self._checked[first:last].all():
            self._check(first, last)
        return self._array[start:stop]

    def _check(self, first: int, last: int) -> None:
        for block in range(first, last):
            begin = block * BLOCK_BYTES
            if zlib.crc32(self._bytes[begin : begin + BLOCK_BYTES].data) != self._sums[block]:
                raise UserError(
                    f"token cache {self._path.parent}: {self._path.name} is damaged between bytes "
                    f"{begin:,} and {min(begin + BLOCK_BYTES, len(self._bytes)):,}; delete that "
                    "directory and run the same command again, which makes it anew"
                )
        self._checked[first:last] = True


class Writer:
    """Writes such a file: a context manager, in memory of what is given at a time."""

    def __init__(self, path: Path):
        self._file, self._sums = open(path, "wb"), open(f"{path}{_SUMS}", "wb")  # noqa: SIM115
        self._filled = self._checksum = 0  # of the block that is being written

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        with self._file, self._sums:
            if self._filled:
                self._sums.write(self._checksum.to_bytes(4, "little"))

    def write(self, data: bytes) -> None:
        self._file.write(data)
        view = memoryview(data)
        while view:
            taken = view[: BLOCK_BYTES - self._filled]
            self._checksum = zlib.crc32(taken, self._checksum)
            self._filled, view = self._filled + len(taken), view[len(taken) :]
            if self._filled == BLOCK_BYTES:
                self._sums.write(self._checksum.to_bytes(4, "little"))
                self._filled = self._checksum = 0
