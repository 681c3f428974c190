"""Collectives as schedules: rounds of transfers, each with its path over links and what it carries.

`topology.collectives.replay` plays a schedule link by link; `topology.collectives.collectives`
knows what those by breadth-first broadcast and shortest paths cost without making them.

Letters: N chips, n members of a group, items of K equal pieces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm, prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from topology.arrays import Floats, Integers
from topology.collectives.collectives import arrivals, broadcast_rounds, check_kind, permute_pairs
from topology.collectives.groups import Groups, path_links, vectors_between, ways_between
from topology.torus.slices import Slice


@dataclass(frozen=True, eq=False)
class Round:
    """Transfers that go at the same time, each from what its source had before the round.

    Attributes:
      source, destination: int [P], chips.
      item: int [P], what is carried (see `Schedule`).
      first, last: int [P], pieces first .. last - 1 of the item.
      directions: int [P, H], the links of the path, as columns of `Slice.neighbours`; then -1.
      adds: whether what arrives is added to what is there, or takes its place.
    """

    source: Integers
    destination: Integers
    item: Integers
    first: Integers
    last: Integers
    directions: Integers
    adds: bool = False

    def reversed(self) -> "Round":
        """The round backwards in time: what was copied from a chip is now added to it."""
        hops = (self.directions >= 0).sum(axis=1)
        H = self.directions.shape[1]
        back = np.arange(H) if not H else hops[:, None] - 1 - np.arange(H)
        there = np.take_along_axis(self.directions, np.maximum(back, 0), axis=1) ^ 1
        return Round(
            self.destination,
            self.source,
            self.item,
            self.first,
            self.last,
            np.where(back >= 0, there, -1),
            adds=not self.adds,
        )


@dataclass(frozen=True, eq=False)
class Schedule:
    """Schedule of a collective in all its groups at once.

    An item is a member's shard (all-gather, all-reduce: item i is gathered from, or reduced at,
    member i), what a member sends in a permute, or, in an all-to-all, n * origin + destination.

    Attributes:
      pieces: K, into which every item is cut.
      strategy: the row of `collectives.EFFICIENCIES`.
    """

    kind: str
    groups: Groups
    pieces: int
    rounds: tuple[Round, ...]
    strategy: str


def schedule(
    kind: str, groups: Groups, *, to: npt.ArrayLike | None = None, pieces: int = 60
) -> Schedule:
    """Makes a schedule of a collective that reaches `collectives.collective_cost`.

    For groups of up to a few hundred chips: an all-gather of n members is n^2 transfers and more.

    Args:
      to: as there, of a permute.
      pieces: of all-to-all and permute, so many to split between paths; the others find theirs.
    """
    check_kind(kind)
    if kind in ("all_to_all", "permute"):
        return _along_shortest_paths(kind, groups, to, pieces)
    K, gather = _breadth_first(groups)
    return _of_gather(kind, groups, K, gather, "breadth_first")


def dimension_rings(kind: str, groups: Groups, sizes: Sequence[int]) -> Schedule:
    """An all-gather, reduce-scatter or all-reduce by bidirectional rings, a dimension at a time.

    The data is split into as many parts as there are dimensions; the parts take the dimensions in
    rotated orders, so that all links are busy where the sizes are equal.

    Args:
      sizes: of the dimensions; members are row-major over them. One size makes one ring of all
        members in their order. A dimension closes to a ring if the hops from its last member to
        its first are no more than those between neighbours, else it is a line.

    Raises:
      ValueError: the sizes do not fit the group, or the kind is another.
    """
    if kind not in ("all_gather", "reduce_scatter", "all_reduce"):
        raise ValueError(f"rings of {kind!r}: all_gather, reduce_scatter or all_reduce")
    sizes = [m for m in sizes if m > 1]
    if prod(sizes) != groups.size:
        raise ValueError(
            f"rings of sizes {sizes}: their product is not the group's {groups.size} members"
        )
    place = np.indices(sizes).reshape(len(sizes), -1).T
    weight = np.array([prod(sizes[j + 1 :]) for j in range(len(sizes))], int)
    rings = list[bool]()
    chips = groups.members[0].reshape(sizes)
    for j in range(len(sizes)):
        line = np.moveaxis(chips, j, -1)
        hops = _hops(groups.slice, line, np.roll(line, -1, axis=-1))
        rings.append(bool(hops[..., -1].max() <= hops[..., :-1].max()))
    K = 2 * len(sizes)
    rounds: dict[tuple[int, int], list[Integers]] = {}
    for part in range(len(sizes)):
        gathered: list[int] = []
        for phase in range(len(sizes)):
            j = (part + phase) % len(sizes)
            transfers = _ring_phase(place, weight, sizes, gathered, j, rings[j], 2 * part)
            for r, transfer in transfers:
                rounds.setdefault((phase, r), []).append(transfer)
            gathered.append(j)
    gather = [_Transfers(*np.concatenate(rounds[key], axis=1)) for key in sorted(rounds)]
    return _of_gather(kind, groups, K, gather, "dimension_rings")


def hamiltonian_ring(slice: Slice) -> Integers:
    """int [N]: chips in an order in which each is one hop from the next, and the last from the
    first; through the box of the slice, so with or without wraparound.

    `dimension_rings` over it is one ring that uses two of every chip's links.
    """
    order = sorted(range(3), key=lambda d: slice.shape[d] % 2)  # a dimension of even size first
    a, b, c = (slice.shape[d] for d in order)
    path = [(y, z if y % 2 == 0 else c - 1 - z) for y in range(b) for z in range(c)]
    ring = [(x, *p) for x in range(a) for p in path[1:][:: 1 if x % 2 == 0 else -1]]
    ring += [(x, *path[0]) for x in reversed(range(a))]
    coordinates = np.empty((len(ring), 3), int)
    coordinates[:, order] = ring
    return slice.index(coordinates)


class _Transfers(NamedTuple):
    """Round in group 0: int [P] each, the places of source and destination, the item, its first
    and last piece; and int [P, 3] the hops of the path, or None for a shortest one."""

    source: Integers
    destination: Integers
    item: Integers
    first: Integers
    last: Integers
    vectors: Integers | None = None


def _of_gather(
    kind: str, groups: Groups, K: int, gather: list[_Transfers], strategy: str
) -> Schedule:
    """Schedule of a collective, from an all-gather's rounds that copy."""
    rounds = [_round_of(groups, transfers) for transfers in gather]
    backwards = [r.reversed() for r in rounds[::-1]]
    chosen = {
        "all_gather": rounds,
        "reduce_scatter": backwards,
        "all_reduce": backwards + rounds,
    }[kind]
    return Schedule(kind, groups, K, tuple(chosen), strategy)


