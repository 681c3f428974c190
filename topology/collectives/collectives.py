"""Costs of collectives on a slice, and lower bounds that hold for every schedule.

All-gather is breadth-first broadcast (Zhao et al., "Efficient Direct-Connect Topologies for
Collective Communications", arXiv 2202.03356): in round t every chip receives, whole, the shards of
the members that are t steps away, each from any neighbours that are one step nearer to its origin
and so had all of it. On a ring this is the bidirectional ring, on a torus the multi-dimensional
ring that keeps all links busy, and it needs as few rounds as the distance allows. Reduce-scatter is
the same backwards in time, all-reduce the one and then the other. All-to-all and permute send
everything at once along shortest paths.

Times: a hop takes `hop_latency`; in a round data streams through the links of its path, so a round
takes its hops' latency and the bytes of its most loaded link over the bandwidth. Where links have
different rates (`Slice.link_rates`), a link's load is its bytes over its rate.

`bytes` of a collective are: of the whole array that a chip has after an all-gather, or before a
reduce-scatter, or of an all-reduce; what a chip sends in an all-to-all, its own part included, or
in a permute.

Letters: G groups of n members, M moves, T rounds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, shortest_path

from topology.arrays import Floats, Integers
from topology.collectives.groups import Groups, path_links, vectors_between, ways_between
from topology.hardware import TPU_V4, Pod
from topology.numbers import choice, number
from topology.routing.loads import links_left
from topology.routing.loads import lower_bounds as traffic_lower_bounds

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute")

EFFICIENCIES = {
    # Torsion's own schedules.
    "breadth_first": 1.0,
    "dimension_rings": 1.0,
    "shortest_paths": 1.0,
    # What the compiler for TPU v4 names in `collective_algorithm_config`.
    "UniDirection1DRing": 1.0,  # one dimension, up to 8 chips
    "UniDirectionNDRing": 1.0,  # squares and cubes up to 8, twisted 4x4x8 and 4x8x8
    "StrategyRing": 1.0,  # one dimension of 16
    "StrategyND": 1.0,  # 16x16, 16x16x16, planes and boxes of unequal sides
    "TwistedTorusND": 1.0,  # larger twisted slices
    "1DAllGatherNonMajorDimImbalanced": 1.0,  # planes of twisted slices
    "AllReduceScatterFusion": 1.0,  # its reduce-scatter, however it is named
    "AllToAllEmitter": 1.0,  # twisted to regular, 0.94 of the ideal ratio was measured
    # Whole arrays summed up and then cut: twice the bytes of a reduce-scatter or an all-gather.
    "as_all_reduce": 0.5,
}
"""The part of the links' usable bandwidth that each strategy reaches.

No source states any, so all are 1 until fitted to measurements: `Network.fitted`. "as_all_reduce"
alone is by count: it is for what the compiler makes an all-reduce of, reduce-scatters of arrays
whose shards do not fill its tiles or on slices larger than a host, and all-gathers over a whole
twisted slice. Traffic(kind="reduce_scatter", strategy="as_all_reduce") is what `fsdp` then costs.
"""

_DISTANCES = 4_000_000  # between members, held at a time
_PATHS = 250_000  # held at a time


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bandwidths and latencies of the links of a network.

    Attributes:
      bandwidth: usable bytes/s of a link in one direction; of TPU v4 unless given, and `Network.of`
        has that of another pod.
      hop_latency: seconds; about 1 us on TPU ("How to Scale Your Model", chapter TPUs).
      efficiencies: of strategies; see `EFFICIENCIES`.
    """

    bandwidth: float = TPU_V4.chip.usable_link_bandwidth
    hop_latency: float = 1e-6
    efficiencies: Mapping[str, float] = field(default_factory=lambda: EFFICIENCIES)

    def __post_init__(self) -> None:
        rates = {"bandwidth": self.bandwidth, **self.efficiencies}
        for name, value in rates.items():
            number(f"network: {name}", value, above=0)
        number("network: hop_latency", self.hop_latency, unit="seconds")

    @classmethod
    def of(cls, pod: Pod) -> "Network":
        """Returns the network of a pod's slices."""
        return cls(bandwidth=pod.chip.usable_link_bandwidth)

    def fitted(self, measured: Iterable[tuple[str, "Cost", float, float]]) -> "Network":
        """The network whose efficiencies fit measured times best (least squares of the rates).

        Args:
          measured: (strategy, cost, bytes, seconds) of each; a strategy's efficiency e is that of
            seconds = latency + transfer / e.

        Raises:
          ValueError: a time is no longer than the latency alone.
        """
        fits: dict[str, list[tuple[float, float]]] = {}
        for strategy, cost, bytes, seconds in measured:
            latency = cost.hops * self.hop_latency
            if seconds <= latency:
                raise ValueError(
                    f"measured {seconds} s of {strategy}: {cost.hops} hops alone take {latency} s; "
                    "give a longer time or a smaller hop_latency"
                )
            fits.setdefault(strategy, []).append(
                (cost.load * bytes / self.bandwidth, seconds - latency)
            )
        found = {}
        for strategy, pairs in fits.items():
            ideal, real = np.array(pairs).T
            found[strategy] = float(ideal @ ideal / (ideal @ real))
        return replace(self, efficiencies={**self.efficiencies, **found})


