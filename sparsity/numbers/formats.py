"""The formats by name, and the texts that stand for them.

The names in FORMATS stand for the objects beside them, `get_format` reads other texts, and any
other object of these classes is a format as well. A scheme is a format of weights and one of
activations under a name of llm-compressor. A new format is a class in a module of its own, and a
line of FORMATS. Sources: OCP 8-bit floating point (OFP8) v1.0; OCP microscaling formats (MX) v1.0;
HBFP of Drumond et al., 2018, as Harma et al., ICLR 2025 use it; for NVFP4 the scales of the
compressed-tensors checkpoint format; those of NF4 and of tiles stand in their classes.
"""

import dataclasses
import difflib

from sparsity.numbers.blocks import Block, check_block
from sparsity.numbers.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    INT8,
    Element,
    FixedElement,
    FloatElement,
)
from sparsity.numbers.format import Format
from sparsity.numbers.fp8 import FP8
from sparsity.numbers.hbfp import HBFP
from sparsity.numbers.integers import ZERO_POINT, Int
from sparsity.numbers.mx import MX
from sparsity.numbers.nf4 import NF4
from sparsity.numbers.nvfp4 import NVFP4
from sparsity.numbers.tiled_fp8 import TiledFP8

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FORMATS",
    "FP8",
    "HBFP",
    "INT8",
    "MX",
    "NF4",
    "NVFP4",
    "SCHEMES",
    "Block",
    "Element",
    "FixedElement",
    "FloatElement",
    "Format",
    "Int",
    "TiledFP8",
    "check_block",
    "check_blocks",
    "element_bits",
    "find_scheme",
    "format_name",
    "format_text",
    "get_format",
]

FORMATS: dict[str, Format] = {
    "int4": Int(bits=4),
    "int8": Int(bits=8),
    "fp8_e4m3": FP8(element=E4M3),
    "fp8_e5m2": FP8(element=E5M2),
    "hbfp4": HBFP(mantissa_bits=3),
    "hbfp6": HBFP(mantissa_bits=5),
    "hbfp8": HBFP(mantissa_bits=7),
    "mxfp8_e4m3": MX(element=E4M3),
    "mxfp8_e5m2": MX(element=E5M2),
    "mxfp6_e3m2": MX(element=E3M2),
    "mxfp6_e2m3": MX(element=E2M3),
    "mxfp4_e2m1": MX(element=E2M1),
    "mxint8": MX(element=INT8),
    "nvfp4": NVFP4(),
    "nf4": NF4(),
    "fp8_e4m3:128x128": TiledFP8(),
}


_INTEGERS = {f"int{bits}": Int(bits=bits) for bits in range(2, 9)}

SCHEMES: dict[str, tuple[str, str | None]] = {
    **{
        f"W{bits}A{of_inputs}": (f"int{bits}:128", f"int{of_inputs}" if of_inputs < 16 else None)
        for bits in range(2, 9)
        for of_inputs in (4, 8, 16)
        if bits <= of_inputs
    },
    "W8A8": ("int8", "int8"),
    "INT8": ("int8", "int8"),
    "W4A16_ASYM": ("int4:128:asymmetric", None),
    "W4AFP8": ("int4:128", "fp8_e4m3:channel"),
    "FP8_DYNAMIC": ("fp8_e4m3:channel", "fp8_e4m3:channel"),
    "FP8_BLOCK": ("fp8_e4m3:128x128", "fp8_e4m3:128"),
    "NVFP4": ("nvfp4", "nvfp4"),
    "NVFP4A16": ("nvfp4", None),
    "MXFP4": ("mxfp4_e2m1", "mxfp4_e2m1"),
    "MXFP4A16": ("mxfp4_e2m1", None),
    "MXFP8": ("mxfp8_e4m3", "mxfp8_e4m3"),
    "MXFP8A16": ("mxfp8_e4m3", None),
}
"""Formats of weights and of activations (None: as they are) by llm-compressor's name of the scheme
(compressed-tensors, `quant_scheme.PRESET_SCHEMES`)."""
_OTHER_SCHEMES = {
    "FP8": "has one scale for all activations, taken from calibration text",
}


