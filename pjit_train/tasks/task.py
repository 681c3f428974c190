"""Tasks: the part of a run that knows what a batch holds and what is learned from it.

A run has a model, data and a task, and everything else (mesh, step, recipes, formats, loop,
checkpoints, evaluation) is the same for all of them. A new task is a module with a class like
`language_modelling.LanguageModelling`, and perhaps one of data; nothing else changes.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from pjit_train.data.data import Batches
from pjit_train.models.model_config import ModelConfig
from pjit_train.sharding import Axes

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
"""Sums over the rows of batches; with "loss", of losses in nats, and "weight", of their weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Base of all tasks: what a run learns from its batches.

    Attributes:
      title: what people call it.
      unit: what speed is counted in, such as "tokens".
      axes: logical axes of each array of a batch, by its name; the first is "batch".
      splits_positions: whether the positions of a row may be split over devices.
    """

    title: ClassVar[str]
    unit: ClassVar[str]
    axes: ClassVar[Mapping[str, Axes]]
    splits_positions: ClassVar[bool]

    @abc.abstractmethod
    def check(self, run) -> None:
        """Raises a UserError where the model and the data of a run are not for the task, or do not
        fit each other; before anything is made or read.
        """

    @abc.abstractmethod
    def check_batches(self, run, batches: Batches) -> None:
        """Raises a UserError where the data, once open, do not fit the model: classes,
        vocabulary."""

    def check_rows(self, run, rows: Mapping[str, np.ndarray]) -> None:
        """Raises a UserError where rows of a batch are not for the model; by default all are."""
        return

    @abc.abstractmethod
    def positions(self, run) -> int:
        """Number of positions of a row, over which attention runs."""

    @abc.abstractmethod
    def units(self, run) -> int:
        """Number of units (see `unit`) of a row of a batch."""

    @abc.abstractmethod
    def flops(self, model: ModelConfig, positions: int) -> float:
        """Floating-point operations of a training step for a row: 3 forward passes, no remat."""

    @abc.abstractmethod
    def logits(self, model: ModelConfig) -> int:
        """Numbers that the head gives each position, for what they take of memory."""

    @abc.abstractmethod
    def describe(self, batches: Batches) -> str:
        """Says, for people, how much there is to train on."""

    @abc.abstractmethod
    def body(self, model, batch: Batch) -> jax.Array:
        """Computes the output of a model's last block for a batch, [batch, positions, d_model]."""

    @abc.abstractmethod
    def head_loss(self, model, x_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses of a batch in nats, and its `weight`; float32 scalars.

        Args:
          x_BTD: what `body` gives.
        """

    @abc.abstractmethod
    def weight(self, batch: Batch) -> Any:
        """The sum of the weights of a batch's losses: their number in training."""

    @abc.abstractmethod
    def head_reads(self, model, x_BTD: jax.Array) -> dict[str, tuple[Any, jax.Array]]:
        """Returns, by the name of a kernel's layer, what its matmul after the blocks reads: (what
        stands in the kernel's place, its inputs)."""

    def loss(self, model, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Computes what training lowers: `head_loss` of the `body`."""
        return self.head_loss(model, self.body(model, batch), batch)

    def sums(self, model, batch: Batch) -> Sums:
        """Sums that a validation adds up: "loss", "weight", and more where a task has more."""
        loss, weight = self.loss(model, batch)
        return {"loss": loss, "weight": weight}

    @abc.abstractmethod
    def figures(self, sums: Mapping[str, np.ndarray], batches: Batches) -> dict[str, float]:
        """The metrics of a validation by their names in metrics.jsonl, "val_loss" among them."""

    def details(self, sums: Mapping[str, np.ndarray], batches: Batches) -> dict[str, Any]:
        """Details of a validation that only `torsion eval` prints, as JSON."""
        return {}

    def remarks(self, details: Mapping[str, Any]) -> str | None:
        """Says what is worth saying of `details` in a line after a validation; None for nothing."""
        return None

    @abc.abstractmethod
    def summary(self, figures: Mapping[str, float]) -> str:
        """The metrics of a validation in one line."""

    def shower(self, run) -> Callable[[Any, Callable[[str], None], str], None] | None:
        """Makes a function that shows something of a model after a validation and at the end.

        Returns:
          A function (weights, say, when), called with the mesh set: what it says by `say` begins
          with `when`, such as "after step 100". None where there is nothing to show.

        Raises:
          UserError: what the run asks for cannot be shown.
        """
        return None