@dataclass(frozen=True)
class Cost:
    """Cost of a collective, whatever the bandwidth and latency of the network.

    Attributes:
      hops: whose latencies it waits for, one after another.
      load: bytes on the most loaded link, summed over rounds, for a collective of one byte.
    """

    hops: int
    load: float

    def seconds(self, bytes: float, network: Network, strategy: str = "breadth_first") -> float:
        efficiency = network.efficiencies[choice("strategy", strategy, network.efficiencies)]
        number("bytes", bytes)
        return self.hops * network.hop_latency + self.load * bytes / network.bandwidth / efficiency


@dataclass(frozen=True)
class BroadcastRound:
    """A round of breadth-first broadcast: its longest move in hops, and the load in shards of the
    most loaded link, the shards split between moves as evenly as they can be."""

    hops: int
    load: Fraction


def check_kind(kind: str) -> None:
    choice("collective", kind, KINDS)


def collective_cost(kind: str, groups: Groups, *, to: npt.ArrayLike | None = None) -> Cost:
    """The cost of a collective in all groups at once.

    Args:
      to: int [n], of a permute, the member to which each member sends; the next one by default,
        the first after the last.
    """
    check_kind(kind)
    if kind == "permute":
        return _paths_cost(groups, *permute_pairs(groups, to))
    if kind == "all_to_all":
        sources = np.repeat(groups.representatives, groups.size)
        destinations = np.tile(np.arange(groups.size), len(groups.representatives))
        cost = _paths_cost(groups, sources, destinations, spread=True)
        return Cost(cost.hops, cost.load / groups.size)
    rounds = broadcast_rounds(groups)
    times = 2 if kind == "all_reduce" else 1
    return Cost(
        times * sum(r.hops for r in rounds),
        times * float(sum(r.load for r in rounds) / groups.size),
    )


def broadcast_rounds(groups: Groups) -> list[BroadcastRound]:
    """The rounds of breadth-first broadcast of one shard from every member to all.

    What a chip receives in a round can be split between its moves so that none carries more than c
    times its part of the links if and only if, for every set D of moves, the shards that can come
    only by moves of D are at most c times what D carries (Hall's condition); so the least c is the
    largest ratio.
    """
    moves, sharing = groups.moves, groups.sharing
    if groups.size == 1:
        return []
    # A set of moves is a number with a bit for each; what it carries, in units of 1 / unit.
    sets = np.arange(2 ** len(moves))
    unit = math.lcm(*(load.numerator for load in sharing))
    parts = np.array([int(unit / load) for load in sharing])
    carries = (sets[:, None] >> np.arange(len(moves)) & 1) @ parts
    hops = np.abs(moves).sum(axis=1)
    worst: dict[int, tuple[int, Fraction]] = {}
    for away, possible in arrivals(groups, groups.representatives):
        T = int(away.max())
        count = np.bincount(away * len(sets) + possible, minlength=(T + 1) * len(sets))
        count = count.reshape(T + 1, len(sets))
        longest = np.zeros(T + 1, int)
        np.maximum.at(longest, away, _longest_of_set(hops, possible))
        for bit in range(len(moves)):  # sums over subsets
            halves = count.reshape(T + 1, -1, 2, 2**bit)
            halves[:, :, 1] += halves[:, :, 0]
        ratio = count[:, 1:] / carries[1:]
        for t in range(1, T + 1):
            D = ratio[t].argmax()
            load = Fraction(int(count[t, D + 1]) * unit, int(carries[D + 1]))
            h, c = worst.get(t, (0, Fraction(0)))
            worst[t] = max(h, int(longest[t])), max(c, load)
    return [BroadcastRound(*worst[t]) for t in sorted(worst)]


