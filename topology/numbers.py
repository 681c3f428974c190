"""The checks of numbers and names that the library's functions are given, each in one place."""

import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Checks that a value is a whole number in a range, and returns it as an int.

    Raises:
      ValueError: it is no whole number from `least` to `most`; names the argument.
    """
    fits = isinstance(value, Integral) or (isinstance(value, Real) and value == value // 1)
    if isinstance(value, bool) or not fits or value < least or (most is not None and value > most):
        upto = f"{least} or more" if most is None else f"{least} .. {most}"
        raise ValueError(f"{name} {shown(value)}: a whole number, {upto}")
    return int(value)


def number(
    name: str,
    value: float,
    *,
    least: float = 0.0,
    above: float | None = None,
    most: float = math.inf,
    unit: str = "a number",
    endless: bool = False,
) -> float:
    """The value, which is a number in a range.

    Args:
      above: the value has to be more than this.
      endless: infinity will do, too.

    Raises:
      ValueError: it is not; names the argument.
    """
    inside = _is_real(value) and least <= value <= most
    inside = inside and (above is None or value > above)
    if not inside or not (abs(value) <= sys.float_info.max or (endless and value == math.inf)):
        low = f"{least:g} or more" if above is None else f"more than {above:g}"
        high = "" if math.isinf(most) else f", {most:g} at most"
        raise ValueError(f"{name} {shown(value)}: {unit}, {low}{high}")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value, which is one of the choices.

    Raises:
      ValueError: it is not; names the argument and lists the choices.
    """
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} {value!r}: one of {', '.join(known)}")
    return value


def shown(value: object) -> str:
    """The value in a message; Python writes no int of thousands of digits."""
    try:
        return f"{value}"
    except ValueError:
        return "of thousands of digits"


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
