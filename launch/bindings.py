"""Gin text as data: which parameter is bound to what, with every name in full.

Gin names a configurable by what a file happened to import it as. Here a name is (module, name in
the module), so bindings of two texts can be compared, and written again in one stable form.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gin import config_parser

from pjit_train.errors import UserError


class Configurable(NamedTuple):
    """A class or function: the module that a gin text imports it from, and its name there."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}"


class Key(NamedTuple):
    """Target of a binding: a parameter of a configurable, in a gin scope ("" for everywhere)."""

    configurable: Configurable
    scope: str
    parameter: str

    def __str__(self) -> str:
        scope = f"{self.scope}/" if self.scope else ""
        return f"{scope}{self.configurable}.{self.parameter}"


class Reference(NamedTuple):
    """`@scope/configurable`, or the result of calling it, `@scope/configurable()`."""

    configurable: Configurable
    scope: str
    call: bool


class Macro(NamedTuple):
    """Reference to a macro of gin: `%name`."""

    name: str


class Bindings(NamedTuple):
    """Contents of a gin text.

    Attributes:
      values: of each parameter; where it is bound twice, the last. Macros that the text defines are
        replaced by their values.
      macros: value of each macro that it defines.
      used_macros: names of the macros in its values.
    """

    values: dict[Key, Any]
    macros: dict[str, Any]
    used_macros: set[str]


class _Delegate(config_parser.ParserDelegate):
    """Makes the values that gin's parser leaves to its caller."""

    def __init__(self):
        self.modules: dict[str, str] = {}  # what a selector begins with -> module
        self.used_macros: set[str] = set()

    def add_import(self, statement: config_parser.ImportStatement) -> None:
        bound = statement.is_from or statement.alias
        self.modules[statement.bound_name() if bound else statement.module] = statement.module

    def configurable(self, selector: str) -> Configurable:
        """The configurable that a selector names; of several imports that fit, the longest."""
        parts = selector.split(".")
        for length in range(len(parts) - 1, 0, -1):
            if (prefix := ".".join(parts[:length])) in self.modules:
                return Configurable(self.modules[prefix], ".".join(parts[length:]))
        return Configurable(*selector.rpartition(".")[::2])

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(self.configurable(selector), scope, evaluate)

    def macro(self, macro_name: str) -> Macro:
        self.used_macros.add(macro_name)
        return Macro(macro_name)


def parse_bindings(text: str) -> Bindings:
    """Reads gin text that includes no files; imports nothing.

    Raises SyntaxError where gin would.
    """
    delegate, values, macros = _Delegate(), {}, {}
    for statement in config_parser.ConfigParser(io.StringIO(text), delegate):
        if isinstance(statement, config_parser.ImportStatement):
            delegate.add_import(statement)
        elif isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            if parameter:
                values[Key(delegate.configurable(selector), scope, parameter)] = value
            else:
                macros[f"{scope}/{selector}" if scope else selector] = value
    values = {key: _without_macros(value, macros) for key, value in values.items()}
    return Bindings(values, macros, delegate.used_macros)


def check_said_once(texts: Iterable[str], source: str, *, numbered: bool = False) -> None:
    """Refuses what gin takes without a word: numbers that overflow, NUL, texts against themselves.

    Args:
      texts: gin texts that stand for one, such as a file, or all that a command line binds.
      source: of the texts, for messages; `numbered` adds the number of the line.

    Raises:
      UserError: a float is not finite, as 1e400 is; a string has a NUL character; or something is
        bound twice, to two values.
    """
    said: dict[Key | str, Any] = {}
    for text in texts:
        delegate = _Delegate()
        for statement in config_parser.ConfigParser(io.StringIO(text), delegate):
            if isinstance(statement, config_parser.ImportStatement):
                delegate.add_import(statement)
            if not isinstance(statement, config_parser.BindingStatement):
                continue
            scope, selector, parameter, value, location = statement
            key = f"{scope}/{selector}".lstrip("/")
            if parameter:
                key = Key(delegate.configurable(selector), scope, parameter)
            where = f"{source}:{location.line_num}" if numbered else source
            if any(isinstance(x, float) and not math.isfinite(x) for x in _leaves(value)):
                raise UserError(f"{where}: {key} = {format_value(value)}: want a finite number")
            if any(isinstance(x, str) and "\0" in x for x in _leaves(value)):  # no path has one
                raise UserError(f"{where}: {key} = {format_value(value)}: want a text without NUL")
            if said.setdefault(key, value) != value:
                first, second = format_value(said[key]), format_value(value)
                raise UserError(f"{where}: {key} is bound to {first} and to {second}; bind it once")


