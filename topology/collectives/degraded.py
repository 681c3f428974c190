"""Collectives on a slice with failed links: the schedules of the whole slice, with detours.

A round of a schedule puts a load on every link. What it puts on a link that has failed goes around
it instead, by shortest paths over the links left and, where asked for, by paths two hops longer, in
the parts that make the most loaded link of the round carry least (a linear program each). Every
chip then gets what it got before, in the same round and later by the longer path's latency, so the
schedule stays correct. With a failed link, switch or several, an all-gather over all chips comes to
the bound of the chip that has fewest links left, so no schedule is better.

`topology.collectives.collectives.lower_bounds` has, with the same `failed_links`, what no schedule
can go below.

Letters: N chips, F failed links, P paths around them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack
from scipy.sparse.csgraph import shortest_path

from topology.arrays import Floats, Integers
from topology.collectives.collectives import (
    Cost,
    arrivals,
    broadcast_rounds,
    check_kind,
    path_loads,
    permute_pairs,
)
from topology.collectives.groups import Groups, path_links
from topology.collectives.schedules import shares_by_move
from topology.numbers import whole
from topology.routing.loads import links_left
from topology.routing.throughput import all_to_all, is_cut, is_quick
from topology.torus.slices import Slice

_PATHS = 100  # around a failed link that are looked at
_SECONDS = 5.0  # that the search for the best routing of an all-to-all has


@dataclass(frozen=True, eq=False)
class LoadRound:
    """Round of a schedule by what it puts on links.

    Attributes:
      hops: of its longest path.
      loads: float [N, 6], bytes over each directed link, in parts of its rate, for a collective of
        one byte.
    """

    hops: int
    loads: Floats


def load_rounds(
    kind: str, groups: Groups, *, to: npt.ArrayLike | None = None, used: int | None = None
) -> list[LoadRound]:
    """The rounds of the schedule whose cost `collective_cost` is, by the loads of all links.

    Args:
      to: as `collective_cost` has it, of a permute.
      used: the number of the first groups that do communicate, where it is not all.
    """
    check_kind(kind)
    n = groups.size
    if kind in ("all_to_all", "permute"):
        if kind == "permute":
            hops, loads = path_loads(groups, *permute_pairs(groups, to), used=used)
        else:
            sources = np.repeat(groups.representatives, n)
            destinations = np.tile(np.arange(n), len(groups.representatives))
            hops, loads = path_loads(groups, sources, destinations, spread=True, used=used)
            loads = loads / n
        return [LoadRound(hops, loads)] if hops else []
    gather = _gather_rounds(groups, used)
    scatter = [LoadRound(round.hops, _reversed(groups.slice, round.loads)) for round in gather]
    return {
        "all_gather": gather,
        "reduce_scatter": scatter[::-1],
        "all_reduce": scatter[::-1] + gather,
    }[kind]


def degraded_cost(
    kind: str,
    groups: Groups,
    failed_links: Iterable[int],
    *,
    to: npt.ArrayLike | None = None,
    longer: int = 2,
) -> Cost:
    """The cost of a collective in all groups at once, around failed links.

    An all-to-all of the whole slice has the load of the best routing found in some seconds, where
    that is less.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing; the two
        directions of a link fail apart.
      to: as `collective_cost` has it, of a permute.
      longer: hops by which a detour may be longer than the shortest, 0 or 2. Longer ones spread the
        load better and take more latency: 2 is for many bytes, 0 for few.

    Raises:
      ValueError: there is no such link, or chips cannot reach each other without them.
    """
    failed = list(failed_links)
    cost = cost_of(degraded_rounds(kind, groups, failed, to=to, longer=longer))
    every = groups.size == groups.slice.num_chips
    if kind == "all_to_all" and failed and every and is_quick(groups.slice, failed):
        best = all_to_all(groups.slice, failed, time_limit=_SECONDS).max_link_load / groups.size
        cost = Cost(cost.hops, min(cost.load, float(best)))
    return cost


def cost_of(rounds: Iterable[LoadRound]) -> Cost:
    """The cost of rounds one after another."""
    rounds = list(rounds)
    return Cost(sum(r.hops for r in rounds), float(sum(r.loads.max() for r in rounds)))


def degraded_rounds(
    kind: str,
    groups: Groups,
    failed_links: Iterable[int],
    *,
    to: npt.ArrayLike | None = None,
    longer: int = 2,
    used: int | None = None,
) -> list[LoadRound]:
    """The rounds of `degraded_cost`, whose failed links carry nothing; by detours alone.

    Args:
      used: as `load_rounds` has it.
    """
    rounds = load_rounds(kind, groups, to=to, used=used)
    return around(groups.slice, rounds, failed_links, longer=longer)


def around(
    slice: Slice, rounds: list[LoadRound], failed_links: Iterable[int], *, longer: int = 2
) -> list[LoadRound]:
    """The rounds of any schedule with detours around failed links.

    Args:
      failed_links, longer: as `degraded_cost` has them.

    Raises:
      ValueError: as `degraded_cost`.
    """
    last = 6 * slice.num_chips - 1
    failed = np.unique([whole("failed link", link, most=last) for link in failed_links]).astype(int)
    if not failed.size:
        return rounds
    if is_cut(slice, failed):
        raise ValueError(
            f"{slice}: the failed links cut it in two; let fewer fail, or take another slice"
        )
    detours = _Detours(slice, failed, whole("longer", longer))
    return [detours.round(one) for one in rounds]


def _gather_rounds(groups: Groups, used: int | None) -> list[LoadRound]:
    """Rounds of breadth-first broadcast of one shard, of 1 / n byte, from every member to all."""
    slice, n = groups.slice, groups.size
    rounds = broadcast_rounds(groups)
    if not rounds:
        return []
    whole_group = bool(groups.whole.all())  # every member is then the image of member 0
    every = np.arange(n)
    receivers = groups.representatives if whole_group else every
    M = len(groups.moves)
    amounts = np.zeros((len(rounds), n, M))  # that a member receives by each move
    for q, (away, possible) in zip(receivers, arrivals(groups, receivers), strict=True):
        here = every if whole_group else q
        for t, round in enumerate(rounds):
            arriving = possible[away == t + 1]
            limits = [round.load / w for w in groups.sharing]
            amounts[t, here] = shares_by_move(arriving, limits)
    vectors = groups.moves
    found = []
    for t, round in enumerate(rounds):
        loads = np.zeros(6 * slice.num_chips)
        for m, vector in enumerate(vectors):
            q = np.flatnonzero(amounts[t, :, m] > 0)
            if not len(q):
                continue
            sources = groups.members[:used, groups.after[q, m ^ 1]].ravel()
            moved = np.tile(amounts[t, q, m] / n, len(sources) // len(q))
            links, _ = path_links(slice, sources, np.tile(vector, (len(sources), 1)))
            passed = links >= 0
            amount = np.broadcast_to(moved[:, None], links.shape)[passed]
            loads += np.bincount(links[passed], amount, minlength=len(loads))
        found.append(LoadRound(round.hops, loads.reshape(-1, 6) / slice.link_rates))
    return found


def _reversed(slice: Slice, loads: Floats) -> Floats:
    """Loads of the same transfers backwards in time: each link has that of its reverse."""
    back = np.zeros_like(loads)
    tail, direction = np.nonzero(slice.neighbours >= 0)
    back[slice.neighbours[tail, direction], direction ^ 1] = loads[tail, direction]
    return back


class _Detours:
    """Paths around failed links, and the best use of them."""

    def __init__(self, slice: Slice, failed: Integers, longer: int):
        self.slice, self.failed = slice, failed
        N = slice.num_chips
        tail, head, _ = links_left(slice, failed)
        graph = csr_array((np.ones(len(tail), np.int8), (head, tail)), (N, N))
        ends = slice.neighbours.ravel()[failed]
        goals, place = np.unique(ends, return_inverse=True)
        away = shortest_path(graph, unweighted=True, indices=goals)[place]  # [F, N], to the end
        left = slice.neighbours.copy()
        left.ravel()[failed] = -1
        paths, of = [], []
        for f, link in enumerate(failed):
            for path in _paths(left, int(link) // 6, away[f], longer):
                paths.append(path)
                of.append(f)
        self.of = np.array(of)
        self.hops = np.array([len(path) for path in paths])
        links = np.concatenate(paths)
        rows = np.repeat(np.arange(len(paths)), self.hops)
        self.used, column = np.unique(links, return_inverse=True)
        rates = np.tile(slice.link_rates, N)
        # What a unit of the failed link's load puts on the links of a path around it.
        parts = rates[failed[self.of[rows]]] / rates[links]
        self.passes = csr_array((parts, (column, rows)), (len(self.used), len(paths)))
        self.known: dict[bytes, Floats] = {}

    def round(self, round: LoadRound) -> LoadRound:
        """The round with what is on failed links put on the paths around them."""
        loads = round.loads.ravel().copy()
        wanted = loads[self.failed]
        loads[self.failed] = 0.0
        if not wanted.any():
            return LoadRound(round.hops, loads.reshape(-1, 6))
        scale = round.loads.max()
        key = np.round(np.concatenate([[loads.max()], loads[self.used], wanted]) / scale, 9)
        if key.tobytes() not in self.known:
            self.known[key.tobytes()] = self._split(key)
        amounts = self.known[key.tobytes()] * scale
        np.add.at(loads, self.used, self.passes @ amounts)
        longest = int(self.hops[amounts > 1e-9 * scale].max())
        return LoadRound(round.hops + longest - 1, loads.reshape(-1, 6))

    def _split(self, key: Floats) -> Floats:
        """float [P], what goes by each path, such that the most loaded link carries least."""
        U, P, F = len(self.used), len(self.of), len(self.failed)
        most, base, wanted = key[0], key[1 : 1 + U], key[1 + U :]
        own = csr_array((np.ones(P), (self.of, np.arange(P))), (F, P))
        # Of equally good ones the shorter paths: a hop costs next to nothing, but something.
        cost = np.append(1e-6 * self.hops / self.hops.sum(), 1.0)
        solved = linprog(
            cost,
            A_ub=hstack([self.passes, csr_array(-np.ones((U, 1)))]).tocsr(),
            b_ub=-base,
            A_eq=hstack([own, csr_array((F, 1))]).tocsr(),
            b_eq=wanted,
            bounds=[(0, None)] * P + [(most, None)],
            method="highs",
        )
        if solved.status != 0:
            raise RuntimeError(f"HiGHS gave up on the detours: {solved.message}")
        amounts = np.maximum(solved.x[:-1], 0)
        sums = np.bincount(self.of, amounts, minlength=F)
        parts: Floats = np.divide(wanted, sums, out=np.zeros(F), where=sums > 0)
        return np.asarray(amounts * parts[self.of])


def _paths(left: Integers, start: int, away: Floats, longer: int) -> Iterator[list[int]]:
    """Yields paths (link ids) from a chip to where `away` is 0: the shortest, then longer ones.

    At most `_PATHS`, no chip twice.
    """
    count, least = 0, int(away[start])
    for length in range(least, least + longer + 1, 2):
        stack: list[tuple[int, list[int], frozenset[int]]] = [(start, [], frozenset([start]))]
        while stack:
            chip, path, seen = stack.pop()
            if away[chip] == 0:
                if len(path) == length:
                    yield path
                    count += 1
                    if count == _PATHS:
                        return
                continue
            for direction, there in enumerate(left[chip].tolist()):
                if there >= 0 and there not in seen and len(path) + 1 + away[there] <= length:
                    stack.append((there, [*path, 6 * chip + direction], seen | {there}))
