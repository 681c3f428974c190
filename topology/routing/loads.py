"""Link loads of any traffic matrix under a routing, and what no routing can go below.

A traffic matrix is float [N, N]: what each chip (row) sends to each other (column), in any unit;
the diagonal costs nothing. Loads are in the same unit, times are load / bandwidth. Bounds are of
loads over the links' rates (`Slice.link_rates`).
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import shortest_path

from topology.arrays import Floats, Integers
from topology.routing.flows import Flow, least_max_load
from topology.routing.routing import Routing
from topology.torus.slices import Slice


def link_loads(slice: Slice, routing: Routing, traffic: npt.ArrayLike) -> Floats:
    """float [N, 6]: what each directed link carries under dimension-order routing.

    A second or two for 4096 chips, with little memory beside the matrix: displacement by
    displacement, all sources at once.

    Args:
      traffic: float [N, N].

    Raises:
      ValueError: the matrix has another shape, or entries that are negative or not finite.
    """
    amounts = _checked(slice, traffic)
    N = slice.num_chips
    chips = np.arange(N)
    reach = np.abs(routing.vectors).max(axis=(0, 1)).tolist()
    moved = [_steps(slice, d, reach[d]) for d in range(3)]
    # passing[d][a, c]: what stands at chip c with a hops along d ahead of it.
    passing = [np.zeros((2 * reach[d] + 1, N)) for d in range(3)]
    walls = [d for d in range(3) if not slice.wrap[d]]
    ways, displacements = np.nonzero(routing.shares)
    for way, v in zip(ways, displacements, strict=True):
        vector = routing.vectors[way, v]
        starts, here = list[Integers](), chips
        for d in routing.order:
            starts.append(here)
            here = moved[d][vector[d]][here]
        amount = routing.shares[way, v] * amounts[chips, here]
        for d in walls:
            end = slice.coordinates[:, d] + vector[d]
            amount = np.where((end >= 0) & (end < slice.shape[d]), amount, 0)
        for d, start in zip(routing.order, starts, strict=True):
            if vector[d]:
                passing[d][vector[d], start] += amount
    loads = np.zeros((N, 6))
    for d in range(3):
        for hops in range(1, reach[d] + 1):
            for sign in (1, -1):
                for made in range(hops):
                    loads[moved[d][sign * made], 2 * d + (sign < 0)] += passing[d][sign * hops]
    return loads


def least_load(
    slice: Slice,
    traffic: npt.ArrayLike,
    *,
    failed_links: Iterable[int] = (),
    tolerance: float = 1e-4,
    max_rounds: int = 200,
    time_limit: float = np.inf,
) -> Flow:
    """The best routing of a traffic matrix, paths splitting at will, with the bound that it meets.

    The multi-commodity linear program over all links: a second on 32 chips, minutes on 128. For
    more chips see `lower_bounds`.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing.
      time_limit: seconds after which the best found by then is returned.
    """
    demands = _checked(slice, traffic)
    if (slice.link_rates != 1).any():
        raise ValueError(
            f"slice {slice}: the best routing is searched for links alike; give one bandwidth"
        )
    left = slice.neighbours.copy()
    left.ravel()[list(failed_links)] = -1
    return least_max_load(
        left,
        demands,
        tolerance=tolerance,
        max_rounds=max_rounds,
        time_limit=time_limit,
    )


def lower_bounds(
    slice: Slice, traffic: npt.ArrayLike, *, failed_links: Iterable[int] = ()
) -> dict[str, float]:
    """Loads that the most loaded link has at least, whatever the routing; cheap on 4096 chips.

    Args:
      traffic: float [N, N].
      failed_links: ids 6 * chip + direction of directed links that carry nothing. "distance" and
        "average" hold without them too, and are those of the slice with all its links.

    Returns:
      "chip": the largest of what a chip sends, or receives, over its links.
      "cut": the largest of what leaves, or enters, a slab of whole planes, over the links that do.
      "distance": all traffic times its shortest paths, over all links.
      "average": on a torus, the optimum of the traffic averaged over all translations: the largest
        load is a convex function of traffic that no translation changes, so averaging never adds to
        it. At least "distance", and equal to the optimum for traffic that is alike for all chips.
    """
    demands = _checked(slice, traffic)
    left = links_left(slice, failed_links)
    bounds = {"chip": _chip_bound(slice, demands, left), "cut": _cut_bound(slice, demands, left)}
    links = max(1e-9, float(((slice.neighbours >= 0) * slice.link_rates).sum()))
    if not slice.is_torus:
        tail, direction = np.nonzero(slice.neighbours >= 0)
        graph = np.zeros((slice.num_chips,) * 2, bool)
        graph[tail, slice.neighbours[tail, direction]] = True
        bounds["distance"] = float((demands * shortest_path(graph, unweighted=True)).sum() / links)
        return bounds
    x, y, z = (_steps(slice, d, slice.shape[d] - 1) for d in range(3))
    chips = np.arange(slice.num_chips)
    mean = np.array([demands[chips, x[a][y[b][z[c]]]].sum() for a, b, c in slice.coordinates])
    bounds["distance"] = float(mean @ slice.hop_distances() / links)
    flow = least_max_load(
        slice.neighbours,
        mean[None] / slice.num_chips,
        sources=[0],
        source_counts=[slice.num_chips],
        link_classes=np.tile(np.arange(6), (slice.num_chips, 1)),
    )
    bounds["average"] = flow.lower_bound / float(slice.link_rates.max())
    return bounds


def _steps(slice: Slice, d: int, reach: int) -> Integers:
    """Permutations [2 reach + 1][N], the chip so many (signed) steps along d.

    Without wraparound in d they go round all the same; the caller leaves those paths out.
    """
    first = slice.coordinates.copy()
    first[:, d] = 0
    ahead = slice.neighbours[:, 2 * d]
    ahead = np.where(ahead < 0, slice.index(first), ahead)
    forward: list[Integers] = [np.arange(slice.num_chips)]
    for _ in range(reach):
        forward.append(ahead[forward[-1]])
    back: list[Integers] = [np.argsort(step) for step in forward[:0:-1]]
    return np.array(forward + back)


def links_left(slice: Slice, failed_links: Iterable[int] = ()) -> tuple[Integers, Integers, Floats]:
    """(tails, heads), int [L] each, of the directed links but for those that failed, and float [L],
    their rates (`Slice.link_rates`)."""
    left = slice.neighbours.copy()
    left.ravel()[list(failed_links)] = -1
    tail, direction = np.nonzero(left >= 0)
    return tail, left[tail, direction], slice.link_rates[direction]


_Left = tuple[Integers, Integers, Floats]  # of `links_left`


def _chip_bound(slice: Slice, traffic: Floats, left: _Left) -> float:
    tail, head, rates = left
    found = 0.0
    for ends, amounts in ((tail, traffic.sum(axis=1)), (head, traffic.sum(axis=0))):
        room = np.bincount(ends, rates, minlength=slice.num_chips)
        found = max(found, float((amounts[room > 0] / room[room > 0]).max(initial=0.0)))
    return found


def _cut_bound(slice: Slice, traffic: Floats, left: _Left) -> float:
    best = 0.0
    tail, head, rates = left
    for d, k in enumerate(slice.shape):
        plane = slice.coordinates[:, d]
        planes = (plane == np.arange(k)[:, None]).astype(float)
        between = planes @ traffic @ planes.T
        links = np.zeros((k, k))
        np.add.at(links, (plane[tail], plane[head]), rates)
        for first in range(k):
            for last in range(first + 1, k + (first > 0)):
                # planes first .. last - 1, so that the rest is a slab or two
                inside = (np.arange(k) >= first) & (np.arange(k) < last)
                for here, there in ((inside, ~inside), (~inside, inside)):
                    if crossing := links[here][:, there].sum():
                        best = max(best, between[here][:, there].sum() / crossing)
    return float(best)


def _checked(slice: Slice, traffic: npt.ArrayLike) -> Floats:
    """float [N, N]: the matrix without its diagonal. ValueError where it is none of the slice."""
    demands = np.asarray(traffic, float)
    N = slice.num_chips
    if demands.shape != (N, N):
        raise ValueError(
            f"traffic: shape {demands.shape}; {slice} has {N} chips, so the matrix is [{N}, {N}]"
        )
    if not np.isfinite(demands).all() or (demands < 0).any():
        raise ValueError("traffic: every entry is finite and 0 or more")
    if np.diagonal(demands).any():
        demands = demands.copy()
        np.fill_diagonal(demands, 0)
    return demands
