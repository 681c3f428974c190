"""The least largest link load of any routing, by prices on links: a linear program and its dual.

A routing is a convex combination of a few ways to send everything. The master program mixes the
ways found so far so that the most loaded link carries least; its dual gives every link a price, the
prices of all links together 1. Whoever sends everything by the cheapest paths at these prices finds
a new way, and what that costs is a bound: no routing whatsoever has a smaller largest load, because
the most loaded link carries at least the price-weighted mean. The two values meet at the optimum
(Kelley's cutting planes, J. SIAM 8, 1960, seen from the dual; the Dantzig-Wolfe decomposition).

Links that a symmetry takes to each other form a class and share a price; by convexity some best
routing loads them alike.

Letters: C classes of links, G groups of demands whose ways are mixed apart, K ways.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

_PATIENCE = 3  # rounds that an unused way stays in the master program
_LEAST_PRICE = 1e-7  # of the mean price: between paths that cost alike, the shorter


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The best mixture of ways.

    Attributes:
      max_link_load: of the mixture: a routing reaches it.
      lower_bound: that of no routing is smaller.
      class_loads: float [C], the load of every link of a class.
      prices: float [C], of every link of a class, that give `lower_bound`; over all links 1.
      ways: of the K ways in the mixture, what the oracle gave; `shares` float [K] are their parts,
        `groups` int [K] their groups; the shares of a group add up to 1.
    """

    max_link_load: float
    lower_bound: float
    class_loads: np.ndarray
    prices: np.ndarray
    ways: list
    groups: np.ndarray
    shares: np.ndarray


def best_mix(
    cheapest: Callable,
    class_sizes,
    *,
    tolerance: float = 1e-6,
    max_rounds: int = 200,
    smoothing: float = 0.8,
) -> Mix:
    """The mixture of ways with the least largest link load.

    Args:
      cheapest: prices [C] -> (cost, loads [G, C], ways of length G): the cheapest way of every
        group, with the load that it puts on each link of a class, and the cost of all together.
      class_sizes: int [C], links of each class.
      tolerance: stops when (max_link_load - lower_bound) / max_link_load is below.
      max_rounds: or after so many rounds, with the interval reached by then.
      smoothing: how far new prices stay with the best ones. Rounds fall about threefold where there
        are many classes; with three of them 0 takes fewer.
    """
    sizes = np.asarray(class_sizes, float)
    even = np.full(len(sizes), 1 / sizes.sum())
    best_prices = master_prices = even
    lower, upper, stay = 0.0, np.inf, smoothing
    columns, groups, ways = np.zeros((0, len(sizes))), np.zeros(0, int), []
    unused = np.zeros(0, int)
    for _ in range(max_rounds):
        prices = stay * best_prices + (1 - stay) * master_prices + _LEAST_PRICE * even
        prices /= prices @ sizes
        cost, loads, found = cheapest(prices)
        if cost > lower:
            lower, best_prices = cost, prices
        columns = np.concatenate([columns, loads])
        groups = np.concatenate([groups, np.arange(len(loads))])
        unused = np.concatenate([unused, np.zeros(len(loads), int)])
        ways += found
        shares, master_prices = _master(columns, groups, sizes, scale=max(lower, 1e-300))
        reached = (shares @ columns).max()
        # Prices near the best ones may find no way that the master has use for: then its own do.
        stay = smoothing if reached < upper * (1 - 1e-9) else 0.0
        upper = reached
        unused = np.where(shares > 0, 0, unused + 1)
        if upper - lower <= tolerance * upper:
            break
        keep = np.flatnonzero(unused < _PATIENCE)
        columns, groups, unused, shares = columns[keep], groups[keep], unused[keep], shares[keep]
        ways = [ways[k] for k in keep]
    used = np.flatnonzero(shares)
    return Mix(
        max_link_load=float(upper),
        lower_bound=float(min(lower, upper)),
        class_loads=shares @ columns,
        prices=best_prices,
        ways=[ways[k] for k in used],
        groups=groups[used],
        shares=shares[used],
    )


def _master(columns, groups, sizes, scale):
    """Shares [K] of the ways found, and prices [C], of the master program.

    Solved as its dual, which HiGHS does faster: maximise the sum over groups of m_g, where m_g is
    at most the cost of each of the group's ways and all links together cost 1.
    """
    K, C, G = len(columns), len(sizes), int(groups.max()) + 1
    own = csr_array((np.ones(K), (np.arange(K), groups)), (K, G))
    # The unknowns are the prices of whole classes, and loads are about 1: well scaled.
    solution = linprog(
        np.concatenate([np.zeros(C), -np.ones(G)]),
        A_ub=hstack([csr_array(-columns / scale), own]).tocsr(),
        b_ub=np.zeros(K),
        A_eq=csr_array(np.concatenate([np.ones(C), np.zeros(G)])[None]),
        b_eq=[1.0],
        bounds=[(0, None)] * C + [(None, None)] * G,
        method="highs-ds",
    )
    if solution.status != 0:
        raise RuntimeError(f"HiGHS gave up on the master program: {solution.message}")
    shares = np.maximum(-solution.ineqlin.marginals, 0)
    shares /= np.bincount(groups, shares)[groups]
    return shares, np.maximum(solution.x[:C], 0) / sizes
