"""Schedules of the pattern N:M (N kept of every M) over the decay phase of a recipe.

A schedule gives the stages on the way to a target, the target last; all stages are equally long.
"""

import dataclasses
import re
from typing import Literal

from sparsity.ranges import Count, check_choice, check_fields

Stages = tuple[tuple[int, int], ...]
"""((n, m), ...), one for each stage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
    """The target pattern from the first step of the phase on."""

    def stages(self, n: int, m: int) -> Stages:
        return ((n, m),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise:
    """M-1:M, then M/2:M, M/4:M, ... until N:M (SdGf-Stepwise, Bambhaniya et al., 2024).

    Halves are rounded down, and the last stage is N:M whatever M/N is: 3:8 is reached through 7:8
    and 4:8. (The authors' code stops at 4:8 there.)
    """

    def stages(self, n: int, m: int) -> Stages:
        return _descending([m - 1, *(m >> halvings for halvings in range(1, m.bit_length()))], n, m)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometric:
    """kN:kM, (k/2)N:(k/2)M, ... until N:M: groups shrink, the density stays (SdGf-Geometric,
    Bambhaniya et al., 2024).

    Attributes:
      k: a power of two; None for the variant's.
      variant: "paper" begins with k = 16 (1:8 through 16:128, 8:64, 4:32 and 2:16: five stages),
        "code", as its README, with k = 8 (four stages).
    """

    k: Count | None = None
    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        _check_variant("Geometric", self.variant)
        check_fields(self)
        if self.k is not None and self.k & (self.k - 1):
            raise ValueError(f"Geometric: k={self.k} is no power of two; use 16, 8, 4, 2 or 1")

    def stages(self, n: int, m: int) -> Stages:
        k = self.k or (16 if self.variant == "paper" else 8)
        return tuple((n * k >> d, m * k >> d) for d in range(k.bit_length()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructureDecay:
    """N falls from M to its target (structure decay, Kao et al., 2022).

    Attributes:
      variant: "paper" goes through M-1:M, M/2:M, M/4:M, ... as `Stepwise` does. "code" (the
        authors', in AQT) takes ceil(M / 2^u) at the u-th update from u = 2 on and so leaves M/2
        out: 1:16 through 15:16, 4:16, 2:16. It is told the pattern to begin with and no target,
        always ends at 1:M, and passes through 0:M, all weights zero, where that is 1:M; here the
        target ends it and N is never 0.
    """

    variant: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        _check_variant("StructureDecay", self.variant)

    def stages(self, n: int, m: int) -> Stages:
        if self.variant == "paper":
            return Stepwise().stages(n, m)
        return _descending([m - 1, *(-(-m >> u) for u in range(2, m.bit_length() + 1))], n, m)


Pattern = Fixed | Stepwise | Geometric | StructureDecay


def parse_pattern(text: str) -> tuple[int, int]:
    """(n, m) of a text such as "2:4": n kept of every m.

    Raises:
      ValueError: the text is no such pattern, or n is not in 1 .. m.
    """
    found = (
        re.fullmatch(r"\s*([0-9]{1,9}):([0-9]{1,9})\s*", text) if isinstance(text, str) else None
    )
    if found is None:
        raise ValueError(
            f"pattern {text!r:.60} is not N:M; write how many of every M weights are kept, as '2:4'"
        )
    n, m = map(int, found.groups())
    if not 1 <= n <= m:
        raise ValueError(
            f"pattern {text!r} keeps {n} of every {m}; N is the number kept, from 1 to {m}"
        )
    return n, m


def _descending(counts: list[int], n: int, m: int) -> Stages:
    """The counts above n, each once, then n itself."""
    above = sorted({count for count in counts if count > n}, reverse=True)
    return tuple((count, m) for count in [*above, n])


def _check_variant(name: str, variant: str) -> None:
    check_choice(f"{name}: variant", variant, ("paper", "code"))
