"""Virtual channels that keep packets from waiting for each other in a circle.

A packet that holds a buffer waits for the next one on its path. No deadlock can arise where the
graph of these waits, the channel dependency graph, has no cycle (Dally and Seitz, IEEE Trans.
Computers C-36, 1987). Dimension order leaves only the rings as cycles, and a dateline on each ring
cuts them: the packet that crosses it goes on in the next virtual channel.

On a twisted torus the ring through a chip along a dimension passes that dimension's end several
times; a packet crosses as many datelines as it passes ends, and has one virtual channel more. A
channel's rank (dimension in the order, datelines crossed, place since the last) grows along every
path, so there is no cycle. Two virtual channels are enough where no path makes more hops along a
dimension than it has chips, as on all regular and shipped twisted slices.

A buffer's id is `virtual_channel * 6 N + link`, link = 6 * chip + direction.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from topology.arrays import Integers
from topology.routing.routing import Routing, routes
from topology.torus.slices import Slice

Datelines = tuple[tuple[frozenset[int], frozenset[int]], ...]
"""[d][0 or 1]: the coordinates from which steps along +d (0) or -d (1) cross a dateline."""


def end_datelines(slice: Slice) -> Datelines:
    """Places a dateline at the end of each dimension that wraps around."""
    return tuple((frozenset([k - 1]), frozenset([0])) for k in slice.shape)


def virtual_channels(
    slice: Slice, links: npt.ArrayLike, datelines: Datelines | None = None
) -> Integers:
    """int [..., H]: the virtual channel of every hop of dimension-order paths.

    It counts the datelines that the path has crossed in the hop's dimension, this hop included.

    Args:
      links: int [..., H], a path's links in order, then -1; dimension after dimension.
      datelines: `end_datelines` by default.
    """
    links = np.asarray(links)
    crossing = np.zeros(slice.num_chips * 6 + 1, bool)  # the last entry answers for -1
    for d, signs in enumerate(datelines or end_datelines(slice)):
        if slice.wrap[d]:
            for sign, places in enumerate(signs):
                chips = np.flatnonzero(np.isin(slice.coordinates[:, d], list(places)))
                crossing[6 * chips + 2 * d + sign] = True
    crosses = crossing[links]
    dimension = np.where(links < 0, -1, links % 6 // 2)
    channels = np.zeros(links.shape, int)
    for d in range(3):
        along = dimension == d
        channels += np.where(along, np.cumsum(crosses & along, axis=-1), 0)
    return channels


def buffers(slice: Slice, links: npt.ArrayLike, datelines: Datelines | None = None) -> Integers:
    """int [..., H]: the buffer that every hop of dimension-order paths goes into; -1 after."""
    links = np.asarray(links)
    channels = virtual_channels(slice, links, datelines)
    return np.where(links < 0, -1, channels * 6 * slice.num_chips + links)


def routing_buffers(
    slice: Slice, routing: Routing, datelines: Datelines | None = None, *, chunk: int = 64
) -> Iterator[Integers]:
    """The paths of all pairs of chips as buffers, int [S, N, H], a chunk of sources at a time."""
    for way in range(len(routing.shares)):
        for first in range(0, slice.num_chips, chunk):
            sources = np.arange(first, min(first + chunk, slice.num_chips))
            yield buffers(slice, routes(slice, routing, way, sources), datelines)


def dependencies(paths: Iterable[Integers]) -> Integers:
    """int [E, 2]: buffers one of which a path leaves for the other, each pair once.

    Args:
      paths: arrays int [..., H] of buffers in order, then -1.
    """
    pairs = [np.zeros(0, np.int64)]
    for path in paths:
        here, there = path[..., :-1], path[..., 1:]
        on = there >= 0
        pairs.append(np.unique((here[on].astype(np.int64) << 32) + there[on]))
    pairs = np.unique(np.concatenate(pairs))
    return np.column_stack([pairs >> 32, pairs & 0xFFFFFFFF])


def find_cycle(waits: npt.ArrayLike) -> list[int] | None:
    """Buffers that wait for each other in a circle, in order; None where there are none.

    None proves that the routing is free of deadlock.

    Args:
      waits: int [E, 2], from `dependencies`.
    """
    waits = np.asarray(waits).reshape(-1, 2)
    names, index = np.unique(waits, return_inverse=True)
    tail, head = index.reshape(-1, 2).T
    if not len(names):
        return None
    loops = np.flatnonzero(tail == head)
    if loops.size:
        return [int(names[tail[loops[0]]])]
    graph = csr_array((np.ones(len(tail), np.int8), (tail, head)), (len(names),) * 2)
    count, label = connected_components(graph, connection="strong")
    if count == len(names):
        return None
    # From a buffer of a circle back to the first that waits for it.
    inside = np.flatnonzero(label == np.argmax(np.bincount(label) > 1))
    part = graph[inside][:, inside]
    reached, before = breadth_first_order(part, 0)
    waiting = set(part[:, [0]].nonzero()[0].tolist())
    here = next(int(c) for c in reached if int(c) in waiting)
    cycle = []
    while here >= 0:
        cycle.append(int(names[inside[here]]))
        here = int(before[here])
    return cycle[::-1]


def is_deadlock_free(slice: Slice, routing: Routing, datelines: Datelines | None = None) -> bool:
    """Tells whether dimension-order routing with these datelines can never deadlock."""
    return find_cycle(dependencies(routing_buffers(slice, routing, datelines))) is None
