"""Text from a run directory's model."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax

from pjit_train.data.text import TextData
from pjit_train.errors import UserError
from pjit_train.evaluate import restore_weights
from pjit_train.models.sampler import Sampler
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh
from pjit_train.tasks.language_modelling import LanguageModelling, language_model


def sample(
    run: Run,
    directory: Path,
    *,
    prompts: Sequence[str],
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """Continues prompts with a run directory's newest good checkpoint, or that of the step asked
    for; see `Sampler`.

    Raises:
      UserError: the run's model is none of language, or as `Sampler`.
    """
    if not isinstance(run.task, LanguageModelling):
        raise UserError(
            f"{directory} is a run of {run.task.title} and gives no text; use torsion eval"
        )
    program = Program(run, make_mesh(run.mesh))
    _, params = restore_weights(program, directory, step)
    sampler = Sampler(language_model(run), run.rules, cast(TextData, run.data).tokenizer)
    with jax.set_mesh(program.mesh):
        return sampler(
            params, prompts, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
        )
