"""Routings by displacement: how many hops along x, y and z take a chip's data to another's place.

On a torus a displacement has many vectors of hops, one modulo the lattice L; a routing says which
of them it takes, in what parts, and in which order of dimensions it makes the hops. Every chip does
the same, so for uniform all-to-all each link of a direction carries the same load and only the
vectors count: breaking the ties between shortest vectors well is all there is to gain.

Letters: N chips, W paths at most per displacement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, vstack

from topology.arrays import Booleans, Floats, Integers
from topology.collectives.prices import best_mix
from topology.numbers import choice
from topology.torus.shapes import three
from topology.torus.slices import Slice

TIES = ("split", "early", "late", "positive")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Dimension-order routing of a slice.

    Attributes:
      vectors: int [W, N, 3], signed hops to the chip at each displacement (chip c is the
        displacement from chip 0 to c). Without wraparound in a dimension both signs stand there,
        and a source takes the one that stays inside.
      shares: float [W, N] >= 0, the part of the data on each path. On a torus the parts of a
        displacement add up to 1.
      order: the dimensions in the order in which the hops are made.
    """

    vectors: Integers
    shares: Floats
    order: tuple[int, int, int] = (0, 1, 2)


def short_vectors(slice: Slice) -> tuple[Integers, Integers]:
    """The vectors of hops to every chip from chip 0 that no other is as short as in x, y and z.

    Returns:
      chips int [M] ascending, vectors int [M, 3]. A vector is left out where another to the same
      chip has no more hops in every dimension, and fewer in one. All shortest ones are there.

    Raises:
      ValueError: the slice does not wrap around in every dimension.
    """
    _check_torus(slice)
    # More hops along d than half the order of e_d can be replaced by fewer the other way round;
    # beyond twice the diameter a vector is longer than any routing has use for.
    reach = [min(_order(slice, d) // 2, 2 * slice.diameter) for d in range(3)]
    grid = np.indices([2 * k + 1 for k in reach]).reshape(3, -1).T - reach
    chips = slice.index(slice.reduce(grid))
    hops = np.abs(grid)
    order = np.lexsort((*hops.T, hops.sum(axis=1), chips))
    found = list[Integers]()
    while order.size:
        # The shortest left of each chip stays, and what it is as short as everywhere goes.
        here = chips[order]
        first = np.searchsorted(here, here)
        best = hops[order[first]]
        longer = (best <= hops[order]).all(axis=1) & (best != hops[order]).any(axis=1)
        taken = first == np.arange(len(order))
        found.append(order[taken])
        order = order[~taken & ~longer]
    kept = np.concatenate(found)
    kept = kept[np.argsort(chips[kept], kind="stable")]
    return chips[kept], grid[kept]


def dimension_order(
    slice: Slice, *, ties: str = "split", order: tuple[int, int, int] = (0, 1, 2)
) -> Routing:
    """Dimension-order routing along shortest vectors.

    Args:
      ties: between shortest vectors of the same displacement:
        "split": all of them in equal parts;
        "early": those with most hops in the earlier dimensions of the order, the two signs of a
          dimension in equal parts;
        "late": those with most hops in the later dimensions, signs likewise;
        "positive": one vector, the one with the largest signed hops, earlier dimensions first.
      order: of the dimensions. Deadlock-free with as many virtual channels as a path crosses
        datelines, and one (see `topology.routing.deadlock`).

    Raises:
      ValueError: no such rule or order.
    """
    choice("ties", ties, TIES)
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"order {order}: the dimensions 0, 1 and 2, each once")
    if not slice.is_torus:
        return _mesh_order(slice, ties, order)
    chips, vectors = short_vectors(slice)
    length = np.abs(vectors).sum(axis=1)
    shortest = length == slice.hop_distances()[chips]
    chips, vectors = chips[shortest], vectors[shortest]
    if ties != "split":
        ranked = {
            "early": np.abs(vectors[:, list(order)]),
            "late": np.abs(vectors[:, list(order[::-1])]),
            "positive": vectors[:, list(order)],
        }[ties]
        sort = np.lexsort((*-ranked.T[::-1], chips))
        chips, vectors, ranked = chips[sort], vectors[sort], ranked[sort]
        first = np.searchsorted(chips, np.arange(slice.num_chips))
        best = (ranked == ranked[first[chips]]).all(axis=1)
        chips, vectors = chips[best], vectors[best]
    parts = 1 / np.bincount(chips)[chips]
    return _routing(slice, chips, vectors, parts, order)


def optimal_split(slice: Slice, *, order: tuple[int, int, int] = (0, 1, 2)) -> Routing:
    """The dimension-order routing whose parts are best for uniform all-to-all on a torus.

    It reaches the optimum of all routings (`throughput.all_to_all`): the hops of a path count and
    not their order, and by the symmetry v -> -v the loads of +d and -d are equal.
    """
    chips, vectors = short_vectors(slice)
    hops = np.abs(vectors)
    starts = np.searchsorted(chips, np.arange(slice.num_chips))

    def cheapest(prices: Floats) -> tuple[float, Floats, list[Floats]]:
        costs = hops @ prices
        least = np.minimum.reduceat(costs, starts)
        ties = costs <= least[chips] * (1 + 1e-12)
        parts = ties / np.add.reduceat(ties, starts)[chips]
        cost = float(slice.num_chips * 2 * least.sum() / 2)
        return cost, (parts @ hops / 2)[None], [parts]

    mix = best_mix(cheapest, np.full(3, 2 * slice.num_chips))
    parts: Floats = sum(share * way for share, way in zip(mix.shares, mix.ways, strict=True))
    used = parts > 1e-12
    return _routing(slice, chips[used], vectors[used], parts[used], order)


def best_single_path(
    slice: Slice, *, order: tuple[int, int, int] = (0, 1, 2), time_limit: float = 60.0
) -> tuple[Routing, int]:
    """The best routing of a torus with one path per displacement, for uniform all-to-all.

    An integer program: one of `short_vectors` for every displacement so that the most loaded
    direction carries least. Its bound is the next whole number above the optimum of all routings.

    Args:
      time_limit: seconds; later, the best found by then.

    Returns:
      The routing (W = 1), and the bound: no routing with one path per displacement has a smaller
      largest load. Compare it with `direction_loads(routing).max()`.
    """
    chips, vectors = short_vectors(slice)
    M, N = len(chips), slice.num_chips
    split = direction_loads(optimal_split(slice)).max()
    bound = int(np.ceil(split - 1e-6 * max(split, 1)))
    hops = np.hstack([np.maximum(vectors, 0), np.maximum(-vectors, 0)])
    loads = csr_array(np.column_stack([hops.T, -np.ones(6)]))
    one = csr_array(coo_array((np.ones(M), (chips, np.arange(M))), (N, M + 1)))
    solution = milp(
        np.concatenate([np.zeros(M), [1.0]]),
        constraints=LinearConstraint(
            vstack([loads, one]),
            np.concatenate([np.full(6, -np.inf), np.ones(N)]),
            np.concatenate([np.zeros(6), np.ones(N)]),
        ),
        integrality=np.ones(M + 1),
        bounds=Bounds(
            np.concatenate([np.zeros(M), [bound]]), np.concatenate([np.ones(M), [np.inf]])
        ),
        options={"time_limit": time_limit},
    )
    if solution.x is None:
        raise RuntimeError(f"HiGHS found no single-path routing: {solution.message}")
    chosen = np.flatnonzero(np.round(solution.x[:M]))
    routing = _routing(slice, chips[chosen], vectors[chosen], np.ones(N), order)
    return routing, max(bound, int(np.ceil(solution.mip_dual_bound - 1e-6)))


def direction_loads(routing: Routing) -> Floats:
    """float [6]: the load of each link of +x, -x, +y, -y, +z, -z under uniform all-to-all.

    On a torus, when every chip sends one unit to every other; `throughput.all_to_all` gives what
    the largest can be at least.
    """
    ahead = np.einsum("wn,wnd->d", routing.shares, np.maximum(routing.vectors, 0))
    back = np.einsum("wn,wnd->d", routing.shares, np.maximum(-routing.vectors, 0))
    return np.column_stack([ahead, back]).ravel()


def routes(slice: Slice, routing: Routing, way: int, sources: npt.ArrayLike) -> Integers:
    """int [S, N, H]: the links of the paths from some sources to every chip, in order; then -1.

    Args:
      way: of the routing's W; a pair that does not go this way has no links.
      sources: int [S], chips.
    """
    sources = np.asarray(sources)
    inside, chips = _targets(slice, routing, way, sources)
    S, N = inside.shape
    hops = np.abs(routing.vectors[way])
    links = np.full((S, N, int(hops.sum(axis=1).max(initial=0))), -1)
    here = np.broadcast_to(sources[:, None], (S, N)).copy()
    made = np.zeros((S, N), int)
    for d in routing.order:
        direction = 2 * d + (routing.vectors[way, :, d] < 0)
        for step in range(int(hops[:, d].max())):
            s, v = np.nonzero(inside & (hops[:, d] > step))
            links[s, v, made[s, v]] = 6 * here[s, v] + direction[v]
            here[s, v] = slice.neighbours[here[s, v], direction[v]]
            made[s, v] += 1
    # From displacements to destinations.
    out = np.full_like(links, -1)
    s, v = np.nonzero(inside)
    out[s, chips[s, v]] = links[s, v]
    return out


def _targets(
    slice: Slice, routing: Routing, way: int, sources: Integers
) -> tuple[Booleans, Integers]:
    """(bool [S, N], int [S, N]): whether a source goes a way, and to which chip it leads."""
    ends = slice.coordinates[sources][:, None] + routing.vectors[way]
    walls = ~np.array(slice.wrap)
    inside = np.asarray(((ends >= 0) & (ends < slice.shape) | ~walls).all(axis=-1))
    inside &= routing.shares[way] > 0
    return inside, slice.index(slice.reduce(np.where(inside[..., None], ends, 0)))


def _routing(
    slice: Slice, chips: Integers, vectors: Integers, parts: Floats, order: Sequence[int]
) -> Routing:
    """Pads lists by chip to W ways; chips ascending."""
    first = np.searchsorted(chips, np.arange(slice.num_chips))
    way = np.arange(len(chips)) - first[chips]
    W = int(way.max()) + 1
    padded = np.zeros((W, slice.num_chips, 3), int)
    shares = np.zeros((W, slice.num_chips))
    padded[way, chips], shares[way, chips] = vectors, parts
    return Routing(vectors=padded, shares=shares, order=three(order))


def _mesh_order(slice: Slice, ties: str, order: Sequence[int]) -> Routing:
    """Routes as `dimension_order`, without all wraparound (so not twisted): paths differ by
    signs."""
    vectors = np.zeros((1, slice.num_chips, 3), int)
    shares = np.ones((1, slice.num_chips))
    for d, (k, wraps) in enumerate(zip(slice.shape, slice.wrap, strict=True)):
        ahead = slice.coordinates[:, d]
        parts = np.ones((2, slice.num_chips))
        if wraps:  # a mesh's ties are antipodes only
            tie = 0.0 if ties == "positive" else 0.5
            parts[1] = np.where(2 * ahead > k, 1.0, np.where(2 * ahead == k, tie, 0.0))
            parts[0] = 1 - parts[1]
        else:
            parts[1] = ahead > 0
        both = [vectors.copy(), vectors.copy()]
        both[0][:, :, d], both[1][:, :, d] = ahead, ahead - k
        vectors = np.concatenate(both)
        shares = np.concatenate([shares * parts[0], shares * parts[1]])
    some = shares.any(axis=1)
    return Routing(vectors=vectors[some], shares=shares[some], order=three(order))


def _order(slice: Slice, d: int) -> int:
    """Steps along +d that lead from a chip back to itself."""
    if slice.shape[d] == 1:
        return 1
    chip, steps = int(slice.neighbours[0, 2 * d]), 1
    while chip:
        chip, steps = int(slice.neighbours[chip, 2 * d]), steps + 1
    return steps


def _check_torus(slice: Slice) -> None:
    if not slice.is_torus:
        raise ValueError(
            f"slice {slice}: vectors of hops are those of a torus; take one that wraps around in "
            "x, y and z"
        )
