"""Routing of any demands over any links with the least largest link load, and its proof."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array
from scipy.sparse.csgraph import dijkstra

from topology.arrays import Floats, Integers
from topology.collectives.prices import best_mix

_APART = 60_000  # sources times classes of links up to which each source has ways of its own


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A fluid routing and the bound that it meets, in the units of the demands.

    Attributes:
      max_link_load: the most loaded link's load under this routing.
      lower_bound: no routing has a smaller one. Where the two are equal up to the tolerance asked
        for, this is the optimum.
      loads: float [N, 6], load of every directed link; 0 where there is none.
      prices: float [N, 6] >= 0, together 1: the certificate. Carried along the cheapest paths at
        these prices, all demands cost `lower_bound`.
      sources, flows: int [S], float [S, N, 6]: the routing: what each source's demands put on each
        link. Where the demands were collapsed by symmetry there is one source of each class, and
        its images for the others.
      detours: (path of links from its tail to its head, load) by link: so much of what the flows
        put on the link, and other detours, goes along the path instead; and their images.
    """

    max_link_load: float
    lower_bound: float
    loads: Floats
    prices: Floats
    sources: Integers
    flows: Floats
    detours: dict[int, list[tuple[tuple[int, ...], float]]]

    @property
    def is_exact(self) -> bool:
        """Tells whether routing and bound meet, up to one part in 100 000."""
        return self.max_link_load - self.lower_bound <= 1e-5 * self.max_link_load


