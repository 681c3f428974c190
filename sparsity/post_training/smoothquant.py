"""SmoothQuant: large activations made smaller, and the weights that meet them larger.

Xiao et al., 2023: y = x W = (x / s) (s W), with s chosen per input, and 1 / s folded into what
makes x, so that the model computes the same. Letters in names: I inputs, O outputs.
"""

import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.post_training.hessian import check_kernel, check_norms


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
      Positive normal numbers; 1 where the input was always 0 or no kernel reads it.

    Raises:
      ValueError: the strength is not from 0 to 1, the maxima are not finite and from 0, or a kernel
        is no finite matrix with as many inputs.
    """
    is_number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    if not is_number or not 0 <= strength <= 1:
        raise ValueError(f"smoothing: strength {strength}; use 0 to 1, such as 0.5")
    if not len(kernels_IO):
        raise ValueError("kernels_IO: there are none; give those that read the inputs")
    for kernel_IO in kernels_IO:
        check_kernel(kernel_IO)
        check_norms("input_maxima_I", input_maxima_I, len(kernel_IO))
    # float64: no power of a float32 over- or underflows.
    weights_I = np.max([np.abs(np.asarray(k, np.float64)).max(1, initial=0) for k in kernels_IO], 0)
    inputs_I = np.asarray(input_maxima_I, np.float64)
    usable = (inputs_I > 0) & (weights_I > 0)
    x_I, w_I = np.where(usable, inputs_I, 1), np.where(usable, weights_I, 1)
    limits = np.finfo(np.float32)
    return jnp.asarray(
        np.clip(x_I**strength / w_I ** (1 - strength), limits.tiny, limits.max), jnp.float32
    )
