"""Classes of ranks that do the same at the same times, so that one of each stands for all.

The coarsest partition in which ranks of a class have the same program and, node by node, partners
of the same classes (colour refinement, as for the coarsest equitable partition of a graph; Paige
and Tarjan, SIAM J. Comput. 16, 1987). Where the network treats them alike too, they do the same at
the same times; where it does not, a class goes as its slowest rank.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from topology.arrays import Integers
from topology.traces.trace import Trace


def classes(trace: Trace) -> Integers:
    """int [R], the class of each rank, numbered by their first ranks."""
    R = len(trace.ranks)
    groups: dict[tuple[int, ...], int] = {}
    partners = [
        np.array([groups.setdefault(one, len(groups)) for one in rank.partners], int)
        for rank in trace.ranks
    ]
    members = [np.array(one) for one in groups]
    colour = _numbered([rank.program for rank in trace.ranks])
    count = len(set(colour.tolist()))
    while True:
        kinds = _numbered([np.sort(colour[one]).tobytes() for one in members])
        signs = [(colour[r], kinds[partners[r]].tobytes()) for r in range(R)]
        colour = _numbered(signs)
        if (now := int(colour.max()) + 1) == count:
            return colour
        count = now


def _numbered(keys: Sequence[Hashable]) -> Integers:
    """int: the number of each key, in the order of their first places."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], int)
