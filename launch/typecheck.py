"""Checks that bound values have the types of the parameters' annotations; gin does not look."""

import collections.abc
import dataclasses
import importlib
import inspect
import operator
import types
import typing
from typing import Any

from launch.bindings import Configurable, Key, Macro, Reference, format_value
from launch.explain import kinds_of
from pjit_train.errors import UserError

_ORDINARY = {
    int: "an int",
    float: "a float",
    str: "a string",
    bool: "True or False",
    type(None): "None",
}


def check_types(values: dict[Key, Any]) -> None:
    """Compares values with the annotations of the dataclass fields that they are bound to.

    Raises UserError for the first value of a wrong type.
    """
    for key, value in sorted(values.items()):
        target = find(key.configurable)
        if dataclasses.is_dataclass(target):
            hint = typing.get_type_hints(target)[key.parameter]
            if not _fits(value, hint):
                shown = format_value(value)
                raise UserError(f"{key} = {shown}: want {_describe(hint)}")


def find(configurable: Configurable) -> Any:
    """Finds the class or function that a configurable names."""
    return operator.attrgetter(configurable.name)(importlib.import_module(configurable.module))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Macro):  # a constant of gin: its value is not known here
        return True
    if isinstance(value, Reference):
        target = find(value.configurable)
        if hint is Any or not isinstance(target, type):
            return True
        if origin in (typing.Union, types.UnionType):
            return any(_fits(value, part) for part in arguments)
        return value.call and isinstance(hint, type) and issubclass(target, hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is float:
        return type(value) in (int, float)
    if hint in _ORDINARY:
        return type(value) is hint
    if origin in (tuple, list, collections.abc.Sequence):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and arguments[-1:] != (Ellipsis,):
            same_length = len(value) == len(arguments)
            return same_length and all(map(_fits, value, arguments))
        return all(_fits(item, arguments[0]) for item in value)
    return not _is_made(hint)


def _is_made(hint: Any) -> bool:
    """Tells whether values are instances of a class that gin makes from its parameters."""
    return dataclasses.is_dataclass(hint) or inspect.isabstract(hint)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _ORDINARY:
        return _ORDINARY[hint]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return f"({', '.join(_describe(part) for part in arguments)})"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"a list (each item {_describe(arguments[0])})"
    if _is_made(hint):
        return " or ".join(f"@{name}()" for name in kinds_of(hint))
    return str(hint)
