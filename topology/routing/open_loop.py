"""Packets that chips make at random at a rate: latency against injection rate, and saturation.

An open loop, as Dally and Towles measure networks (chapter 23): chips make packets whether or not
the network takes them, each waits in an endless queue of its chip, and its latency counts from when
it was made until its last hop. A run warms up, then counts the packets made in a window, and goes
on making others until those have arrived.

Links, buffers and priorities are those of `topology.routing.simulate`: a hop takes one cycle, a
link moves a packet a cycle, a packet moves only where the next buffer has a free place, and on a
link those under way go before a chip's own. Without load the latency is the number of hops.

A chip tries six times a cycle, once for each of its links, to make a packet, with a sixth of the
rate each time; what it makes for itself uses no link and is left out. So rates of more than one
packet a cycle are possible, and a link with a queue of its own has the mean time of a slotted
queue, 1 + (5 / 6) r / (2 (1 - r)) cycles, near the M/D/1 queue's 1 + r / (2 (1 - r)).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topology.arrays import Floats, Integers
from topology.numbers import number, whole
from topology.routing.deadlock import Datelines, end_datelines
from topology.routing.routing import Routing
from topology.torus.slices import Slice

TRIES = 6
"""How often a chip tries to make a packet in a cycle; the largest rate."""

OVERLOAD = 1.1
"""Times the bound, at which a curve ends: what arrives then is what the slice carries at most."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Latency and throughput at a rate.

    Attributes:
      rate: packets that a chip makes a cycle, those to itself included.
      offered, accepted: packets to others that were made, and that arrived, in the window, by chip
        and cycle.
      latency: mean cycles of the packets that were made in the window; NaN where there were none.
      latency_99: the cycles that 99 % of them take at most.
      hops: their mean.
      packets: of the window.
      stable: the packets in the network and its queues did not grow in the window by more than 2 %
        of those made, and all of the window arrived. Otherwise the network is saturated, and
        latencies, of those that arrived, only grow with the length of the run.
    """

    rate: float
    offered: float
    accepted: float
    latency: float
    latency_99: float
    hops: float
    packets: int
    stable: bool


def measure(
    slice: Slice,
    routing: Routing,
    traffic: npt.ArrayLike,
    rate: float,
    *,
    places: int | None = None,
    cycles: int = 1000,
    datelines: Datelines | None = None,
    seed: int = 0,
) -> Point:
    """Latency and throughput at a rate: `cycles` / 2 to warm up, and a window of `cycles`.

    Args:
      traffic: float [N, N], how often a chip (row) sends to each chip; rows add up to 1 or less.
      rate: packets a chip makes a cycle, up to `TRIES`.
      places: packets that a buffer holds; None for any number.
      datelines: `topology.routing.deadlock.end_datelines` by default.

    Raises:
      ValueError: a number is out of its range, or the traffic is not that of the slice's chips.
    """
    number("rate", rate, most=TRIES, unit="packets a chip and cycle")
    whole("cycles", cycles, least=10, most=10**7)
    room = None if places is None else whole("places", places, least=1)
    source = _Source(slice, routing, traffic, rate, seed)
    network = _Network(slice, routing, room, datelines)
    warm, end = cycles // 2, cycles // 2 + cycles
    for now in range(warm):
        network.step(*source.packets(), now)
    first, before = network.made, network.inside
    for now in range(warm, end):
        network.step(*source.packets(), now)
    last, growth = network.made, network.inside - before
    made = last - first
    stable = growth <= max(0.02 * made, 3 * made**0.5)
    for now in range(end, end + 2 * cycles if stable else end):
        if not network.waits(first, last):
            break
        network.step(*source.packets(), now)
    latency, hops = network.times(first, last)
    N = slice.num_chips
    return Point(
        rate=float(rate),
        offered=made / cycles / N,
        accepted=(made - growth) / cycles / N,
        latency=float(latency.mean()) if len(latency) else np.nan,
        latency_99=float(np.quantile(latency, 0.99)) if len(latency) else np.nan,
        hops=float(hops.mean()) if len(hops) else np.nan,
        packets=made,
        stable=stable and len(latency) == made,
    )


class _Source:
    """Packets of a cycle, as (source, destination, vector of hops)."""

    def __init__(
        self, slice: Slice, routing: Routing, traffic: npt.ArrayLike, rate: float, seed: int
    ):
        self.slice, self.routing, self.rate = slice, routing, rate
        if (slice.link_rates != 1).any():
            raise ValueError(
                f"slice {slice}: a packet takes a cycle on every link; give one bandwidth"
            )
        self.rng, N = np.random.default_rng(seed), slice.num_chips
        matrix = np.asarray(traffic, float)
        if matrix.shape != (N, N) or not (matrix >= 0).all():
            raise ValueError(f"traffic: float [{N}, {N}], every entry 0 or more")
        sums = np.cumsum(matrix, axis=1)
        if not (sums[:, -1] <= 1 + 1e-9).all():
            raise ValueError("traffic: a row is what part goes to each chip, 1 at most together")
        self.parts = np.minimum(sums, 1).ravel() + np.repeat(np.arange(N), N)

    def packets(self) -> tuple[Integers, Integers]:
        """Makes the packets of a cycle: (int [P] sources, int [P, 3] hops)."""
        N, rng = self.slice.num_chips, self.rng
        source = np.repeat(np.arange(N), rng.binomial(TRIES, self.rate / TRIES, N))
        place = np.searchsorted(self.parts, source + rng.random(len(source)), side="right")
        sent = place < (source + 1) * N  # the others are of rows that add up to less than 1
        source, to = source[sent], place[sent] % N
        source, to = source[source != to], to[source != to]
        steps = self.slice.coordinates[to] - self.slice.coordinates[source]
        if self.slice.is_torus:
            displacement = self.slice.index(self.slice.reduce(steps))
        else:
            displacement = self.slice.index(np.mod(steps, self.slice.shape))
        return source, self._hops(source, displacement)

    def _hops(self, source: Integers, displacement: Integers) -> Integers:
        """int [P, 3]: a vector of hops of each, one of its ways by their shares."""
        vectors = self.routing.vectors[:, displacement]
        shares = self.routing.shares[:, displacement]
        if not self.slice.is_torus:  # of the ways, those that stay inside
            ends = self.slice.coordinates[source] + vectors
            walls = ~np.array(self.slice.wrap)
            inside = ((ends >= 0) & (ends < self.slice.shape) | ~walls).all(axis=-1)
            shares = np.where(inside, shares, 0)
        sums = np.cumsum(shares, axis=0)
        drawn = self.rng.random(len(source)) * sums[-1]
        way = (sums <= drawn).sum(axis=0)
        return np.asarray(vectors[way, np.arange(len(source))])


class _Network:
    """Packets under way and in the queues of their chips; a packet is a row of the arrays, and
    what is measured of them stands there when they have arrived."""

    def __init__(
        self, slice: Slice, routing: Routing, room: int | None, datelines: Datelines | None
    ):
        self.slice, self.order, self.room = slice, routing.order, room
        self.links = links = 6 * slice.num_chips
        self.crossing = np.zeros(links, int)
        for d, signs in enumerate(datelines or end_datelines(slice)):
            if slice.wrap[d]:
                for sign, at in enumerate(signs):
                    chips = np.flatnonzero(np.isin(slice.coordinates[:, d], list(at)))
                    self.crossing[6 * chips + 2 * d + sign] = 1
        self.to = slice.neighbours.ravel()
        self.made = self.inside = 0
        self.begun, self.ended, self.distance = (np.zeros(1024, int) for _ in range(3))
        self.left = np.zeros((1024, 3), int)  # hops, signed
        self.away = np.zeros(1024, int)  # hops left, in all
        self.target = np.zeros(1024, int)  # the link that is next
        self.channel = np.zeros(1024, int)  # virtual, of the link that is next
        self.behind = np.full(1024, -1)  # the packet behind in a chip's queue
        self.head, self.tail = np.full(links, -1), np.full(links, -1)
        channels = 1 + int(np.abs(routing.vectors).max())  # no path crosses more datelines
        self.held = np.zeros(channels * links, np.int32)  # packets in each buffer
        self.under_way = np.zeros(0, int)  # in the order in which they came to their buffers
        self.buffer = np.zeros(1024, int)  # in which a packet under way is

    def step(self, source: Integers, hops: Integers, now: int) -> None:
        """Carries out a cycle, with the packets that are made at its beginning."""
        self._queue(source, hops, now)
        heads = self.head[self.head >= 0]
        packets = np.concatenate([self.under_way, heads])
        target = self.target[packets]
        able = np.arange(len(packets))
        if self.room is not None:
            arrives = self.away[packets] == 1
            free = self.held[self.channel[packets] * self.links + target] < self.room
            able = np.flatnonzero(arrives | free)
        first = np.full(self.links, -1)
        first[target[able[::-1]]] = able[::-1]  # the first that wants a link is written last
        moved = first[first >= 0]
        self._move(np.sort(moved), packets, now)

    def _queue(self, source: Integers, hops: Integers, now: int) -> None:
        """Puts packets that were made into the queues of their chips, by the link that is next."""
        P = len(source)
        new = np.arange(self.made, self.made + P)
        while self.made + P > len(self.begun):
            self._grow()
        self.made += P
        self.inside += P
        self.begun[new], self.ended[new], self.behind[new] = now, -1, -1
        self.left[new] = hops
        self.distance[new] = self.away[new] = np.abs(hops).sum(axis=1)
        self._aim(new, source, np.full(P, -1))
        links = self.target[new]
        sort = np.argsort(links, kind="stable")
        new, links = new[sort], links[sort]
        same = links[1:] == links[:-1]
        self.behind[new[:-1][same]] = new[1:][same]
        starts = np.flatnonzero(np.concatenate([[True], ~same])[: len(links)])
        ends = np.flatnonzero(np.concatenate([~same, [True]])[: len(links)])
        link, tail = links[starts], self.tail[links[starts]]
        waiting = tail >= 0
        self.behind[tail[waiting]] = new[starts][waiting]
        self.head[link[~waiting]] = new[starts][~waiting]
        self.tail[link] = new[ends]

    def _aim(self, packets: Integers, chips: Integers, came: Integers) -> None:
        """Sets the next link, and its virtual channel, of packets at chips, with a hop left.

        Args:
          came: int [P], the dimension of the last hop; -1 for none.
        """
        left = self.left[packets]
        d = np.full(len(packets), -1)
        for dimension in self.order[::-1]:
            d[left[:, dimension] != 0] = dimension
        back = left[np.arange(len(packets)), d] < 0
        link = 6 * chips + 2 * d + back
        before = np.where(came == d, self.channel[packets], 0)
        self.target[packets] = link
        self.channel[packets] = before + self.crossing[link]

    def _move(self, moved: Integers, packets: Integers, now: int) -> None:
        """Moves packets[moved] over the links that they want."""
        through, own = moved[moved < len(self.under_way)], moved[moved >= len(self.under_way)]
        out, movers = packets[own], packets[moved]
        links = self.target[out]
        self.head[links] = self.behind[out]
        self.tail[links[self.behind[out] < 0]] = -1
        target = self.target[movers]
        d, sign = target % 6 // 2, 1 - target % 2 * 2
        if self.room is not None:
            np.subtract.at(self.held, self.buffer[packets[through]], 1)
            self.buffer[movers] = self.channel[movers] * self.links + target
        self.left[movers, d] -= sign
        self.away[movers] -= 1
        on = self.away[movers] > 0
        self.ended[movers[~on]] = now + 1
        self.inside -= int((~on).sum())
        if self.room is not None:
            self.held[self.buffer[movers[on]]] += 1  # over each link comes one at most
        self._aim(movers[on], self.to[target[on]], d[on])
        stays = np.ones(len(self.under_way), bool)
        stays[through] = False
        self.under_way = np.concatenate([self.under_way[stays], movers[on]])

    def _grow(self) -> None:
        for name in (
            "begun",
            "ended",
            "distance",
            "left",
            "away",
            "target",
            "channel",
            "behind",
            "buffer",
        ):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))

    def waits(self, first: int, last: int) -> bool:
        """Tells whether one of the packets first .. last - 1 has not arrived."""
        return bool((self.ended[first:last] < 0).any())

    def times(self, first: int, last: int) -> tuple[Integers, Integers]:
        """(latencies, hops) of those of the packets first .. last - 1 that arrived."""
        there = self.ended[first:last] >= 0
        took = self.ended[first:last] - self.begun[first:last]
        return took[there], self.distance[first:last][there]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Latency by rate.

    Attributes:
      points: by rate, each as `measure` gives it.
      saturation: the largest rate that was stable (0: none), and the smallest that was not, or the
        bound, which is not: there a link is full, and its queue grows without end.
    """

    points: tuple[Point, ...]
    saturation: tuple[float, float]