def arrivals(groups: Groups, receivers: npt.ArrayLike) -> Iterator[tuple[Integers, Integers]]:
    """Yields for each receiving member: (int [n] steps away from every member, int [n] the set of
    moves by which that member's shard can arrive when it is broadcast breadth-first; bit m is move
    m)."""
    n, after, receivers = groups.size, groups.after, np.asarray(receivers)
    here, move = np.nonzero(after >= 0)
    graph = csr_array((np.ones(len(here), np.int8), (here, after[here, move])), (n, n))
    reverse = np.arange(after.shape[1]) ^ 1
    batch = max(1, _DISTANCES // (n * (1 + len(reverse))))
    for start in range(0, len(receivers), batch):
        some = receivers[start : start + batch]
        back = after[some][:, reverse]  # where each move comes from
        ends, place = np.unique(np.column_stack([some, back]), return_inverse=True)
        away = shortest_path(graph, unweighted=True, indices=np.maximum(ends, 0)).astype(np.int32)
        for (here, *there), exists in zip(place.reshape(len(some), -1), back >= 0, strict=True):
            nearer = (away[there] == away[here] - 1) & exists[:, None]
            yield away[here], (nearer << np.arange(len(there))[:, None]).sum(axis=0)


def permute_pairs(groups: Groups, to: npt.ArrayLike | None = None) -> tuple[Integers, Integers]:
    """The members that send in a permute, and to which; who sends to itself is left out."""
    here = np.arange(groups.size)
    to = np.roll(here, -1) if to is None else np.asarray(to)
    if to.shape != here.shape or (np.sort(to) != here).any():
        raise ValueError(f"permute: `to` is a permutation of the members 0 .. {groups.size - 1}")
    return here[to != here], to[to != here]


def lower_bounds(
    kind: str,
    groups: Groups,
    bytes: float,
    network: Network,
    *,
    to: npt.ArrayLike | None = None,
    failed_links: Iterable[int] = (),
) -> dict[str, float]:
    """Seconds below which no schedule whatsoever can be, by several proofs; the largest counts.

    Chips that are no members of a group may help it.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing.

    Returns:
      "latency": the hops between the two members furthest apart.
      The others are for bytes on the most loaded link, and the latency of one hop.
      "chip": what the chip with the fewest links receives.
      "cut": what must enter a slab of whole planes, over the links that do.
      "projection" (gathers and reductions): look only at links along some dimensions, and count as
        one place the chips that the other dimensions connect. Every byte of an all-gather visits
        all p places of its group, over at least p - 1 of these links; in an all-reduce p - 1
        messages bring together what the first place to know the sum needs, and p - 1 more bring it
        to the others.
      "distance", "average" (all-to-all and permute): see `topology.routing.loads.lower_bounds`.
    """
    check_kind(kind)
    slice, n = groups.slice, groups.size
    failed = list(failed_links)
    sources = np.repeat(groups.representatives, n)
    destinations = np.tile(np.arange(n), len(groups.representatives))
    if kind == "permute":
        sources, destinations = permute_pairs(groups, to)
    if kind in ("all_to_all", "permute"):
        traffic = np.zeros((slice.num_chips,) * 2)
        for members in groups.members:
            if kind == "permute":
                traffic[members[sources], members[destinations]] = bytes
            else:
                traffic[np.ix_(members, members)] = bytes / n
        np.fill_diagonal(traffic, 0)
        loads = traffic_lower_bounds(slice, traffic, failed_links=failed)
    else:
        loads = {
            "chip": _chip_load(kind, groups, failed) * bytes,
            "cut": _cut_load(kind, groups, failed) * bytes,
            "projection": _projection_load(kind, groups, failed) * bytes,
        }
    chips = groups.members[0]
    apart = vectors_between(slice, chips[sources], chips[destinations])
    hops = int(np.abs(apart).sum(axis=-1).max(initial=0))
    alpha = network.hop_latency * (hops > 0)
    return {"latency": hops * network.hop_latency} | {
        name: alpha + load / network.bandwidth for name, load in loads.items()
    }


def _chip_load(kind: str, groups: Groups, failed: list[int]) -> float:
    if groups.size == 1:
        return 0.0
    tail, head, rates = links_left(groups.slice, failed)
    N = groups.slice.num_chips
    out, into = (np.bincount(ends, rates, minlength=N).min() for ends in (tail, head))
    # In an all-reduce of n members each chip sends all its data, as parts or as sums.
    part = (groups.size - 1) / groups.size if kind != "all_reduce" else 1.0
    least = {"all_gather": into, "reduce_scatter": out}.get(kind, min(out, into))
    return float(part / least) if least else 0.0


def _cut_load(kind: str, groups: Groups, failed: list[int]) -> float:
    slice, n = groups.slice, groups.size
    tail, head, rates = links_left(slice, failed)
    if kind == "reduce_scatter":  # an all-gather backwards
        tail, head = head, tail
    best = 0.0
    for d, k in enumerate(slice.shape):
        plane = slice.coordinates[:, d]
        for first in range(k):
            for last in range(first + 1, k + (first > 0)):
                inside = (plane >= first) & (plane < last)
                links = rates[inside[head] & ~inside[tail]].sum()
                if kind == "all_reduce":
                    links = min(links, rates[inside[tail] & ~inside[head]].sum())
                count = inside[groups.members].sum(axis=1)
                split = (count > 0) & (count < n)
                # The shards from outside; of an all-reduce, at least one sum of them.
                enters = split.sum() if kind == "all_reduce" else ((n - count) / n)[split].sum()
                if links:
                    best = max(best, enters / links)
    return best


def _projection_load(kind: str, groups: Groups, failed: list[int]) -> float:
    slice, best = groups.slice, 0.0
    N, neighbours = slice.num_chips, slice.neighbours
    left = neighbours.copy()
    left.ravel()[failed] = -1
    for kept in range(1, 8):
        along = np.repeat([kept >> d & 1 for d in range(3)], 2).astype(bool)
        tail, direction = np.nonzero((neighbours >= 0) & ~along)
        graph = csr_array((np.ones(len(tail)), (tail, neighbours[tail, direction])), (N, N))
        places = connected_components(graph, directed=False)[1]
        links = ((left >= 0) * slice.link_rates)[:, along].sum()
        visited = len(np.unique(places[groups.members[0]]))
        if links:
            best = max(best, (visited - 1) * len(groups.members) / links)
    return best * (2 if kind == "all_reduce" else 1)


def _paths_cost(
    groups: Groups, sources: Integers, destinations: Integers, *, spread: bool = False
) -> Cost:
    """The cost of a byte from each source (member) to its destination, in all groups at once.

    Args:
      spread: the sources stand for all their images under the group's symmetries.
    """
    hops, loads = path_loads(groups, sources, destinations, spread=spread)
    return Cost(hops, float(loads.max()))


def path_loads(
    groups: Groups,
    sources: Integers,
    destinations: Integers,
    *,
    spread: bool = False,
    used: int | None = None,
) -> tuple[int, Floats]:
    """Load that a byte along shortest paths from each source to its destination puts on the links.

    Args:
      sources, destinations: int [P], members of every group; all groups send at once.
      spread: the sources stand for all their images under the group's symmetries.
      used: the number of the first groups that do send, where it is not all.

    Returns:
      The longest path in hops, and float [N, 6], the load of every directed link: bytes over its
      rate.
    """
    slice, members = groups.slice, groups.members
    different = sources != destinations
    sources, destinations = members[0][sources[different]], members[0][destinations[different]]
    if not len(sources):
        return 0, np.zeros((slice.num_chips, 6))
    pair, vectors, part = ways_between(slice, sources, destinations, np.ones(len(sources)))
    labels = firsts = np.arange(slice.num_chips)
    if spread:
        labels, firsts = _orbits(groups)
    loads = np.zeros(6 * len(firsts))
    for start in range(0, len(pair), _PATHS):
        some = np.s_[start : start + _PATHS]
        links, _ = path_links(slice, sources[pair[some]], vectors[some])
        passed = links >= 0
        amount = np.broadcast_to(part[some, None], links.shape)[passed]
        ids = 6 * labels[links[passed] // 6] + links[passed] % 6
        loads += np.bincount(ids, amount, minlength=len(loads))
    loads = loads.reshape(-1, 6)
    touched = np.flatnonzero(loads.any(axis=1))
    offsets = slice.coordinates[members[:, 0]] - slice.coordinates[members[0, 0]]
    total = np.zeros_like(loads)
    for offset in offsets[:used]:
        moved = slice.index(slice.reduce(slice.coordinates[firsts[touched]] + offset))
        total[labels[moved]] += loads[touched]  # a translation takes orbits to orbits
    return int(np.abs(vectors).sum(axis=1).max()), total[labels] / slice.link_rates


def _orbits(groups: Groups) -> tuple[Integers, Integers]:
    """Labels [N] of chips that whole steps of the groups connect, and the first chip of each."""
    slice, N = groups.slice, groups.slice.num_chips
    ends = [slice.translation(step) for step in groups.steps[groups.whole]]
    here = np.tile(np.arange(N), len(ends))
    there = np.concatenate(ends) if ends else here
    graph = csr_array((np.ones(len(here)), (here, there)), (N, N))
    labels = connected_components(graph, directed=False)[1]
    return labels, np.unique(labels, return_index=True)[1]


def _longest_of_set(hops: Integers, sets: Integers) -> Integers:
    longest = np.zeros(len(sets), int)
    for m, h in enumerate(hops):
        longest = np.where(sets >> m & 1, np.maximum(longest, h), longest)
    return longest
