"""The boxes as which a slice can be read: its chips as sums of three vectors."""

import itertools
from dataclasses import dataclass

import numpy as np

from topology.torus.slices import Slice


@dataclass(frozen=True)
class Box:
    """Chips as sums of `vectors`, each `sizes` times; every chip once."""

    vectors: tuple[tuple[int, int, int], ...]
    sizes: tuple[int, ...]


def boxes(slice: Slice) -> list[Box]:
    """The boxes as which a slice can be read; the first is its shape.

    On a twisted slice, dimensions in every order: each is as long as it takes to come back to the
    chips of those before. Where it comes back to another chip than it left, a vector that also
    goes along the earlier dimensions can close the ring; both are boxes.
    """
    unit = np.eye(3, dtype=int)
    found = [Box(tuple(map(tuple, unit.tolist())), slice.shape)]
    if not slice.is_twisted:
        return found
    for order in itertools.permutations(range(3)):
        before, sizes, options = np.zeros((1, 3), int), [], []
        for i, d in enumerate(order):
            there = set(slice.index(slice.reduce(before)).tolist())
            steps = range(1, slice.num_chips + 1)
            n = next(n for n in steps if int(slice.index(slice.reduce(n * unit[d]))) in there)
            closed = [
                vector
                for turns in itertools.product((0, 1, -1), repeat=i)
                for vector in [
                    unit[d] + sum(t * unit[e] for t, e in zip(turns, order, strict=False))
                ]
                if not slice.reduce(n * vector).any()
            ]
            closed.sort(key=lambda vector: np.abs(vector).sum())
            options.append({tuple(v.tolist()): None for v in [unit[d], *closed[:1]]})
            sizes.append(n)
            before = (before[:, None] + np.arange(n)[:, None] * unit[d]).reshape(-1, 3)
        for vectors in itertools.product(*options):
            pairs = sorted(zip(vectors, sizes, strict=True), reverse=True)
            box = Box(*map(tuple, zip(*pairs, strict=True)))
            if box not in found:
                found.append(box)
    return found
