"""Next-token prediction: the task of language models."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pjit_train.data.text import TextData
from pjit_train.errors import UserError
from pjit_train.models.loss import cross_entropy
from pjit_train.models.sampler import Sampler
from pjit_train.models.transformer import TransformerConfig
from pjit_train.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling(Task):
    """Predicts the next token of text; a `TransformerConfig` and `TextData`."""

    title: ClassVar[str] = "language modelling"
    unit: ClassVar[str] = "tokens"
    axes: ClassVar = {
        name: ("batch", "length")
        for name in ("inputs", "targets", "segments", "positions", "weights")
    }

    splits_positions: ClassVar[bool] = True

    def check(self, run):
        for what, value, kind in (
            ("model", run.model, TransformerConfig),
            ("data", run.data, TextData),
        ):
            if not isinstance(value, kind):
                raise UserError(
                    f"run: {what}={type(value).__name__} is not for language modelling; use "
                    f"{kind.__name__}, or another run.Run.task"
                )
        vocab_size = run.data.tokenizer.vocab_size
        run.model.check_data(vocab_size=vocab_size, seq_len=run.data.seq_len)

    def check_batches(self, run, batches):
        batches.check_vocabulary(run.model.vocab_size)

    def positions(self, run):
        return run.data.seq_len

    def units(self, run):
        return run.data.seq_len

    def flops(self, model, positions):
        return model.flops_per_token(positions) * positions

    def logits(self, model):
        return model.vocab_size

    def describe(self, batches):
        return f"{batches.tokens_per_epoch:,} training tokens"

    def body(self, model, batch):
        return model.body(batch["inputs"], **placing(batch))[0]

    def head_loss(self, model, x_BTD, batch):
        hidden_BTD = model.head_inputs(model.norm(x_BTD))
        head_DV, targets = model.head_kernel(), batch["targets"]
        softcap = model.config.logit_softcap
        loss = cross_entropy(hidden_BTD, head_DV, targets, batch.get("weights"), softcap)
        return loss, self.weight(batch)

    def weight(self, batch):
        weights = batch.get("weights")
        return np.float32(batch["targets"].size) if weights is None else weights.sum()

    def head_reads(self, model, x_BTD):
        name = "embedding" if model.head is None else "head"
        return {name: (getattr(model, name).get_value(), model.norm(x_BTD))}

    def figures(self, sums, batches):
        """Loss (nats per token), perplexity and bits per byte."""
        loss = float(sums["loss"]) / float(sums["weight"])
        return {
            "val_loss": loss,
            "val_perplexity": math.exp(min(loss, 700.0)),
            "val_bits_per_byte": loss / math.log(2) / batches.bytes_per_token("validation"),
        }

    def summary(self, figures: Mapping[str, float]) -> str:
        return (
            f"loss {figures['val_loss']:.4f}  perplexity {figures['val_perplexity']:.3f}  "
            f"bits per byte {figures['val_bits_per_byte']:.4f}"
        )

    def shower(self, run):
        """Shows the samples that `run.samples` asks for."""
        asked = run.samples
        asked.check(run.model.max_len, run.data.tokenizer)
        if not asked.tokens:
            return None
        sampler = Sampler(run.model, run.rules, run.data.tokenizer)

        def show(weights, say, when):
            texts = sampler(
                weights,
                asked.prompts,
                tokens=asked.tokens,
                temperature=asked.temperature,
                seed=run.seed,
            )
            for text in texts:
                shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
                say(f"sample {when}:\n{shown}\n")

        return show


def placing(batch) -> dict[str, Any]:
    """The arguments of `Transformer.body` that say what the tokens of a batch see, and where they
    stand."""
    return {"segments": batch.get("segments"), "positions": batch.get("positions")}


def language_model(run) -> TransformerConfig:
    """The model of a run, which is to be one of language.

    Raises:
      UserError: it is another.
    """
    if not isinstance(run.model, TransformerConfig):
        raise UserError(
            f"run.Run.model: {type(run.model).__name__} is no language model; use "
            "transformer.TransformerConfig"
        )
    return run.model
