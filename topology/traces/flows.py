"""Transfers that share links: what each puts on them, and the rates that are max-min fair.

A transfer at rate 1 takes as long as it would alone. At rate r it keeps each link busy for r times
the part of the time that it does alone; the parts of all transfers over a link add up to at most 1.
Rates are max-min fair: none can grow but at the cost of one that is no faster (progressive filling;
Bertsekas and Gallager, Data Networks, section 6.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from topology.arrays import Floats, Integers
from topology.collectives.collectives import Cost, Network, lower_bounds
from topology.collectives.degraded import LoadRound, around, cost_of, load_rounds
from topology.collectives.groups import Groups, path_links, vectors_between
from topology.torus.slices import Slice
from topology.traces.trace import SEND

_Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Transfer:
    """Use of the links by a communication of many ranks at once.

    Attributes:
      latency: seconds before data arrive that no other transfer changes.
      seconds: that follow, alone.
      bound: seconds in which no schedule does all of it, latency and all.
      busy: float [6 N], the part of `seconds` for which each directed link is busy.
    """

    latency: float
    seconds: float
    bound: float
    busy: Floats


class Transfers:
    """The transfers of a trace on a slice, each worked out once.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing.
    """

    def __init__(self, slice: Slice, network: Network, failed_links: Sequence[int] = ()):
        self.slice, self.network, self.failed = slice, network, list(failed_links)
        self._known: dict[tuple[str, _Groups], tuple[list[tuple[Cost, Floats]], float]] = {}

    def of(self, kind: str, groups: _Groups, bytes: float) -> Transfer:
        """The transfer of a kind in some groups of chips at once.

        Args:
          groups: of chips, one after another; of a send, pairs of source and destination.
          bytes: that a chip has before it.

        Raises:
          ValueError: the failed links cut the slice in two.
        """
        key = kind, groups
        if key not in self._known:
            self._known[key] = self._worked_out(kind, groups)
        schedules, bound = self._known[key]
        if kind == "all_gather":
            bytes *= len(groups[0])  # of the whole array, which costs are for
        network = self.network
        cost, loads = min(schedules, key=lambda one: one[0].seconds(bytes, network))
        latency = cost.hops * network.hop_latency
        seconds = cost.load * bytes / network.bandwidth
        least = network.hop_latency * (cost.hops > 0) + bound * bytes / network.bandwidth
        busy = loads / cost.load if cost.load else loads
        return Transfer(latency, seconds, min(least, latency + seconds), busy)

    def _worked_out(self, kind: str, groups: _Groups) -> tuple[list[tuple[Cost, Floats]], float]:
        """(schedules: their cost and float [6 N], the load of each link; the least load of any)."""
        slice, bound = self.slice, 0.0
        if kind == SEND:
            whole = [self._paths(groups)]
            bound = self._sent(groups)
        elif (of := partition(slice, groups)) is not None:
            used = len(groups)
            whole = load_rounds(kind, of, used=used)
            free = Network(bandwidth=1.0, hop_latency=0.0)
            bounds = lower_bounds(kind, of, 1.0, free, failed_links=self.failed)
            bound = max(bounds.values()) if used == len(of.members) else bounds["chip"]
        else:
            whole = self._rings(kind, groups)
            n = max(len(group) for group in groups)
            bound = (n - 1) / n / float(self.slice.link_rates.sum())
        schedules = []
        for longer in (0, 2) if self.failed else (0,):
            rounds = around(slice, whole, self.failed, longer=longer)
            loads = sum((r.loads.ravel() for r in rounds), np.zeros(6 * slice.num_chips))
            schedules.append((cost_of(rounds), loads))
        return schedules, bound

    def _paths(self, pairs: _Groups, part: float = 1.0) -> LoadRound:
        """A byte's part from each first chip to the last of each pair, by one shortest path."""
        sources, destinations = np.array(pairs).T
        vectors = vectors_between(self.slice, sources, destinations)
        links, _ = path_links(self.slice, sources, vectors)
        loads = np.bincount(links[links >= 0], minlength=6 * self.slice.num_chips)
        hops = int((links >= 0).sum(axis=1).max(initial=0))
        return LoadRound(hops, part * loads.reshape(-1, 6) / self.slice.link_rates)

    def _sent(self, pairs: _Groups) -> float:
        """The largest part of what a chip sends, or receives, over the links that it has."""
        links = ((self.slice.neighbours >= 0) * self.slice.link_rates).sum(axis=1)
        links = np.maximum(links, 1e-9)
        most = 0.0
        for ends in np.array(pairs).T:
            most = max(most, float((np.bincount(ends, minlength=len(links)) / links).max()))
        return most

    def _rings(self, kind: str, groups: _Groups) -> list[LoadRound]:
        """Rounds for groups of any place and size: rings of their members, both ways at once."""
        n = max(len(group) for group in groups)
        if n == 1:
            return []
        shifts = range(1, n) if kind == "all_to_all" else (1,)
        rounds = []
        for shift in shifts:
            pairs = [
                (group[i], group[(i + shift) % len(group)])
                for group in groups
                for i in range(len(group))
                if shift < len(group)
            ]
            if kind in ("all_to_all", "permute"):
                rounds.append(self._paths(tuple(pairs), 1 / n if kind == "all_to_all" else 1.0))
                continue
            there = self._paths(tuple(pairs), 1 / n / 2)
            back = self._paths(tuple((b, a) for a, b in pairs), 1 / n / 2)
            step = LoadRound(max(there.hops, back.hops), there.loads + back.loads)
            rounds += [step] * (n - 1) * (2 if kind == "all_reduce" else 1)
        return rounds