def get_format(format: str | Format) -> Format:
    """The format of a text; a format object is itself.

    Args:
      format: a name of FORMATS, or int2 to int8; then, where it has another block than the name
        alone stands for, a colon and a number, "channel" or "tensor"; for tiles of inputs and
        outputs two numbers; and for integers with a zero point ":asymmetric", in short ":asym". So
        "int4:128", "fp8_e4m3:channel", "fp8_e4m3:128x128", "int3:asym", "int8:tensor:asymmetric".

    Raises:
      ValueError: there is no such format; the message lists the names.
    """
    if isinstance(format, Format):
        return format
    if isinstance(format, str) and format in _named():
        return _named()[format]
    name, *options = format.split(":") if isinstance(format, str) else [None]
    # Formats of one name differ by the options that they have.
    found = [known for text, known in _named().items() if text.partition(":")[0] == name]
    if not found:
        raise ValueError(_unknown(format))
    given = []
    for option in options:
        asymmetric = option in ZERO_POINT
        kind = "symmetric" if asymmetric else "block"
        if kind in given:
            raise ValueError(f"{format}: gives two of its {kind}; use one, such as int4:128:asym")
        given.append(kind)
        changed = [x for x in (known.with_option(option) for known in found) if x is not None]
        if not changed and asymmetric:
            raise ValueError(f"{format}: a zero point is of integers; use int4 or int8, or {name}")
        # What is no option of any is told as what it would have to be: a block.
        found = changed or [dataclasses.replace(found[0], block=option)]
    return found[0]


def _named() -> dict[str, Format]:
    """Formats by every name that a text may begin with."""
    return _INTEGERS | FORMATS


def _unknown(format: object) -> str:
    """Makes the error message for what is no format."""
    text = f"unknown format {format!r}; use one of {', '.join(FORMATS)}, int2 to int8, or an object"
    if isinstance(format, str) and format.upper() in SCHEMES:
        weights, activations = SCHEMES[format.upper()]
        also = f", and {activations} of activations" if activations else ""
        return f"{text}; that is a scheme, which has {weights} of weights{also}"
    name = format.partition(":")[0].lower() if isinstance(format, str) else ""
    near = difflib.get_close_matches(name, _named(), n=1)
    return f"{text}; did you mean {near[0]}?" if near else text


def find_scheme(text: str) -> tuple[str, str | None] | None:
    """The formats of weights and activations of one of SCHEMES; None for what is none.

    Capitals make no difference, save where the text is a format as it stands: int8 and nvfp4.

    Raises:
      ValueError: the scheme is one of llm-compressor's that cannot be had here.
    """
    name = text.upper()
    if text in _named():
        return None
    if name in _OTHER_SCHEMES:
        raise ValueError(f"{text} {_OTHER_SCHEMES[name]}, which is not supported; use FP8_DYNAMIC")
    return SCHEMES.get(name)


def format_text(format: Format) -> str:
    """The text of a format that `get_format` reads; where there is none, the object's own."""
    for name, known in _named().items():
        if (options := format.options(known)) is not None:
            return ":".join([name.partition(":")[0], *options]) if options else name
    return str(format)


def format_name(format: str | Format) -> str:
    """A format in words, for people: its name, its block and its zero point."""
    text = format_text(get_format(format))
    if "(" in text:
        return text
    name, *options = text.split(":")
    for option in options:
        name += " with zero points" if option in ZERO_POINT else f" in blocks of {option}"
    return name


def element_bits(format: str | Format) -> int:
    """Bits of one element, without scales."""
    return get_format(format).element_bits


def check_blocks(format: str | Format, size: int, *, ways: int = 1, name: str = "") -> None:
    """Raises a ValueError, beginning with the name, where blocks do not divide an axis.

    `quantize` takes any size: its last block is then shorter. Sharded arrays, hardware and most
    checkpoint formats do not.

    Args:
      size: of the axis that is cut into blocks.
      ways: the number of equal shards that the axis is cut into; no shard may cut a block.
    """
    block = get_format(format).block
    if isinstance(block, int):
        check_block(block, size, ways=ways, name=name)
