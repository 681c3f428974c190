"""Image classification: a vision transformer learns the classes of images."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.data.images import ImageData
from pjit_train.errors import UserError
from pjit_train.models.vit import ViTConfig
from pjit_train.tasks.task import Task

_SHOWN = 3  # classes that a validation names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification(Task):
    """Predicts the class of an image by softmax cross-entropy; a `ViTConfig` and `ImageData`."""

    title: ClassVar[str] = "image classification"
    unit: ClassVar[str] = "images"
    axes: ClassVar = {
        "images": ("batch", None, None, None),
        "labels": ("batch",),
        "weights": ("batch",),
    }

    splits_positions: ClassVar[bool] = False  # one class token more than patches

    def check(self, run):
        for what, value, kind in (("model", run.model, ViTConfig), ("data", run.data, ImageData)):
            if not isinstance(value, kind):
                raise UserError(
                    f"run: {what}={type(value).__name__} is not for image classification; use "
                    f"{kind.__name__}, or another run.Run.task"
                )
        for name in ("image_size", "channels"):
            of_data, of_model = getattr(run.data, name), getattr(run.model, name)
            if of_data != of_model:
                raise UserError(
                    f"data: images have {name}={of_data} and the model takes {name}={of_model}; "
                    "use the same for both"
                )

    def check_batches(self, run, batches):
        if len(batches.classes) != run.model.num_classes:
            raise UserError(
                f"model: num_classes={run.model.num_classes} and the data have "
                f"{len(batches.classes)} classes; use num_classes={len(batches.classes)}"
            )

    def positions(self, run):
        return run.model.num_patches + 1

    def units(self, run):
        return 1

    def flops(self, model, positions):
        return model.flops_per_image

    def logits(self, model):
        return 0  # one position has them

    def describe(self, batches):
        return f"{batches.num_train:,} training images of {len(batches.classes)} classes"

    def body(self, model, batch):
        return model.body(batch["images"])

    def head_loss(self, model, x_BTD, batch):
        losses_B, weights_B, _ = self._scored(model, x_BTD, batch)
        return jnp.sum(losses_B * weights_B), self.weight(batch)

    def weight(self, batch):
        weights_B = batch.get("weights")
        return np.float32(batch["labels"].size) if weights_B is None else jnp.sum(weights_B)

    def head_reads(self, model, x_BTD):
        return {"head": (model.head.kernel.get_value(), model.norm(x_BTD[:, 0]))}

    def sums(self, model, batch):
        """Adds, to loss and weight, "right" answers and "images" by class, float32 [classes]."""
        losses_B, weights_B, logits_BC = self._scored(model, self.body(model, batch), batch)
        labels_BC = jax.nn.one_hot(batch["labels"], logits_BC.shape[-1])
        right_B = (jnp.argmax(logits_BC, axis=-1) == batch["labels"]) * weights_B
        return {
            "loss": jnp.sum(losses_B * weights_B),
            "weight": self.weight(batch),
            "right": jnp.sum(right_B[:, None] * labels_BC, axis=0),
            "images": jnp.sum(weights_B[:, None] * labels_BC, axis=0),
        }

    def _scored(self, model, x_BTD, batch):
        logits_BC = model.classify(x_BTD)
        labels_BC = jax.nn.one_hot(batch["labels"], logits_BC.shape[-1])
        losses_B = -jnp.sum(jax.nn.log_softmax(logits_BC) * labels_BC, axis=-1)
        weights_B = batch.get("weights")
        return losses_B, jnp.ones_like(losses_B) if weights_B is None else weights_B, logits_BC

    def figures(self, sums, batches):
        """Loss in nats and accuracy (top-1), over the images of the validation."""
        accuracy = float(sums["right"].sum()) / float(sums["images"].sum())
        return {"val_loss": float(sums["loss"]) / float(sums["weight"]), "val_accuracy": accuracy}

    def details(self, sums, batches):
        """`classes`: by name, the "images" of the validation and the "accuracy" on them."""
        of_class = zip(batches.classes, sums["images"], sums["right"], strict=True)
        return {
            "classes": {
                name: {"images": int(images), "accuracy": float(right / images) if images else None}
                for name, images, right in of_class
            }
        }

    def summary(self, figures: Mapping[str, float]) -> str:
        return f"loss {figures['val_loss']:.4f}  accuracy {figures['val_accuracy']:.2%}"

    def remarks(self, details):
        """Names the classes with the lowest accuracy."""
        known = {n: c["accuracy"] for n, c in details["classes"].items() if c["images"]}
        worst = sorted(known, key=known.__getitem__)[:_SHOWN]
        worst = [name for name in worst if not math.isclose(known[name], 1.0)]
        if not worst:
            return None
        return "least accurate: " + ", ".join(f"{name} {known[name]:.1%}" for name in worst)
