"""Patterns over the names of parameters, and what they assign to each."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

V = TypeVar("V")

KERNELS = r"(attention|feed_forward)/.*kernel"
"""The expression that recipes and formats have unless another is given: kernels of blocks."""


def names(tree: Any) -> Any:
    """The tree with each leaf replaced by its name, such as "blocks/attention/query/kernel".

    A name joins the dictionary keys, attribute names and indices on the way to the leaf by "/".
    """
    return jax.tree.map_with_path(lambda path, _: "/".join(map(_entry, path)), tree)


def assign(params: Any, layers: Mapping[str, V | None]) -> Any:
    """A tree like `params` of the values that `layers` gives to their names.

    Args:
      layers: value by regular expression, looked for anywhere in the name (`re.search`). The first
        one that matches counts; the value None, or "dense", leaves a parameter out, and so do
        names that none matches.

    Returns:
      A tree like `params`, with None where a parameter is left out.

    Raises:
      ValueError: an expression is none, or matches no parameter; the line says which names are
        nearest.
    """
    patterns = [(_compiled(text), value) for text, value in layers.items()]
    known = jax.tree.leaves(names(params))
    for pattern, _ in patterns:
        if not any(map(pattern.search, known)):
            near = difflib.get_close_matches(pattern.pattern, known, n=3, cutoff=0.0)
            raise ValueError(
                f"layers: {pattern.pattern!r} matches no parameter; the nearest names are "
                + ", ".join(near)
            )

    def value_of(name: str) -> V | None:
        value = next((value for pattern, value in patterns if pattern.search(name)), None)
        return None if value == "dense" else value

    return jax.tree.map(value_of, names(params))


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"layers: {text!r} is no regular expression: {error}") from None


def _entry(entry: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)


def listed(chosen: Mapping[str, str]) -> str:
    """Lists, for people, what parameters are given: "2:4 of attention/query, attention/key; 1:8 of
    head".

    Args:
      chosen: by name, in the order in which they are listed.
    """
    groups: dict[str, list[str]] = {}
    for name, given in chosen.items():
        groups.setdefault(given, []).append(re.sub("^blocks/|/kernel$", "", name))
    return "; ".join(f"{given} of {', '.join(found)}" for given, found in groups.items())
