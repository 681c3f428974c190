"""Operands of matmuls that hardware does in 8 bits: codes, and scales for after the sum.

The scale of an operand is the same for all that a sum goes over, so that

    sum_k (x_scale[t] x[t, k]) (w_scale[f] w[k, f]) = x_scale[t] w_scale[f] sum_k x[t, k] w[k, f],

and the sum on the right is one of int8 codes in int32, exact, or of 8-bit floats in float32. The
matmuls of `quantized_kernels` that are emulated compute the left side, and are the test of these.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from sparsity.numbers.format import NO_NATIVE
from sparsity.numbers.formats import Format, format_name
from sparsity.numbers.quantization import noise_of_blocks, parts_of
from sparsity.numbers.rounding import Rounding, bits_of, divide, float_of
from sparsity.numbers.scales import to_float

Matmul = Literal["emulated", "native"]
_INSTEAD = "matmul='emulated'"


def check_formats(weights: Format | None, activations: Format | None) -> tuple[Format, Format]:
    """Returns two formats; raises a ValueError where no hardware multiplies their codes."""
    dtypes, formats = [], list[Format]()
    for name, format in (("weights", weights), ("activations", activations)):
        try:
            if format is None:
                raise ValueError(NO_NATIVE)
            dtypes.append(jnp.dtype(format.native_dtype()))
            formats.append(format)
        except ValueError as error:
            raise ValueError(
                f"matmul='native' {error}, and {name} are {format and format_name(format)}; "
                f"use int8 or fp8_e4m3, or {_INSTEAD}"
            ) from None
    if jnp.int8 in dtypes and dtypes != [jnp.int8] * 2:
        raise ValueError(
            f"matmul='native' multiplies operands of one kind, and weights are "
            f"{format_name(formats[0])}, activations {format_name(formats[1])}; "
            f"use int8 or fp8_e4m3 for both, or {_INSTEAD}"
        )
    if dtypes == [jnp.float8_e5m2] * 2:
        raise ValueError(
            "matmul='native' of E5M2 and E5M2 is on no GPU; use E4M3 for weights or activations, "
            f"or {_INSTEAD}"
        )
    return formats[0], formats[1]


def check_matmul(weights: Format, activations: Format, size: int, device: jax.Device) -> None:
    """Raises a ValueError where a device has no such matmul, or sums of integers may be too large.

    A CPU is let through: XLA multiplies int8 there, and takes 8-bit floats for float32.

    Args:
      weights, activations: that `check_formats` accepts.
      size: entries that are summed over.
      device: CUDA has int8 from compute capability 7.5, and 8-bit floats from 8.9; of TPUs v5 and
        v6 have int8, and 7 and later ones 8-bit floats (`jax.experimental.pallas.tpu.TpuInfo`).
    """
    integers = weights.native_dtype() == jnp.int8
    if integers:
        most = (2**31 - 1) // 2 ** (weights.element_bits + activations.element_bits - 2)
        if size > most:
            raise ValueError(
                f"matmul='native' sums {size} products in 32 bits, and {most} may overflow no "
                f"less; use at most {most} inputs, or {_INSTEAD}"
            )
    what, other = ("int8", "fp8_e4m3") if integers else ("8-bit float", "int8")
    if device.platform == "cpu" or _has(device, integers):
        return
    instead = f"{other} of weights and activations, or " if _has(device, not integers) else ""
    raise ValueError(
        f"matmul='native': {device.device_kind} has no {what} matmul; use {instead}{_INSTEAD}"
    )


def _has(device: jax.Device, integers: bool) -> bool:
    kind = device.device_kind
    if device.platform == "tpu":
        return bool(kind.startswith(("TPU v5", "TPU v6") if integers else ("TPU7", "TPU8")))
    capability = str(getattr(device, "compute_capability", ""))
    numbers = capability.split(".")
    if not all(part.isdigit() for part in numbers):  # other makers' floats are not those of OFP8
        return False
    return tuple(map(int, numbers)) >= ((7, 5) if integers else (8, 9))


@functools.partial(jax.jit, static_argnames=("format", "axes", "rounding"))
def codes_of(
    x: jax.Array,
    format: Format,
    axes: tuple[int, ...],
    rounding: Rounding = "even",
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of an array: `quantize` gives their products, rounded to float32.

    Args:
      x: float [...].
      format: that `check_formats` accepts.
      axes: adjacent and negative, taken as one; of a format with a scale to a channel all entries
        along them share it.

    Returns:
      int8, or the float8 type of the format, in the shape of x; and float32 with as many axes, 1
      where entries share a scale. A scale below 2^-126 may come out as zero.
    """
    first, last = axes[0] + x.ndim, axes[-1] + x.ndim
    flat = x.astype(jnp.float32).reshape(*x.shape[:first], -1, *x.shape[last + 1 :])
    parts = parts_of(flat, format, first, None, None)
    noise = None if key is None else noise_of_blocks(key, parts, format, first)
    magnitude, sign = format.elements(parts.blocks, parts.scale, rounding, noise)
    codes = float_of(bits_of(magnitude) | sign).astype(format.native_dtype())
    if parts.scale is None:
        scale = jnp.ones((1,) * x.ndim, jnp.float32)
    else:
        # XLA:CPU makes cheap operands anew for every entry of a product; a quotient it keeps.
        scale = divide(to_float(parts.scale), 1.0)
        ones = (1,) * (len(axes) - 1)
        scale = scale.reshape(*scale.shape[:first], *ones, *scale.shape[first:])
    return codes.reshape(x.shape), scale