def _round_of(groups: Groups, transfers: _Transfers) -> Round:
    """The round in all groups, from that in group 0."""
    chips, vectors = groups.members, transfers.vectors
    here, there = chips[:, transfers.source], chips[:, transfers.destination]
    if vectors is None:
        vectors = vectors_between(groups.slice, here[0], there[0])
    _, directions = path_links(groups.slice, here[0], vectors)
    G = len(chips)
    return Round(
        here.ravel(),
        there.ravel(),
        np.tile(transfers.item, G),
        np.tile(transfers.first, G),
        np.tile(transfers.last, G),
        np.tile(directions, (G, 1)),
    )


def _breadth_first(groups: Groups) -> tuple[int, list[_Transfers]]:
    """(pieces, the rounds of breadth-first broadcast)."""
    loads = [r.load for r in broadcast_rounds(groups)]
    fair = [[load / w for w in groups.sharing] for load in loads]
    K = lcm(*(part.denominator for row in fair for part in row))
    rounds: list[list[tuple[int, ...]]] = [[] for _ in loads]
    for q, (away, possible) in enumerate(arrivals(groups, range(groups.size))):
        back = groups.after[q][np.arange(len(groups.moves)) ^ 1]
        for t, row in enumerate(fair):
            limits = [int(part * K) for part in row]
            arriving = np.flatnonzero(away == t + 1)
            for p, move, first, last in _share_out(arriving, possible[arriving], limits, K):
                rounds[t].append((back[move], q, p, first, last, move))
    gather = []
    for transfers in rounds:
        source, destination, item, first, last, move = np.array(transfers).T
        gather.append(_Transfers(source, destination, item, first, last, groups.moves[move]))
    return K, gather


