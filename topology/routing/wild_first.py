"""Wild-first routing around a failed optical switch, free of deadlock with two virtual channels.

"Resiliency at Scale" (NSDI 2024) describes the idea: a packet may first make at most one wild hop
per dimension and then goes in dimension order. What follows is this library's own construction.

The order begins with the dimension of the failed switch. Then only what starts in a column that
lost its links is stuck, and a wild hop along one of the other two dimensions, or both, takes it to
a column that has them; other chips may make wild hops too, to even out the load. Dimension order
with datelines uses only some of the buffers: a link from a dateline leaves its virtual channel 0
empty, and one further from the last dateline than a packet ever goes leaves its channel 1 empty.
Wild hops go into these empty buffers only. So they wait for dimension order but it never waits for
them, and the dependency graph stays without a cycle. Datelines are put where the failed columns
have their wild hops, and on a ring of eight chips the columns beside them have theirs too: what
these take over from the failed ones they must be able to pass on, or the failed column's load is
shared by its eight neighbours alone, and a slice of 8x8x8 keeps 8/9 of its all-to-all, not 15/16.

Which pairs make which wild hops is a linear program (`topology.collectives.prices`).
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from topology.arrays import Floats, Integers
from topology.collectives.prices import best_mix
from topology.hardware import block_of
from topology.routing.deadlock import Datelines, buffers, end_datelines
from topology.routing.routing import dimension_order, routes
from topology.routing.throughput import orbits, switch_links
from topology.torus.shapes import three
from topology.torus.slices import Slice


@dataclass(frozen=True, kw_only=True)
class WildFirst:
    """Uniform all-to-all by wild-first routing around a failed switch.

    Attributes:
      max_link_load: when every chip sends one unit to every other.
      lower_bound: no choice among these paths has a smaller one.
      order: of the dimensions after the wild hops.
      sources, destinations, shares: int [K], int [K], float [K]: pairs, and the part of a pair's
        unit that takes each path; for one source of each class, the others' are their images.
      paths: int [K, H]: the buffers (see `topology.routing.deadlock`) of a path in order, then -1.
    """

    max_link_load: float
    lower_bound: float
    order: tuple[int, int, int]
    sources: Integers
    destinations: Integers
    shares: Floats
    paths: Integers


def wild_first(
    slice: Slice, dimension: int, i: int, j: int, *, tolerance: float = 1e-4, max_rounds: int = 100
) -> WildFirst:
    """The best wild-first routing of uniform all-to-all without the switch OCS(dimension, i, j).

    Seconds on 128 chips, up to a minute on 512.

    Raises:
      ValueError: no such switch, or paths that cross more than one dateline of a dimension, which
        two virtual channels do not serve.
    """
    failed = switch_links(slice, dimension, i, j)
    sources, destinations, paths = candidate_paths(slice, dimension, i, j)
    links = 6 * slice.num_chips

    # Symmetries that keep the failed links, the wild hops and the order of dimensions.
    wild = np.flatnonzero(_buffers(slice, dimension, i, j)[1] >= 0)
    chips, classes = orbits(slice, failed, wild, reflections_only=True)
    _, first, counts = np.unique(chips, return_index=True, return_counts=True)
    mine = np.isin(sources, first)
    sources, destinations, paths = sources[mine], destinations[mine], paths[mine]
    sort = np.lexsort((destinations, sources))
    sources, destinations, paths = sources[sort], destinations[sort], paths[sort]

    alive = (slice.neighbours.ravel() >= 0) & ~np.isin(np.arange(links), failed)
    sizes = np.bincount(np.unique(classes[alive], return_inverse=True)[1])
    label = np.full(links, -1)
    label[alive] = np.unique(classes[alive], return_inverse=True)[1]
    hop = paths >= 0
    incidence = csr_array(
        (
            np.ones(hop.sum()),
            label[paths[hop] % links],
            np.concatenate([[0], np.cumsum(hop.sum(axis=1))]),
        ),
        (len(paths), len(sizes)),
    )
    group = np.searchsorted(first, sources)
    pair = group * slice.num_chips + destinations
    starts = np.flatnonzero(np.concatenate([[True], pair[1:] != pair[:-1]]))
    pair = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(pair))))

    def cheapest(prices: Floats) -> tuple[float, Floats, list[Floats]]:
        costs = incidence @ prices
        least = np.minimum.reduceat(costs, starts)
        ties = costs <= least[pair] * (1 + 1e-9)
        parts = ties / np.add.reduceat(ties, starts)[pair]
        per_group = csr_array((parts, (group, np.arange(len(parts)))), (len(first), len(parts)))
        loads = (per_group @ incidence).toarray() * counts[:, None] / sizes
        ways = [np.where(group == g, parts, 0) for g in range(len(first))]
        return float(counts[group[starts]] @ least), loads, ways

    mix = best_mix(cheapest, sizes, tolerance=tolerance, max_rounds=max_rounds)
    shares: Floats = sum(share * way for share, way in zip(mix.shares, mix.ways, strict=True))
    used = np.flatnonzero(shares > 1e-12)
    return WildFirst(
        max_link_load=mix.max_link_load,
        lower_bound=mix.lower_bound,
        order=_order(dimension),
        sources=sources[used],
        destinations=destinations[used],
        shares=shares[used],
        paths=paths[used],
    )


def candidate_paths(
    slice: Slice, dimension: int, i: int, j: int
) -> tuple[Integers, Integers, Integers]:
    """Lists the wild-first paths of all pairs that avoid a failed switch.

    Any choice among them is free of deadlock, because all of them together are.

    Returns:
      sources int [K], destinations int [K], paths int [K, H] of buffers, then -1.
    """
    order, links, everyone = _order(dimension), 6 * slice.num_chips, np.arange(slice.num_chips)
    broken = np.zeros(links, bool)
    broken[switch_links(slice, dimension, i, j)] = True
    by_order, wild = _buffers(slice, dimension, i, j)
    H = max(paths.shape[-1] for paths in by_order) + 2
    out = []
    for hops in itertools.product((None, 0, 1), repeat=2):
        here, before = everyone, np.full((slice.num_chips, 2), -1)
        able, made = np.ones(slice.num_chips, bool), 0
        for d, sign in zip(order[1:], hops, strict=True):
            if sign is not None:
                buffer = wild[6 * here + 2 * d + sign]
                able &= buffer >= 0
                before[:, made], made = buffer, made + 1
                here = slice.neighbours[here, 2 * d + sign]
        start = np.flatnonzero(able)
        for way, paths in enumerate(by_order):
            path = paths[here[start]]
            goes = ~broken[np.where(path < 0, 0, path) % links] | (path < 0)
            arrives = (path[..., 0] >= 0) | ((way == 0) & (everyone == here[start][:, None]))
            good = goes.all(axis=-1) & arrives & (everyone != start[:, None])
            s, t = np.nonzero(good)
            whole = np.full((len(s), H), -1)
            whole[:, :made] = before[start[s], :made]
            whole[:, made : made + path.shape[-1]] = path[s, t]
            out.append((start[s], t, whole))
    sources, destinations, paths = (np.concatenate(parts) for parts in zip(*out, strict=True))
    served = np.zeros((slice.num_chips,) * 2, bool)
    served[sources, destinations] = True
    if served.sum() < slice.num_chips * (slice.num_chips - 1):
        raise ValueError(
            f"slice {slice}: with switch ({dimension}, {i}, {j}) failed two virtual channels leave "
            "no wild hop to some chips; take the regular slice or its shipped twist"
        )
    return sources, destinations, paths


def _buffers(slice: Slice, dimension: int, i: int, j: int) -> tuple[list[Integers], Integers]:
    """(the ways of dimension order [N, N, H] as buffers, the buffer of a wild hop over each link).

    A wild hop takes the lower virtual channel that dimension order leaves empty; -1 where it fills
    both, and where the link failed.
    """
    routing = dimension_order(slice, ties="split", order=_order(dimension))
    datelines = _datelines(slice, dimension, i, j)
    everyone, links = np.arange(slice.num_chips), 6 * slice.num_chips
    by_order = [
        buffers(slice, routes(slice, routing, way, everyone), datelines)
        for way in range(len(routing.shares))
    ]
    # Antipodes of which one is at the dateline do without the way that begins by crossing it, since
    # they have the other one: so virtual channel 1 is empty one link sooner.
    for paths in by_order:
        for d, (ahead, back) in enumerate(datelines):
            if d != dimension and ahead != back and not slice.is_twisted:
                crossed = (paths >= links) & (paths % 6 // 2 == d)
                paths[2 * crossed.sum(axis=-1) == slice.shape[d]] = -1
    if max(int(paths.max(initial=0)) for paths in by_order) >= 2 * links:
        raise ValueError(
            f"slice {slice}: paths cross the end of a dimension more than once, and wild-first "
            "routing has two virtual channels; take the regular slice or its shipped twist"
        )
    empty = np.ones(2 * links, bool)
    for paths in by_order:
        empty[paths[paths >= 0]] = False
    empty = empty.reshape(2, links)
    wild = np.where(empty[0], np.arange(links), np.where(empty[1], links + np.arange(links), -1))
    wild[slice.neighbours.ravel() < 0] = -1
    wild[switch_links(slice, dimension, i, j)] = -1
    return by_order, wild


def _order(dimension: int) -> tuple[int, int, int]:
    return three((dimension, *(d for d in range(3) if d != dimension)))


def _datelines(slice: Slice, dimension: int, i: int, j: int) -> Datelines:
    """Datelines: the end of the failed switch's dimension; elsewhere so that columns can be left.

    Wild hops lose the links after the one from the dateline, as far as packets go past it: k/2 - 2
    of a ring of k chips (k/2 - 1 where both directions have theirs at the same place), and all but
    the dateline's own in the short dimension of a twisted slice.
    """
    lines, side = list(end_datelines(slice)), block_of(slice.pod).side
    for d, place in zip(_order(dimension)[1:], (i, j), strict=True):
        k = slice.shape[d]
        if slice.is_twisted or k > 2 * side:  # a column may be left one way only
            ahead, back = place, place + side * (k > 2 * side)
        elif k == side:  # lose the hop into the failed column, which nobody misses
            ahead = back = place + 2
        else:  # lose the hops from the middle between two failed columns on, which nobody misses
            ahead, back = place + 1, place + 3
        lines[d] = (frozenset([ahead % k]), frozenset([back % k]))
    return tuple(lines)
