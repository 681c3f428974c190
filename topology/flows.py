"""Any demands over any links: the routing with the least largest link load, and its proof."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from topology.prices import best_mix


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
      sources, shares, parents: int [K], float [K], int [K, N]: the routing as K trees: from
        sources[k], the part shares[k] of each demand goes along the tree in which parents[k, c] is
        the chip before c (negative at the source). Where the demands were collapsed by symmetry
        there are trees for one source of each class, and their images for the others.
    """

    max_link_load: float
    lower_bound: float
    loads: np.ndarray
    prices: np.ndarray
    sources: np.ndarray
    shares: np.ndarray
    parents: np.ndarray

    @property
    def is_exact(self) -> bool:
        """Whether routing and bound meet, up to one part in 100 000."""
        return self.max_link_load - self.lower_bound <= 1e-5 * self.max_link_load


def least_max_load(
    neighbours,
    demands,
    *,
    sources=None,
    source_counts=None,
    link_classes=None,
    tolerance: float = 1e-6,
    max_rounds: int = 200,
) -> Flow:
    """The least load that the most loaded link can have, over all routings: paths may split.

    Exact: a multi-commodity flow by column generation (see `topology.prices`). Symmetry, where the
    caller knows of any, makes it small: link classes and one source of each class are all it sees.

    Args:
      neighbours: int [N, 6], the chip over each directed link; -1 where there is none.
      demands: float [S, N] >= 0, from each source to each chip.
      sources: int [S], chips; all N by default.
      source_counts: int [S], how many sources (this one and its images) each row stands for.
      link_classes: int [N, 6], links with the same number are images of each other; by default
        every link is its own class.

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
        nothing = np.zeros(neighbours.shape)
        return Flow(
            max_link_load=0.0,
            lower_bound=0.0,
            loads=nothing,
            prices=(neighbours >= 0) / (neighbours >= 0).sum(),
            sources=np.zeros(0, int),
            shares=np.zeros(0),
            parents=np.zeros((0, N), int),
        )
    demands, sources, counts = demands[used], sources[used], counts[used]

    links = np.flatnonzero(neighbours.ravel() >= 0)
    links = links[np.lexsort((neighbours.ravel()[links], links // 6))]
    tails, heads = links // 6, neighbours.ravel()[links]
    own = np.arange(neighbours.size) if link_classes is None else np.ravel(link_classes)
    _, classes = np.unique(own[links], return_inverse=True)
    sizes = np.bincount(classes)
    starts = np.searchsorted(tails, np.arange(N + 1))
    keys = tails * N + heads

    def cheapest(prices):
        graph = csr_array((prices[classes], heads, starts), (N, N))
        costs, parents = dijkstra(graph, indices=sources, return_predecessors=True)
        if np.isinf(costs[demands > 0]).any():
            raise ValueError("demands: a destination cannot be reached over the links that work")
        through = _through(np.where(parents < 0, np.arange(N), parents), demands)
        row, chip = np.nonzero(parents >= 0)
        classes_in = classes[np.searchsorted(keys, parents[row, chip].astype(int) * N + chip)]
        amounts = through[row, chip] * counts[row] / sizes[classes_in]
        G, C = len(sources), len(sizes)
        loads = np.bincount(row * C + classes_in, amounts, minlength=G * C).reshape(G, C)
        cost = counts @ np.where(demands > 0, demands * costs, 0).sum(axis=1)
        return cost, loads, list(parents)

    mix = best_mix(cheapest, sizes, tolerance=tolerance, max_rounds=max_rounds)

    def on_links(values):
        out = np.zeros(neighbours.size)
        out[links] = values[classes]
        return out.reshape(neighbours.shape)

    return Flow(
        max_link_load=mix.max_link_load,
        lower_bound=mix.lower_bound,
        loads=on_links(mix.class_loads),
        prices=on_links(mix.prices),
        sources=sources[mix.groups],
        shares=mix.shares,
        parents=np.array(mix.ways),
    )


def _through(parents, amounts):
    """float [S, N]: what passes each chip on its way down a tree, its own amount included.

    Args:
      parents: int [S, N], each row a tree; the root is its own parent.
      amounts: float [S, N], what each chip is sent.
    """
    S, N = parents.shape
    up = (parents + np.arange(S)[:, None] * N).ravel()
    depth, ancestor = (up != np.arange(S * N)).astype(int), up
    while (up[ancestor] != ancestor).any():  # pointers double
        depth, ancestor = depth + depth[ancestor], ancestor[ancestor]
    order = np.argsort(depth, kind="stable")
    levels = np.split(order, np.searchsorted(depth[order], np.arange(1, depth.max() + 1)))
    through = amounts.ravel().copy()
    for level in levels[:0:-1]:
        # A level's chips hand up to the level above only.
        above, where = np.unique(up[level], return_inverse=True)
        through[above] += np.bincount(where, through[level])
    return through.reshape(S, N)
