"""Distillation: a run learns from a frozen teacher, beside what its task says.

`Distillation` is bound by gin, as `run.Run.distillation = @distillation.Distillation()`; `Teacher`
is what it makes of one run.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.sources import folder_of
from pjit_train.models.loss import Taught, cross_entropy
from pjit_train.models.transformer import TransformerConfig
from pjit_train.step import split_model
from sparsity.ranges import NonNegative, Positive, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """Adds to the loss of a language model how far it is from a teacher's.

    The loss of a token is that of the task, plus `weight` * temperature^2 * KL(teacher, student) of
    their softmax at the temperature (Hinton et al., 2015), plus `features` * the sum over layers of
    |student - teacher|^2 / |teacher|^2 of what the layers give, over the tokens of the batch
    (SquareHead; Kurtic et al., 2023).

    Attributes:
      teacher: a Hugging Face folder, or another source as of `run.Run.initial_weights`; None for
        the weights that the run begins with.
      features: 0 leaves the layers out; otherwise the teacher has the student's layers and width.
    """

    teacher: str | None = None
    temperature: Positive = 1.0
    weight: NonNegative = 1.0
    features: NonNegative = 0.0

    def __post_init__(self):
        check_fields(self, UserError)

    def build(self, run) -> "Teacher":
        """The teacher of a run.

        Raises:
          UserError: it does not fit the run's model or tokenizer.
        """
        model = run.model
        if not isinstance(model, TransformerConfig):
            raise UserError(
                f"distillation: {type(model).__name__} is no language model; leave it out"
            )
        if self.teacher is None:
            return Teacher(distillation=self, config=model, rules=run.rules, folder=None)
        folder = folder_of(self.teacher)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"distillation: teacher={self.teacher!r} is no Hugging Face folder; give one, or "
                "that which torsion export writes of a run"
            )
        config = huggingface.check(folder)[1]
        what = f"distillation: teacher={self.teacher!r}"
        if not isinstance(config, TransformerConfig):
            raise UserError(f"{what} is a {type(config).__name__}, which is no language model")
        for name in ("vocab_size", *(("num_layers", "d_model") if self.features else ())):
            theirs, ours = getattr(config, name), getattr(model, name)
            if theirs != ours:
                raise UserError(f"{what} has {name}={theirs} and the model {ours}; use another")
        if run.data.seq_len > config.max_len:
            raise UserError(
                f"{what} takes sequences up to {config.max_len} and seq_len={run.data.seq_len}; "
                "use shorter ones"
            )
        file = run.data.tokenizer_file
        if file is not None and (folder / "tokenizer.json").is_file():
            theirs = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            if _vocabulary(theirs) != _vocabulary(json.loads(file.text)):
                raise UserError(f"{what} has another tokenizer than the run; use one of its own")
        config = dataclasses.replace(
            config, dtype=model.dtype, param_dtype=model.param_dtype, layers=model.layers
        )
        return Teacher(distillation=self, config=config, rules=run.rules, folder=folder)


def _vocabulary(tokenizer: Any) -> Any:
    """The part of a tokenizer.json that gives ids their meaning."""
    added = [(x.get("id"), x.get("content")) for x in tokenizer.get("added_tokens") or []]
    return sorted(added), tokenizer.get("model", {}).get("vocab")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model, and the loss beside it.

    Attributes:
      folder: that its parameters are read from; None where the run begins with them.
    """

    distillation: Distillation
    config: TransformerConfig
    rules: Any
    folder: Path | None

    def load(self) -> Any:
        """The parameters of `folder`, on the mesh that is set."""
        assert self.folder is not None
        return huggingface.load(self.folder, self.config, rules=self.rules)[1]

    def loss(self, student, params: Any, batch) -> tuple[jax.Array, jax.Array]:
        """(sum of the losses of the tokens, sum of their weights), float32 scalars.

        Args:
          student: the model.
          params: of the teacher; nothing is differentiated by them.
          batch: of language modelling.
        """
        of, targets = self.distillation, batch["targets"]
        teacher = nnx.merge(split_model(self.config, self.rules)[0], jax.lax.stop_gradient(params))
        weights_BT = batch.get("weights")
        if weights_BT is None:
            weights_BT = jnp.ones_like(targets, jnp.float32)

        def run(model):
            options = {"segments": batch.get("segments"), "positions": batch.get("positions")}
            collect = bool(of.features)
            hidden_BTD, layers_LBTD = model.hidden(batch["inputs"], collect=collect, **options)
            return (model.head_inputs(hidden_BTD), model.head_kernel()), layers_LBTD

        (hidden_BTD, head_DV), layers_LBTD = run(student)
        (taught_BTD, taught_DV), taught_LBTD = jax.lax.stop_gradient(run(teacher))
        taught = None
        if of.weight:
            cap = self.config.logit_softcap
            taught = Taught(taught_BTD, taught_DV, cap, of.temperature, of.weight)
        softcap = student.config.logit_softcap
        total = cross_entropy(hidden_BTD, head_DV, targets, weights_BT, softcap, taught)
        weight = jnp.sum(weights_BT)
        if of.features:
            total += of.features * weight * square_head(layers_LBTD, taught_LBTD, weights_BT)
        return total, weight


def square_head(student: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over layers of |student - teacher|^2 / |teacher|^2; a float32 scalar.

    Args:
      student: [layers, batch, tokens, d_model]; the teacher's likewise.
      weights: [batch, tokens], of the tokens in both squares.
    """

    def squares(x):
        return jnp.sum(jnp.square(x.astype(jnp.float32)) * weights[..., None], axis=(1, 2, 3))

    return jnp.sum(squares(student - teacher) / jnp.maximum(squares(teacher), 1e-30))
