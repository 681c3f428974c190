"""Simulation of packets over links, cycle by cycle, with queues and finite buffers.

A model of moderate fidelity to validate the rest of the package on small slices. In a cycle every
directed link moves at most one packet, and a packet moves only where the next buffer has a free
place (a credit, which is back the cycle after one left). Any packet of a buffer may leave it, not
only the first (virtual output queues). On a link those under way go before a chip's own, the ones
that waited longest first. A chip has one endless queue of its own packets per link, and takes what
arrives at once. A hop takes one cycle.

No simulation can end before the fluid bound, and 16 units of all-to-all on the best single paths
end within 1 % of it on 4x4x8 and 4 % on 4x4x8_twisted (5 % and 7 % with 4 and 8 places a buffer).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topology.arrays import Integers
from topology.routing.deadlock import Datelines, buffers
from topology.routing.routing import Routing, routes
from topology.torus.slices import Slice


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Outcome of a simulation of packets on a slice.

    Attributes:
      cycles: until the last arrived, or until nothing moved any more.
      delivered: packets that arrived.
      stuck: packets that wait for each other in a deadlock.
      link_packets: int [N, 6], packets over each directed link. Its largest entry is the fewest
        cycles possible on these paths.
    """

    cycles: int
    delivered: int
    stuck: int
    link_packets: Integers


def simulate(num_chips: int, paths: npt.ArrayLike, *, places: int | None = None) -> Simulation:
    """Sends packets along given paths, all ready at the start.

    Args:
      paths: int [P, H], the buffers (see `topology.routing.deadlock`) of each packet's path in
        order, -1 after; at least one hop each. A chip sends its own in this order, link by link.
      places: packets that a buffer holds; None for any number.
    """
    paths = np.asarray(paths)
    if (paths[:, 0] < 0).any():
        raise ValueError("paths: a packet has no hop; leave out what a chip sends to itself")
    if places is not None and places < 1:
        raise ValueError(f"places: {places}; a buffer holds 1 packet or more")
    room = len(paths) if places is None else places
    links, P = 6 * num_chips, len(paths)
    paths = np.column_stack([paths, np.full(P, -1)])
    first = paths[:, 0] % links
    own = np.argsort(first, kind="stable")
    own_next = np.searchsorted(first[own], np.arange(links))
    own_end = np.searchsorted(first[own], np.arange(links), side="right")
    held = np.zeros(int(paths.max(initial=0)) + 1, int)  # packets in each buffer
    hop = np.zeros(P, int)
    link_packets = np.zeros(links, int)
    under_way = np.zeros(0, int)  # packets in buffers, in the order in which they came
    cycles = delivered = 0
    while delivered < P:
        ready = own[own_next[own_next < own_end]]
        packets = np.concatenate([under_way, ready])
        target, arrives = paths[packets, hop[packets]], paths[packets, hop[packets] + 1] < 0
        able = np.flatnonzero(arrives | (held[target] < room))
        if not able.size:
            break
        able = able[np.unique(target[able] % links, return_index=True)[1]]  # the first per link
        moving, target, arrives = packets[able], target[able], arrives[able]
        through = able < len(under_way)
        np.subtract.at(held, paths[moving[through], hop[moving[through]] - 1], 1)
        own_next[first[moving[~through]]] += 1
        held[target[~arrives]] += 1
        link_packets[target % links] += 1
        hop[moving] += 1
        stays = np.ones(len(under_way), bool)
        stays[able[through]] = False
        under_way = np.concatenate([under_way[stays], moving[~arrives]])
        delivered += int(arrives.sum())
        cycles += 1
    return Simulation(
        cycles=cycles,
        delivered=delivered,
        stuck=P - delivered,
        link_packets=link_packets.reshape(num_chips, 6),
    )


def all_to_all_packets(
    slice: Slice,
    routing: Routing,
    units: int = 1,
    *,
    datelines: Datelines | None = None,
    seed: int = 0,
) -> Integers:
    """int [units N (N - 1), H]: paths of `units` packets from every chip to every other, shuffled.

    Where a displacement has several ways, its packets are dealt out to them in their shares, over
    sources and units together, on a torus.
    """
    rng, N = np.random.default_rng(seed), slice.num_chips
    everyone, packets = np.arange(N), []
    if N == 1:
        return np.zeros((0, 1), int)
    ways = [
        buffers(slice, routes(slice, routing, way, everyone), datelines)
        for way in range(len(routing.shares))
    ]
    # [W, N, N] by source and destination; on a mesh only one way is open to a pair.
    steps = slice.coordinates[None] - slice.coordinates[:, None]
    displacement = slice.index(
        np.mod(steps, slice.shape) if not slice.is_torus else slice.reduce(steps)
    )
    open_to = np.array([way[..., 0] >= 0 for way in ways])
    parts = np.cumsum(np.where(open_to, routing.shares[:, displacement], 0), axis=0)
    for _ in range(units):
        turn = np.argsort(rng.random((N, N)), axis=0)  # of each source, per displacement
        draw = (turn[everyone[:, None], displacement] + rng.random()) / N
        choice = (parts <= draw * parts[-1]).sum(axis=0)
        H = max(way.shape[-1] for way in ways)
        chosen = np.full((N, N, H), -1)
        for w, way in enumerate(ways):
            chosen[choice == w, : way.shape[-1]] = way[choice == w]
        packets.append(chosen[~np.eye(N, dtype=bool)])
    packets = np.concatenate(packets)
    return packets[rng.permutation(len(packets))]
