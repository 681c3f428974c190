"""Shards put on chips: the longest first, each where the step grows least, then bettered.

Two kinds of steps better a placement. Shards move to other chips or change places with others,
which evens chips out (as measured by a high power of their times, so that of equally busy chips
each counts); and a few tables, one of a busiest chip among them, are laid anew.

Letters: N chips, P parts of a step.
"""

import time
from collections.abc import Sequence

import numpy as np

from topology.arrays import Booleans, Floats, Integers
from topology.embeddings.choosing import Problem, latencies
from topology.embeddings.shardings import PARTS, Sharding, everywhere_seconds

_POWERS = (6, 24)
_TRIED_CHIPS = 12  # of the busiest, before a descent ends
_RELAID = 4  # tables at once
_LOST = 400  # vain trials in a row, before shards move again
_PARTNERS = 800  # shards that one may change places with, drawn from all


class Placement:
    """A way for each table and the sites of its shards, with what they load every chip with.

    Attributes:
      chosen: of each table, the index of its way in `Problem.ways`.
      sites: int of each table, indices of `Problem.sites`; none where all chips do alike.
      loads: float [N, P], seconds of each chip by its shards.
      held: float [N], bytes of its shards.
      everywhere: bytes that every chip holds besides.
    """

    def __init__(self, problem: Problem, chosen: Sequence[int]):
        self.problem, self.chosen = problem, list(chosen)
        self.sites: list[Integers] = [np.zeros(0, int) for _ in chosen]
        N = problem.machine.chips
        self.loads: Floats = np.zeros((N, len(PARTS)))
        self.held: Floats = np.zeros(N)
        self.everywhere: float = 0.0
        self._alike: float = 0.0
        self._exchanging, self._reducing = 0, 0
        for way in self.ways:
            self._count(way, 1)

    @property
    def ways(self) -> list[Sharding]:
        return [of[k] for of, k in zip(self.problem.ways, self.chosen, strict=True)]

    def way(self, table: int) -> Sharding:
        return self.problem.ways[table][self.chosen[table]]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        machine = self.problem.machine
        latency = sum(latencies(self._exchanging > 0, self._reducing > 0, machine))
        return float(self.loads.max(axis=0).sum() + self._alike + latency)

    @property
    def room(self) -> float:
        """Bytes of a chip beside what all chips hold."""
        return float((self.problem.memory - self.everywhere) * (1 + 1e-12))

    @property
    def fits(self) -> bool:
        return bool(self.held.max() <= self.room)

    def add(self, table: int, sites: Integers) -> None:
        """Puts shards of a table on sites."""
        self._load(table, sites, 1)
        self.sites[table] = np.concatenate([self.sites[table], sites])

    def remove(self, table: int, sites: Integers) -> None:
        """Takes the shards of a table off sites."""
        self._load(table, sites, -1)
        self.sites[table] = np.setdiff1d(self.sites[table], sites)

    def change(self, table: int, way: int, sites: Integers) -> None:
        """Lays a table another way, on other sites."""
        self.remove(table, self.sites[table])
        self._count(self.way(table), -1)
        self.chosen[table] = way
        self._count(self.way(table), 1)
        self.add(table, sites)

    def _count(self, way: Sharding, sign: int) -> None:
        """Counts what all chips do alike for a table."""
        self.everywhere += sign * way.every_memory
        self._alike += sign * everywhere_seconds(way, self.problem.machine)
        self._exchanging += sign * way.exchanges
        self._reducing += sign * (way.reduced > 0)

    def _load(self, table: int, sites: Integers, sign: int) -> None:
        way = self.way(table)
        chips = self.problem.sites(way)[sites].ravel()
        self.loads[chips] += sign * way.shard
        self.held[chips] += sign * way.shard_memory


