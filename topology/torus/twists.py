"""Twists of a shape that the optical switches can make, and the best of them.

Two twists are the same network where a signed permutation of x, y and z takes the lattice of one
to that of the other; one of each such class is listed. "TONS" (arXiv 2605.27963) searches more
widely, over topologies that are not twisted tori.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from topology.arrays import Integers
from topology.hardware import TPU_V4, Pod, block_of
from topology.torus.shapes import NO_TWIST, Shape, Twist, nearest_shape, shipped_twist, times
from topology.torus.slices import Slice

_Key = tuple[int, ...]  # of a class of equivalent twists


def mean_distance_then_diameter(slice: Slice) -> tuple[float, int]:
    """The measure by which `ranked_twists` ranks unless told otherwise."""
    return slice.mean_distance, slice.diameter


def ranked_twists(
    shape: Shape, measure: Callable[[Slice], Any] = mean_distance_then_diameter, pod: Pod = TPU_V4
) -> list[tuple[Slice, Any]]:
    """The networks that the wiring can make of a shape, the best first, each with its measure.

    Args:
      shape: of whole blocks.
      measure: Slice -> anything that sorts, less being better; for example the exact all-to-all
        optimum.
    """
    found = [(slice, measure(slice)) for slice in all_twists(shape, pod)]
    return sorted(found, key=lambda pair: pair[1])


def all_twists(shape: Shape, pod: Pod = TPU_V4) -> list[Slice]:
    """Lists a slice of every class of equivalent twists; the regular torus is the first.

    Of a class, the twist that ships stands where it is in it, else the one with the least shifts.

    Raises:
      ValueError: the shape has no wraparound, or the pod no switches, so no twist.
    """
    Slice(shape=shape, pod=pod)  # or says why there is none
    side = block_of(pod).side
    if any(k % side for k in shape):
        raise ValueError(
            f"twists of {times(shape)}: every dimension is a multiple of {side}; the nearest is "
            f"{times(nearest_shape(shape, whole=True, pod=pod))}"
        )
    shipped = shipped_twist(shape, pod)
    twists = sorted(
        _acyclic_twists(shape, side),
        key=lambda twist: (twist != NO_TWIST, twist != shipped, sum(map(sum, twist)), twist),
    )
    # Everything is a multiple of a block's side: count in blocks, whose numbers are smaller.
    lattices = (np.diag(shape) - np.array(twists)) // side
    found: dict[_Key, Twist] = {}
    for twist, key in zip(twists, _class_keys(lattices), strict=True):
        found.setdefault(key, twist)
    return [Slice(shape=shape, twist=twist, pod=pod) for twist in found.values()]


def _acyclic_twists(shape: Shape, side: int) -> set[Twist]:
    """Lists all twists by whole blocks, each dimension shifting only later ones of some order.

    By Hajos's theorem these are all lattices that the box of the shape tiles Z^3 by.
    """
    found = set()
    for first, second, third in itertools.permutations(range(3)):
        shifts = [range(0, shape[d], side) for d in (second, third, third)]
        for to_second, to_third, second_to_third in itertools.product(*shifts):
            twist = np.zeros((3, 3), int)
            twist[first, second], twist[first, third] = to_second, to_third
            twist[second, third] = second_to_third
            found.add(tuple(map(tuple, twist.tolist())))
    return found


def _class_keys(lattices: Integers) -> list[_Key]:
    """int [B, 3, 3] bases -> for each, one value that equivalent lattices share."""
    forms = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=2):  # -L = L: the third sign changes nothing
            forms.append(_hermite(lattices[:, :, order] * (*signs, 1)).reshape(-1, 9))
    each = np.stack(forms, axis=1).tolist()  # [B, 24, 9]
    return [min(map(tuple, of_one)) for of_one in each]


def _hermite(bases: npt.ArrayLike) -> Integers:
    """int [B, 3, 3], rows bases of lattices -> their Hermite normal forms, one for each lattice."""
    H = np.array(bases)
    for c in range(3):
        while H[:, c + 1 :, c].any():  # Euclid's algorithm on the column, all lattices at once
            size = np.where(H[:, c:, c] == 0, np.iinfo(int).max, np.abs(H[:, c:, c]))
            pivot = c + size.argmin(axis=1)
            rows = np.arange(len(H))
            H[rows, c], H[rows, pivot] = H[rows, pivot], H[rows, c].copy()
            H[:, c + 1 :] -= (H[:, c + 1 :, c] // H[:, c, c, None])[..., None] * H[:, None, c]
        H[:, c] *= np.sign(H[:, c, c])[:, None]
        for r in range(c):
            H[:, r] -= (H[:, r, c] // H[:, c, c])[:, None] * H[:, c]
    return H