def latency_curve(
    slice: Slice,
    routing: Routing,
    traffic: Floats,
    bound: float,
    *,
    places: int | None = None,
    cycles: int = 1000,
    steps: int = 10,
    halvings: int = 3,
    seed: int = 0,
    told: Callable[[Point], object] = lambda point: None,
) -> Curve:
    """Measures up to saturation, in steps and then halves of the last, and at an overload.

    Args:
      bound: packets a chip and cycle that the most loaded link can carry; the rates are multiples
        of bound / steps below it, and for the overload `OVERLOAD` times as much.
      halvings: of the interval in which saturation lies.
      told: of each point, as soon as it is measured.
    """
    number("bound", bound, above=0, most=TRIES, unit="packets a chip and cycle")
    points = list[Point]()

    def is_stable_at(rate: float) -> bool:
        point = measure(
            slice, routing, traffic, rate, places=places, cycles=cycles, seed=seed + len(points)
        )
        points.append(point)
        told(point)
        return point.stable

    low, high = 0.0, bound
    for step in range(1, steps):
        rate = bound * step / steps
        if not is_stable_at(rate):
            high = rate
            break
        low = rate
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable_at(middle) else (low, middle)
    is_stable_at(min(OVERLOAD * bound, TRIES))
    points.sort(key=lambda point: point.rate)
    return Curve(points=tuple(points), saturation=(low, high))
