"""Run directories: whether one may be trained in, and what is in one that was."""

import logging
import tokenize
from pathlib import Path
from typing import Any

from launch import __version__
from launch.bindings import Key, format_value, parse_bindings
from launch.versions import is_default, upgraded, written_by_newer
from pjit_train import record
from pjit_train.errors import UserError
from pjit_train.files import write_whole

log = logging.getLogger("torsion")

# What may differ when a run is resumed: where and how it computes, reports and saves, not what.
# Everything else gives another run.
CHANGEABLE = (
    "pjit_train.loggers.MLflow",
    "pjit_train.loggers.Trackio",
    "pjit_train.loggers.Wandb",
    "pjit_train.checkpoint.CheckpointConfig",
    "pjit_train.data.text.TextData.cache_dir",
    "pjit_train.run.Run.checkpoints",
    "pjit_train.run.Run.eval_batches",
    "pjit_train.run.Run.eval_every",
    "pjit_train.run.Run.log_every",
    "pjit_train.run.Run.loggers",
    "pjit_train.run.Run.mesh",
    "pjit_train.run.Run.on_nonfinite",
    "pjit_train.run.Run.profile",
    "pjit_train.run.Run.rules",
    "pjit_train.run.Run.samples",
    "pjit_train.run.Run.steps",
    "pjit_train.run.Samples",
    "pjit_train.sharding.MeshShape",
    "pjit_train.sharding.Rules",
    "pjit_train.models.dlrm.DLRMConfig.capacity",
    "pjit_train.models.dlrm.DLRMConfig.hot_rows",
    "pjit_train.models.dlrm.DLRMConfig.replicate_rows",
    "pjit_train.models.dlrm.DLRMConfig.sharding",
    "pjit_train.models.transformer.TransformerConfig.layers",
    "pjit_train.models.transformer.TransformerConfig.remat",
)
# What may differ, too, where the digest of the tokens says that the text is the same.
OF_TEXT = (
    "pjit_train.data.click_sources.",
    "pjit_train.data.clicks.ClickData.source",
    "pjit_train.data.conversations.",
    "pjit_train.data.sources.",
    "pjit_train.data.text.TextData.sources",
    "pjit_train.data.tokenizers.TokenizerJson.path",
)
_UNBOUND = object()
_WAY = "give the directory of a run (the --out of its train)"
_UNREADABLE = (OSError, ValueError, SyntaxError, tokenize.TokenError)


def check_is_run(directory: Path) -> None:
    """Raises a UserError where there is no configuration of a run, and says what there is."""
    try:
        what = None if is_run(directory) else _what_it_is(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}; {_WAY}") from error
    if what is not None:
        raise UserError(f"{directory} {what}")


def is_run(directory: Path) -> bool:
    """Tells whether a directory holds the configuration of a run."""
    return any((directory / name).is_file() for name in ("config.gin", record.FILE))


def _what_it_is(path: Path) -> str:
    """Says what a path is that is no run directory, and what would be right."""
    if not path.exists():
        return f"does not exist; {_WAY}"
    if around := next((folder for folder in path.absolute().parents if is_run(folder)), None):
        shown = next((folder for folder in path.parents if folder.absolute() == around), around)
        return f"is a part of the run {shown}; give that"
    if path.is_file():
        return f"is a file; {_WAY}"
    if (path / "config.json").is_file():
        named = _architecture(path / "config.json")
        return (
            f"has no config.gin: it is a Hugging Face folder{named}, not a run; give the run that "
            "it was exported from, or train one that starts from it, with --gin "
            f"\"run.Run.initial_weights = '{path}'\""
        )
    if _has_checkpoints(path):
        return "has no config.gin; the command that trained it writes it again"
    if runs := sorted(child for child in path.iterdir() if child.is_dir() and is_run(child)):
        more = ", ..." if len(runs) > 3 else ""
        return (
            f"has no config.gin: it is a folder of runs; give one of them: "
            f"{', '.join(map(str, runs[:3]))}{more}"
        )
    for pattern, what in (
        ("*.safetensors", "weights"),
        ("*.gguf", "weights"),
        ("*", "other files"),
    ):
        if found := sorted(path.glob(pattern)):
            return f"has no config.gin: it holds {what} ({found[0].name}) and no run; {_WAY}"
    return f"has no config.gin; {_WAY}"


def _architecture(path: Path) -> str:
    """The class of model that a Hugging Face configuration names, in brackets; "" for none."""
    from pjit_train.files import read_json

    try:
        [name] = read_json(path)["architectures"]
    except (UserError, KeyError, TypeError, ValueError):
        return ""
    return f" ({name})" if isinstance(name, str) and name.isidentifier() else ""


def configuration(directory: Path) -> tuple[str, list[str]]:
    """Reads a run's configuration, and lists what there is to say about its files.

    `config.gin` counts, which may say anew where and how things are computed, and where the same
    text is. Where it is lost, damaged or of another run, its copy in the record counts.

    Raises:
      UserError: there is no configuration that can be read.
    """
    check_is_run(directory)
    path, said = directory / "config.gin", []
    try:
        kept = record.read(directory)
    except UserError as error:
        kept, said = None, [str(error)]
    then = None if kept is None else upgraded(kept.config)
    try:
        written = parse_bindings(text := upgraded(path.read_text(encoding="utf-8"))).values
    except _UNREADABLE as error:
        if then is None:
            raise UserError(_no_way(path)) from error
        what = "cannot be read" if path.exists() else "is missing"
        return then, [f"{path} {what}; its copy in {directory / record.FILE} is used"]
    if newer := written_by_newer(text):
        said.append(f"{path} was written by torsion {newer}, and this is {__version__}")
    if then is None:
        return text, said
    trained = parse_bindings(then).values
    changed = _changes(trained, written)
    if not changed:
        return text, said
    _, key, old, new = changed[0]
    what = f"{path} has {_show(key, new)}; the run was trained with {_show(key, old)}"
    if all(_may_change(key) or _is_of_text(key) for _, key, _, _ in changed):
        return text, [*said, what]
    return then, [*said, f"{what}, which is used"]


