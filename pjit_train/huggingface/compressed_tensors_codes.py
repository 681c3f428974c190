"""Codes and scales of weights, as the compressed-tensors library stores them (version 0.20).

Letters in names: O outputs of a linear layer, I its inputs, G groups of inputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pjit_train.errors import UserError
from sparsity.numbers.formats import Format, format_text
from sparsity.post_training.gptq import Scales

# Small floats by their codes without the sign, which is the highest bit.
_E2M1 = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_E2M3 = np.arange(32, dtype=np.uint8).view(ml_dtypes.float6_e2m3fn).astype(np.float32)


class Scheme(NamedTuple):
    """Scheme by which the weights of a format are written.

    Attributes:
      name: of the compressed-tensors format.
      weights, inputs: its arguments of quantization, of weights and of activations (or None).
    """

    name: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None


def scheme(format: Format, activations: Format | None = None) -> Scheme:
    """The compressed-tensors format of weights in a number format.

    Raises:
      UserError: there is none.
    """
    inputs = None if activations is None else _inputs(activations)
    layout = format.as_stored_weights(inputs)
    if layout is not None:
        return Scheme(layout.name, layout.weights, inputs)
    given = format_text(format)
    if activations is not None:
        given += f" with activations in {format_text(activations)}"
    raise UserError(
        f"export: compressed-tensors has no name for {given}; it has int4 and int8 (channel or "
        "blocks; activations int8), fp8_e4m3 per output (activations fp8_e4m3) and by tiles "
        "(fp8_e4m3:128x128; activations fp8_e4m3:128), mxfp8_e4m3, "
        "mxfp4_e2m1 and nvfp4 (activations in the same), mxfp6_e2m3 (activations mxfp8_e4m3); "
        "or use --dense for plain numbers"
    )


def _inputs(format: Format) -> dict[str, Any]:
    """The arguments of activations that are quantized as they come."""
    if (inputs := format.as_stored_inputs()) is not None:
        return inputs
    raise UserError(
        f"export: compressed-tensors has no activations in {format_text(format)}; it has int8, "
        "fp8_e4m3, fp8_e4m3:128, mxfp8_e4m3, mxfp4_e2m1 and nvfp4; or use --dense for plain numbers"
    )


def input_scales(maxima: np.ndarray) -> np.ndarray:
    """The tensor scales of NVFP4 for activations, float32, of their greatest magnitudes.

    448 * 6 / max |x|, and at most 2^100, as of weights; a reader makes the scales of blocks of 16
    as activations come, and clips what is greater than the text was.
    """
    with np.errstate(divide="ignore"):
        return np.minimum(np.float32(448 * 6) / maxima.astype(np.float32), np.float32(2.0**100))


def encode(values_OI: np.ndarray, scales: Scales, format: Format, name: str) -> dict[str, Any]:
    """The stored tensors of a weight, by their names after the layer's.

    Args:
      values_OI: float32, of the format.
      name: of the compressed-tensors format; see `scheme`.
    """
    outputs, inputs = values_OI.shape
    tile: Any = (format.output_block, format.block) if format.output_block > 1 else None
    if scales.scale is None:
        scale_OG = np.ones((outputs, 1), np.float32)
    elif tile is not None:
        scale_OG = scales.scale.T.copy()
    else:
        scale_OG = np.broadcast_to(scales.scale.T, (outputs, len(scales.scale))).copy()
    factor = scale_OG
    if scales.tensor_scale is not None:
        with np.errstate(divide="ignore"):
            factor = scale_OG / scales.tensor_scale
    factor_OI = _spread(factor, values_OI.shape, tile)
    elements_OI = values_OI / np.where(factor_OI == 0, 1, factor_OI) + np.float32(0)  # no -0.0
    match name:
        case "pack-quantized":
            codes_OI, zero_OG = _integers(elements_OI, scales)
            stored = {
                "weight_packed": pack_int32(codes_OI, format.element_bits),
                "weight_scale": scale_OG,
                "weight_shape": np.array([outputs, inputs], np.int64),
            }
            if zero_OG is not None:  # bit after bit along the outputs
                packed_GW = pack_int32(zero_OG.T, format.element_bits)
                stored["weight_zero_point"] = np.ascontiguousarray(packed_GW.T)
            return stored
        case "int-quantized":
            codes_OI, zero_OG = _integers(elements_OI, scales)
            stored = {"weight": codes_OI, "weight_scale": scale_OG}
            return stored if zero_OG is None else stored | {"weight_zero_point": zero_OG}
        case "float-quantized" | "naive-quantized":
            return {"weight": _e4m3(elements_OI), "weight_scale": scale_OG}
        case "mxfp8-quantized":
            return {"weight": _e4m3(elements_OI), "weight_scale": _e8m0(scale_OG)}
        case "mxfp4-pack-quantized" | "mxfp6-pack-quantized":
            table = _E2M1 if "mxfp4" in name else _E2M3
            packed = pack_floats(elements_OI, table)
            return {"weight_packed": packed, "weight_scale": _e8m0(scale_OG)}
    return {
        "weight_packed": pack_floats(elements_OI, _E2M1),
        "weight_scale": _e4m3(scale_OG),
        "weight_global_scale": scales.tensor_scale.reshape(1),
    }


def _integers(elements_OI: np.ndarray, scales: Scales) -> tuple[np.ndarray, np.ndarray | None]:
    """int8 codes [outputs, inputs], and zero points [outputs, groups] where there are any."""
    codes_OI = np.rint(elements_OI).astype(np.int16)
    if scales.zero_point is None:
        return codes_OI.astype(np.int8), None
    outputs, inputs = codes_OI.shape
    zero_OG = np.broadcast_to(scales.zero_point.T, (outputs, len(scales.zero_point)))
    codes_OI += np.repeat(zero_OG, inputs // zero_OG.shape[1], axis=1).astype(np.int16)
    return codes_OI.astype(np.int8), zero_OG.astype(np.int8)


def _spread(
    scale_OG: np.ndarray, shape: tuple[int, ...], tile: tuple[int, int] | None
) -> np.ndarray:
    """Repeats scales so that each weight [outputs, inputs] has its own.

    Args:
      scale_OG: one to a group of inputs of each output; of tiles one to each.
      tile: its outputs and inputs, or None; the last ones may be smaller.
    """
    if tile is None:
        return np.repeat(scale_OG, shape[1] // scale_OG.shape[1], axis=1)
    rows = np.repeat(scale_OG, tile[0], axis=0)[: shape[0]]
    return np.repeat(rows, tile[1], axis=1)[:, : shape[1]]


def decode(
    tensors: Mapping[str, np.ndarray], arguments: Mapping[str, Any], name: str
) -> np.ndarray:
    """The float32 values [outputs, inputs] that stored tensors stand for; undoes `encode`.

    Args:
      arguments: of the weights; see `Scheme`.
    """
    bits = arguments["num_bits"]
    match name:
        case "pack-quantized":
            inputs = int(tensors["weight_shape"][1])
            elements_OI = unpack_int32(tensors["weight_packed"], bits, inputs).astype(np.float32)
        case "mxfp4-pack-quantized" | "nvfp4-pack-quantized":
            elements_OI = unpack_floats(tensors["weight_packed"], _E2M1)
        case "mxfp6-pack-quantized":
            elements_OI = unpack_floats(tensors["weight_packed"], _E2M3)
        case _:
            elements_OI = tensors["weight"].astype(np.float32)
    scale_OG = tensors["weight_scale"]
    if (zero_OG := tensors.get("weight_zero_point")) is not None:
        if name == "pack-quantized":
            zero_OG = unpack_int32(zero_OG.T, bits, len(elements_OI)).T
        elements_OI = elements_OI - np.repeat(
            zero_OG.astype(np.float32), elements_OI.shape[1] // zero_OG.shape[1], axis=1
        )
    if scale_OG.dtype == np.uint8:
        scale_OG = np.ldexp(np.float64(1), scale_OG.astype(np.int64) - 127)
    scale_OG = scale_OG.astype(np.float32)
    if "weight_global_scale" in tensors:
        scale_OG = scale_OG / tensors["weight_global_scale"]
    return elements_OI * _spread(scale_OG, elements_OI.shape, arguments.get("block_structure"))


def pack_int32(codes_OI: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes plus 2^(bits-1), in little-endian order of bits, as int32 [outputs, words]."""
    unsigned = (codes_OI.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(len(codes_OI), -1)
    stream = np.pad(stream, [(0, 0), (0, -stream.shape[1] % 32)])
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def unpack_int32(words: np.ndarray, bits: int, inputs: int) -> np.ndarray:
    """Unpacks codes to int16 [outputs, inputs], the inverse of `pack_int32`."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8)
    stream = np.unpackbits(bytes_, axis=1, count=inputs * bits, bitorder="little")
    codes = np.packbits(stream.reshape(len(words), inputs, bits), axis=-1, bitorder="little")
    return codes[..., 0].astype(np.int16) - 2 ** (bits - 1)


def pack_floats(elements_OI: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of nearest small floats, bit after bit from the low ones up: uint8 [outputs, bytes].

    Args:
      table: the floats that are not negative, by code; the sign is the bit above those.
    """
    middles = (table[1:] + table[:-1]) / 2
    codes = np.searchsorted(middles, np.abs(elements_OI)).astype(np.uint8)
    codes += np.signbit(elements_OI).astype(np.uint8) * np.uint8(len(table))
    stream = np.unpackbits(
        codes[..., None], axis=-1, count=len(table).bit_length(), bitorder="little"
    )
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def unpack_floats(packed: np.ndarray, table: np.ndarray) -> np.ndarray:
    """float32 [outputs, inputs]; undoes `pack_floats` where it fills whole bytes."""
    bits = len(table).bit_length()
    stream = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    codes = np.packbits(stream, axis=-1, bitorder="little")[..., 0]
    sign = np.where(codes & len(table), -1, 1).astype(np.float32)
    return sign * table[codes & len(table) - 1]


def _e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn)


def _e8m0(scale: np.ndarray) -> np.ndarray:
    """Reads the biased exponents of powers of two."""
    return (np.frexp(scale)[1] - 1 + 127).astype(np.uint8)
