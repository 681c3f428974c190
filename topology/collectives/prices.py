"""The least largest link load of any routing, by prices on links: a linear program and its dual.

A routing is a convex combination of a few assignments of paths to all that is sent. The master
program mixes the assignments known so far so that the most loaded link carries least; its dual
gives every link a price, the prices of all links together 1. Whoever sends everything by the
cheapest paths at these prices finds a new one, and what that costs is a bound: no routing
whatsoever has a smaller largest load, because the most loaded link carries at least the
price-weighted mean. The two values meet at the optimum (Kelley's cutting planes, J. SIAM 8, 1960,
seen from the dual; the Dantzig-Wolfe decomposition).

Links that a symmetry takes to each other form a class and share a price; by convexity some best
routing loads them alike.

Moves are what may be added to any mixture, whatever it carries: a detour takes load from a link and
puts it on a path around that link. Some best prices make no link dearer than a path around it, so
detours do not change the optimum (dual-optimal inequalities; Ben Amor, Desrosiers and Valerio de
Carvalho, Operations Research 54(3), 2006), and with them a handful of assignments is enough.

Letters: C classes of links, G groups of demands that are mixed apart, K assignments, M moves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csc_array, csr_array, hstack, vstack

from topology.arrays import Floats, Integers
from topology.numbers import number, whole

_PATIENCE = 3  # rounds that an unused assignment stays in the master program
_LEAST_PRICE = 1e-7  # of the mean price: between paths that cost alike, the shorter


Way = TypeVar("Way")
"""An assignment of paths, in whatever form the oracle of a problem gives it."""

Cheapest = Callable[[Floats], tuple[float, Floats, list[Way]]]
"""prices [C] -> (cost, loads [G, C], ways of length G); see `best_mix`."""


@dataclass(frozen=True, kw_only=True)
class Mix(Generic[Way]):
    """The best mixture of assignments of paths.

    Attributes:
      max_link_load: of the mixture: a routing reaches it.
      lower_bound: that of no routing is smaller.
      class_loads: float [C], the load of every link of a class.
      prices: float [C], of every link of a class, that give `lower_bound`; over all links 1.
      ways: the K assignments in the mixture, as the oracle gave them; `shares` float [K] are
        their parts, `groups` int [K] their groups; the shares of a group add up to 1.
      moves: float [M], how often each move is made.
    """

    max_link_load: float
    lower_bound: float
    class_loads: Floats
    prices: Floats
    ways: list[Way]
    groups: Integers
    shares: Floats
    moves: Floats


def best_mix(
    cheapest: Cheapest[Way],
    class_sizes: npt.ArrayLike,
    *,
    moves: csc_array | None = None,
    start: npt.ArrayLike | None = None,
    tolerance: float = 1e-6,
    max_rounds: int = 200,
    time_limit: float = np.inf,
    progress: Callable[[float, float], object] | None = None,
    smoothing: float = 0.8,
) -> Mix[Way]:
    """The mixture of assignments of paths with the least largest link load.

    Args:
      cheapest: gives the cost at some prices of the cheapest assignments of all groups together,
        the load that each puts on each link of a class, and the assignments.
      class_sizes: int [C], links of each class.
      moves: sparse [C, M], what each move adds to the load of each link of a class; of the links
        that it takes load from, the mixture has as much. None: there are none.
      start: float [C], prices to begin with; by default all the same.
      tolerance: stops when (max_link_load - lower_bound) / max_link_load is below.
      max_rounds: or after so many rounds, with the interval reached by then.
      time_limit: or after so many seconds, likewise, but not before the first round is complete.
      progress: called with (lower_bound, max_link_load) after every round.
      smoothing: how far new prices stay with the best ones. Rounds fall about threefold where there
        are many classes; with three of them 0 takes fewer.
    """
    max_rounds = whole("max_rounds", max_rounds, least=1)
    number("tolerance", tolerance)
    number("time_limit", time_limit, unit="seconds", endless=True)
    began = time.monotonic()
    sizes = np.asarray(class_sizes, float)
    moves = csc_array((len(sizes), 0)) if moves is None else csc_array(moves)
    even = np.full(len(sizes), 1 / sizes.sum())
    best_prices = master_prices = even if start is None else np.asarray(start, float)
    master = _Master(sizes, moves)
    lower, upper, stay = 0.0, np.inf, smoothing
    columns, groups = np.zeros((0, len(sizes))), np.zeros(0, int)
    ways, unused = list[Way](), np.zeros(0, int)
    best: tuple[Floats, list[Way], Integers, Floats, Floats]
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
        left = np.inf if np.isinf(upper) else time_limit - (time.monotonic() - began)
        solved = master.solve(columns, groups, scale=max(lower, 1e-300), seconds=left)
        if solved is None:
            break
        shares, made, master_prices = solved
        class_loads = shares @ columns + moves @ made
        reached = class_loads.max()
        # Prices near the best ones may find no path that the master has use for: its own do then.
        stay = smoothing if reached < upper * (1 - 1e-9) else 0.0
        upper = reached
        used = np.flatnonzero(shares)
        best = class_loads, [ways[k] for k in used], groups[used], shares[used], made
        if progress is not None:
            progress(float(min(lower, upper)), float(upper))
        if upper - lower <= tolerance * upper or time.monotonic() - began > time_limit:
            break
        unused = np.where(shares > 0, 0, unused + 1)
        keep = np.flatnonzero(unused < _PATIENCE)
        columns, groups, unused = columns[keep], groups[keep], unused[keep]
        ways = [ways[k] for k in keep]
    class_loads, ways, groups, shares, made = best
    return Mix(
        max_link_load=float(upper),
        lower_bound=float(min(lower, upper)),
        class_loads=class_loads,
        prices=best_prices,
        ways=ways,
        groups=groups,
        shares=shares,
        moves=made,
    )


class _Master:
    """The master program: shares of known assignments, and moves, that load links least.

    Solved as its dual, which HiGHS does faster: maximise the sum over groups of m_g, where m_g is
    at most the cost of each of the group's assignments, no move costs less than nothing, and all
    links together cost 1. Moves are let in when one costs less than nothing, and stay.
    """

    def __init__(self, sizes: Floats, moves: csc_array):
        self.sizes, self.moves = sizes, moves
        self.open = np.zeros(moves.shape[1], bool)

    def solve(
        self, columns: Floats, groups: Integers, *, scale: float, seconds: float
    ) -> tuple[Floats, Floats, Floats] | None:
        """(shares [K], moves [M], prices [C]); None if the seconds do not suffice."""
        end = time.monotonic() + seconds
        K, C, G = len(columns), len(self.sizes), int(groups.max()) + 1
        own = csr_array((np.ones(K), (np.arange(K), groups)), (K, G))
        ways = hstack([csr_array(-columns / scale), own])
        while True:
            if (left := end - time.monotonic()) <= 0:
                return None
            some = np.flatnonzero(self.open)
            free = hstack([-self.moves[:, some].T, csr_array((len(some), G))])
            # The unknowns are the prices of whole classes, and loads are about 1: well scaled.
            solution = linprog(
                np.concatenate([np.zeros(C), -np.ones(G)]),
                A_ub=vstack([ways, free]).tocsr(),
                b_ub=np.zeros(K + len(some)),
                A_eq=csr_array(np.concatenate([np.ones(C), np.zeros(G)])[None]),
                b_eq=[1.0],
                bounds=[(0, None)] * C + [(None, None)] * G,
                method="highs-ds",
                options={} if np.isinf(left) else {"time_limit": left},
            )
            if solution.status == 1:
                return None
            if solution.status != 0:
                raise RuntimeError(f"HiGHS gave up on the master program: {solution.message}")
            prices = np.maximum(solution.x[:C], 0)
            cheap = (self.moves.T @ prices < -1e-9 * prices.max()) & ~self.open
            if not cheap.any():
                break
            self.open |= cheap
        amounts = np.maximum(-solution.ineqlin.marginals, 0)
        shares = amounts[:K] / np.bincount(groups, amounts[:K])[groups]
        made = np.zeros(len(self.open))
        made[some] = amounts[K:] * scale
        return shares, _possible(shares @ columns, self.moves, made), prices / self.sizes


def _possible(loads: Floats, moves: csc_array, made: Floats) -> Floats:
    """Limits moves, so that none takes away load that is not there.

    A link without load costs nothing, so neither does a move away from it: without it the largest
    load is no larger.
    """
    if not made.any():
        return made
    emptied = np.asarray(moves.argmin(axis=0)).ravel()  # the class that each move takes load from
    while (after := loads + moves @ made).min() < -1e-9 * loads.max():
        taken = np.bincount(emptied, -moves.min(axis=0).toarray().ravel() * made, len(loads))
        short = np.maximum(-after, 0)
        made = made * (1 - np.minimum(short / np.maximum(taken, 1e-300), 1))[emptied]
    return made
