"""Collectives over several slices, which the data-centre network joins.

Within a slice data goes over its links, by the schedules of `topology.collectives`; between slices
each chip exchanges its shard with the chips at the same place, over its part of its host's network:

  all_gather      between slices, then within
  reduce_scatter  the same backwards
  all_reduce      a reduce-scatter within, an all-reduce between, an all-gather within
  all_to_all      what stays in the slice over links, at once with what leaves it

The array may go in pieces, one behind the other: while one is between slices, the next is on the
links. Each piece pays the latencies again.

Letters: S slices, n members of a group in each.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from topology.collectives.collectives import (
    Cost,
    Network,
    check_kind,
    collective_cost,
)
from topology.collectives.degraded import degraded_cost
from topology.collectives.groups import Groups
from topology.numbers import number, whole

LINKS, BETWEEN = "links", "between slices"
_MOST_PIECES = 256


@dataclass(frozen=True)
class Stage:
    """Stage of a collective: what it is, the network that it takes, seconds of latency, and of all
    its bytes."""

    name: str
    network: str
    latency: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SeveralCost:
    """Cost of a collective over several slices.

    Attributes:
      seconds: of all pieces.
      pieces: into which the array is cut.
      stages: that each piece goes through, one after another; of an all-to-all at once.
      bounds: seconds below which no schedule is. "between": what must enter, or leave, a slice over
        the data-centre network. "chip": what a chip receives over its links and its part of that.
    """

    seconds: float
    pieces: int
    stages: tuple[Stage, ...]
    bounds: dict[str, float]


def several_slices(
    kind: str,
    groups: Groups,
    slices: int,
    bytes: float,
    *,
    dcn: float,
    network: Network | None = None,
    dcn_latency: float = 1e-5,
    pieces: int | None = None,
    failed_links: Iterable[int] = (),
) -> SeveralCost:
    """The cost of a collective of groups that have the same members in each of several slices.

    Args:
      kind: all_gather, reduce_scatter, all_reduce or all_to_all.
      bytes: as in `topology.collectives`, over all slices.
      dcn: bytes/s of a chip over the data-centre network, in each direction.
      dcn_latency: seconds of a step between slices; no source has it, so it is an assumption.
      pieces: None: the power of two, up to 256, with which it takes least.
      failed_links: of each slice, as `degraded_cost` has them.

    Raises:
      ValueError: the kind is a permute or none, or a number is out of its range.
    """
    check_kind(kind)
    if kind == "permute":
        raise ValueError("collective 'permute': is within a slice; take another over several")
    slices = whole("slices", slices, least=2, most=2**16)
    number("bytes", bytes)
    number("dcn", dcn, above=0, unit="bytes a second")
    number("dcn_latency", dcn_latency, unit="seconds")
    if pieces is not None:
        pieces = whole("pieces", pieces, least=1, most=2**20)
    network = network or Network.of(groups.slice.pod)
    stages = _stages(kind, groups, slices, bytes, dcn, network, dcn_latency, list(failed_links))
    tried = [2**i for i in range(_MOST_PIECES.bit_length())] if pieces is None else [pieces]
    seconds = {count: _seconds(stages, count, kind == "all_to_all") for count in tried}
    best = min(seconds, key=lambda count: seconds[count])
    return SeveralCost(
        seconds=seconds[best],
        pieces=best,
        stages=stages,
        bounds=_bounds(kind, groups, slices, bytes, dcn, network),
    )


def _stages(
    kind: str,
    groups: Groups,
    slices: int,
    bytes: float,
    dcn: float,
    network: Network,
    dcn_latency: float,
    failed: list[int],
) -> tuple[Stage, ...]:
    S, n = slices, groups.size

    def within(kind: str, bytes: float) -> Stage:
        cost: Cost = collective_cost(kind, groups)
        if failed:
            around = [degraded_cost(kind, groups, failed, longer=hops) for hops in (0, 2)]
            cost = min(around, key=lambda one: one.seconds(bytes, network))
        latency = cost.hops * network.hop_latency
        return Stage(f"{kind} within slices", LINKS, latency, cost.load * bytes / network.bandwidth)

    def between(kind: str, steps: int, bytes: float) -> Stage:
        return Stage(f"{kind} between slices", BETWEEN, steps * dcn_latency, bytes / dcn)

    # Of a ring of slices, a chip's shard of each at a time.
    shard = (S - 1) / S * bytes / n
    if kind == "all_gather":
        return between(kind, S - 1, shard), within(kind, bytes)
    if kind == "reduce_scatter":
        return within(kind, bytes), between(kind, S - 1, shard)
    if kind == "all_reduce":
        return (
            within("reduce_scatter", bytes),
            between(kind, 2 * (S - 1), 2 * shard),
            within("all_gather", bytes),
        )
    return within(kind, bytes / S), between(kind, 1, (S - 1) / S * bytes)


def _seconds(stages: tuple[Stage, ...], pieces: int, at_once: bool) -> float:
    """Seconds until all pieces are through all stages; each network does a stage at a time, that of
    the piece that was ready first."""
    takes = [stage.latency + stage.seconds / pieces for stage in stages]
    if at_once:
        return pieces * max(takes)
    free: dict[str, float] = {LINKS: 0.0, BETWEEN: 0.0}
    ready = [(0.0, piece, 0) for piece in range(pieces)]  # (when, piece, stage)
    end = 0.0
    while ready:
        when, piece, i = heapq.heappop(ready)
        begins = max(when, free[stages[i].network])
        if begins > when and ready and ready[0][0] < begins:
            heapq.heappush(ready, (begins, piece, i))
            continue
        end = free[stages[i].network] = begins + takes[i]
        if i + 1 < len(stages):
            heapq.heappush(ready, (end, piece, i + 1))
    return max(free.values())


def _bounds(
    kind: str, groups: Groups, slices: int, bytes: float, dcn: float, network: Network
) -> dict[str, float]:
    S, n = slices, groups.size
    N = S * n
    links = float(((groups.slice.neighbours >= 0) * groups.slice.link_rates).sum(axis=1).min())
    out = links * network.bandwidth + dcn
    if kind == "all_to_all":
        return {"between": (S - 1) / S * bytes / dcn, "chip": (N - 1) / N * bytes / out}
    # An all-reduce brings together at one slice what the others have, and then takes it to them.
    times = 2 if kind == "all_reduce" else 1
    received = bytes if kind == "all_reduce" else (N - 1) / N * bytes
    return {"between": times * (S - 1) / S * bytes / n / dcn, "chip": received / out}