def _share_out(
    items: Integers, possible: Integers, limits: list[int], K: int
) -> Iterator[tuple[int, int, int, int]]:
    """Assigns the pieces of items to moves by a maximum flow, within the limit of each move.

    Yields (item, move, first piece, last piece).
    """
    of, flow = _flow(possible, limits, K)
    for s, row in enumerate(flow):
        mine = items[of == s]
        at = 0
        for move, amount in enumerate(row):
            end = at + amount
            for i in range(at // K, -(-end // K) if end > at else 0):
                yield mine[i], move, max(at - i * K, 0), min(end - i * K, K)
            at = end


def shares_by_move(possible: Integers, limits: Sequence[Fraction]) -> Floats:
    """float [M], the shards that come by each move, within its limit.

    Args:
      possible: int [P], of each shard the set of moves by which it can come; bit m is move m.
      limits: of each move, in shards.
    """
    K = lcm(*(limit.denominator for limit in limits))
    _, flow = _flow(possible, [int(limit * K) for limit in limits], K)
    return np.asarray(flow.sum(axis=0) / K)


def _flow(possible: Integers, limits: list[int], K: int) -> tuple[Integers, Integers]:
    """(int [P], the set of each item by its number s; int [S, M], its pieces by each move)."""
    sets, of = np.unique(possible, return_inverse=True)
    S, M = len(sets), len(limits)
    capacity = np.zeros((S + M + 2,) * 2, np.int32)
    capacity[-2, :S] = np.bincount(of, minlength=S) * K
    capacity[:S, S : S + M] = (sets[:, None] >> np.arange(M) & 1) * (len(possible) * K)
    capacity[S : S + M, -1] = limits
    flow = maximum_flow(csr_array(capacity), S + M, S + M + 1).flow.toarray()
    return of, flow[:S, S : S + M]


def _ring_phase(
    place: Integers,
    weight: Integers,
    sizes: list[int],
    gathered: list[int],
    j: int,
    closed: bool,
    piece: int,
) -> Iterator[tuple[int, Integers]]:
    """Yields (round, transfers int [5, P] as `_Transfers`) of one part's gather along dimension j.

    Every chip passes on what it has of the dimensions gathered before: one shard per place there.
    """
    m = sizes[j]
    had = [sizes[g] for g in gathered]
    free = np.indices(had).reshape(len(had), prod(had)).T
    q, i = np.indices((len(place), len(free))).reshape(2, -1)
    origin = place[q].copy()
    origin[:, gathered] = free[i]
    for r in range(1, (m // 2 if closed else m - 1) + 1):
        for sign in (1, -1):
            if closed and r == m - r:  # between antipodes a piece goes each way round
                first, last = (piece, piece + 1) if sign > 0 else (piece + 1, piece + 2)
            else:
                first, last = piece, piece + 2
            at, before = place[q, j] - sign * r, place[q, j] - sign
            inside = np.full(len(q), True) if closed else (at >= 0) & (at < m)
            here, from_ = place[q].copy(), origin.copy()
            here[:, j], from_[:, j] = before % m, at % m
            columns = (
                here @ weight,
                q,
                from_ @ weight,
                np.full_like(q, first),
                np.full_like(q, last),
            )
            yield r, np.array(columns)[:, inside]


def _along_shortest_paths(kind: str, groups: Groups, to: npt.ArrayLike | None, K: int) -> Schedule:
    n = groups.size
    if kind == "permute":
        source, destination = permute_pairs(groups, to)
        item = source
    else:
        source, destination = np.indices((n, n)).reshape(2, -1)
        source, destination = source[source != destination], destination[source != destination]
        item = n * source + destination
    chips = groups.members[0]
    pair, vectors, part = ways_between(
        groups.slice, chips[source], chips[destination], np.ones(len(source))
    )
    if not len(pair):
        return Schedule(kind, groups, K, (), "shortest_paths")
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    total = np.cumsum(part)
    reached = total - np.repeat((total - part)[starts], np.diff([*starts, len(pair)]))
    last = np.rint(reached * K).astype(int)
    first = np.concatenate([[0], last[:-1]])
    first[starts] = 0
    some = last > first
    pair = pair[some]
    transfers = _Transfers(
        source[pair], destination[pair], item[pair], first[some], last[some], vectors[some]
    )
    return Schedule(kind, groups, K, (_round_of(groups, transfers),), "shortest_paths")


def _hops(slice: Slice, sources: Integers, destinations: Integers) -> Integers:
    return np.asarray(np.abs(vectors_between(slice, sources, destinations)).sum(axis=-1))
