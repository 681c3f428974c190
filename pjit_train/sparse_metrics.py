"""Metrics of a sparse or quantized run besides its loss: how sparse, how settled, how exact."""

from typing import Any, cast

import jax
import jax.numpy as jnp

from pjit_train.step import State, weights
from sparsity.numbers.quantized import Quantizer
from sparsity.numbers.rounding import divide
from sparsity.updater import Updater


def observe(updater: Updater, optimizer: Any, before: Any, state: State) -> dict[str, jax.Array]:
    """Figures of the masks and of the gradients that they meet; scalars, float32.

    A program of its own, run for the steps that are logged: the step itself has no sum over devices
    that a dense one lacks.

    Args:
      updater: of the run's recipe.
      optimizer: configuration of the optimizer, for its `adam_betas`.
      before: the entry "sparsity" of the state when it was observed last.
      state: after a step.

    Returns:
      `sparsity/<layer kind>`: fraction of weights that are pruned.
      `mask_flips`: fraction of the mask entries that have changed since; not where masks are made
        anew in every forward pass.
      `gradient_noise/kept`, `gradient_noise/pruned`: mean variance of a weight's gradient,
        v - m^2 of Adam's unbiased moments (the quantity that progressive gradient flow blames for
        the loss of quality at high sparsity; Bambhaniya et al., 2024).
      `autoswitch_z`: STEP's statistic of the change of the variance (Lu et al., 2023).
    """
    sparsity, params = state["sparsity"], state["params"]
    masks = _named(updater.masks(sparsity, params))
    figures = {}
    kinds: dict[str, list[str]] = {}
    for name in masks:
        kinds.setdefault(kind(name), []).append(name)
    for each, names in sorted(kinds.items()):
        figures[f"sparsity/{each}"] = _fraction([masks[n] == 0 for n in names])
    if jax.tree.leaves(getattr(before, "codes", getattr(before, "masks", None))):
        previous = _named(updater.masks(before, params))
        figures["mask_flips"] = _fraction([masks[n] != previous[n] for n in masks])
    adam = _adam(state["optimizer"])
    noise = {} if adam is None else _noise(adam, *optimizer.adam_betas)
    if noise.keys() >= masks.keys():
        figures["gradient_noise/kept"] = _mean([noise[n] for n in masks], masks.values())
        if all(noise[n].shape == mask.shape for n, mask in masks.items()):  # else packed
            pruned = [mask == 0 for mask in masks.values()]
            figures["gradient_noise/pruned"] = _mean([noise[n] for n in masks], pruned)
    if hasattr(adam, "z"):
        figures["autoswitch_z"] = adam.z[(adam.count - 1) % adam.z.shape[0]]
    return figures


def observe_quantization(
    quantizer: Quantizer, updater: Updater | None, state: State, adapters: Any = None
) -> dict[str, jax.Array]:
    """Figures of the weights of a quantized run; scalars, float32. As `observe`, run by itself.

    Of activations and gradients see `activation_metrics`.

    Returns:
      `quantization_error/<layer kind>`: |q(w) - w| / |w|, of what the recipe leaves of the weights.
      `clipped/<layer kind>`: fraction of weights above the greatest value of their block.
    """
    figures = {}
    read = weights(state, updater, adapters=adapters)
    for name, (error, clipped) in quantizer.errors(read).items():
        figures[f"quantization_error/{kind(name)}"] = error
        figures[f"clipped/{kind(name)}"] = clipped
    return figures


def kind(name: str) -> str:
    """The kind of a layer, of the name of its kernel: attention/query, feed_forward/up."""
    parts = [part for part in name.split("/") if part not in ("blocks", "kernel")]
    return "/".join(parts)


def _adam(optimizer_state):
    """Adam's state inside an optimizer's; None where there is none."""
    is_adam = lambda x: hasattr(x, "mu") and hasattr(x, "nu")
    return next(filter(is_adam, jax.tree.leaves(optimizer_state, is_leaf=is_adam)), None)


def _noise(adam, b1: float, b2: float) -> dict[str, jax.Array]:
    """Estimates the variance of the gradient of every weight, from Adam's moments."""
    means, squares = _named(adam.mu), _named(adam.nu)
    switched_at = getattr(adam, "switched_at", -1)  # where STEP froze the second moments
    bias1, bias2 = 1 - b1**adam.count, 1 - b2 ** jnp.where(switched_at < 0, adam.count, switched_at)
    return {n: jnp.maximum(squares[n] / bias2 - (means[n] / bias1) ** 2, 0) for n in means}


def _named(tree) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def _mean(arrays, masks) -> jax.Array:
    """Mean of arrays where their masks are not 0; packed arrays have these entries alone."""
    masks = [
        mask != 0 if mask.shape == x.shape else True for x, mask in zip(arrays, masks, strict=True)
    ]
    total = sum(_total(jnp.where(mask, x, 0)) for x, mask in zip(arrays, masks, strict=True))
    count = sum(_total(jnp.broadcast_to(m, x.shape)) for x, m in zip(arrays, masks, strict=True))
    return total / jnp.maximum(count, 1)


def _total(x) -> jax.Array:
    return jnp.sum(x, dtype=jnp.float32)


def _fraction(masks) -> jax.Array:
    """The part of bool arrays that is True, of a count in integers as far as int32 reaches."""
    size = sum(m.size for m in masks)
    dtype = jnp.int32 if size < 1 << 31 else jnp.float32
    count = sum(jnp.sum(m, dtype=dtype) for m in masks)
    return divide(cast(jax.Array, count).astype(jnp.float32), size)  # rounded once: 1/2 is 0.5
