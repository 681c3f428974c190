"""A schedule played on the links of its slice: every byte counted, and the data checked."""

from dataclasses import dataclass

import numpy as np

from topology.arrays import Floats, Integers
from topology.collectives.collectives import Network
from topology.collectives.schedules import Round, Schedule
from topology.torus.slices import Slice


@dataclass(frozen=True, eq=False)
class Replay:
    """Result of replaying a schedule of a collective on a network.

    Attributes:
      seconds: the rounds one after another; each takes the latency of its longest path and the
        bytes of its most loaded link.
      round_seconds: float [T].
      link_bytes: float [N, 6], of every directed link, over all rounds.
      correct: whether each chip ended with what the collective promises it.
    """

    seconds: float
    round_seconds: Floats
    link_bytes: Floats
    correct: bool


def replay(schedule: Schedule, bytes: float, network: Network | None = None) -> Replay:
    """Replays a schedule of a collective, round by round, and counts what each link carries.

    Args:
      bytes: as in `topology.collectives`.

    Raises:
      ValueError: a transfer's path passes a link that does not exist, or ends elsewhere.
    """
    network, groups = network or Network.of(schedule.groups.slice.pod), schedule.groups
    whole = schedule.kind == "permute"
    piece = bytes / schedule.pieces / (1 if whole else groups.size)
    total, seconds = np.zeros(6 * groups.slice.num_chips), []
    bandwidth = network.bandwidth * network.efficiencies[schedule.strategy]
    for round in schedule.rounds:
        links = _links(groups.slice, round)
        amount = np.broadcast_to(((round.last - round.first) * piece)[:, None], links.shape)
        loads = np.bincount(links[links >= 0], amount[links >= 0], minlength=len(total))
        total += loads
        hops = (links >= 0).sum(axis=1).max(initial=0)
        busy = (loads.reshape(-1, 6) / groups.slice.link_rates).max()
        seconds.append(float(hops * network.hop_latency + busy / bandwidth))
    moved = schedule.kind in ("all_to_all", "permute")
    correct = _delivered(schedule) if moved else _gathered(schedule)
    return Replay(sum(seconds), np.array(seconds), total.reshape(-1, 6), correct)


def _links(slice: Slice, round: Round) -> Integers:
    """int [P, H]: the ids of the links that each path passes; -1 after its end."""
    chip = round.source.copy()
    links = np.full(round.directions.shape, -1)
    for h, direction in enumerate(round.directions.T):
        go = direction >= 0
        links[go, h] = 6 * chip[go] + direction[go]
        chip[go] = slice.neighbours[chip[go], direction[go]]
        if (chip < 0).any():
            lost = round.source[chip < 0][0]
            raise ValueError(f"transfer from chip {lost}: its path passes a link that is not there")
    if (chip != round.destination).any():
        p = np.flatnonzero(chip != round.destination)[0]
        raise ValueError(
            f"transfer from chip {round.source[p]}: its path ends at chip {chip[p]}, "
            f"not at {round.destination[p]}"
        )
    return links


def _pieces(round: Round) -> tuple[Integers, Integers]:
    """The transfers of a round, piece by piece: (index of the transfer, piece)."""
    count = round.last - round.first
    transfer = np.repeat(np.arange(len(count)), count)
    piece = np.arange(len(transfer)) - np.repeat(np.cumsum(count) - count, count)
    return transfer, piece + round.first[transfer]


def _gathered(schedule: Schedule) -> bool:
    """Gathers and reductions with an integer in every piece of every shard of every chip."""
    members, K = schedule.groups.members, schedule.pieces
    n, N = members.shape[1], members.size
    own = np.random.default_rng(0).integers(1, 2**31, (N, n, K))
    sums = own[members].sum(axis=1)  # [G, n, K]
    every = np.arange(n)
    held = own.copy()
    if schedule.kind == "all_gather":
        held = np.zeros_like(own)
        held[members, every] = own[members, every]
        sums = own[members, every]
    for round in schedule.rounds:
        t, piece = _pieces(round)
        sent = held[round.source[t], round.item[t], piece]
        where = (round.destination[t], round.item[t], piece)
        if round.adds:
            np.add.at(held, where, sent)
        else:
            held[where] = sent
    if schedule.kind == "reduce_scatter":
        return bool((held[members, every] == sums).all())
    return bool((held[members] == sums[:, None]).all())


def _delivered(schedule: Schedule) -> bool:
    """Follows every piece by a schedule; tells whether all are sent from where they are, and
    arrive."""
    members, K = schedule.groups.members, schedule.pieces
    G, n = members.shape
    group = np.empty(members.size, int)
    group[members] = np.arange(G)[:, None]
    if schedule.kind == "permute":
        start, end = members, members.copy()
        for round in schedule.rounds:
            end[group[round.destination], round.item] = round.destination
    else:
        start, end = np.repeat(members, n, axis=1), np.tile(members, (1, n))
    at = np.repeat(start[:, :, None], K, axis=2)
    for round in schedule.rounds:
        t, piece = _pieces(round)
        where = (group[round.source[t]], round.item[t], piece)
        if (at[where] != round.source[t]).any():
            return False
        at[where] = round.destination[t]
    return bool((at == end[:, :, None]).all())
