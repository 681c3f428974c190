"""Validation loss of parameters, in a run or after it."""

import fcntl
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pjit_train import record
from pjit_train.checkpoint import Checkpoints
from pjit_train.data.data import Batches
from pjit_train.errors import UserError
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh

log = logging.getLogger("torsion")
_OPTIMIZERS = ("optimizer", "table_slots")  # entries of checkpoints that only training reads


def validate(program: Program, weights, batches: Batches) -> dict[str, float]:
    """The metrics of the run's task, "val_loss" among them, over its validation batches.

    Args:
      weights: what `Program.weights` gives.
    """
    return program.run.task.figures(validation_sums(program, weights, batches), batches)


def validation_sums(program: Program, weights, batches: Batches) -> dict[str, np.ndarray]:
    """Sums of the run's task over its validation batches; see `Task.sums`."""
    count = min(program.run.eval_batches, batches.num_eval_batches)
    sums = None
    for index in range(count):
        batch = program.global_batch(functools.partial(batches.eval_batch, index))
        sums = program.evaluate(weights, batch, sums)
    return {name: np.asarray(x) for name, x in sums.items()}


def prepare(run: Run, directory: Path) -> Batches:
    """The batches of a run that is only read; warns where the data are not what it was trained on.

    Nothing need be writable: tokens that cannot be kept are made for this process alone.
    """
    batches = run.data.prepare(run.seed, keep=False)
    if (other := record.other_corpus(directory, batches.digest)) is not None:
        log.warning("%s; figures are of the data of now", other)
    return batches


def restore_weights(program: Program, directory: Path, step: int | None = None):
    """(step, weights) of a run directory's newest good checkpoint, or of the step asked for.

    The weights are those that the forward pass reads, of a sparse run masked.

    Raises:
      UserError: there is none.
    """
    step, state = restore_state(program, directory, step)
    return step, program.weights(state)


def restore_state(program: Program, directory: Path, step: int | None = None):
    """(step, state) of the checkpoint that `restore_weights` reads.

    The optimizer's arrays, twice as large for Adam, are not read and not in the state.

    Raises:
      UserError: there is none.
    """
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoints/; give the directory of a run")
    saved, config = directory / "checkpoints", program.run.checkpoints
    with Checkpoints(saved, config, read_only=True) as checkpoints:
        restored = checkpoints.restore(
            program.abstract_saved_after,
            step=step,
            only=[n for n in program.abstract_saved_after(0) if n not in _OPTIMIZERS],
            being_written=_is_training(directory),
        )
    if restored is None:
        raise UserError(f"{directory}/checkpoints is empty; train the run for some steps first")
    return restored[0], program.loaded(restored[1])


def _is_training(directory: Path) -> bool:
    """Tells whether a process holds the lock of a run directory (see `loop`)."""
    try:
        with (directory / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks on this file system
        pass
    return False


def evaluate(run: Run, directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """Validation metrics of a run directory's newest good checkpoint, and its `step`.

    They are those of the run's task: `Task.figures` and `Task.details`.

    Where the text is not that of the run, `corpus` is "changed", and a warning of the logger
    `torsion` says it, too.

    Of a run with a recipe of `sparsity` also what was counted in the weights that were evaluated:
    `kernels`, a `sparsity.masks.validity.Validity` by name as a dictionary, and `sparse`, whether
    all of them are as sparse as the recipe says.
    """
    program = Program(run, make_mesh(run.mesh))
    batches = prepare(run, directory)
    step, weights = restore_weights(program, directory, step)
    sums = validation_sums(program, weights, batches)
    figures = {"step": step, **run.task.figures(sums, batches)}
    if record.other_corpus(directory, batches.digest) is not None:
        figures["corpus"] = "changed"
    figures |= run.task.details(sums, batches)
    if program.updater is None:
        return figures
    with jax.set_mesh(program.mesh):
        params = weights if program.embeddings is None else weights["params"]
        counted = program.updater.validity(params)
    sparse = bool(counted) and all(kernel.holds for kernel in counted.values())
    kernels = {name: kernel._asdict() for name, kernel in counted.items()}
    return {**figures, "sparse": sparse, "kernels": kernels}