def least_max_load(
    neighbours: npt.ArrayLike,
    demands: npt.ArrayLike,
    *,
    sources: npt.ArrayLike | None = None,
    source_counts: npt.ArrayLike | None = None,
    link_classes: npt.ArrayLike | None = None,
    start: npt.ArrayLike | None = None,
    tolerance: float = 1e-6,
    max_rounds: int = 200,
    time_limit: float = np.inf,
    progress: Callable[[float, float], object] | None = None,
) -> Flow:
    """The least load that the most loaded link can have, over all routings: paths may split.

    Exact: a multi-commodity flow by column generation (see `topology.collectives.prices`).
    Symmetry, where the caller knows of any, makes it small: link classes and one source of each
    class are all it sees. Where that leaves much, the ways of all sources are mixed alike, and
    detours do the rest.

    Args:
      neighbours: int [N, 6], the chip over each directed link; -1 where there is none.
      demands: float [S, N] >= 0, from each source to each chip.
      sources: int [S], chips; all N by default.
      source_counts: int [S], how many sources (this one and its images) each row stands for.
      link_classes: int [N, 6], links with the same number are images of each other; by default
        every link is its own class.
      start: float [N, 6], prices to begin with, such as those of links that have not failed yet.
      tolerance, max_rounds, time_limit, progress: of `prices.best_mix`.

    Raises:
      ValueError: a shape or a demand is wrong, or a destination cannot be reached.
    """
    neighbours, demands = np.asarray(neighbours), np.asarray(demands, float)
    N = len(neighbours)
    sources = np.arange(N) if sources is None else np.asarray(sources)
    counts = np.ones(len(sources)) if source_counts is None else np.asarray(source_counts, float)
    if demands.shape != (len(sources), N):
        raise ValueError(
            f"demands: shape {demands.shape}; one row per source and one column per chip is "
            f"{(len(sources), N)}"
        )
    if not np.isfinite(demands).all() or (demands < 0).any():
        raise ValueError("demands: every entry is finite and 0 or more")
    demands = np.where(np.arange(N) == sources[:, None], 0.0, demands)
    used = np.flatnonzero(demands.any(axis=1))
    if not used.size:
        return Flow(
            max_link_load=0.0,
            lower_bound=0.0,
            loads=np.zeros(neighbours.shape),
            prices=(neighbours >= 0) / max(1, (neighbours >= 0).sum()),
            sources=np.zeros(0, int),
            flows=np.zeros((0, N, 6)),
            detours={},
        )
    demands, sources, counts = demands[used], sources[used], counts[used]

    links = np.flatnonzero(neighbours.ravel() >= 0)
    links = links[np.lexsort((neighbours.ravel()[links], links // 6))]
    tails, heads = links // 6, neighbours.ravel()[links]
    own = np.arange(neighbours.size) if link_classes is None else np.ravel(link_classes)
    _, first, classes = np.unique(own[links], return_index=True, return_inverse=True)
    sizes = np.bincount(classes)
    starts = np.searchsorted(tails, np.arange(N + 1))
    S, C, L = len(sources), len(sizes), len(links)
    apart = S * C <= _APART

    def cheapest(prices: Floats) -> tuple[float, Floats, list[csr_array]]:
        each = prices[classes]
        costs = dijkstra(csr_array((each, heads, starts), (N, N)), indices=sources)
        if np.isinf(costs[demands > 0]).any():
            raise ValueError("demands: a destination cannot be reached over the links that work")
        row, link, amount = _split(costs, each, tails, heads, demands)
        parts = amount * counts[row] / sizes[classes[link]]
        loads = np.asarray(np.bincount(row * C + classes[link], parts, S * C), float).reshape(S, C)
        cost = float(counts @ np.where(demands > 0, demands * costs, 0).sum(axis=1))
        flows = csr_array((amount, (row, link)), (S, L))
        if apart:
            return cost, loads, [flows[[s]] for s in range(S)]
        return cost, loads.sum(axis=0)[None], [flows]

    detoured, paths = _detours(neighbours, links[first])
    index = np.full(neighbours.size, -1)
    index[links] = np.arange(L)
    to, of = classes[index[paths]], classes[index[detoured]]
    M = np.arange(len(detoured))
    weights = sizes[of][:, None] / sizes[to]
    moves = csc_array(
        (
            np.concatenate([weights.ravel(), -np.ones(len(M))]),
            (np.concatenate([to.ravel(), of]), np.concatenate([np.repeat(M, 3), M])),
        ),
        (C, len(M)),
    )
    mix = best_mix(
        cheapest,
        sizes,
        moves=moves,
        start=None if start is None else np.bincount(classes, np.ravel(start)[links]) / sizes,
        tolerance=tolerance,
        max_rounds=max_rounds,
        time_limit=time_limit,
        progress=progress,
    )

    def on_links(values: Floats) -> Floats:
        out = np.zeros((*values.shape[:-1], neighbours.size))
        out[..., links] = values
        return out.reshape(*values.shape[:-1], *neighbours.shape)

    flows = np.zeros((S, L))
    for group, share, way in zip(mix.groups, mix.shares, mix.ways, strict=True):
        flows[group : group + 1 if apart else S] += share * way.toarray()
    detours: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    for m in np.flatnonzero(mix.moves):
        detours.setdefault(int(detoured[m]), []).append(
            (tuple(paths[m].tolist()), float(mix.moves[m]))
        )
    return Flow(
        max_link_load=mix.max_link_load,
        lower_bound=mix.lower_bound,
        loads=on_links(mix.class_loads[classes]),
        prices=on_links(mix.prices[classes]),
        sources=sources,
        flows=on_links(flows),
        detours=detours,
    )


def _split(
    costs: Floats, prices: Floats, tails: Integers, heads: Integers, demands: Floats
) -> tuple[Integers, Integers, Floats]:
    """The cheapest way of each source, in equal parts over the last hops of paths that cost alike.

    Args:
      costs: float [S, N], of the cheapest path to each chip; prices: float [L].

    Returns:
      row int [F], link int [F], amount float [F]: what each source sends over each link that it
      uses.
    """
    S, N = costs.shape
    ahead = costs[:, tails] + prices
    row, link = np.nonzero(ahead <= costs[:, heads] + 1e-9 * prices.mean())
    row, link = row[ahead[row, link] > 0], link[ahead[row, link] > 0]
    here, before = row * N + heads[link], row * N + tails[link]
    finite = np.isfinite(costs.ravel()[here])
    row, link, here, before = row[finite], link[finite], here[finite], before[finite]
    part = 1 / np.bincount(here, minlength=S * N)[here]
    through = coming = demands.ravel()
    while coming.any():  # hop by hop back to the sources
        coming = np.bincount(before, part * coming[here], minlength=S * N)
        through = through + coming
    amount = part * through[here]
    used = amount > 0
    return row[used], link[used], amount[used]


def _detours(neighbours: Integers, links: Integers) -> tuple[Integers, Integers]:
    """The paths of three hops from the tail to the head of each of some links, without it.

    Returns:
      link int [M], path int [M, 3], both link ids 6 * chip + direction.
    """
    tail, head = links // 6, neighbours.ravel()[links]
    first = neighbours[tail]  # [R, 6]
    second = np.where(first[..., None] >= 0, neighbours[first], -1)  # [R, 6, 6]
    third = np.where(second[..., None] >= 0, neighbours[second], -1)  # [R, 6, 6, 6]
    simple = (first != head[:, None])[..., None] & (second != tail[:, None, None])
    r, a, b, c = np.nonzero((third == head[:, None, None, None]) & simple[..., None])
    x, y = first[r, a], second[r, a, b]
    return links[r], np.column_stack([6 * tail[r] + a, 6 * x + b, 6 * y + c])
