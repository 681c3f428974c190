"""Slices of a pod: meshes, tori and twisted tori of chips, and what their graph is like.

A slice that wraps around in all its dimensions is the Cayley graph of Z^3 / L: its chips are the
vectors of Z^3, two of them the same chip where they differ by a vector of the lattice L, which
k_d e_d - twist_d (d = x, y, z) span; neighbours differ by +-e_d. A regular torus has a twist of
zero. So every chip sees the same network, and what is asked of one chip holds for all. A slice of
a pod of two dimensions is one chip thick along z.

Letters: N chips, d one of the dimensions x, y, z, k_d = shape[d].
"""

import itertools
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from topology.arrays import Floats, Integers
from topology.hardware import TPU_V4, AnyTorus, Pod, block_of, host_of
from topology.numbers import whole
from topology.torus.bisection import cut_links, least_cut_found
from topology.torus.shapes import (
    DIMENSIONS,
    NO_TWIST,
    Shape,
    Twist,
    Wrap,
    check_shape,
    check_twist,
    check_wrap,
    in_three,
    nearest_twistable,
    shift_order,
    shipped_twist,
    three,
    times,
    wraparound,
)

DIRECTIONS = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
"""The columns of `Slice.neighbours`: +x, -x, +y, -y, +z, -z."""

AS_WIRED: Wrap = ()
"""Wraparound of a new slice: wherever its wiring can."""

_IMPROVED = 4096  # chips up to which cuts are improved chip by chip
_LARGEST = 10**9  # size or shift that a message is given about
_SIZES = {2: "two positive sizes like 4x8", 3: "three positive sizes like 4x4x8"}
_EXAMPLES = {
    2: "8x16 or 8x16_wrap:",
    3: "4x4x8, 4x4x8_twisted, 4x4x12_twist:0,0,4/0,0,4/0,0,0 or 4x4x8_wrap:z",
}


