"""Log-probabilities of given tokens under a language model: what all its evaluations are made of.

Letters in names: B batch, T tokens, C tokens that are scored, D model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, auto_axes

from pjit_train.language_model import LanguageModel
from pjit_train.models.loss import token_scores
from pjit_train.step import split_model

BATCH_TOKENS = 2048  # of a batch on a device


class Row(NamedTuple):
    """A text to score.

    Attributes:
      tokens: ids, int [tokens].
      scored: so many of the last tokens are; fewer than there are tokens.
    """

    tokens: np.ndarray
    scored: int


class Score(NamedTuple):
    """Score of a row.

    Attributes:
      log_probability: of the scored tokens given those before them, in nats.
      greedy: whether each of them is the likeliest.
    """

    log_probability: float
    greedy: bool


class Scorer:
    """Scores rows of tokens under a language model, batched by length, on its mesh."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self.rules = model.rules.with_whole_rows()
        self._graph, _ = split_model(model.config, self.rules)
        with jax.set_mesh(model.mesh):
            self._compiled = jax.jit(self._scores, static_argnames="count")

    def __call__(
        self, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None
    ) -> list[Score]:
        """Scores of rows, in their order.

        Args:
          rows: none longer than the model's longest sequence and the token after it.
          progress: called with the number of rows that are done, and that of all.
        """
        scores: list[Score | None] = [None] * len(rows)
        shards = self.rules.shards(self.model.mesh.shape, "batch")
        done = 0
        for length, count, members in _batches(rows, shards):
            inputs, starts, targets, weights = _arrays(rows, members, length, count, shards)
            nats, greedy = self._on_mesh(inputs, starts, targets, weights)
            for row, member in enumerate(members):
                scores[member] = Score(float(nats[row]), bool(greedy[row]))
            done += len(members)
            if progress is not None:
                progress(done, len(rows))
        return [score for score in scores if score is not None]

    def _on_mesh(self, inputs, starts, targets, weights):
        with jax.set_mesh(self.model.mesh):
            by_rows = lambda x: NamedSharding(
                self.model.mesh, self.rules.spec(("batch", *[None] * (x.ndim - 1)))
            )
            arrays = [jax.device_put(x, by_rows(x)) for x in (inputs, starts, targets, weights)]
            log_BC, greedy_B = self._compiled(self.model.params, *arrays, count=targets.shape[1])
            # float64: of a million tokens the sum would lose the digits that people compare.
            return np.asarray(log_BC, np.float64).sum(axis=1), np.asarray(greedy_B)

    def _scores(self, params, inputs_BT, starts_B, targets_BC, weights_BC, *, count):
        model = nnx.merge(self._graph, params)
        hidden_BTD, _ = model.hidden(inputs_BT)

        def last(hidden_BTD, starts_B):
            at_BC = starts_B[:, None] + jnp.arange(count)
            return jnp.take_along_axis(hidden_BTD, at_BC[..., None], axis=1, mode="clip")

        def scores(hidden_BCD, head_DV, targets_BC, weights_BC):
            softcap = self.model.config.logit_softcap
            log_BC, greedy_BC = token_scores(hidden_BCD, head_DV, targets_BC, softcap)
            real_BC = weights_BC > 0
            return jnp.where(real_BC, log_BC, 0.0), jnp.all(greedy_BC | ~real_BC, axis=1)

        spec = lambda *axes: self.rules.spec(axes)
        hidden_BCD = auto_axes(last, out_sharding=spec("batch", None, None))(hidden_BTD, starts_B)
        specs = spec("batch", None), spec("batch")
        return auto_axes(scores, out_sharding=specs)(
            model.head_inputs(hidden_BCD), model.head_kernel(), targets_BC, weights_BC
        )


def _batches(rows: Sequence[Row], shards: int):
    """Yields batches of rows that are about as long: inputs' length, scored tokens, rows' numbers.

    There are few such lengths, since each is compiled for itself.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i))
    while order:
        length = _padded(len(rows[order[0]].tokens) - 1)
        size = shards * max(1, BATCH_TOKENS // length)
        members, order = order[:size], order[size:]
        count = min(length, _power_of_two(max(rows[i].scored for i in members)))
        yield length, count, members


def _padded(length: int) -> int:
    """A length of a few: steps of an eighth of the power of two below, of 32 at least."""
    step = max(32, 1 << max(0, length.bit_length() - 4))
    return math.ceil(length / step) * step


def _power_of_two(count: int) -> int:
    return 1 << max(3, (count - 1).bit_length())


def _arrays(rows: Sequence[Row], members: list[int], length: int, count: int, shards: int):
    """The arrays of a batch: inputs [B, T], and of those scored starts [B], targets and weights
    [B, C]."""
    size = shards * max(1, BATCH_TOKENS // length)
    inputs = np.zeros((size, length), np.int32)
    starts = np.zeros(size, np.int32)
    targets = np.zeros((size, count), np.int32)
    weights = np.zeros((size, count), np.float32)
    for at, member in enumerate(members):
        tokens, scored = rows[member]
        inputs[at, : len(tokens) - 1] = tokens[:-1]
        starts[at] = len(tokens) - 1 - scored
        targets[at, :scored] = tokens[len(tokens) - scored :]
        weights[at, :scored] = 1
    return inputs, starts, targets, weights
