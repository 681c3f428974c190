"""SmoothQuant: large activations made smaller, and the weights that meet them larger.

Xiao et al., 2023: y = x W = (x / s) (s W), with s chosen per input, and 1 / s folded into what
makes x, so that the model computes the same. Letters in names: I inputs, O outputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def smoothing_scales(
    input_maxima_I: jax.Array, kernels_IO: Sequence[jax.Array], strength: float
) -> jax.Array:
    """s_j = max |X_j|^a / max |W_j|^(1 - a), float32 [inputs] (Xiao et al., 2023, equation 4).

    Args:
      input_maxima_I: greatest magnitude of every input over the calibration text.
      kernels_IO: all kernels that are given these inputs; the maximum is over all of them.
      strength: a, from 0 to 1: how much of the difficulty moves from activations to weights; the
        paper takes 0.5, and up to 0.9 for models with worse outliers.

    Returns:
      Positive numbers; 1 where the input was always 0 or no kernel reads it.

    Raises:
      ValueError: the strength is not from 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smoothing: strength {strength}; use 0 to 1, such as 0.5")
    weights_I = jnp.max(jnp.stack([_row_maxima(kernel) for kernel in kernels_IO]), axis=0)
    inputs_I = jnp.asarray(input_maxima_I, jnp.float32)
    scales_I = inputs_I**strength / weights_I ** (1 - strength)
    usable = (inputs_I > 0) & (weights_I > 0) & jnp.isfinite(scales_I) & (scales_I > 0)
    return jnp.where(usable, scales_I, 1.0)


def _row_maxima(kernel_IO: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(kernel_IO.astype(jnp.float32)), axis=1)
