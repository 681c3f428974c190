"""Intervals between checkpoints: the rules of Young and Daly, and the exact optimum behind them.

Times are seconds throughout:
  work      computed between the end of a checkpoint and the start of the next (the interval)
  save      the pause that a checkpoint takes
  restore   from a failure until the job computes again
  mtbf      mean time between the failures of the job, which come as a Poisson process: also while
            it saves and while it restores
A failure loses what was computed since the last whole checkpoint.
"""

import math

from scipy import special

from topology.numbers import number


def young_interval(save: float, mtbf: float) -> float:
    """sqrt(2 save mtbf) (Young, Communications of the ACM 17(9), 1974), of first order."""
    _check(save=save, mtbf=mtbf)
    square = 2 * save * mtbf
    if 1e-290 < square < math.inf:
        return math.sqrt(square)
    return math.sqrt(2) * math.sqrt(save) * math.sqrt(mtbf)  # the square is no float


def daly_interval(save: float, mtbf: float) -> float:
    """sqrt(2 save mtbf) (1 + sqrt(x) / 3 + x / 9) - save with x = save / (2 mtbf); mtbf from
    save = 2 mtbf on (Daly, Future Generation Computer Systems 22(3), 2006, of higher order)."""
    _check(save=save, mtbf=mtbf)
    x = save / mtbf / 2
    if x >= 1:
        return mtbf
    return young_interval(save, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save


def best_interval(save: float, mtbf: float) -> float:
    """The work between checkpoints at which `efficiency` is greatest.

    Its derivative is zero where (1 - work / mtbf) e^((work + save) / mtbf) = 1, so
    work = mtbf (1 + W(-e^(-1 - save / mtbf))), W the principal branch of Lambert's function. Where
    save / mtbf is small W is near its branch point -1, and the sum is taken from the series there,
    in p = sqrt(2 (1 - e^(-save / mtbf))) (Corless et al., Advances in Computational Mathematics 5,
    1996, equation 4.22).
    """
    _check(save=save, mtbf=mtbf)
    if save < 1e-3 * mtbf:
        p = math.sqrt(2) * math.sqrt(-math.expm1(-save / mtbf)) if save / mtbf else 0.0
        if p < 1e-8:  # the ratio may be less than the least float
            return young_interval(save, mtbf)
        series = sum(c * p**k for k, c in enumerate(_BRANCH, start=1))
        return mtbf * series
    w: float = special.lambertw(-math.exp(-1 - save / mtbf)).real
    return mtbf * (1 + w)


def efficiency(work: float, save: float, restore: float, mtbf: float) -> float:
    """The part of a long job's time in which it computes what is kept.

    A renewal argument: an interval is over when work + save passes without a failure, and after
    each failure a restore has to pass without one too, so it takes on average
    mtbf e^(restore / mtbf) (e^((work + save) / mtbf) - 1) (Daly 2006).
    """
    _check(work=work, save=save, mtbf=mtbf)
    number("restore", restore, unit="seconds")
    if (work + save + restore) / mtbf > 700:  # e^700 intervals: never
        return 0.0
    interval = (work + save) / mtbf
    if interval < 1e-300:  # no failure comes: e^x - 1 is x
        return work / (work + save)
    return work / mtbf / math.exp(restore / mtbf) / math.expm1(interval)


_BRANCH = (1, -1 / 3, 11 / 72, -43 / 540, 769 / 17280, -221 / 8505, 680863 / 43545600)


def _check(**seconds: float) -> None:
    for name, value in seconds.items():
        number(name, value, above=0, unit="seconds")
