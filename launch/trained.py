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
    data = record.to_read(run.data, directory, record.read_if_whole(directory))
    return dataclasses.replace(run, data=data), operative
