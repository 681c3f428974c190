"""Calibration text between two blocks, kept on disk: a batch at a time is in memory."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pjit_train.compression.calibrate import States


class StatesOnDisk(States):
    """Activations float32 [batches, rows, tokens, d_model] in a file, of which each batch is read
    when it is asked for. What a block makes of them goes to another file, which is then on the disk
    itself: whatever ends the process, one of the two is whole.

    Attributes:
      path: of the file that holds them.

    Args:
      shape: of all.
      rest: by layer, the inputs of a block besides, the same for all batches.
      name: number -> the path after so many blocks; two files take turns.
      number: how many blocks the states have been through.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        rest: list[dict[str, Any]],
        name: Callable[[int], Path],
        number: int,
    ):
        self._shape, self._rest, self._name, self._number = shape, rest, name, number
        self._each = int(np.prod(shape[1:]))

    @property
    def path(self) -> Path:
        return self._name(self._number)

    @property
    def whole(self) -> bool:
        """Tells whether the file is there, in its full size."""
        size = self._shape[0] * self._each * 4
        return self.path.is_file() and self.path.stat().st_size == size

    def __iter__(self) -> Iterator[tuple[jax.Array, list[dict[str, Any]]]]:
        for batch in range(self._shape[0]):
            offset = batch * self._each * 4
            x = np.fromfile(self.path, np.float32, self._each, offset=offset)
            yield jax.numpy.asarray(x.reshape(self._shape[1:])), self._rest

    def write(self, batches: Iterator[jax.Array]) -> None:
        """Writes the states, at whatever number they are."""
        with self.path.open("wb") as file:
            for x in batches:
                file.write(np.ascontiguousarray(np.asarray(x, np.float32)).data)
            file.flush()
            os.fsync(file.fileno())

    def advance(self, forward: Callable[[jax.Array, list[dict[str, Any]]], jax.Array]) -> None:
        after = StatesOnDisk(self._shape, self._rest, self._name, self._number + 1)
        after.write(forward(x, rest) for x, rest in self)
        self._number += 1
