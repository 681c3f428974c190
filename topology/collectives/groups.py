"""Groups of chips that make a collective together, and the steps by which their data moves.

The groups of a mesh axis on a torus are translations of each other, so one stands for all: what it
puts on a link, its translations put on the link's translations.

Letters: N chips of the slice, G groups of n members, M moves (every step and its reverse).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from topology.arrays import Booleans, Floats, Integers
from topology.collectives.prices import best_mix
from topology.numbers import whole
from topology.routing.routing import short_vectors
from topology.torus.slices import Slice


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of a slice's chips into groups that all do the same collective at once.

    Attributes:
      slice: its links carry the data.
      members: int [G, n], chips; every chip once.

    Raises:
      ValueError: a chip is missing or stands twice, or the groups are not translations of each
        other, member by member.
    """

    slice: Slice
    members: Integers

    def __post_init__(self) -> None:
        chips = np.arange(self.slice.num_chips)
        try:
            members = np.array(self.members)
        except ValueError:  # rows of different lengths
            members = np.zeros(0)
        is_of_numbers = members.ndim == 2 and members.dtype.kind in "iuf"
        if not is_of_numbers or not np.array_equal(np.sort(members.ravel()), chips):
            raise ValueError(
                f"groups of {self.slice}: members: every chip 0 .. {self.slice.num_chips - 1} "
                "belongs to one group; give int [groups, members]"
            )
        members = members.astype(int)
        object.__setattr__(self, "members", members)
        coordinates = self.slice.coordinates[members]
        relative = self.slice.reduce(coordinates - coordinates[:, :1])
        wrong = (relative != relative[0]).any(axis=(1, 2))
        if wrong.any():
            raise ValueError(
                f"groups of {self.slice}: group {np.flatnonzero(wrong)[0]} is no translation of "
                "group 0; lay mesh axes along vectors of the slice"
            )

    @property
    def size(self) -> int:
        return len(self.members[0])

    @cached_property
    def place(self) -> Integers:
        """int [N]: a chip's place in group 0, -1 for chips of other groups."""
        place = np.full(self.slice.num_chips, -1)
        place[self.members[0]] = np.arange(self.size)
        return place

    @cached_property
    def steps(self) -> Integers:
        """int [S, 3]: hops along x, y and z of the steps from member to member.

        All single hops that stay within the group; where these do not connect it, the shortest
        vectors between members that do.
        """
        units = np.eye(3, dtype=int)
        steps = [e for e in units if (self._after(e) >= 0).any()]
        labels = self._labels(steps)
        if labels.any():
            chips = self.members[0]
            vectors = vectors_between(self.slice, np.full(self.size, chips[0]), chips)
            for p in np.lexsort((*-vectors.T, np.abs(vectors).sum(axis=1))):
                if labels[p] != labels[0]:
                    steps.append(vectors[p])
                    labels = self._labels(steps)
        return np.array(steps, int).reshape(-1, 3)

    @cached_property
    def moves(self) -> Integers:
        """int [M, 3]: every step and, next to it, its reverse."""
        return np.stack([self.steps, -self.steps], axis=1).reshape(-1, 3)

    @cached_property
    def after(self) -> Integers:
        """int [n, M]: the place in group 0 to which each move leads from each; -1 for none."""
        if not len(self.moves):
            return np.zeros((self.size, 0), int)
        return np.stack([self._after(move) for move in self.moves], axis=1)

    @cached_property
    def sharing(self) -> tuple[Fraction, ...]:
        """Load on the links of each move, in bytes over a link's rate, when every chip of the slice
        sends a byte by it.

        A step of h hops along a direction passes h links, so each link carries h such steps. Where
        several moves use a direction, each gets an equal part of it.
        """
        hops = np.maximum(np.stack([self.moves, -self.moves], axis=2), 0).reshape(-1, 6)
        loads = hops * (hops > 0).sum(axis=0)
        rates = [Fraction(float(r)).limit_denominator(10**4) for r in self.slice.link_rates]
        return tuple(
            max(
                (int(load) / rate for load, rate in zip(row, rates, strict=True)),
                default=Fraction(0),
            )
            for row in loads
        )

    @cached_property
    def whole(self) -> Booleans:
        """bool [S]: steps that lead from every member to one; they are symmetries of the group."""
        return np.asarray((self.after[:, ::2] >= 0).all(axis=0))

    @cached_property
    def representatives(self) -> Integers:
        """int [R]: places of group 0, one of each kind up to its symmetries; 1 in a ring."""
        n = self.size
        ends = self.after[:, ::2][:, self.whole]
        here = np.repeat(np.arange(n), ends.shape[1])
        graph = coo_array((np.ones(len(here), np.int8), (here, ends.ravel())), (n, n))
        return np.unique(connected_components(graph, directed=False)[1], return_index=True)[1]

    def _after(self, vector: Integers) -> Integers:
        to = self.slice.reduce(self.slice.coordinates[self.members[0]] + vector)
        inside = np.asarray(((to >= 0) & (to < self.slice.shape)).all(axis=-1))
        chips = self.slice.index(np.where(inside[:, None], to, 0))
        return np.where(inside, self.place[chips], -1)

    def _labels(self, steps: list[Integers]) -> Integers:
        n = self.size
        ends = np.array([self._after(step) for step in steps]).reshape(-1)
        here = np.tile(np.arange(n), len(steps))[ends >= 0]
        graph = coo_array((np.ones(len(here), np.int8), (here, ends[ends >= 0])), (n, n))
        labels: Integers = connected_components(graph, directed=False)[1]
        return labels


