"""How often to save a checkpoint: the rules of Young and Daly, and the exact optimum behind them.

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


def young_interval(save: float, mtbf: float) -> float:
    """sqrt(2 save mtbf) (Young, Communications of the ACM 17(9), 1974), of first order."""
    _check(save=save, mtbf=mtbf)
    return math.sqrt(2 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """sqrt(2 save mtbf) (1 + sqrt(x) / 3 + x / 9) - save with x = save / (2 mtbf); mtbf from
    save = 2 mtbf on (Daly, Future Generation Computer Systems 22(3), 2006, of higher order)."""
    _check(save=save, mtbf=mtbf)
    x = save / (2 * mtbf)
    if x >= 1:
        return mtbf
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save


def best_interval(save: float, mtbf: float) -> float:
    """The work between checkpoints at which `efficiency` is greatest.

    Its derivative is zero where (1 - work / mtbf) e^((work + save) / mtbf) = 1, so
    work = mtbf (1 + W(-e^(-1 - save / mtbf))), W the principal branch of Lambert's function.
    """
    _check(save=save, mtbf=mtbf)
    return mtbf * (1 + special.lambertw(-math.exp(-1 - save / mtbf)).real)


def efficiency(work: float, save: float, restore: float, mtbf: float) -> float:
    """The part of a long job's time in which it computes what is kept.

    A renewal argument: an interval is over when work + save passes without a failure, and after
    each failure a restore has to pass without one too, so it takes on average
    mtbf e^(restore / mtbf) (e^((work + save) / mtbf) - 1) (Daly 2006).
    """
    _check(work=work, save=save, mtbf=mtbf)
    if restore < 0:
        raise ValueError(f"restore {restore}: seconds, 0 or more")
    if (work + save + restore) / mtbf > 700:  # e^700 intervals: never
        return 0.0
    return work / (mtbf * math.exp(restore / mtbf) * math.expm1((work + save) / mtbf))


def _check(**seconds):
    for name, value in seconds.items():
        if not value > 0:
            raise ValueError(f"{name} {value}: seconds, more than 0")