def place(problem: Problem, chosen: Sequence[int]) -> Placement | None:
    """Puts the shards of the chosen ways on chips; None where they find no room."""
    placement = Placement(problem, chosen)
    room, ways = max(placement.room, 1e-9), placement.ways
    if placement.room < 0:
        return None
    total = sum(float(way.shard.sum()) * way.shards for way in ways)
    mean = (total or 1.0) / problem.machine.chips

    def size(t: int) -> float:
        return max(float(ways[t].shard.sum()) / mean, ways[t].shard_memory / room)

    placed = [t for t, way in enumerate(ways) if not way.is_everywhere]
    for t in sorted(placed, key=lambda t: (-ways[t].on_hosts, -size(t))):
        sites = best_sites(placement, ways[t])
        if sites is None:
            return None
        placement.add(t, sites)
    return placement


def best_sites(placement: Placement, way: Sharding) -> Integers | None:
    """Sites for the shards of a table where the step grows least; None where there is no room.

    Of equal ones, those that have least to do.
    """
    if way.is_everywhere:
        return np.zeros(0, int)
    chips = placement.problem.sites(way)  # [S, n]
    after = placement.loads[chips].max(axis=1) + way.shard  # [S, P]
    grown = np.maximum(after, placement.loads.max(axis=0)).sum(axis=1)
    held = placement.held[chips].max(axis=1)
    full = held + way.shard_memory > placement.room
    best = np.lexsort((held, after.sum(axis=1), grown, full))[: way.shards]
    return None if full[best].any() else best


def improve(placement: Placement, *, seconds: float, goal: float = 0.0) -> None:
    """Betters a placement for some seconds, or until a step takes no longer than the goal."""
    end = time.monotonic() + seconds
    rng = np.random.default_rng(0)

    def goes_on() -> bool:
        return time.monotonic() < end and placement.seconds > goal

    while goes_on():
        before = placement.seconds
        for power in _POWERS:
            _descend(placement, power, end, rng)
        lost = 0
        while goes_on() and lost < _LOST:
            lost = 0 if _relay_some(placement, rng) else lost + 1
        if placement.seconds > before * (1 - 1e-5):
            return


class _Shards:
    """The shards of a placement that take a chip each, as arrays."""

    def __init__(self, placement: Placement):
        tables = [
            t
            for t in range(len(placement.chosen))
            if not placement.way(t).is_everywhere and not placement.way(t).on_hosts
        ]
        counts = [len(placement.sites[t]) for t in tables]
        self.table: Integers = np.repeat(tables, counts).astype(int)
        empty = np.zeros(0, int)
        self.chip: Integers = np.concatenate([empty, *(placement.sites[t] for t in tables)])
        ways = [placement.way(t) for t in self.table.tolist()]
        self.loads: Floats = np.array([way.shard for way in ways]).reshape(-1, len(PARTS))
        self.memory: Floats = np.array([way.shard_memory for way in ways])
        self.has: Booleans = np.zeros((len(placement.held), len(placement.chosen)), bool)
        self.has[self.chip, self.table] = True

    def move(self, placement: Placement, shard: int, chip: int) -> None:
        table, here = self.table[shard], self.chip[shard]
        placement.remove(table, np.array([here]))
        placement.add(table, np.array([chip]))
        self.has[here, table], self.has[chip, table] = False, True
        self.chip[shard] = chip


def _descend(placement: Placement, power: int, end: float, rng: np.random.Generator) -> None:
    """Moves and exchanges shards of the busiest chips while that lowers the power's sum."""
    shards = _Shards(placement)
    if not len(shards.table):
        return
    while time.monotonic() < end:
        scale = np.maximum(placement.loads.max(axis=0), 1e-30)
        powers = (placement.loads / scale) ** power
        # The sum over parts of the norms of all chips' times, and how it grows with each power.
        sums = powers.sum(axis=0)
        weights = scale * sums ** (1 / power - 1) / power
        busiest = np.argsort(-(powers @ weights))[:_TRIED_CHIPS]
        if not any(
            _better_chip(placement, shards, int(chip), scale, powers, weights, power, rng)
            for chip in busiest
        ):
            return


