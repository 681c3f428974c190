"""Events of a pod over months: the jobs that arrive, the parts that fail, the maintenance.

Each is a list made before a simulation begins, from a seed of its own, so policies are compared on
the same jobs and the same failures; lists from anywhere else (real traces) do as well. Times are
seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from topology.fabric.parts import Part, switches
from topology.hardware import TPU_V4, Block, Pod, block_of, of_blocks
from topology.numbers import number, whole
from topology.torus.slices import Slice

DAY = 86400.0
YEAR = 365 * DAY

SIZES = {
    0.29: ["2x2x1", "2x2x2", "2x2x4", "2x4x4"],
    0.28: ["4x4x8_twisted", "4x8x8_twisted", "8x8x16_twisted", "8x16x16_twisted"],
    0.05: ["4x4x8", "4x8x8", "8x8x16", "8x16x16"],
    0.38: ["4x4x4", "4x4x16", "4x8x16", "8x8x8", "12x16x16"],
}
"""{share: slices}. Published of a day in November 2022 (Jouppi et al., ISCA 2023): 29 % of slices
are smaller than a block, 33 % have a geometry that can be twisted, 28 % are twisted. Assumed: which
shapes each group has, and that inside a group a slice of n blocks comes 1/n times as often as one
of one block, so that all sizes take as much of the machine."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Training job that is submitted to a pod.

    Attributes:
      arrival: when it is submitted.
      work: how long it computes at full speed, in all.
      priority: the higher goes first, and may pre-empt the lower.
      slowdown: what routing around a failed link or switch adds to its step time, as a part of it;
        None if the job did not opt in.
    """

    name: str
    slice: Slice
    arrival: float
    work: float
    priority: int = 0
    slowdown: float | None = None

    def __post_init__(self) -> None:
        number(f"job {self.name!r}: arrival", self.arrival, unit="seconds")
        number(f"job {self.name!r}: work", self.work, above=0, unit="seconds")
        number(f"job {self.name!r}: priority", self.priority, least=-math.inf)
        if self.slowdown is not None:
            number(f"job {self.name!r}: slowdown", self.slowdown)

    @property
    def uses_switches(self) -> bool:
        """Tells whether the slice uses switches: any of whole blocks does, if only to wrap
        around."""
        return self.slice.is_whole_blocks


@dataclass(frozen=True)
class Outage:
    """A part that is out from start to end; planned: for maintenance, announced beforehand.

    The part is a block, host, chip or link, which takes its block out, or a switch (ocs).
    """

    start: float
    end: float
    part: Part
    planned: bool = False

    def __post_init__(self) -> None:
        number(f"outage of {self.part}: start", self.start, unit="seconds")
        number(f"outage of {self.part}: end", self.end, unit="seconds", endless=True)
        if self.end < self.start:
            raise ValueError(
                f"outage of {self.part}: from {self.start} to {self.end}; start is before end"
            )
        if self.part.kind == "port":
            raise ValueError(
                f"outage of {self.part}: a port's fibre is moved to a spare port; give its block, "
                "host, chip, link or ocs"
            )


@dataclass(frozen=True, kw_only=True)
class FailureRates:
    """Rates at which the parts of a pod fail, and mean times of repair.

    Attributes:
      host, cable, switch: failures of one part a day. Published: 0.08 %, 0.005 %, 0.04 % (Zu et
        al., NSDI 2024, of machines, ICI cables and OCSes). A block's cables are its 144 wires and
        96 fibres.
      host_repair, cable_repair, switch_repair: mean seconds until the part is in use again. Not
        published: these are assumptions.
    """

    host: float = 0.0008
    cable: float = 0.00005
    switch: float = 0.0004
    host_repair: float = 8 * 3600.0
    cable_repair: float = 24 * 3600.0
    switch_repair: float = 8 * 3600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number(f"failure rates: {name}", value)

    def repair(self, kind: str) -> float:
        """Mean seconds that a part of a kind (host, link, ocs) is out."""
        return {"host": self.host_repair, "link": self.cable_repair, "ocs": self.switch_repair}[
            kind
        ]

    def block_failures(self, pod: Pod = TPU_V4) -> float:
        """Failures of a block a second: of any of its hosts and cables."""
        block = block_of(pod)
        return (block.hosts * self.host + len(_cables(block)) * self.cable) / DAY

    def block_availability(self, pod: Pod = TPU_V4) -> float:
        """The part of the time that all hosts and cables of a block are up.

        A part is up for 1 / rate and out for its repair, in turn, so up rate^-1 of
        rate^-1 + repair; parts fail independently.
        """
        host = 1 / (1 + self.host / DAY * self.host_repair)
        cable = 1 / (1 + self.cable / DAY * self.cable_repair)
        block = block_of(pod)
        return host**block.hosts * cable ** len(_cables(block))


PUBLISHED_RATES = FailureRates()


def generate_jobs(
    horizon: float,
    *,
    load: float = 0.8,
    mean_work: float = DAY,
    sizes: Mapping[float, Sequence[str]] | Sequence[tuple[float, Sequence[str]]] = SIZES,
    urgent: float = 0.1,
    opt_in: float = 0.95,
    slowdown: tuple[float, float] = (0.005, 0.086),
    seed: int = 0,
    pod: Pod = TPU_V4,
) -> list[Job]:
    """Jobs that arrive as a Poisson process, with exponentially distributed work.

    Args:
      load: the part of all blocks that the jobs would hold if nothing failed.
      mean_work: an assumption.
      sizes: {share: slices}, as `SIZES`, or such pairs.
      urgent: part of the jobs that have priority 1 (an assumption); the others have 0.
      opt_in: part of the jobs that may be rerouted; published: 95 % (NSDI 2024).
      slowdown: of those, between these, evenly; published: 0.5 .. 8.6 % of step time.
    """
    number("jobs: load", load)
    number("jobs: mean_work", mean_work, above=0, unit="seconds")
    number("jobs: horizon", horizon, unit="seconds")
    number("jobs: urgent", urgent, most=1)
    number("jobs: opt_in", opt_in, most=1)
    seed = whole("jobs: seed", seed)
    for end in slowdown:
        number("jobs: slowdown", end)
    if len(slowdown) != 2 or slowdown[0] > slowdown[1]:
        raise ValueError(f"jobs: slowdown {slowdown}: the least and the most, in this order")
    groups = list(sizes.items() if isinstance(sizes, Mapping) else sizes)
    for share, group in groups:
        number("jobs: share of sizes", share)
        if not group:
            raise ValueError(f"jobs: sizes: the share {share} has no slices")
    if not sum(share for share, _ in groups) > 0:
        raise ValueError(f"jobs: sizes {sizes}: shares of slices, together more than 0")
    pod = of_blocks(pod)
    names, shares = list[str](), list[float]()
    for share, group in groups:
        weights = np.array([1 / _slice(name, pod).num_blocks for name in group])
        names += group
        shares += (share * weights / weights.sum()).tolist()
    chances = np.array(shares) / sum(shares)
    blocks = np.array([_slice(name, pod).num_blocks for name in names])
    rate = load * pod.num_blocks / float(chances @ blocks) / mean_work
    number("jobs: load times horizon / mean_work", rate * horizon, most=_MOST, unit="jobs")
    rng = np.random.default_rng([seed, 1])
    count = rng.poisson(rate * horizon)
    columns = zip(
        np.sort(rng.uniform(0, horizon, count)).tolist(),
        rng.choice(len(names), count, p=chances).tolist(),
        rng.exponential(mean_work, count).tolist(),
        (rng.random(count) < urgent).tolist(),
        (rng.random(count) < opt_in).tolist(),
        rng.uniform(*slowdown, count).tolist(),
        strict=True,
    )
    return [
        Job(
            name=f"job{number}",
            slice=_slice(names[size], pod),
            arrival=arrival,
            work=work,
            priority=int(first),
            slowdown=slow if opted else None,
        )
        for number, (arrival, size, work, first, opted, slow) in enumerate(columns)
    ]


def generate_outages(
    horizon: float, rates: FailureRates = PUBLISHED_RATES, *, seed: int = 0, pod: Pod = TPU_V4
) -> list[Outage]:
    """Failures of hosts, cables and switches, by start; repairs take exponential times.

    Each part fails as a Poisson process while it is up, whatever the others do.
    """
    number("outages: horizon", horizon, unit="seconds")
    seed = whole("outages: seed", seed)
    pod = of_blocks(pod)
    block, blocks = pod.block, range(pod.num_blocks)
    hosts = [Part("host", (b, h)) for b in blocks for h in range(block.hosts)]
    cables = [Part("link", (b, *cable)) for b in blocks for cable in _cables(block)]
    all_switches = [Part("ocs", tuple(switch)) for switch in switches(pod)] if pod.switch else []
    found = []
    for key, (parts, rate) in enumerate(
        ((hosts, rates.host), (cables, rates.cable), (all_switches, rates.switch))
    ):
        if not parts:
            continue
        expected = rate / DAY * len(parts) * horizon
        number("outages: horizon times rates", expected, most=_MOST, unit="outages")
        rng = np.random.default_rng([seed, 2, key])
        count = rng.poisson(expected)
        starts = np.sort(rng.uniform(0, horizon, count)).tolist()
        which = rng.integers(len(parts), size=count).tolist()
        lasts = rng.exponential(rates.repair(parts[0].kind), count).tolist()
        up_from: dict[int, float] = {}
        for start, which_part, seconds in zip(starts, which, lasts, strict=True):
            if start >= up_from.get(which_part, 0.0):  # a part that is out cannot fail
                up_from[which_part] = start + seconds
                found.append(Outage(start, start + seconds, parts[which_part]))
    return sorted(found, key=lambda outage: outage.start)


def generate_maintenance(
    horizon: float, *, every: float, lasts: float, pod: Pod = TPU_V4
) -> list[Outage]:
    """A planned outage of each block in each period of `every` seconds, one block after another."""
    pod = of_blocks(pod)
    number("maintenance: horizon", horizon, unit="seconds")
    number("maintenance: every", every, above=0, unit="seconds")
    number("maintenance: lasts", lasts, above=0, most=every, unit="seconds of every")
    number(
        "maintenance: horizon / every",
        horizon / every * pod.num_blocks,
        most=_MOST,
        unit="outages",
    )
    turns = range(int(horizon / every * pod.num_blocks) + 1)
    starts = [(turn * every / pod.num_blocks, turn % pod.num_blocks) for turn in turns]
    return [
        Outage(start, start + lasts, Part("block", (block,)), planned=True)
        for start, block in starts
        if start < horizon
    ]


_MOST = 1_000_000  # jobs or outages of a simulation, at a kilobyte each


@lru_cache
def _cables(block: Block) -> list[tuple[int, ...]]:
    """(x, y, z, direction) of a block's 144 wires and 96 fibres, each once."""
    return [
        (*place, 2 * d + minus)
        for place in np.ndindex(block.shape)
        for d in range(3)
        for minus in (0, 1)
        if not minus or place[d] == 0
    ]


@lru_cache
def _slice(name: str, pod: Pod) -> Slice:
    return Slice.parse(name, pod)
