"""Builds a `Run` from gin files and bindings, and the text that would build it again.

Gin's state is global; every call clears it first.
"""

import difflib
import importlib.resources
import io
from collections.abc import Sequence
from pathlib import Path

import gin

from launch import gin_internals
from launch.bindings import (
    Bindings,
    Configurable,
    Key,
    check_said_once,
    format_bindings,
    format_value,
    included,
    parse_bindings,
)
from launch.explain import IMPORT, explained, missing_parameters, nearest_parameter
from launch.pretrained import pretrained_bindings
from launch.typecheck import check_types
from launch.versions import renamed, stamped, upgraded
from pjit_train.errors import UserError
from pjit_train.run import Run

SHIPPED = Path(str(importlib.resources.files("launch")))  # holds configs/, in a checkout by a link
gin.add_config_file_search_path(str(SHIPPED))
gin_internals.keep_the_order_of_dictionaries()
gin_internals.read_files_by(lambda path: _Text(path))

# The imports of a gin text hold for it alone, so each binding of the command line gets these.
_IMPORTS = "\n".join(["from __gin__ import dynamic_registration", *IMPORT.values(), ""])


class _Text(io.StringIO):
    """The text of a gin file for gin, with the names of today, complete where it is of a run."""

    def __init__(self, path: str):
        text = Path(path).read_text(encoding="utf-8")
        of_run = Path(path).name == "config.gin"
        super().__init__(upgraded(text) if of_run else renamed(text))
        self.name = path  # for gin's messages


def build_run(
    files: Sequence[str], bindings: Sequence[str] = (), *, text: str = ""
) -> tuple[Run, str]:
    """Builds the run that gin files and bindings describe; the last binding of a parameter holds.

    Args:
      files: paths from the current directory, or else of what is shipped (`configs/base.gin`, or
        `base.gin`). What they include is looked for from the current directory, or else in what is
        shipped.
      bindings: gin bindings, in which `explain.STANDARD` are imported.
      text: gin text that comes before the files, as this function returns it.

    A run with `initial_weights` and no model has the model of that folder (`pretrained`).

    Names of earlier versions are read as those of today (`versions`).

    Returns:
      The run, and its operative configuration: gin text that begins with the version and binds
      every parameter in use, defaults too. The run built from that text is the same and so is its
      text.

    Raises:
      UserError: a missing file, an unknown name, a value of the wrong type, a binding without any
        effect: whatever is wrong with the configuration.
    """
    gin.clear_config()
    with explained(what := " ".join(files) or "the run's configuration"):
        gin.parse_config(renamed(text))
    for file in files:
        path = _find_file(file)
        with explained(path):
            gin.parse_config_file(path)
            _check_file(path, ())
    given = {binding: renamed(_IMPORTS + binding) for binding in bindings}
    for binding, now in given.items():
        with explained(source := f"--gin {binding!r}", _in_use()):
            gin.parse_config(now)
            check_said_once([now], source)
    with explained(what):
        gin.parse_config(_IMPORTS)
        bound = parse_bindings(gin.config_str())
        if more := pretrained_bindings(bound):
            gin.parse_config("\n".join([_IMPORTS, *more]))
            bound = parse_bindings(gin.config_str())
        _check_macros(bound)
        gin.finalize()
        check_types(bound.values)
        name = Configurable(Run.__module__, Run.__name__)
        if name not in {key.configurable for key in bound.values}:
            raise UserError(missing_parameters(name, ["model", "data", "optimizer", "steps"]))
        run = gin.get_configurable(Run)()
        operative = parse_bindings(gin.operative_config_str()).values
    for binding, now in given.items():
        for key in parse_bindings(now).values:
            if not any(_holds(key, other) for other in operative):
                name = str(key).removesuffix(f".{key.parameter}")
                raise UserError(f"--gin {binding!r}: this run does not use {name}")
    return run, stamped(format_bindings(operative))


def _find_file(file: str) -> str:
    for folder in (Path(), SHIPPED, SHIPPED / "configs"):
        if (folder / file).is_file():
            return str(folder / file)
    configs = (SHIPPED / "configs").resolve()
    shipped = [f"configs/{path.relative_to(configs)}" for path in sorted(configs.glob("**/*.gin"))]
    near = difflib.get_close_matches(file, shipped, n=1)
    raise UserError(f"{file}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def _check_file(file: str, within: tuple[str, ...]) -> None:
    """Checks the text of a file, and those that it includes, by themselves.

    What is missing, and files `within` themselves, are gin's to name.
    """
    paths = (folder / file for folder in (Path(), SHIPPED))
    path = next((path for path in paths if path.is_file()), None)
    if path is not None and file not in within:
        text = path.read_text()
        check_said_once([text], file, numbered=True)
        for other in included(text):
            _check_file(other, (*within, file))


def _in_use() -> set[str]:
    return {str(key.configurable) for key in parse_bindings(gin.config_str()).values}


def _holds(key: Key, used: Key) -> bool:
    """Tells whether a binding of `key` holds for `used`: in its scope or one within."""
    within = not key.scope or f"{used.scope}/".startswith(f"{key.scope}/")
    return within and (key.configurable, key.parameter) == (used.configurable, used.parameter)


def _check_macros(bound: Bindings) -> None:
    """Raises UserError for a macro that nothing uses: mostly a binding without its module."""
    for name, value in bound.macros.items():
        if name not in bound.used_macros:
            near = nearest_parameter(name, {str(key.configurable) for key in bound.values})
            raise UserError(
                f"{name} = {format_value(value)}: sets a macro that nothing uses; "
                f"did you mean {near}?"
            )
