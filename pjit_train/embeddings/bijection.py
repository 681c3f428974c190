"""A fixed bijection of a table's ids, so that no regular pattern of ids falls on one device."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

_ROUNDS = 4
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's finalizer


@dataclasses.dataclass(frozen=True)
class Bijection:
    """Permutation of [0, size) that looks random: a Feistel network whose sums are modular.

    A number is x * columns + y; in turn x moves by a hash of y and y by a hash of x, modulo their
    sizes, so that any size that is a product has a permutation and nothing is walked again (Black
    and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, their generalized Feistel cipher).

    Attributes:
      size: of which a divisor near the square root should exist; a prime is permuted badly.
    """

    size: int

    @property
    def columns(self) -> int:
        return self.size // self._rows

    @functools.cached_property
    def _rows(self) -> int:
        return next(n for n in range(math.isqrt(self.size), 0, -1) if self.size % n == 0)

    def __call__(self, ids: Any) -> Any:
        """Positions of ids, int32 of their shape; of NumPy or JAX as the ids are."""
        x, y = self._split(ids)
        for key in range(_ROUNDS):
            if key % 2 == 0:
                x = (x + _hash(y, key) % np.uint32(self._rows)) % np.uint32(self._rows)
            else:
                y = (y + _hash(x, key) % np.uint32(self.columns)) % np.uint32(self.columns)
        return (x * np.uint32(self.columns) + y).astype(np.int32)

    def inverse(self, positions: Any) -> Any:
        """Ids at positions."""
        x, y = self._split(positions)
        for key in reversed(range(_ROUNDS)):
            if key % 2 == 0:
                x = (x + np.uint32(self._rows) - _hash(y, key) % np.uint32(self._rows)) % np.uint32(
                    self._rows
                )
            else:
                back = np.uint32(self.columns) - _hash(x, key) % np.uint32(self.columns)
                y = (y + back) % np.uint32(self.columns)
        return (x * np.uint32(self.columns) + y).astype(np.int32)

    def _split(self, numbers):
        numbers = numbers.astype(np.uint32)
        return numbers // np.uint32(self.columns), numbers % np.uint32(self.columns)


def mixed(x: Any) -> Any:
    """Bits of uint32 numbers, mixed: the finalizer of MurmurHash3."""
    for multiplier, shift in zip(_MULTIPLIERS, (16, 13), strict=True):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(multiplier)
    return x ^ (x >> np.uint32(16))


def _hash(x, key: int):
    return mixed(x + np.uint32(0x9E3779B9 * (key + 1) % 2**32))