def fair_rates(busy: Floats) -> tuple[Floats, Integers]:
    """The max-min fair rates of transfers, none above 1.

    Args:
      busy: float [F, L], the part of the time for which a transfer keeps a link busy at rate 1.

    Returns:
      float [F], rates; int [F], the link that limits each, its fullest one where none does.
    """
    F = len(busy)
    rates, limits = np.zeros(F), busy.argmax(axis=1)
    growing, left = np.ones(F, bool), np.ones(busy.shape[1])
    while growing.any():
        demand = busy[growing].sum(axis=0)
        room = np.divide(left, demand, out=np.full(len(left), np.inf), where=demand > 1e-12)
        step = min(room.min(initial=np.inf), (1 - rates[growing]).min())
        rates[growing] += step
        left = np.maximum(left - step * demand, 0)
        full = (left <= 1e-9) & (demand > 1e-12)
        stopped = growing & ((busy[:, full] > 1e-12).any(axis=1) | (rates >= 1 - 1e-12))
        for f in np.flatnonzero(stopped & (rates < 1 - 1e-9)):
            limits[f] = np.flatnonzero(full & (busy[f] > 1e-12))[0]
        growing &= ~stopped
    return rates, limits


def partition(slice: Slice, groups: _Groups) -> Groups | None:
    """The groups, and translations of the first that make a partition of the slice with them.

    None where there are no such translations, or the groups are none of each other.
    """
    N = slice.num_chips
    taken = np.zeros(N, bool)
    taken[[chip for group in groups for chip in group]] = True
    first, found = np.array(groups[0]), list(groups)
    if not slice.is_torus and not taken.all():
        return None
    while not taken.all():
        offset = slice.coordinates[np.flatnonzero(~taken)[0]] - slice.coordinates[first[0]]
        moved = slice.index(slice.reduce(slice.coordinates[first] + offset))
        if taken[moved].any():
            return None
        taken[moved] = True
        found.append(tuple(moved.tolist()))
    if len({len(group) for group in found}) > 1:
        return None
    try:
        return Groups(slice, np.array(found))
    except ValueError:
        return None
