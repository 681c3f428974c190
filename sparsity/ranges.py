"""Numbers and their meaning: the range of a field stands in its annotation, and is checked there.

steps: Count
warmup: Fraction | None = None

def __post_init__(self):
    check_fields(self)
"""

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

LARGEST = 2**31 - 1  # of JAX's default integers
_FLOAT32 = np.finfo(np.float32)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` and `below` leave these two themselves out."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        after_low = self.low < value if self.above else self.low <= value
        return after_low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {_short(self.low)}"
        high = f"{'below' if self.below else 'to'} {_short(self.high)}"
        return f"{low} {'and ' if self.above or self.below else ''}{high}"


# Whole numbers.
Count = Annotated[int, Range(1, LARGEST)]
Whole = Annotated[int, Range(0, LARGEST)]
# Numbers that float32 holds, to its full precision and without overflow.
Positive = Annotated[float, Range(float(_FLOAT32.tiny), float(_FLOAT32.max))]
NonNegative = Annotated[float, Range(0, float(_FLOAT32.max))]
# Parts of one: of a run, of a corpus; and how much of a running mean is kept.
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Part = Annotated[float, Range(0, 1, above=True, below=True)]  # some, but not all


def check_number(name: str, value: Any, hint: Any, error: type[ValueError] = ValueError) -> None:
    """Raises `error` unless a value is what a hint says; its message says what would be right.

    Args:
      name: of the value, for the message.
      hint: `Count` or another `Annotated[int or float, Range]`, or a union of one with None or
        literals; or a sequence of these or a mapping to them, whose items are named one by one; or
        a union of None and tuples of several lengths.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    many = (tuple, Sequence, Mapping)
    if origin not in many and any(typing.get_origin(part) in many for part in arguments):
        if value is not None:  # the other part of the union
            sequences = [part for part in arguments if typing.get_origin(part) in many]
            lengths = [len(typing.get_args(part)) for part in sequences]
            size = len(value) if isinstance(value, Sequence) else None
            fits = [part for part, n in zip(sequences, lengths, strict=True) if n == size]
            if len(sequences) > 1 and (not fits or isinstance(value, str)):
                raise error(f"{name}={_shown(value)}; use {' or '.join(map(str, lengths))} numbers")
            check_number(name, value, [*fits, *sequences][0], error)
    elif origin is Mapping:
        if not isinstance(value, Mapping):
            raise error(f"{name}={_shown(value)}; use a mapping to numbers")
        for key, item in value.items():
            check_number(f"{name}[{key!r}]", item, arguments[1], error)
    elif origin in (tuple, Sequence):
        count = len(arguments) if origin is tuple else None
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise error(f"{name}={_shown(value)}; use {count or 'a list of'} numbers")
        each = arguments if origin is tuple else arguments * len(value)
        if len(value) != len(each):
            raise error(f"{name}={_shown(value)}; use {count} numbers")
        for i, (item, of_item) in enumerate(zip(value, each, strict=True)):
            check_number(f"{name}[{i}]", item, of_item, error)
    elif not _fits(value, hint):
        raise error(f"{name}={_shown(value)}; use {_wanted(hint)}")


def check_choice(
    name: str, value: Any, choices: Iterable[str], error: type[ValueError] = ValueError
) -> None:
    """Raises `error` unless a value is one of the choices, which its message lists."""
    *others, last = choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        said = f"{', '.join(others)} or {last}" if others else last
        raise error(f"{name}={_shown(value)} is unknown; use {said}")


def check_fields(instance: Any, error: type[ValueError] = ValueError) -> None:
    """Checks every field of a dataclass instance that is annotated with a range.

    Raises:
      error: the first field that is not so; the message names the class and the field.
    """
    for name, hint in ranged_fields(instance.__class__).items():
        check_number(f"{type(instance).__name__}.{name}", getattr(instance, name), hint, error)


@functools.cache
def ranged_fields(kind: type) -> dict[str, Any]:
    """The fields of a dataclass in whose annotations there is a range, and the annotations."""
    hints = typing.get_type_hints(kind, include_extras=True)
    names = (field.name for field in dataclasses.fields(kind))
    return {name: hints[name] for name in names if _has_range(hints[name])}


def _has_range(hint: Any) -> bool:
    within = getattr(hint, "__metadata__", ())
    return any(isinstance(x, Range) for x in within) or any(map(_has_range, typing.get_args(hint)))


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(x) and value == x for x in typing.get_args(hint))
    if hint is type(None):
        return value is None
    kind, [within] = hint.__origin__, hint.__metadata__
    wanted = numbers.Integral if kind is int else numbers.Real
    is_number = isinstance(value, wanted) and not isinstance(value, bool)
    return is_number and value in within  # a NaN is in no range


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_wanted, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is type(None):
        return "None"
    [within] = hint.__metadata__
    return f"a {'whole number' if hint.__origin__ is int else 'number'} {within}"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # of an int with thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}".replace("e+", "e")