def included(text: str) -> list[str]:
    """Lists the files that a gin text includes."""
    statements = config_parser.ConfigParser(io.StringIO(text), _Delegate())
    return [s.filename for s in statements if isinstance(s, config_parser.IncludeStatement)]


def format_bindings(values: dict[Key, Any]) -> str:
    """Gin text that binds `values`: imports, then a binding a line, in ASCII and sorted."""
    used = {configurable.module for value in values.values() for configurable in _within(value)}
    names: dict[str, str] = {}  # module -> what it is imported as
    for module in sorted(used | {key.configurable.module for key in values}):
        wanted = name = module.rpartition(".")[2]
        count = 1
        while name in names.values():
            count += 1
            name = f"{wanted}{count}"
        names[module] = name

    lines = ["from __gin__ import dynamic_registration"]
    for module, name in names.items():
        if module == "gin":  # its own configurables, such as gin.singleton, need no import
            continue
        package, _, last = module.rpartition(".")
        statement = f"from {package} import {last}" if package else f"import {last}"
        lines.append(statement if name == last else f"{statement} as {name}")
    before = None
    for key in sorted(values):
        if (key.configurable, key.scope) != before:
            lines.append("")
            before = (key.configurable, key.scope)
        scope = f"{key.scope}/" if key.scope else ""
        selector = f"{names[key.configurable.module]}.{key.configurable.name}"
        lines.append(f"{scope}{selector}.{key.parameter} = {format_value(values[key], names)}")
    return "\n".join(lines) + "\n"


def format_value(value: Any, names: dict[str, str] | None = None) -> str:
    """A value as gin text; `names` says what modules are imported as, by default their last part"""
    match value:
        case Reference(configurable, scope, call):
            module = (names or {}).get(configurable.module, configurable.module.rpartition(".")[2])
            scope = f"{scope}/" if scope else ""
            return f"@{scope}{module}.{configurable.name}{'()' if call else ''}"
        case Macro(name):
            return f"%{name}"
        case tuple():
            items = [format_value(item, names) for item in value]
            return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
        case list():
            return f"[{', '.join(format_value(item, names) for item in value)}]"
        case dict():
            pairs = (f"{format_value(k, names)}: {format_value(value[k], names)}" for k in value)
            return f"{{{', '.join(pairs)}}}"
        case _:
            return ascii(value)


def _without_macros(value: Any, macros: dict[str, Any]) -> Any:
    def replace(leaf):
        if isinstance(leaf, Macro) and leaf.name in macros:
            return _in_scope(_without_macros(macros[leaf.name], macros), leaf.name)
        return leaf

    return _map_names(replace, value)


def _in_scope(value: Any, scope: str) -> Any:
    """Rewrites what gin evaluates in a scope so that a text outside of it says the same.

    A macro is evaluated in the scope of its name, and a reference without a scope in that one.
    """

    def scoped(leaf):
        evaluated_here = isinstance(leaf, Reference) and leaf.call and not leaf.scope
        return leaf._replace(scope=scope) if evaluated_here else leaf

    return _map_names(scoped, value)


def _map_names(function: Callable[[Any], Any], value: Any) -> Any:
    """A value with a function's results in place of its references and macros."""
    match value:
        case Reference() | Macro():
            return function(value)
        case tuple() | list():
            return type(value)(_map_names(function, item) for item in value)
        case dict():
            return {key: _map_names(function, item) for key, item in value.items()}
        case _:
            return value


def _within(value: Any) -> Iterator[Configurable]:
    """Yields the configurables that a value refers to."""
    return (leaf.configurable for leaf in _leaves(value) if isinstance(leaf, Reference))


def _leaves(value: Any) -> Iterator[Any]:
    """Yields the references and macros in a value, in whatever tuples, lists and dictionaries."""
    match value:
        case Reference() | Macro():
            yield value
        case tuple() | list():
            for item in value:
                yield from _leaves(item)
        case dict():
            for item in value.values():
                yield from _leaves(item)
        case _:
            yield value
