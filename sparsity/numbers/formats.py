"""Number formats: elements of few bits, and the scales that blocks of them share.

A format is an element and the rule by which a block of elements gets its scale; a number takes the
value scale * element. The names in FORMATS stand for the objects beside them, `get_format` reads
other texts, and any other object of these classes is a format as well. A scheme is a format of
weights and one of activations under a name of llm-compressor. Sources: OCP 8-bit floating point
(OFP8) v1.0; OCP microscaling formats (MX) v1.0; HBFP of Drumond et al., 2018, as Harma et al., ICLR
2025 use it; for NVFP4 the scales of the compressed-tensors checkpoint format.
"""

import dataclasses
import difflib
import math
import re
from typing import Annotated, Literal

from sparsity.ranges import Count, NonNegative, Positive, Range, Whole, check_fields

Block = Count | Literal["channel", "tensor"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatElement:
    """A small floating-point number with a sign, subnormals and the bias 2^(exponent_bits-1) - 1.

    Attributes:
      exponent_bits, mantissa_bits: widths of the fields; with the sign they make `bits`.
      largest: the greatest finite value.
      nan: the code of the positive NaN, or None where the element has none.
    """

    exponent_bits: Annotated[int, Range(1, 8)]
    mantissa_bits: Annotated[int, Range(0, 15)]
    largest: Positive
    nan: Whole | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def emin(self) -> int:
        """The exponent of the least normal value; subnormals share it."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the greatest value."""
        return math.frexp(self.largest)[1] - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedElement:
    """A fixed-point number n / 2^fraction_bits, where -2^(bits-1) < n < 2^(bits-1)."""

    bits: Annotated[int, Range(2, 16)]
    fraction_bits: Annotated[int, Range(0, 16)]

    def __post_init__(self):
        check_fields(self)

    @property
    def limit(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def emax(self) -> int:
        """The exponent of the greatest value."""
        return self.bits - 2 - self.fraction_bits


E4M3 = FloatElement(exponent_bits=4, mantissa_bits=3, largest=448.0, nan=0x7F)  # no infinity
E5M2 = FloatElement(exponent_bits=5, mantissa_bits=2, largest=57344.0, nan=0x7E)
E3M2 = FloatElement(exponent_bits=3, mantissa_bits=2, largest=28.0)
E2M3 = FloatElement(exponent_bits=2, mantissa_bits=3, largest=7.5)
E2M1 = FloatElement(exponent_bits=2, mantissa_bits=1, largest=6.0)
INT8 = FixedElement(bits=8, fraction_bits=6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int:
    """Integers times a float32 scale, and less a zero point where not symmetric.

    Symmetric: scale = max |x| / (2^(bits-1) - 1/2), the codes -2^(bits-1) .. 2^(bits-1) - 1 (so do
    SparseGPT, Frantar & Alistarh, 2023, and the compressed-tensors format); with `narrow`, scale =
    max |x| / (2^(bits-1) - 1) and the least code is not used, so that the greatest value is held.
    Not symmetric: scale = (max(x, 0) - min(x, 0)) / (2^bits - 1) and zero point =
    round(-min(x, 0) / scale) - 2^(bits-1); the code of x is round(x / scale) + zero point. All of
    it in IEEE float32, the scale itself included; a block of zeros has scale 1.

    Attributes:
      bits: 2 to 8.
      block: how many consecutive entries along the axis share a scale: a number, "channel" for the
        whole axis, or "tensor" for the whole array.
    """

    bits: Annotated[int, Range(2, 8)] = 8
    block: Block = "channel"
    symmetric: bool = True
    narrow: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.narrow and not self.symmetric:
            raise ValueError("Int: narrow=True with symmetric=False; a zero point needs every code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8:
    """8-bit floats (OFP8): a saturating cast, or with a float32 scale = max |x| / largest.

    What is greater than the greatest value, infinity included, becomes that value; NaN stays NaN.
    With a scale taken from the data, a block with NaN or infinity is NaN. A subnormal product of
    element and scale is rounded twice: to 24 bits, then to a multiple of 2^-149.

    Attributes:
      element: E4M3 or E5M2 (any FloatElement will do).
      block: None for no scale; else as in `Int`.
    """

    element: FloatElement = E4M3
    block: Block | None = None

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HBFP:
    """Hybrid block floating point: integers that share an exponent.

    exponent e = ceil(log2(max |x|)), and at least -126; values n * 2^(e - mantissa_bits) with
    |n| <= 2^mantissa_bits - 1. The logarithm is exact. The code that came with Harma et al. adds
    1e-8 to the maximum before a float32 logarithm; with `epsilon` = 1e-8 so does this, in float32.

    Attributes:
      mantissa_bits: without the sign: HBFP8 has 7; 1 to 15.
      block: entries along the axis that share an exponent, "channel" or "tensor".
      epsilon: added to the maximum of the block.
    """

    mantissa_bits: Annotated[int, Range(1, 15)] = 7
    block: Block = 64
    epsilon: NonNegative = 0.0

    def __post_init__(self):
        check_fields(self)

    @property
    def element(self) -> FixedElement:
        return FixedElement(bits=self.mantissa_bits + 1, fraction_bits=self.mantissa_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MX:
    """OCP microscaling: elements that share a power of two, stored as one byte (E8M0).

    scale = 2^(floor(log2(max |x|)) - emax of the element), from 2^-127 to 2^127 (MX v1.0, section
    6.3); elements above the greatest value are clipped to it. Where a block holds NaN or infinity
    its scale is NaN, and so is the whole block.

    Attributes:
      element: a FloatElement, or INT8.
      block: entries along the axis that share a scale, "channel" or "tensor".
    """

    element: FloatElement | FixedElement = E4M3
    block: Block = 32

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4:
    """E2M1 elements with an E4M3 scale to a block and one float32 scale to the array.

    tensor scale g = 448 * 6 / max |array|, and at most 2^100; block scale s = E4M3(max |x| / 6 *
    g), to nearest even; values = E2M1(x / (s / g)) * (s / g); each step in float32 (so does
    compressed-tensors, which stores s and g). Where s = 0 the block is zero. A block with NaN or
    infinity is NaN, and does not count for g.

    Attributes:
      block: entries along the axis that share a block scale.
    """

    block: Count = 16

    def __post_init__(self):
        check_fields(self)

    @property
    def element(self) -> FloatElement:
        return E2M1


Format = Int | FP8 | HBFP | MX | NVFP4

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
}


_NAMED = {f"int{bits}": Int(bits=bits) for bits in range(2, 9)} | FORMATS
_ZERO_POINT = ("asymmetric", "asym")

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
    "FP8_BLOCK": "has a scale to a square of 128 x 128 weights",
}


def get_format(format: str | Format) -> Format:
    """The format of a text; a format object is itself.

    Args:
      format: a name of FORMATS, or int2 to int8; then, where it has another block than the name
        alone stands for, a colon and a number, "channel" or "tensor"; and for integers with a zero
        point ":asymmetric", in short ":asym". So "int4:128", "fp8_e4m3:channel", "int3:asym",
        "int8:tensor:asymmetric".

    Raises:
      ValueError: there is no such format; the message lists the names.
    """
    if isinstance(format, Format):
        return format
    name, *options = format.split(":") if isinstance(format, str) else [None]
    if name not in _NAMED:
        raise ValueError(_unknown(format))
    found, changes = _NAMED[name], {}
    for option in options:
        asymmetric = option in _ZERO_POINT
        if asymmetric and not isinstance(found, Int):
            raise ValueError(f"{format}: a zero point is of integers; use int4 or int8, or {name}")
        field = "symmetric" if asymmetric else "block"
        if field in changes:
            raise ValueError(f"{format}: gives two of its {field}; use one, such as int4:128:asym")
        block = int(option) if re.fullmatch(r"[0-9]{1,10}", option) else option
        changes[field] = False if asymmetric else block
    return dataclasses.replace(found, **changes) if changes else found


def _unknown(format) -> str:
    """The message for what is no format."""
    text = f"unknown format {format!r}; use one of {', '.join(FORMATS)}, int2 to int8, or an object"
    if isinstance(format, str) and format.upper() in SCHEMES:
        weights, activations = SCHEMES[format.upper()]
        also = f", and {activations} of activations" if activations else ""
        return f"{text}; that is a scheme, which has {weights} of weights{also}"
    name = format.partition(":")[0].lower() if isinstance(format, str) else ""
    near = difflib.get_close_matches(name, _NAMED, n=1)
    return f"{text}; did you mean {near[0]}?" if near else text


def find_scheme(text: str) -> tuple[str, str | None] | None:
    """The formats of weights and activations of one of SCHEMES; None for what is none.

    Capitals make no difference, save where the text is a format as it stands: int8 and nvfp4.

    Raises:
      ValueError: the scheme is one of llm-compressor's that cannot be had here.
    """
    name = text.upper()
    if text in _NAMED:
        return None
    if name in _OTHER_SCHEMES:
        raise ValueError(f"{text} {_OTHER_SCHEMES[name]}, which is not supported; use FP8_DYNAMIC")
    return SCHEMES.get(name)


def format_text(format: Format) -> str:
    """The text of a format that `get_format` reads; where there is none, the object's own."""
    if isinstance(format, Int) and not format.symmetric:
        text = format_text(dataclasses.replace(format, symmetric=True))
        return f"{text}:asymmetric" if text.startswith("int") else str(format)
    for name, known in _NAMED.items():
        if format == known:
            return name
        if type(format) is type(known) and dataclasses.replace(format, block=known.block) == known:
            return f"{name}:{format.block}"
    return str(format)


def format_name(format: str | Format) -> str:
    """A format in words, for people: its name, its block and its zero point."""
    text = format_text(get_format(format))
    if "(" in text:
        return text
    name, *options = text.split(":")
    for option in options:
        name += " with zero points" if option in _ZERO_POINT else f" in blocks of {option}"
    return name


def element_bits(format: str | Format) -> int:
    """Bits of one element, without scales."""
    format = get_format(format)
    return format.bits if isinstance(format, Int) else format.element.bits


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


def check_block(block: int, size: int, *, ways: int = 1, name: str = "") -> None:
    """`check_blocks` of a block."""
    start = f"{name}: " if name else ""
    if size % block:
        raise ValueError(
            f"{start}{size} entries are not cut into blocks of {block}; "
            f"use a block that divides {size}, such as {math.gcd(size, block)}"
        )
    if size % ways or size // ways % block:
        raise ValueError(
            f"{start}{ways} shards of {size} entries cut blocks of {block}; "
            f"use a block that divides the shard, or fewer shards"
        )
