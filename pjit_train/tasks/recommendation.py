"""Recommendation: a model learns which samples are clicked on."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.data.clicks import ClickData
from pjit_train.embeddings.tables import check_bags
from pjit_train.errors import UserError
from pjit_train.models.dlrm import DLRMConfig
from pjit_train.tasks.task import Task

_BINS, _REACH = 2**14, 32.0  # of logits from -_REACH to _REACH, for the area under the curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation(Task):
    """Predicts clicks by binary cross-entropy; a `DLRMConfig` and `ClickData`."""

    title: ClassVar[str] = "recommendation"
    unit: ClassVar[str] = "samples"
    axes: ClassVar = {
        "labels": ("batch",),
        "weights": ("batch",),
        "dense": ("batch", None),
        "ids": ("batch", None),
        "lengths": ("batch", None),
    }

    splits_positions: ClassVar[bool] = False

    def check(self, run):
        for what, value, kind in (("model", run.model, DLRMConfig), ("data", run.data, ClickData)):
            if not isinstance(value, kind):
                raise UserError(
                    f"run: {what}={type(value).__name__} is not for recommendation; use "
                    f"{kind.__name__}, or another run.Run.task"
                )
        of_data, of_model = run.data.source.num_dense, run.model.num_dense
        if of_data != of_model:
            raise UserError(
                f"data: samples have {of_data} dense features and the model takes num_dense="
                f"{of_model}; use the same for both"
            )
        of_data, of_model = tuple(run.data.source.hotness), tuple(run.model.hotness)
        if of_data != of_model:
            raise UserError(
                f"data: bags have hotness={of_data} and the model takes hotness={of_model}; use "
                "the same for both"
            )

    def check_batches(self, run, batches):
        # Those after them are checked when they are read.
        self.check_rows(run, batches.train_batch(0))
        self.check_rows(run, batches.eval_batch(0))

    def check_rows(self, run, rows):
        try:
            check_bags(run.model.features, run.model.bags(rows))
        except ValueError as error:
            raise UserError(f"data: {error}") from error

    def positions(self, run):
        return 1

    def units(self, run):
        return 1

    def flops(self, model, positions):
        return model.flops_per_sample

    def logits(self, model):
        return 1

    def describe(self, batches):
        return f"{batches.num_train:,} training samples"

    def body(self, model, batch):
        """The logits [batch, 1, 1]."""
        return model(batch.get("dense"), batch["embedded"])[:, None, None]

    def head_loss(self, model, x_BTD, batch):
        losses_B = _losses(x_BTD[:, 0, 0], batch["labels"])
        weights_B = batch.get("weights")
        weighted_B = losses_B if weights_B is None else losses_B * weights_B
        return jnp.sum(weighted_B), self.weight(batch)

    def weight(self, batch):
        weights_B = batch.get("weights")
        return np.float32(batch["labels"].size) if weights_B is None else jnp.sum(weights_B)

    def head_reads(self, model, x_BTD):
        return {}

    def sums(self, model, batch):
        """Adds, to loss and weight, the weight of "clicks" and of "others" by logit, and "right",
        that of logits on the right side of zero."""
        logits_B = self.body(model, batch)[:, 0, 0]
        labels_B = batch["labels"]
        weights_B = batch.get("weights")
        weights_B = jnp.ones_like(logits_B) if weights_B is None else weights_B
        bins_B = jnp.clip((logits_B + _REACH) * (_BINS / (2 * _REACH)), 0, _BINS - 1)
        counted = jax.sharding.auto_axes(_counted, out_sharding=jax.sharding.PartitionSpec())
        counted = counted if not jax.sharding.get_abstract_mesh().empty else _counted
        return {
            "loss": jnp.sum(_losses(logits_B, labels_B) * weights_B),
            "weight": jnp.sum(weights_B),
            "right": jnp.sum(((logits_B > 0) == (labels_B > 0.5)) * weights_B),
            "clicks": counted(bins_B.astype(jnp.int32), labels_B * weights_B),
            "others": counted(bins_B.astype(jnp.int32), (1 - labels_B) * weights_B),
        }

    def figures(self, sums, batches):
        """Log loss in nats, area under the ROC curve, and accuracy.

        The area is that of logits in 2^14 bins from -32 to 32; two in one bin count as equal.
        """
        return {
            "val_loss": float(sums["loss"]) / float(sums["weight"]),
            "val_auc": area(sums["clicks"], sums["others"]),
            "val_accuracy": float(sums["right"]) / float(sums["weight"]),
        }

    def details(self, sums, batches) -> dict[str, Any]:
        """`clicks` and `samples` of the validation."""
        clicks = float(np.sum(sums["clicks"], dtype=np.float64))
        return {"clicks": round(clicks), "samples": round(float(sums["weight"]))}

    def summary(self, figures: Mapping[str, float]) -> str:
        return (
            f"loss {figures['val_loss']:.4f}  AUC {figures['val_auc']:.4f}  "
            f"accuracy {figures['val_accuracy']:.2%}"
        )


def area(clicks: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve: how often a click's score is above another sample's.

    Args:
      clicks: weight of clicks by ascending score; others: of the other samples.

    Returns:
      Equal scores count one half; NaN where there are no clicks, or nothing else.
    """
    clicks, others = (np.asarray(x, np.float64) for x in (clicks, others))
    below = np.cumsum(others) - others
    pairs = clicks.sum() * others.sum()
    return float(clicks @ (below + others / 2) / pairs) if pairs else float("nan")


def _losses(logits_B: jax.Array, labels_B: jax.Array) -> jax.Array:
    return jax.nn.softplus(logits_B) - labels_B * logits_B


def _counted(bins_B: jax.Array, weights_B: jax.Array) -> jax.Array:
    return jnp.zeros(_BINS, jnp.float32).at[bins_B].add(weights_B)