def restore_configuration(file: str) -> None:
    """Writes a run's `config.gin` again from its copy, where it is lost or cannot be read."""
    path = Path(file)
    if path.name != "config.gin" or (kept := record.read_if_whole(path.parent)) is None:
        return
    try:
        parse_bindings(path.read_text(encoding="utf-8"))
    except _UNREADABLE:
        log.warning("%s is lost or damaged: written again from its copy in %s", path, record.FILE)
        write_whole(path, kept.config)


def check_directory(directory: Path, config_text: str) -> None:
    """Checks that a run may be trained in a directory; writes nothing.

    Args:
      directory: missing, empty, or that of a run which this one resumes.
      config_text: the run's operative configuration.

    Raises:
      UserError: the path cannot be a directory, holds something else, or was begun with another
        configuration; bindings of `CHANGEABLE` may differ, and those of `OF_TEXT` where a digest
        of the tokens is there to compare.
    """
    for part in (directory, *directory.parents):
        if part.exists() and not part.is_dir():
            raise UserError(f"run directory {directory}: {part} is a file; use another --out")
    if not directory.exists():
        return
    path, kept = directory / "config.gin", record.read(directory)
    if kept is None and not path.exists():
        if _has_checkpoints(directory):
            log.warning("%s is lost: going on with the configuration that is given", path)
        elif any(_is_foreign(path) for path in directory.iterdir()):
            raise UserError(
                f"{directory} is not a run directory: it is not empty and has no config.gin; "
                "use another --out"
            )
        return
    before = _read(path) if kept is None else parse_bindings(upgraded(kept.config)).values
    by_digest = record.corpus_of(directory) is not None  # the tokens are compared later
    changed = [
        change
        for change in _changes(before, parse_bindings(config_text).values)
        if not _may_change(change[1]) and not (by_digest and _is_of_text(change[1]))
    ]
    if changed:
        _, key, old, new = changed[0]
        raise UserError(
            f"run directory {directory} was begun with {_show(key, old)}, "
            f"now it is {_show(key, new)}; use another --out, or the configuration that it has"
        )


def steps_before(directory: Path) -> int | None:
    """The `run.Run.steps` that a directory was trained with last; None where it was not."""
    kept, path = record.read(directory), directory / "config.gin"
    if kept is None and not path.exists():
        return None
    before = _read(path) if kept is None else parse_bindings(upgraded(kept.config)).values
    steps = (value for key, value in before.items() if str(key) == "run.Run.steps")
    return next(steps, None)


def _is_foreign(path: Path) -> bool:
    """Tells whether a path is more than what a run leaves that was killed as it started."""
    if path.name == "checkpoints" and path.is_dir():
        return any(part.name != f"{Path(record.FILE).name}.new" for part in path.iterdir())
    return path.name not in (".lock", "config.gin.new", "pod")


def _has_checkpoints(directory: Path) -> bool:
    """Tells whether there are checkpoints that a run wrote."""
    return any((directory / "checkpoints").glob("*/digests/metadata"))


def _read(path: Path) -> dict[Key, Any]:
    try:
        return parse_bindings(upgraded(path.read_text(encoding="utf-8"))).values
    except _UNREADABLE as error:
        raise UserError(_no_way(path)) from error


def _no_way(path: Path) -> str:
    return (
        f"{path} cannot be read; remove it, and the command that trained the run goes on with the "
        "configuration that it is given"
    )


def _changes(before: dict[Key, Any], now: dict[Key, Any]) -> list[tuple[bool, Key, Any, Any]]:
    """(whether it came or went, key, old value, new value) of what differs.

    A parameter that came later is not bound before; its default of today says the same.

    First come those that are in both: a reference that changed tells more than the parameters that
    came or went with it.
    """
    pairs = [(k, before.get(k, _UNBOUND), now.get(k, _UNBOUND)) for k in before.keys() | now.keys()]
    changed = [
        (_UNBOUND in (old, new), key, old, new)
        for key, old, new in pairs
        if old != new and not (old is _UNBOUND and is_default(key, new))
    ]
    return sorted(changed, key=lambda change: change[:2])


def _may_change(key: Key) -> bool:
    configurable = f"{key.configurable.module}.{key.configurable.name}"
    return configurable in CHANGEABLE or f"{configurable}.{key.parameter}" in CHANGEABLE


def _is_of_text(key: Key) -> bool:
    """Tells whether a binding says where text is; the digest of the tokens proves it the same."""
    name = f"{key.configurable.module}.{key.configurable.name}.{key.parameter}"
    return name.startswith(OF_TEXT)


def _show(key: Key, value: Any) -> str:
    return f"no {key}" if value is _UNBOUND else f"{key} = {format_value(value)}"
