"""Kept weights of a pruned block, fitted to what the dense block makes of the same text.

After "A free lunch in LLM compression: revisiting retraining after pruning" (arXiv 2510.14444):
attention and feed-forward are fitted one after the other, each to its own dense output. The mean
square of the difference is made smaller by Adam over the calibration text; what was pruned stays 0.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from pjit_train.compression.calibrate import States

STEP = 0.03  # of the root mean square of a kernel's kept weights, of the first update
HALVES = ("attention", "feed_forward")
_STATIC = ("half", "causal", "window")

Kernels = dict[tuple[str, ...], jax.Array]


class Reconstruction:
    """Fits the kept weights of pruned blocks of one shape; what it compiles serves all of them.

    Args:
      graph: of one block.
      epochs: passes over the text for each half of a block.
    """

    def __init__(self, graph: nnx.GraphDef, epochs: int):
        self.epochs = epochs
        self._squares = jax.jit(functools.partial(_squares, graph), static_argnames=_STATIC)
        self._step = jax.jit(functools.partial(_step, graph), static_argnames=_STATIC)

    def fit(
        self,
        layer: int,
        dense: Mapping[str, Any],
        pruned: Mapping[str, Any],
        names: list[str],
        states: States,
    ) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
        """Fits one block.

        Args:
          dense, pruned: its parameters before and after pruning.
          names: of the pruned kernels, such as "blocks/attention/query/kernel"; their nonzeros are
            fitted.
          states: inputs of the block.

        Returns:
          The block, and by half (before, after): |f(x) - f'(x)| / |f(x)| of its output over the
          text. A half that does not get better is left as it was.
        """
        target = jax.tree.map(jnp.asarray, dict(dense))
        block = flatten_dict(jax.tree.map(jnp.asarray, dict(pruned)))
        errors = {}
        for half in HALVES:
            paths = [tuple(name.split("/")[1:]) for name in names if name.split("/")[1] == half]
            if paths:
                fitted, errors[half] = self._fit(layer, half, target, block, paths, states)
                block |= fitted
        return unflatten_dict({path: np.array(x) for path, x in block.items()}), errors

    def _fit(self, layer: int, half: str, target, block, paths, states: States):
        trained: Kernels = {path: block[path] for path in paths}
        rest = {path: x for path, x in block.items() if path not in trained}
        sizes = {p: jnp.sqrt(jnp.mean(x**2, where=x != 0)) for p, x in trained.items()}
        kept = {path: x != 0 for path, x in trained.items()}

        def error(trained: Kernels) -> float:
            found = [
                self._squares(target, rest, trained, x, half=half, **inputs[layer])
                for x, inputs in states
            ]
            lost, whole = np.sum(np.array(jax.device_get(found), np.float64), axis=0)
            return math.sqrt(lost / whole) if whole else 0.0

        before, fitted = error(trained), trained
        moments = _adam().init(trained)
        steps, number = self.epochs * sum(1 for _ in states), 0
        for _ in range(self.epochs):
            for x, inputs in states:
                rate = STEP * (1 + math.cos(math.pi * number / steps)) / 2
                fitted, moments = self._step(
                    target, rest, fitted, moments, kept, sizes, rate, x, half=half, **inputs[layer]
                )
                number += 1
        after = error(fitted)
        better = after < before
        return (fitted, (before, after)) if better else (trained, (before, before))


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b2=0.99)


def _step(graph, target, rest, trained, moments, kept, sizes, rate, x_BTD, *, half, **inputs):
    def loss(trained):
        lost, whole = _squares(graph, target, rest, trained, x_BTD, half=half, **inputs)
        return lost / whole

    gradients = jax.grad(loss)(trained)
    gradients = {path: jnp.where(kept[path], g, 0) for path, g in gradients.items()}
    updates, moments = _adam().update(gradients, moments)
    # A step is a part of a kernel's own scale.
    return {p: x - rate * sizes[p] * updates[p] for p, x in trained.items()}, moments


def _squares(graph, target, rest, trained, x_BTD, *, half, **inputs):
    """(|f(x) - f'(x)|^2, |f(x)|^2) of a half: `target` is dense, and what comes before the half is
    the changed block's."""
    changed = nnx.merge(graph, unflatten_dict(rest | trained))
    whole = nnx.merge(graph, target)

    def attend(block):
        read = _normed(block.attention_norm, x_BTD)
        return _normed(block.attention_post_norm, block.attention(read, **inputs)[0])

    if half == "attention":
        made, wanted = attend(changed), attend(whole)
    else:
        h_BTD = x_BTD + attend(changed)

        def feed(block):
            read = _normed(block.feed_forward_norm, h_BTD)
            return _normed(block.feed_forward_post_norm, block.feed_forward(read))

        made, wanted = feed(changed), feed(whole)
    made, wanted = made.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.sum((made - wanted) ** 2), jnp.sum(wanted**2)


def _normed(norm, x):
    return x if norm is None else norm(x)