def _better_chip(
    placement: Placement,
    shards: _Shards,
    chip: int,
    scale: Floats,
    powers: Floats,
    weights: Floats,
    power: int,
    rng: np.random.Generator,
) -> bool:
    """Makes the move or exchange of a chip's shards that lowers the weighted powers most."""
    own = np.flatnonzero(shards.chip == chip)
    others = np.flatnonzero(shards.chip != chip)
    if not len(own):
        return False
    if len(others) > _PARTNERS:
        others = rng.choice(others, _PARTNERS, replace=False)
    targets = np.argsort(powers @ weights)[: max(_PARTNERS // 4, 1)]
    loads = placement.loads / scale
    sizes = shards.loads / scale
    here, room = placement.held[chip], placement.room

    def gain(after_here: Floats, after_there: Floats, there: Integers) -> Floats:
        change = after_here**power + after_there**power - powers[chip] - powers[there]
        return np.asarray(change @ weights)

    # Moves [own, targets].
    moved = sizes[own][:, None]
    gains = gain(np.maximum(loads[chip] - moved, 0), loads[targets] + moved, targets)
    table = shards.table[own]
    bad = shards.has[targets][:, table].T | (targets == chip)
    bad |= placement.held[targets] + shards.memory[own][:, None] > room
    gains = np.where(bad, np.inf, gains)
    best = np.unravel_index(gains.argmin(), gains.shape)
    least, made = gains[best], (int(own[best[0]]), int(targets[best[1]]), -1)
    if len(others):  # exchanges [own, others]
        there, partner = shards.chip[others], sizes[others]
        gains = gain(
            np.maximum(loads[chip] - moved + partner, 0),
            np.maximum(loads[there] - partner + moved, 0),
            there,
        )
        grown = shards.memory[others] - shards.memory[own][:, None]
        bad = shards.has[there][:, table].T | shards.has[chip][shards.table[others]]
        bad |= (here + grown > room) | (placement.held[there] - grown > room)
        gains = np.where(bad, np.inf, gains)
        best = np.unravel_index(gains.argmin(), gains.shape)
        if gains[best] < least:
            least, other = gains[best], int(others[best[1]])
            made = (int(own[best[0]]), int(shards.chip[other]), other)
    if not least < -1e-7 * float(powers[chip] @ weights):
        return False
    shard, to, other = made
    shards.move(placement, shard, to)
    if other >= 0:
        shards.move(placement, other, chip)
    return True


def _relay_some(placement: Placement, rng: np.random.Generator) -> bool:
    """Takes some tables off and lays them anew, one after the other, each the way that leaves the
    step shortest; undone where the step is longer than before. Tells whether it is shorter."""
    problem, before = placement.problem, placement.seconds
    count = min(len(placement.chosen), int(rng.integers(1, _RELAID + 1)))
    tables = rng.choice(len(placement.chosen), count, replace=False).tolist()
    part = int(rng.integers(len(PARTS)))
    busiest = int(placement.loads[:, part].argmax())
    on_it = [
        t
        for t in range(len(placement.chosen))
        if (placement.problem.sites(placement.way(t))[placement.sites[t]] == busiest).any()
    ]
    if on_it:  # a table of a busiest chip is among them
        tables = list(dict.fromkeys([int(rng.choice(on_it)), *tables]))
    old = [(t, placement.chosen[t], placement.sites[t]) for t in tables]
    for t in tables:
        placement.remove(t, placement.sites[t])
    for t in tables:
        best, found = np.inf, None
        for k, way in enumerate(problem.ways[t]):
            placement.change(t, k, np.zeros(0, int))
            sites = best_sites(placement, way)
            if sites is None or placement.held.max() > placement.room:
                continue
            placement.add(t, sites)
            took = placement.seconds + 1e-3 * float(placement.loads.mean(axis=0).sum())
            if took < best:
                best, found = took, (t, k, sites)
            placement.remove(t, sites)
        if found is None:
            break
        placement.change(*found)
    else:
        if placement.fits and placement.seconds <= before * (1 + 1e-12):
            return placement.seconds < before * (1 - 1e-6)
    for t in tables:
        placement.remove(t, placement.sites[t])
    for move in old:
        placement.change(*move)
    return False