def groups_of_axes(slice: Slice, devices: npt.ArrayLike, axes: Sequence[int]) -> Groups:
    """The groups of a collective over some axes of a mesh.

    Args:
      devices: int, chip indices in the mesh's shape.
      axes: positions of the axes that it goes over; members are in their row-major order.

    Raises:
      ValueError: there is no such axis, one stands twice, or as `Groups`.
    """
    devices = np.asarray(devices)
    axes = [whole("axes", a, most=devices.ndim - 1) for a in axes]
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes {axes}: each once")
    n = int(np.prod([devices.shape[a] for a in axes]))
    last = np.moveaxis(devices, axes, range(devices.ndim - len(axes), devices.ndim))
    return Groups(slice, last.reshape(-1, n))


def vectors_between(slice: Slice, sources: Integers, destinations: Integers) -> Integers:
    """int [..., 3]: the hops of a shortest path; of several the same one for one displacement."""
    ahead = slice.coordinates[destinations] - slice.coordinates[sources]
    if slice.is_twisted:
        return np.asarray(_shortest(slice)[slice.index(slice.reduce(ahead))])
    k = np.array(slice.shape)
    around = (ahead + (k - 1) // 2) % k - (k - 1) // 2
    return np.where(np.array(slice.wrap), around, ahead)


def ways_between(
    slice: Slice, sources: Integers, destinations: Integers, weights: Floats
) -> tuple[Integers, Integers, Floats]:
    """The shortest paths from sources [P] to destinations [P], and the share of data on each.

    Without a twist the two paths between antipodes share the data evenly, which loads links
    least; on a twisted torus, parts are those with the least largest mean load for the weights.

    Returns:
      pair int [W] ascending, vector int [W, 3], part float [W]; the parts of a pair add up to 1.
    """
    if slice.is_twisted:
        return _twisted_ways(slice, sources, destinations, weights)
    vectors = vectors_between(slice, sources, destinations)
    pair, part = np.arange(len(vectors)), np.ones(len(vectors))
    for d, (k, wraps) in enumerate(zip(slice.shape, slice.wrap, strict=True)):
        tie = (2 * vectors[:, d] == k) & wraps
        part = np.where(tie, part / 2, part)
        other = vectors[tie].copy()
        other[:, d] -= k
        vectors = np.concatenate([vectors, other])
        pair, part = np.concatenate([pair, pair[tie]]), np.concatenate([part, part[tie]])
    order = np.argsort(pair, kind="stable")
    return pair[order], vectors[order], part[order]


def path_links(
    slice: Slice, chips: npt.ArrayLike, vectors: npt.ArrayLike
) -> tuple[Integers, Integers]:
    """The links of paths that make their hops along x, then y, then z.

    Returns:
      links int [P, H], directions int [P, H]; a path's hops come first, then -1.
    """
    chips, vectors = np.array(chips), np.asarray(vectors)
    longest = int(np.abs(vectors).sum(axis=1).max(initial=0))
    links = np.full((len(chips), longest), -1)
    made = np.zeros(len(chips), int)
    for d in range(3):
        direction = 2 * d + (vectors[:, d] < 0)
        for h in range(int(np.abs(vectors[:, d]).max(initial=0))):
            go = np.flatnonzero(np.abs(vectors[:, d]) > h)
            links[go, made[go]] = 6 * chips[go] + direction[go]
            chips[go] = slice.neighbours[chips[go], direction[go]]
            made[go] += 1
    return links, np.where(links < 0, -1, links % 6)


@functools.lru_cache(maxsize=8)
def _short_vectors(slice: Slice) -> tuple[Integers, Integers]:
    return short_vectors(slice)


@functools.lru_cache(maxsize=8)
def _shortest(slice: Slice) -> Integers:
    chips, vectors = _short_vectors(slice)
    order = np.lexsort((*-vectors.T, np.abs(vectors).sum(axis=1), chips))
    return np.asarray(vectors[order][np.unique(chips[order], return_index=True)[1]])


def _twisted_ways(
    slice: Slice, sources: Integers, destinations: Integers, weights: Floats
) -> tuple[Integers, Integers, Floats]:
    ahead = slice.coordinates[destinations] - slice.coordinates[sources]
    displacement = slice.index(slice.reduce(ahead))
    demand = np.bincount(displacement, weights, minlength=slice.num_chips)
    chips, vectors = _short_vectors(slice)
    wanted = demand[chips] > 0
    chips, vectors = chips[wanted], vectors[wanted]
    hops = np.abs(vectors) / slice.link_rates[::2]
    starts = np.flatnonzero(np.diff(chips, prepend=-1))
    row = np.cumsum(np.diff(chips, prepend=-1) > 0) - 1

    def cheapest(prices: Floats) -> tuple[float, Floats, list[Floats]]:
        costs = hops @ prices
        least = np.minimum.reduceat(costs, starts)
        ties = costs <= least[row] * (1 + 1e-12)
        parts = ties / np.add.reduceat(ties, starts)[row]
        cost = float(demand[chips[starts]] @ least)
        return cost, ((demand[chips] * parts) @ hops)[None], [parts]

    part: Floats = np.ones(0)
    if len(chips):
        mix = best_mix(cheapest, np.ones(3), tolerance=1e-4, smoothing=0.0)
        part = sum(share * way for share, way in zip(mix.shares, mix.ways, strict=True))
    used = part > 1e-9
    chips, vectors, part = chips[used], vectors[used], part[used]
    first = np.searchsorted(chips, displacement)
    count = np.searchsorted(chips, displacement, side="right") - first
    pair = np.repeat(np.arange(len(displacement)), count)
    way = np.arange(len(pair)) - np.repeat(np.cumsum(count) - count, count) + first[pair]
    part = part[way] / np.bincount(pair, part[way], minlength=len(displacement))[pair]
    return pair, vectors[way], part
