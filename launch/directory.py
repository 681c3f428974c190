"""Run directories: whether one may be trained in, and what is in one that was."""

import tokenize
from pathlib import Path
from typing import Any

from launch.bindings import Key, format_value, parse_bindings
from pjit_train.errors import UserError

# What may differ when a run is resumed: where and how it computes, reports and saves, not what.
# Everything else gives another run.
CHANGEABLE = (
    "pjit_train.checkpoint.CheckpointConfig",
    "pjit_train.data.text.TextData.cache_dir",
    "pjit_train.run.Run.checkpoints",
    "pjit_train.run.Run.eval_batches",
    "pjit_train.run.Run.eval_every",
    "pjit_train.run.Run.log_every",
    "pjit_train.run.Run.mesh",
    "pjit_train.run.Run.on_nonfinite",
    "pjit_train.run.Run.profile",
    "pjit_train.run.Run.rules",
    "pjit_train.run.Run.samples",
    "pjit_train.run.Run.steps",
    "pjit_train.run.Samples",
    "pjit_train.sharding.MeshShape",
    "pjit_train.sharding.Rules",
    "pjit_train.transformer.TransformerConfig.layers",
    "pjit_train.transformer.TransformerConfig.remat",
)
_UNBOUND = object()


def config_file(directory: Path) -> Path:
    """The configuration of a run directory. UserError where it has none."""
    path = directory / "config.gin"
    if not path.is_file():
        what = "has no config.gin" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {what}; give the directory of a run (the --out of its train)")
    return path


def check_directory(directory: Path, config_text: str) -> None:
    """Checks that a run may be trained in a directory; writes nothing.

    Args:
      directory: missing, empty, or that of a run which this one resumes.
      config_text: the run's operative configuration.

    Raises:
      UserError: the path cannot be a directory, holds something else, or was begun with another
        configuration; bindings of `CHANGEABLE` may differ.
    """
    for part in (directory, *directory.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"run directory {directory}: {part} is a file; use another --out")
    if not directory.exists():
        return
    if not (directory / "config.gin").exists():
        if any(_is_foreign(path) for path in directory.iterdir()):
            raise UserError(
                f"{directory} is not a run directory: it is not empty and has no config.gin; "
                "use another --out"
            )
        return
    before, now = _read(directory / "config.gin"), parse_bindings(config_text).values
    changed = [
        (_UNBOUND in (old, new), key, old, new)
        for key in before.keys() | now.keys()
        if (old := before.get(key, _UNBOUND)) != (new := now.get(key, _UNBOUND))
        and not _may_change(key)
    ]
    if changed:
        # A reference that changed tells more than the parameters that came or went with it.
        _, key, old, new = min(changed, key=lambda change: change[:2])
        raise UserError(
            f"run directory {directory} was begun with {_show(key, old)}, "
            f"now it is {_show(key, new)}; use another --out, or the configuration that it has"
        )


def steps_before(directory: Path) -> int | None:
    """The `run.Run.steps` that a directory was trained with last; None where it was not."""
    path = directory / "config.gin"
    if not path.exists():
        return None
    steps = (value for key, value in _read(path).items() if str(key) == "run.Run.steps")
    return next(steps, None)


def _is_foreign(path: Path) -> bool:
    """False for what a start leaves that was killed before it wrote config.gin."""
    if path.name == "checkpoints" and path.is_dir():
        return any(path.iterdir())
    return path.name not in (".lock", "config.gin.new", "pod")


def _read(path: Path) -> dict[Key, Any]:
    try:
        return parse_bindings(path.read_text(encoding="utf-8")).values
    except (OSError, ValueError, SyntaxError, tokenize.TokenError) as error:
        raise UserError(f"{path} cannot be read; use another --out") from error


def _may_change(key: Key) -> bool:
    configurable = f"{key.configurable.module}.{key.configurable.name}"
    return configurable in CHANGEABLE or f"{configurable}.{key.parameter}" in CHANGEABLE


def _show(key: Key, value: Any) -> str:
    return f"no {key}" if value is _UNBOUND else f"{key} = {format_value(value)}"