Array = TypeVar("Array", bound=npt.NDArray[np.generic])


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A slice of a pod: its shape, its twist, and which dimensions wrap around.

    Legal shapes, with the dimensions in any order (the names x, y and z of a slice are its own):
      - on a pod of blocks (TPU v4, v5p) 4i x 4j x 4k chips, in as many blocks of 4x4x4 as its
        largest slice has: 4x4x4, 4x4x8, ... 16x16x16; whole hosts inside one block: 2x2x1, 2x4x1,
        4x4x1, 2x2x2, 2x2x4, 2x4x4;
      - on TPU v5e and v6e those of `Pod.shapes`, from 1x1 to 16x16;
      - on a torus of one's own (`hardware.any_torus`) any, also of one or two dimensions.

    Attributes:
      shape: chips along x, y and z; on a pod of two dimensions z is 1, and may be left out.
      twist: `[3][3]`; row d is the shift (in chips) that a step +d past the end of dimension d adds
        when it wraps. A shift that itself carries a coordinate past its end adds that dimension's
        shift too: coordinates are reduced modulo L. Multiples of 4, because the optical wiring
        keeps a chip's place in its block's face; and x, y and z have an order in which every
        dimension shifts only later ones, or the box of chips would not tile Z^3 by L (Hajos's
        theorem), so the graph would not be a torus of N chips.
      wrap: whether each dimension wraps around; by default wherever the wiring can
        (`shapes.wraparound`). A twisted slice wraps in all three, or in all of more than a chip on
        a torus of one's own.
      pod: the machine whose wiring, hosts and limits it has.

    Raises:
      ValueError: the shape, the twist or the wraparound cannot be wired; names the nearest legal.
    """

    shape: Shape
    twist: Twist = NO_TWIST
    wrap: Wrap = AS_WIRED
    pod: Pod = field(default=TPU_V4, repr=False)

    def __post_init__(self) -> None:
        pod, sizes = self.pod, tuple(self.shape)
        if pod.dimensions == 2 and len(sizes) == 3 and sizes[2] == 1:
            sizes = sizes[:2]
        if isinstance(pod, AnyTorus) and 0 < len(sizes) < 3:
            sizes = (*sizes, *(1,) * (3 - len(sizes)))
        if len(sizes) != pod.dimensions:
            raise ValueError(
                f"slice {times(sizes)}: shape of {_SIZES[pod.dimensions]} on {pod.name}"
            )
        name = f"slice {times(sizes)}: {_SIZES[pod.dimensions]}; size of the shape"
        sizes = tuple(whole(name, k, least=1, most=_LARGEST) for k in sizes)
        check_shape(sizes, pod)
        wrap = wraparound(sizes, pod) if self.wrap == AS_WIRED else self.wrap
        if np.shape(wrap) == (2,) == np.shape(sizes):
            wrap = (*wrap, False)
        if np.shape(wrap) != (3,) or not all(w in (0, 1) for w in wrap):
            raise ValueError(f"slice {times(sizes)}: wrap {wrap}: True or False for x, y and z")
        wrap = tuple(bool(w) for w in wrap)
        check_wrap(sizes, wrap, pod)
        name = f"slice {times(sizes)}: shift of the twist"
        twist = tuple(
            tuple(whole(name, s, least=-_LARGEST, most=_LARGEST) for s in row) for row in self.twist
        )
        check_twist(sizes, twist, wrap, pod)
        shape = in_three(sizes, pod)
        for name, value in (("shape", shape), ("twist", twist), ("wrap", wrap)):
            object.__setattr__(self, name, value)
        inside = tuple(tuple(row.tolist()) for row in self.reduce(twist))  # the same L
        object.__setattr__(self, "twist", inside)

    @classmethod
    def parse(cls, text: str, pod: Pod = TPU_V4) -> "Slice":
        """Parses the name of a slice, as `str` writes it.

        `4x4x8` is regular; `4x4x8_twisted` has the twist that ships; `_twist:0,0,4/0,0,4/0,0,0`
        gives the three rows of any other; `_wrap:xy` wraps only those dimensions, `_wrap:` none.
        On a pod of two dimensions `8x16`.
        """
        least = 0 if isinstance(pod, AnyTorus) else 1
        sizes = rf"(\d{{1,6}}(?:x\d{{1,6}}){{{least},2}})"
        names = sizes + r"(_twisted)?(?:_twist:([-\d,/]+))?(?:_wrap:([xyz]*))?"
        match = re.fullmatch(names, text.strip(), re.ASCII)
        if not match:
            raise ValueError(_not_a_slice(text, pod))
        rows = [row.split(",") for row in match[3].split("/")] if match[3] else []
        wrong_rows = rows and ([len(row) for row in rows] != [3] * 3 or match[2])
        if wrong_rows or not all(re.fullmatch(r"-?[0-9]{1,6}", s) for row in rows for s in row):
            raise ValueError(_not_a_slice(text, pod))
        shape = tuple(int(k) for k in match[1].split("x"))
        if isinstance(pod, AnyTorus):
            shape = (*shape, *(1,) * (3 - len(shape)))
        if len(shape) != pod.dimensions and shape[pod.dimensions :] != (1,):
            raise ValueError(
                f"slice {text!r}: not a slice of {pod.name}, which has {pod.dimensions} "
                f"dimensions; write for example {_EXAMPLES[pod.dimensions]}"
            )
        shape = shape[: pod.dimensions]
        twist = tuple(tuple(int(s) for s in row) for row in rows) if rows else NO_TWIST
        if match[2]:
            check_shape(shape, pod)
            shipped = shipped_twist(shape, pod)
            if shipped is None:
                raise ValueError(f"slice {text!r}: {_no_twist(shape, pod)}")
            twist = shipped
        wrap = AS_WIRED if match[4] is None else tuple(d in match[4] for d in DIMENSIONS)
        return cls(shape=shape, twist=twist, wrap=wrap, pod=pod)

    def __str__(self) -> str:
        name = times(self.sizes)
        if self.is_twisted:
            if self.twist == shipped_twist(self.sizes, self.pod):
                name += "_twisted"
            else:
                name += "_twist:" + "/".join(",".join(map(str, row)) for row in self.twist)
        if self.wrap != wraparound(self.sizes, self.pod):
            name += "_wrap:" + "".join(d for d, w in zip(DIMENSIONS, self.wrap, strict=True) if w)
        return name

    @property
    def is_twisted(self) -> bool:
        return self.twist != NO_TWIST

    @property
    def sizes(self) -> Shape:
        """The shape along the dimensions that the pod has."""
        return self.shape[: self.pod.dimensions]

    @property
    def is_whole_blocks(self) -> bool:
        block = self.pod.block
        return block is not None and all(k % block.side == 0 for k in self.shape)

    @property
    def is_torus(self) -> bool:
        """Tells whether all dimensions of more than a chip wrap (twisted or not): all chips are
        alike."""
        return all(wraps or k == 1 for k, wraps in zip(self.shape, self.wrap, strict=True))

    @property
    def num_chips(self) -> int:
        return int(np.prod(self.shape))

    @property
    def num_hosts(self) -> int:
        """Hosts that the slice takes; a part of a host takes one."""
        return -(-self.num_chips // host_of(self.pod).chips)

    @property
    def num_blocks(self) -> int:
        """Blocks that the slice takes; a part of a block takes one.

        Raises:
          ValueError: the pod is not made of blocks.
        """
        return max(1, self.num_chips // block_of(self.pod).chips)

    @property
    def block_shape(self) -> tuple[int, int, int]:
        """Blocks along x, y and z. ValueError as of `num_blocks`."""
        side = block_of(self.pod).side
        return three(max(1, k // side) for k in self.shape)

    @cached_property
    def lattice(self) -> Integers:
        """int [3, 3]: rows k_d e_d - twist_d, a basis of L. Means nothing without wraparound."""
        return _frozen(np.diag(self.shape) - np.array(self.twist))

    @cached_property
    def coordinates(self) -> Integers:
        """int [N, 3]: (x, y, z) of every chip; the index is row-major, z the fastest."""
        return _frozen(np.indices(self.shape).reshape(3, -1).T)

    def index(self, coordinates: npt.ArrayLike) -> Integers:
        """int [..., 3] coordinates inside the shape -> int [...] chip indices.

        Raises:
          ValueError: a coordinate lies outside; `reduce` brings any vector inside.
        """
        coordinates = np.asarray(coordinates)
        if coordinates.size and ((coordinates < 0) | (coordinates >= self.shape)).any():
            raise ValueError(f"chip outside the slice {self}: coordinates reach 0 .. shape - 1")
        return np.asarray(coordinates @ np.array([self.shape[1] * self.shape[2], self.shape[2], 1]))

    def reduce(self, vectors: npt.ArrayLike) -> Integers:
        """int [..., 3] -> [..., 3]: the same chips modulo L, along the dimensions that wrap."""
        vectors = np.array(vectors)
        for d in shift_order(self.twist):
            if self.wrap[d]:
                turns = vectors[..., d] // self.shape[d]
                vectors += turns[..., None] * (np.array(self.twist[d]) - self.shape[d] * _unit(d))
        return vectors

    @cached_property
    def neighbours(self) -> Integers:
        """int [N, 6]: the chip one step away in each of `DIRECTIONS`; -1 where there is none.

        The directed link from chip c in direction j has the id 6 * c + j.
        """
        to = self.reduce(self.coordinates[:, None, :] + DIRECTIONS)
        inside = np.asarray(((to >= 0) & (to < self.shape)).all(axis=-1))
        return _frozen(np.where(inside, self.index(np.where(inside[..., None], to, 0)), -1))

    @property
    def link_rates(self) -> Floats:
        """float [6]: bandwidth of links in each of `DIRECTIONS`, in parts of the chip's
        `link_bandwidth`; 1 but on a torus of one's own."""
        rates = self.pod.link_rates if isinstance(self.pod, AnyTorus) else (1.0,) * 3
        return _frozen(np.repeat(np.array(rates), 2))

    @property
    def num_links(self) -> int:
        """Links, each counted once for its two directions."""
        return int((self.neighbours >= 0).sum()) // 2

    def hop_distances(self, chip: int = 0) -> Integers:
        """int [N]: links on a shortest path from a chip to every chip."""
        chip = whole("chip", chip, most=self.num_chips - 1)
        distances = np.full(self.num_chips, -1)
        distances[chip] = 0
        front, hops = np.array([chip]), 0
        while front.size:
            hops += 1
            front = np.unique(self.neighbours[front])
            front = front[(front >= 0) & (distances[front] < 0)]
            distances[front] = hops
        return distances

    @cached_property
    def _distance_counts(self) -> Integers:
        """int [diameter + 1]: ordered pairs of chips at each distance."""
        if self.is_torus:
            return np.bincount(self.hop_distances()) * self.num_chips
        counts = np.ones(1, int)  # not twisted: distances of the dimensions add up
        for k, wraps in zip(self.shape, self.wrap, strict=True):
            apart = np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
            apart = np.minimum(apart, k - apart) if wraps else apart
            counts = np.convolve(counts, np.bincount(apart.ravel()))
        return counts

    @property
    def diameter(self) -> int:
        """The longest of the shortest paths, in hops."""
        return len(self._distance_counts) - 1

    @property
    def mean_distance(self) -> float:
        """Hops from a chip to another, averaged over all ordered pairs of distinct chips."""
        counts = self._distance_counts
        if self.num_chips == 1:
            return 0.0
        return float(counts @ np.arange(len(counts)) / counts[1:].sum())

    @cached_property
    def bisection_links(self) -> int:
        """Links that the smallest cut into two equal halves crosses, each counted once.

        Times a link's one-way bandwidth, it is the bandwidth from one half to the other: 512 links
        of a pod. On a regular torus and on a mesh it is that of a plane, half of one dimension, and
        no set of half the chips has a smaller cut: all-to-all by dimension order loads the links of
        this cut alike and no link more. On a twisted torus, and on one of one's own, it is the
        smallest found, so an upper bound (`throughput.bisection_is_least` says where it is proved):
        of the halves {v : frac(w . v) < 1/2} of the phases w that L leaves whole (w . L in Z) and
        whose order is even, and of others improved by exchanging chips (see
        `topology.torus.bisection`).
        """
        if self.num_chips == 1:
            return 0
        if isinstance(self.pod, AnyTorus):
            return self._least_cut_of_boxes()
        if not self.is_torus:
            planes = zip(self.shape, self.wrap, strict=True)
            cuts = [(1 + wraps) * self.num_chips // k for k, wraps in planes if k % 2 == 0]
            return min(cuts)
        # A step e_d turns the phase by w_d, so 2 |w_d| of the links along d lead across, if w_d is
        # taken from -1/2 .. 1/2. Phases are kept as whole numbers of 1/N turns.
        N = self.num_chips
        phases = self.phases
        turns = np.minimum(phases, N - phases).sum(axis=1)
        order = N // np.gcd.reduce(np.column_stack([phases, np.full(N, N)]), axis=1)
        planes = 2 * np.where(order % 2 == 0, turns, N)
        least = int(planes.min())
        if not self.is_twisted:
            return least
        phase = self.coordinates @ phases[planes.argmin()] % N
        return min(least, least_cut_found(self.shape, self.neighbours, [2 * phase < N]))

    def _least_cut_of_boxes(self) -> int:
        """Links of the least cut into halves that is found from those that planes begin, one chip
        more on one side where the chips are odd."""
        N, halves = self.num_chips, []
        for order in itertools.permutations(range(3)):
            rank = np.argsort(np.lexsort(self.coordinates.T[list(order)]))
            halves.append(rank < N // 2)
        if N > _IMPROVED:
            return min(cut_links(self.neighbours, half) for half in halves)
        return least_cut_found(self.shape, self.neighbours, halves)

    @cached_property
    def phases(self) -> Integers:
        """int [N, 3]: all w with w . L in Z (the dual group of Z^3 / L), in units of 1/N turn."""
        # The columns of the inverse of L's basis span them. The box of chips, which stands once for
        # every vector modulo the rows of that basis, does so modulo its columns too: they are
        # triangular in the opposite order.
        basis = np.rint(np.linalg.inv(self.lattice) * self.num_chips).astype(int).T
        return _frozen(self.coordinates @ basis % self.num_chips)

    @cached_property
    def point_symmetries(self) -> Integers:
        """int [G, 3, 3]: the signed permutations P of x, y and z that are symmetries of the slice.

        On a torus those with P L = L: with the N translations they make G * N automorphisms, under
        which throughput questions collapse. (A dimension of 4 chips has more automorphisms than
        these, because a ring of four is a square of two dimensions; they are not linear.)
        """
        found = []
        around, rates = self.lattice[list(self.wrap)], self.link_rates[::2]
        for order in itertools.permutations(range(3)):
            kinds = list(zip(self.shape, self.wrap, strict=True))
            alike = [kinds[d] == kinds[e] for d, e in enumerate(order)]
            if not self.is_twisted and not all(alike):
                continue
            if (rates != rates[list(order)]).any():
                continue
            for signs in itertools.product((1, -1), repeat=3):
                P = np.zeros((3, 3), int)
                P[range(3), order] = signs
                if not self.is_twisted or not self.reduce(around @ P.T).any():
                    found.append(P)
        return _frozen(np.array(found))

    def symmetry_action(self, P: npt.ArrayLike) -> Integers:
        """int [N]: the chip to which each chip goes under one of `point_symmetries`.

        On a torus chip 0 stays; along a dimension that does not wrap, a reflection is about the
        middle.
        """
        P = np.asarray(P)
        reflected = (P.sum(axis=1) < 0) & ~np.array(self.wrap)
        moved = self.coordinates @ P.T + np.where(reflected, np.array(self.shape) - 1, 0)
        return self.index(self.reduce(moved))

    def translation(self, vector: npt.ArrayLike) -> Integers:
        """int [N]: the chip to which each chip goes when a vector [3] is added to all.

        Raises:
          ValueError: the vector moves chips along a dimension that does not wrap.
        """
        vector = np.asarray(vector)
        for d in range(3):
            if vector[d] and not self.wrap[d]:
                raise ValueError(
                    f"translation by {vector.tolist()}: {self} does not wrap around in "
                    f"{DIMENSIONS[d]}; give 0 there"
                )
        return self.index(self.reduce(self.coordinates + vector))


def check_same_pod(slice: Slice, pod: Pod) -> None:
    """Raises a ValueError where a slice is of another generation than the pod it is for."""
    if slice.pod.chip != pod.chip:
        raise ValueError(f"slice {slice}: is one of {slice.pod.name}, the pod is {pod.name}")


def _not_a_slice(text: str, pod: Pod) -> str:
    return f"slice {text!r}: not a slice; write for example {_EXAMPLES[pod.dimensions]}"


def _no_twist(shape: Shape, pod: Pod) -> str:
    """Says why no twist of a shape ships, and the nearest shape of which one does."""
    nearest = nearest_twistable(shape, pod)
    if nearest is None:
        return f"no slice of {pod.name} is twisted, its wiring is fixed; take {times(shape)}"
    return (
        "only n x n x 2n and n x 2n x 2n ship twisted, n a multiple of "
        f"{block_of(pod).side}; the nearest is {times(nearest)}_twisted"
    )


def _unit(d: int) -> Integers:
    return np.asarray(np.eye(3, dtype=int)[d])


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array
