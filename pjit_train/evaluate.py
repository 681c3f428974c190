"""Validation loss of parameters, in a run or after it."""

import math
from pathlib import Path

from pjit_train.checkpoint import Checkpoints
from pjit_train.data.text import Batches
from pjit_train.errors import UserError
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh


def validate(program: Program, params, batches: Batches) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per byte over the run's validation batches."""
    count = min(program.run.eval_batches, batches.num_eval_batches)
    sums = None
    for index in range(count):
        batch = program.global_batch(lambda rows, i=index: batches.eval_batch(i, rows))
        sums = program.evaluate(params, batch, sums)
    total, weight = (float(x) for x in sums)
    loss = total / weight
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_bits_per_byte": loss / math.log(2) / batches.bytes_per_token("validation"),
    }


def restore_params(program: Program, directory: Path, step: int | None = None):
    """(step, params) of a run directory's newest good checkpoint, or of the step asked for.

    Raises:
      UserError: there is none.
    """
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoints/; give the directory of a run")
    with Checkpoints(directory / "checkpoints", program.run.checkpoints) as checkpoints:
        restored = checkpoints.restore(program.abstract_state, step=step)
    if restored is None:
        raise UserError(f"{directory}/checkpoints is empty; train the run for some steps first")
    return restored[0], restored[1]["params"]


def evaluate(run: Run, directory: Path, *, step: int | None = None) -> dict[str, float]:
    """Validation figures of a run directory's newest good checkpoint, and its `step`."""
    program = Program(run, make_mesh(run.mesh))
    batches = run.data.prepare(run.seed)
    step, params = restore_params(program, directory, step)
    return {"step": step, **validate(program, params, batches)}
