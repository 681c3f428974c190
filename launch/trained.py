"""The run of a run directory, as the commands read it."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from launch.configure import build_run
from launch.directory import configuration
from pjit_train import record
from pjit_train.errors import UserError
from pjit_train.run import Run

log = logging.getLogger("torsion")


def read_run(directory: Path, bindings: Sequence[str] = ()) -> tuple[Run, str]:
    """Builds the run that a directory was trained with, changed by bindings.

    It reads the run's own tokenizer, and its relative paths count from where it was trained.

    Returns:
      As `build_run`.

    Raises:
      UserError: as `build_run`; or the directory holds no run.
    """
    text, said = configuration(directory)
    for line in said:
        log.warning("%s", line)
    try:
        run, operative = build_run([], bindings, text=text)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    kept = record.read_if_whole(directory)
    data = record.to_read(run.data, directory, kept)
    if kept is not None and run.initial_weights is not None:
        source = str(Path(kept.folder, run.initial_weights))
        if Path(source).exists():  # what adapters were trained beside is read again
            run = dataclasses.replace(run, initial_weights=source)
    return dataclasses.replace(run, data=data), operative
