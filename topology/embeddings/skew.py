"""The ids of a batch by a law of popularity: how many are distinct, how unevenly owners are asked.

The law is the one that samplers draw by inverting a power: row i = 1 .. V has a probability in
proportion to the integral of x^-s from i to i + 1, Zipf's law but for the first few rows. s = 0 is
uniform. Ranks are gathered into classes: the first 256 rows each their own, then classes that grow
by 3 %.
"""

import functools
import math

import numpy as np

from topology.arrays import Floats
from topology.numbers import number, whole

_EXACT, _GROWTH = 256, 1.03
MOST_ROWS = 2**40
MOST_SKEW = 4.0


class PowerLaw:
    """Popularity of a table's rows.

    Args:
      rows: V.
      skew: s, 0 .. 4.

    Attributes:
      counts: float [C], rows of each class, the most popular first.
      shares: float [C], the probability of each row of a class; counts @ shares is 1.

    Raises:
      ValueError: a number is out of its range.
    """

    counts: Floats
    shares: Floats

    def __init__(self, rows: int, skew: float = 0.0):
        self.rows = whole("rows", rows, least=1, most=MOST_ROWS)
        self.skew = number("skew", skew, most=MOST_SKEW)
        self.counts, self.shares = _classes(self.rows, float(self.skew))

    def hit(self, draws: float) -> Floats:
        """float [C]: the probability that a row of each class is among so many draws."""
        return np.asarray(-np.expm1(draws * np.log1p(-np.minimum(self.shares, 1 - 1e-16))))

    def unique(self, draws: float, beyond: int = 0) -> float:
        """The expected number of distinct rows among so many draws, the `beyond` most popular
        left out."""
        return float(self._beyond(beyond) @ self.hit(draws))

    def share(self, top: int) -> float:
        """The part of all draws that the `top` most popular rows get."""
        return float(1 - self._beyond(top) @ self.shares)

    def _beyond(self, top: int) -> Floats:
        """float [C]: rows of each class that are not among the `top` most popular."""
        if not top:
            return self.counts
        ends = np.cumsum(self.counts)
        return np.clip(ends - top, 0, self.counts)

    def asked(self, draws: float, sources: int, owners: int, beyond: int = 0) -> float:
        """Rows that the busiest of some owners is asked for, when each source asks once for each
        distinct row among its own draws.

        Rows are spread over owners by a bijection, so that the most popular fall anywhere: the sum
        that an owner gets varies as those of random rows do, and the greatest of n of them lies
        about sqrt(2 ln n) deviations above the mean, and above what the most popular row brings. No
        owner has more than ceil(V / n) rows.
        """
        counts, hit = self._beyond(beyond), self.hit(draws)
        if not counts.any():
            return 0.0
        per_owner = math.ceil(float(counts.sum()) / owners)  # some have one row less: one of 0
        of_all = float(counts @ hit)
        mean_hit = of_all / (per_owner * owners)
        between = float(counts @ hit**2) - of_all * mean_hit  # of an owner's rows by popularity
        within = float(counts @ (hit * (1 - hit)))  # of what the sources draw
        variance = (sources**2 * (1 - 1 / owners) * max(between, 0.0) + sources * within) / owners
        mean, spread = sources * of_all / owners, math.sqrt(2 * math.log(owners) * variance)
        hottest = sources * float(hit[np.flatnonzero(counts)[0]])  # and its part of the others
        hottest += max(mean - hottest / owners, 0.0)
        return min(max(mean + spread, hottest), float(sources * per_owner))

    def busiest(self, owners: int, beyond: int = 0) -> float:
        """The part of all draws (not of the `beyond` most popular) that go to the busiest owner:
        its hottest row's and its part of the others'."""
        counts = self._beyond(beyond)
        if not counts.any():
            return 0.0
        hottest = float(self.shares[np.flatnonzero(counts)[0]])
        return min(hottest + (float(counts @ self.shares) - hottest) / owners, 1.0)


@functools.lru_cache(maxsize=4096)
def _classes(rows: int, skew: float) -> tuple[Floats, Floats]:
    exact = min(rows, _EXACT)
    starts = np.arange(1, exact + 2, dtype=float)
    if rows > exact:
        steps = math.ceil(math.log((rows + 1) / (exact + 1)) / math.log(_GROWTH))
        rest = np.round(np.geomspace(exact + 1, rows + 1, steps + 1))
        starts = np.unique(np.concatenate([starts, rest]))
    low, high = starts[:-1], starts[1:]
    if skew == 1:
        mass = np.log(high / low)
    else:  # of high^(1-s) - low^(1-s), without the cancellation for large ranks
        mass = low ** (1 - skew) * np.expm1((1 - skew) * np.log(high / low)) / (1 - skew)
    counts = high - low
    shares = mass / mass.sum() / counts
    for array in (counts, shares):
        array.setflags(write=False)
    return counts, shares
