"""Configurations of earlier versions, read as what they meant then.

Three things change between versions, and each has its place here:

- A module, class or parameter moves: its row in `MOVED`. Imports, bindings and references of old
  gin texts are rewritten as they are read, with one notice.
- A parameter is added: a run of before has no binding of it. That means its default of today,
  unless `BORN` says that it was born with another, which is then what the run was trained with.
- A default changes: the row of that parameter in `BORN`, with the default that it was born with.
"""

import dataclasses
import functools
import importlib
import logging
import re
from typing import Any

from launch import __version__
from launch.bindings import (
    Configurable,
    Key,
    Reference,
    format_bindings,
    format_value,
    parse_bindings,
)

log = logging.getLogger("torsion")

MOVED: dict[str, str] = {
    "pjit_train.compress": "pjit_train.compression.compress",
    "pjit_train.transformer": "pjit_train.models.transformer",
    "pjit_train.vit": "pjit_train.models.vit",
    "sparsity.autoswitch": "sparsity.recipes.autoswitch",
    "sparsity.decay": "sparsity.recipes.decay",
    "sparsity.formats": "sparsity.numbers.formats",
    "sparsity.one_shot": "sparsity.post_training.one_shot",
    "sparsity.patterns": "sparsity.recipes.patterns",
    "sparsity.quantized": "sparsity.numbers.quantized",
    "sparsity.recipes": "sparsity.recipes.recipes",
}
"""{old: new}, full names of modules, of classes or functions in them, or of parameters of those."""

BORN: dict[str, Any] = {}
"""{"module.Class.parameter": the default it was born with} where that is not today's."""

_HEADER = "# torsion "
_IMPORT = re.compile(
    r"^(?:from\s+([\w.]+)\s+import\s+(\w+)|import\s+([\w.]+))(?:\s+as\s+(\w+))?", re.MULTILINE
)
_told: set[str] = set()


def stamped(text: str) -> str:
    """A configuration with the version that writes it in its first line."""
    return f"{_HEADER}{__version__}\n{text}"


def written_by_newer(text: str) -> str | None:
    """The version that wrote a configuration, where it is newer than this one."""
    version = text.partition("\n")[0].removeprefix(_HEADER)
    if not text.startswith(_HEADER) or not re.fullmatch(r"\d+(\.\d+)*", version):
        return None
    numbers = [[int(part) for part in v.split(".")] for v in (version, __version__)]
    return version if numbers[0] > numbers[1] else None


def renamed(text: str) -> str:
    """Gin text with the names of today; says once in a process which names have moved."""
    for old, new in MOVED.items():
        changed = _rename(text, old, new)
        if changed != text and old not in _told:
            _told.add(old)
            log.info("%s is %s now; the old name is read as the new one", old, new)
        text = changed
    return text


def upgraded(text: str) -> str:
    """A run's whole configuration with the names of today and all that has another default now.

    A parameter that it lacks came later; where `BORN` has it, it is bound to what the run then did.
    """
    text = renamed(text)
    values, added = parse_bindings(text).values, {}
    for name, default in BORN.items():
        module, configurable, parameter = name.rsplit(".", 2)
        for key in values:
            if key.configurable == (module, configurable):
                added[key._replace(parameter=parameter)] = default
    added = {key: default for key, default in added.items() if key not in values}
    return format_bindings(values | added) if added else text


def is_default(key: Key, value: Any) -> bool:
    """Tells whether a parameter is bound to the default that it has today."""
    default = _defaults(key.configurable).get(key.parameter, dataclasses.MISSING)
    if isinstance(value, Reference):  # what it makes with nothing bound
        return value.call and not value.scope and _found(value.configurable) is type(default)
    return default is not dataclasses.MISSING and format_value(default) == format_value(value)


@functools.cache
def _defaults(configurable: Configurable) -> dict[str, Any]:
    """The defaults of a dataclass; none where there is no such class any more."""
    found = _found(configurable)
    if not dataclasses.is_dataclass(found):
        return {}
    return {field.name: field.default for field in dataclasses.fields(found)}


def _found(configurable: Configurable) -> Any:
    """Finds a configurable; None where there is no such thing any more."""
    try:
        return getattr(importlib.import_module(configurable.module), configurable.name)
    except (ImportError, AttributeError):
        return None


def _rename(text: str, old: str, new: str) -> str:
    """Gin text in which the module, class or parameter `old` is called `new`."""
    text = _IMPORT.sub(lambda found: _import(found, old, new), text)
    # Within a module: what is bound or referred to by the name that the text imports the module as.
    for found in list(_IMPORT.finditer(text)):
        module = f"{found[1]}.{found[2]}" if found[1] else found[3]
        prefix = f"{module}."
        if old.startswith(prefix) and new.startswith(prefix):
            alias = found[4] or found[2] or module
            then, now = (f"{alias}.{name.removeprefix(prefix)}" for name in (old, new))
            text = re.sub(rf"(?<![\w.]){re.escape(then)}(?!\w)", now, text)
    return text


def _import(found: re.Match, old: str, new: str) -> str:
    """An import statement of `old`, as one of `new` under the name by which the text uses it."""
    module = f"{found[1]}.{found[2]}" if found[1] else found[3]
    if module != old:
        return found[0]
    package, _, name = new.rpartition(".")
    alias = found[4] or found[2] or None
    if alias is None:  # import a.b.c binds the full name, which bindings then begin with
        return f"import {new}"
    return f"from {package} import {name}" + ("" if alias == name else f" as {alias}")
