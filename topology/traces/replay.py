"""A clock that runs a trace on a slice: what is computed, what is sent meanwhile, what waits.

A rank computes one node at a time, of those that may begin the first of its program. What
communicates begins when all that take part have come to it, waits the latency of its hops, and
then shares the links with all others under way, by rates that are max-min fair. A send ends when
its data have arrived, its receive not before.

Ranks that are alike (`topology.traces.alike`) run as one.
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from topology.arrays import Floats, Integers
from topology.collectives.collectives import Network
from topology.numbers import whole
from topology.timeline import Event
from topology.torus.slices import Slice
from topology.traces.alike import classes
from topology.traces.flows import Transfer, Transfers, fair_rates
from topology.traces.meetings import Meeting, meetings
from topology.traces.trace import RECEIVE, Program, Trace

TRACKS = ("compute", "network")


@dataclass
class Communication:
    """All communications of a kind and size of groups.

    Attributes:
      count: how many; bytes: of one after another.
      seconds: from the coming of the last that takes part to the end, of one after another.
      alone: seconds that they would take with all links to themselves.
      waited: seconds that those who take part wait for the last one, on average.
      links: {directed link, 6 * chip + direction: seconds for which it held the data up most}.
    """

    kind: str
    members: int
    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    alone: float = 0.0
    waited: float = 0.0
    links: dict[int, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, eq=False)
class Replay:
    """Result of replaying a trace.

    Attributes:
      seconds: until the last rank is done.
      bound: seconds that no schedule of its communication, no order of what is computed and no
        sharing of links can undercut: its longest path with every communication at its own bound,
        or all that a rank computes.
      ranks: int [C], the first rank of each class of ranks that do the same; sizes: int [C], how
        many they are.
      computing: float [C], seconds of computing; waiting: float [C], seconds until the class is
        done in which nothing is computed.
      communications: by kind and size of groups.
      events: of the first rank of each class, which is their process, on `TRACKS`.
    """

    seconds: float
    bound: float
    ranks: Integers
    sizes: Integers
    computing: Floats
    waiting: Floats
    communications: tuple[Communication, ...]
    events: tuple[Event, ...]


def replay(
    trace: Trace,
    slice: Slice,
    *,
    network: Network | None = None,
    failed_links: Sequence[int] = (),
    chips: Sequence[int] | None = None,
) -> Replay:
    """Runs a trace on a slice.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing.
      chips: of each rank; by default in their order.

    Raises:
      ValueError: the slice has fewer chips than the trace has ranks, what ranks wait for never
        comes, or the failed links cut the slice in two.
    """
    R, N = len(trace.ranks), slice.num_chips
    if R > N:
        raise ValueError(f"trace of {R} ranks: {slice} has {N} chips; take a larger slice")
    on = list(range(R)) if chips is None else [whole("chips", c, most=N - 1) for c in chips]
    if len(set(on)) < len(on) or len(on) != R:
        raise ValueError(f"chips: give one for each of the {R} ranks, and none twice")
    of = classes(trace)
    met = meetings(trace, of)
    transfers = Transfers(slice, network or Network.of(slice.pod), failed_links)
    each = [
        transfers.of(
            one.kind, tuple(tuple(on[rank] for rank in group) for group in one.groups), one.bytes
        )
        for one in met
    ]
    ideal = _Clock(trace, of, met, each, ideal=True).run()
    real = _Clock(trace, of, met, each, ideal=False).run()
    return Replay(
        seconds=real.now,
        bound=min(real.now, max(ideal.now, float(real.computing.max()))),
        ranks=real.ranks,
        sizes=np.bincount(of),
        computing=real.computing,
        waiting=real.ends - real.computing,
        communications=tuple(real.communications.values()),
        events=tuple(real.events),
    )


@dataclass(eq=False)
class _Flow:
    meeting: int
    left: float  # seconds alone, after its latency


class _Clock:
    """Run of the classes of a trace.

    Ideal: each communication takes its bound and shares no link, and a rank computes all at once
    that may begin; so no run is done before.
    """

    def __init__(
        self,
        trace: Trace,
        of: Integers,
        met: list[Meeting],
        transfers: list[Transfer],
        *,
        ideal: bool,
    ):
        self.met, self.transfers, self.ideal = met, transfers, ideal
        self.ranks: Integers = np.unique(of, return_index=True)[1]
        self.programs = [trace.programs[trace.ranks[r].program] for r in self.ranks]
        self.meeting_of = {party: m for m, one in enumerate(met) for party in one.parties}
        self.missing = [one.callers for one in met]
        self.came: list[list[float]] = [[] for _ in met]
        self.over = [False] * len(met)
        self.waiting = [[len(node.after) for node in program] for program in self.programs]
        self.followers = [_followers(program) for program in self.programs]
        self.queues: list[list[int]] = [[] for _ in self.programs]  # of what may be computed
        self.busy = [False] * len(self.programs)
        self.now, self.left = 0.0, sum(map(len, self.programs))
        # (time, number, what ends: a class's node, or else the latency of a meeting)
        self.timers: list[tuple[float, int, tuple[int, int] | None, int]] = []
        self.order = itertools.count()
        self.flows: list[_Flow] = []
        self.rates: Floats = np.zeros(0)
        self.limits: Integers = np.zeros(0, int)
        self.computing = np.zeros(len(self.programs))
        self.ends = np.zeros(len(self.programs))
        self.communications: dict[tuple[str, int], Communication] = {}
        self.events: list[Event] = []

    def run(self) -> "_Clock":
        for c, waiting in enumerate(self.waiting):
            for i, count in enumerate(waiting):
                if not count and self.ready(c, i):
                    self.done(c, i)
        while True:
            self.compute()
            if not self.left:
                return self
            if not self.timers and not self.flows:
                raise ValueError(self.stuck())
            self.advance()

    def ready(self, c: int, i: int) -> bool:
        """Begins a node whose dependencies have ended, or lines it up; tells whether it is done."""
        node = self.programs[c][i]
        if not node.communicates:
            heapq.heappush(self.queues[c], i)
            return False
        m = self.meeting_of[c, i]
        if node.kind == RECEIVE:
            return self.over[m]
        self.came[m].append(self.now)
        self.missing[m] -= 1
        if not self.missing[m]:
            transfer = self.transfers[m]
            self.at(self.now + (transfer.bound if self.ideal else transfer.latency), None, m)
        return False

    def compute(self) -> None:
        """Begins what each class may compute now."""
        for c, queue in enumerate(self.queues):
            while queue and (self.ideal or not self.busy[c]):
                i = heapq.heappop(queue)
                node = self.programs[c][i]
                if not node.seconds:
                    self.done(c, i)
                    continue
                self.busy[c] = True
                self.computing[c] += node.seconds
                self.at(self.now + node.seconds, (c, i), 0)
                rank = int(self.ranks[c])
                self.events.append(Event(node.name, "compute", self.now, node.seconds, rank))

    def advance(self) -> None:
        """Lets the time pass until something ends."""
        step = self.timers[0][0] - self.now if self.timers else math.inf
        for flow, rate in zip(self.flows, self.rates, strict=True):
            step = min(step, flow.left / rate)
        for flow, rate, link in zip(self.flows, self.rates, self.limits, strict=True):
            flow.left -= step * rate
            self.communication(flow.meeting).links[int(link)] += step
        self.now += step
        tiny = 1e-12 * max(self.now, 1e-9)
        arrived = [flow for flow in self.flows if flow.left <= tiny]
        self.flows = [flow for flow in self.flows if flow.left > tiny]
        changed = bool(arrived)
        for flow in arrived:
            self.arrived(flow.meeting)
        while self.timers and self.timers[0][0] <= self.now + tiny:
            _, _, computed, m = heapq.heappop(self.timers)
            if computed is not None:
                self.busy[computed[0]] = False
                self.done(*computed)
            elif self.ideal or not self.transfers[m].seconds:
                self.arrived(m)
            else:
                self.flows.append(_Flow(m, self.transfers[m].seconds))
                changed = True
        if changed and self.flows:
            busy = np.array([self.transfers[flow.meeting].busy for flow in self.flows])
            self.rates, self.limits = fair_rates(busy)
        elif changed:
            self.rates, self.limits = np.zeros(0), np.zeros(0, int)

    def arrived(self, m: int) -> None:
        """Ends a communication."""
        meeting, transfer, came = self.met[m], self.transfers[m], self.came[m]
        begin = max(came)
        one = self.communication(m)
        one.count += 1
        one.bytes += meeting.bytes
        one.seconds += self.now - begin
        one.alone += transfer.latency + transfer.seconds
        one.waited += begin - sum(came) / len(came)
        self.over[m] = True
        for c, i in meeting.parties:
            node, rank = self.programs[c][i], int(self.ranks[c])
            self.events.append(Event(node.name, "network", begin, self.now - begin, rank))
            if not self.waiting[c][i]:
                self.done(c, i)

    def done(self, c: int, i: int) -> None:
        """Ends a node, and begins those that waited for it alone."""
        ended = [i]
        self.ends[c] = self.now
        while ended:
            self.left -= 1
            for follower in self.followers[c][ended.pop()]:
                self.waiting[c][follower] -= 1
                if not self.waiting[c][follower] and self.ready(c, follower):
                    ended.append(follower)

    def at(self, time: float, computed: tuple[int, int] | None, m: int) -> None:
        heapq.heappush(self.timers, (time, next(self.order), computed, m))

    def communication(self, m: int) -> Communication:
        meeting = self.met[m]
        key = meeting.kind, len(meeting.groups[0])
        return self.communications.setdefault(key, Communication(*key))

    def stuck(self) -> str:
        """Says who waits for whom in vain."""
        for m, one in enumerate(self.met):
            if self.over[m] or not self.came[m]:
                continue
            for c, i in one.parties:
                if self.waiting[c][i]:
                    node, rank = self.programs[c][i], int(self.ranks[c])
                    return (
                        f"rank {rank}: node {node.name!r}: others wait for it, and it waits for "
                        "them; ranks do what they have in common in other orders"
                    )
        return "trace: its ranks wait for each other; check the order of sends and receives"


def _followers(program: Program) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in program]
    for i, node in enumerate(program):
        for before in node.after:
            found[before].append(i)
    return found
