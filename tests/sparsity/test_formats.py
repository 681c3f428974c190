import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsity.numbers import formats
from sparsity.numbers.encoding import bits_per_element, decode, encode
from sparsity.numbers.format import Format
from sparsity.numbers.formats import (
    FORMATS,
    FP8,
    HBFP,
    MX,
    NF4,
    NVFP4,
    Int,
    TiledFP8,
    check_blocks,
    get_format,
)
from sparsity.numbers.quantization import quantize
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.rounding import MAGNITUDE, bits_of, round_to_step
from sparsity.numbers.scales import ratio_scale
from sparsity.post_training.gptq import gptq, rtn
from sparsity.post_training.interplay import lost_maxima

ELEMENTS = [
    (formats.E4M3, ml_dtypes.float8_e4m3fn),
    (formats.E5M2, ml_dtypes.float8_e5m2),
    (formats.E3M2, ml_dtypes.float6_e3m2fn),
    (formats.E2M3, ml_dtypes.float6_e2m3fn),
    (formats.E2M1, ml_dtypes.float4_e2m1fn),
]


def test_names():
    names = "int4 int8 fp8_e4m3 fp8_e5m2 hbfp4 hbfp6 hbfp8 mxfp8_e4m3 mxfp8_e5m2 mxfp6_e3m2"
    names += " mxfp6_e2m3 mxfp4_e2m1 mxint8 nvfp4 nf4 fp8_e4m3:128x128"
    assert " ".join(FORMATS) == names
    assert all(get_format(name) is format for name, format in FORMATS.items())
    assert len({*FORMATS.values()}) == len(FORMATS)
    mine = MX(element=formats.E2M3, block=8)
    assert get_format(mine) is mine


@pytest.mark.parametrize("name", ["fp4", "INT8", None, 8])
def test_an_unknown_format_lists_the_names(name):
    with pytest.raises(ValueError, match=r"^unknown format .*int4, int8, .*nvfp4.*$") as error:
        get_format(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "format"),
    [
        *((f"int{bits}", Int(bits=bits)) for bits in range(2, 9)),
        ("int3:asym", Int(bits=3, symmetric=False)),
        ("int4:asymmetric", Int(bits=4, symmetric=False)),
        ("int4:128", Int(bits=4, block=128)),
        ("int4:128:asym", Int(bits=4, block=128, symmetric=False)),
        ("int4:asym:128", Int(bits=4, block=128, symmetric=False)),
        ("int8:tensor", Int(block="tensor")),
        ("fp8_e4m3:channel", FP8(block="channel")),
        ("hbfp6:16", HBFP(mantissa_bits=5, block=16)),
        ("mxfp4_e2m1:tensor", MX(element=formats.E2M1, block="tensor")),
        ("nvfp4:32", NVFP4(block=32)),
        ("nf4:32", NF4(block=32)),
        ("nf4:channel", NF4(block="channel")),
        ("fp8_e4m3:128x128", TiledFP8()),
        ("fp8_e4m3:64x32", TiledFP8(block=64, output_block=32)),
    ],
)
def test_a_text_says_bits_block_and_zero_point(text, format):
    assert get_format(text) == format
    assert get_format(formats.format_text(format)) == format
    assert "(" not in formats.format_name(format)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int9", "did you mean int"),
        ("int1", "did you mean int"),
        ("int4:", "block=''; use a whole number"),
        ("int4:0", "block=0; use a whole number"),
        ("int4:8:16", "gives two of its block"),
        ("int4:asym:asymmetric", "gives two of its symmetric"),
        ("int4:symetric", "block='symetric'; use a whole number"),
        ("nvfp4:asym", "a zero point is of integers"),
        ("mxfp8_e4m2", "did you mean mxfp8_e"),
        ("nf4:asym", "a zero point is of integers; use int4 or int8, or nf4"),
        ("nf4:64x64", "NF4.block='64x64'; use a whole number"),
        ("fp8_e4m3:64x", "block='64x'; use a whole number"),
        ("fp8_e4m3:0x64", "block=0; use a whole number"),
        ("fp8_e4m3:64x64:8", "gives two of its block"),
        ("fp8_e5m2:128x128", "block='128x128'; use a whole number"),
        ("W4A16", "that is a scheme, which has int4:128 of weights$"),
        ("w8a8", "scheme, which has int8 of weights, and int8 of activations$"),
        ("", "unknown format ''; use one of"),
    ],
)
def test_a_wrong_text_is_one_line(text, says):
    with pytest.raises(ValueError, match=says) as error:
        get_format(text)
    assert "\n" not in str(error.value)


def test_schemes_have_the_arguments_that_llm_compressor_gives_them():
    """Its presets: integer weights in groups of 128, but W8A8's per channel; inputs per token."""
    channel, token = FP8(block="channel"), FP8(block="channel")
    expected = {
        "W4A16": (Int(bits=4, block=128), None),
        "W3A16": (Int(bits=3, block=128), None),
        "W8A16": (Int(block=128), None),
        "W4A16_ASYM": (Int(bits=4, block=128, symmetric=False), None),
        "W8A8": (Int(), Int()),
        "INT8": (Int(), Int()),
        "W4A8": (Int(bits=4, block=128), Int()),
        "W4A4": (Int(bits=4, block=128), Int(bits=4)),
        "W4AFP8": (Int(bits=4, block=128), token),
        "FP8_DYNAMIC": (channel, token),
        "fp8_dynamic": (channel, token),
        "FP8_BLOCK": (TiledFP8(), FP8(block=128)),
        "NVFP4": (NVFP4(), NVFP4()),
        "NVFP4A16": (NVFP4(), None),
        "MXFP4": (FORMATS["mxfp4_e2m1"], FORMATS["mxfp4_e2m1"]),
        "MXFP8A16": (FORMATS["mxfp8_e4m3"], None),
    }
    for name, (weights, activations) in expected.items():
        found = formats.find_scheme(name)
        assert get_format(found[0]) == weights
        assert (None if found[1] is None else get_format(found[1])) == activations
        layers = {"kernel": name}
        assert (
            Quantization(layers=layers).build({"kernel": np.zeros((128, 128))}).plans[0].formats
            == MatmulFormats(weights=weights, activations=activations).resolved()
        )
    for weights, activations in formats.SCHEMES.values():
        assert all(map(get_format, filter(None, (weights, activations))))
    assert formats.find_scheme("int8") is formats.find_scheme("nvfp4") is None
    assert "W8A4" not in formats.SCHEMES
    with pytest.raises(ValueError, match="not supported; use FP8_DYNAMIC"):
        formats.find_scheme("FP8")


def test_every_format_of_the_documents_is_one():
    """The names in the table of docs/quantization.md, and the texts in both documents."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = (docs / "quantization.md").read_text()
    section = text.partition("## Formats\n")[2].partition("\n## ")[0]
    table = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    text_of = r"\b(?:int|fp|hbfp|mx|nvfp|nf)\w*\d[\w:]*"
    named = {name for cell in table for name in re.findall(text_of, cell)}
    assert named >= set(FORMATS)
    text += (docs / "compression.md").read_text()
    named |= set(re.findall(r"--(?:format|activations) ([\w:]+)", text))
    named |= set(re.findall(r"`((?:int|fp8|hbfp|mx|nvfp|nf)\w*\d[\w:]*)`", text))
    schemes = set(re.findall(r"`((?:W\dA|FP8|MXFP|NVFP)\w*)`", text))
    assert named >= {"int4:32", "int4:asym", "int3"}
    assert schemes >= {"W4A16", "W8A8", "FP8_DYNAMIC"}
    for name in named | schemes:
        assert formats.find_scheme(name) or get_format(name)


@pytest.mark.parametrize(("element", "dtype"), ELEMENTS)
def test_elements_are_those_of_the_specification(element, dtype):
    info = ml_dtypes.finfo(dtype)
    assert element.bits == info.bits
    assert element.largest == float(info.max)
    assert 2.0**element.emin == float(info.smallest_normal)
    assert element.emax == math.floor(math.log2(float(info.max)))
    if element.nan is not None:
        assert np.isnan(np.uint8(element.nan).view(dtype).astype(np.float32))


def test_fixed_point_elements():
    assert (formats.INT8.bits, formats.INT8.limit, formats.INT8.emax) == (8, 127, 0)
    assert [formats.element_bits(f"hbfp{k}") for k in (4, 6, 8)] == [4, 6, 8]
    assert HBFP(mantissa_bits=9).element.bits == 10


def float_element(exponent_bits, mantissa_bits, largest):
    return formats.FloatElement(
        exponent_bits=exponent_bits, mantissa_bits=mantissa_bits, largest=largest
    )


WIDE = float_element(6, 1, 2.0**32)


def test_a_scale_is_of_the_greatest_element_also_where_that_is_no_integer():
    """15 / 7.5 = 2; in steps of 2 / 8 up to 2, and 0.15 is nearer to 0.25 than to 0."""
    x = np.float32([[15.0, 4.0, -0.5, 0.15]])
    format = FP8(element=formats.E2M3, block="channel")
    np.testing.assert_array_equal(quantize(x, format), np.float32([[15.0, 4.0, -0.5, 0.25]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(bits=9), "Int.bits=9; use a whole number from 2 to 8"),
        (lambda: Int(bits=4, symmetric=False, narrow=True), "narrow=True with symmetric=False"),
        (
            lambda: Int(block="row"),
            "block='row'; use a whole number from 1 to .* or 'channel' or 'tensor'",
        ),
        (lambda: MX(block=0), "block=0; use a whole number"),
        (lambda: FP8(block=True), "block=True; use a whole number"),
        (lambda: FP8(element=WIDE, block=8), "FP8.element.largest=4294967296.0: .* below 2.24"),
        (lambda: TiledFP8(element=WIDE), "TiledFP8.element.largest=4294967296.0: .* below 2.24"),
        (lambda: float_element(2, 3, 7.25), "FloatElement.largest=7.25: no value of 2 exp.* 3 man"),
        (lambda: float_element(2, 3, 8.0), "FloatElement.largest=8.0: no value of 2 exp.* 3 man"),
        (lambda: NVFP4(block="tensor"), "block='tensor'; use a whole number from 1 to 2147483647$"),
        (lambda: HBFP(mantissa_bits=0), "mantissa_bits=0; use a whole number from 1 to 15"),
    ],
)
def test_objects_that_are_no_format(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_that_do_not_divide_are_refused_on_demand():
    check_blocks("mxfp8_e4m3", 64, ways=2)
    check_blocks("int8", 7, ways=3)
    with pytest.raises(ValueError, match=r"^w: 72 entries .* blocks of 32; .* such as 8$"):
        check_blocks("mxfp4_e2m1", 72, name="w")
    with pytest.raises(ValueError, match=r"^w: 4 shards of 64 entries cut blocks of 32; "):
        check_blocks("mxint8", 64, ways=4, name="w")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(Format):
    """-1, 0 and 1 times max |x| of a block: a format as a user would write one."""

    block: int = 4
    element_bits = 2

    def scale(self, blocks, axes, earlier=None):
        return ratio_scale(self.largest(blocks, axes), 1, 1)

    def limit(self, negative, scale):
        return 1.0

    def elements(self, blocks, scale, rounding, noise):
        magnitude = round_to_step(self.lifted(blocks, scale), 1, rounding, noise)
        return magnitude, bits_of(jnp.where(magnitude == 0, 0.0, blocks)) & ~MAGNITUDE

    def codes(self, magnitude, negative, scale):
        return magnitude.astype(jnp.int32) + 2 * negative

    def magnitudes(self, codes, scale):
        return (codes & 1).astype(jnp.float32), codes > 1


def test_a_format_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setitem(FORMATS, "ternary", Ternary())
    w = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    blocks = w.reshape(4, 4, 12)
    scales = np.abs(blocks).max(1)
    want = (np.round(blocks / scales[:, None]) * scales[:, None]).reshape(w.shape)
    np.testing.assert_array_equal(quantize(w, "ternary", axis=0), want)
    encoded = encode(w, "ternary", axis=0)
    assert encoded.nbytes == 12 * 16 * 2 // 8 + scales.nbytes
    np.testing.assert_array_equal(decode(encoded), want)
    assert bits_per_element("ternary", w.shape, axis=0) == 2 + 32 / 4
    drawn = quantize(w, "ternary", axis=0, rounding="stochastic", key=jax.random.key(0))
    assert set(np.unique(np.abs(np.asarray(drawn)) / scales.repeat(4, 0))) == {0, 1}

    hessian = np.cov(np.random.default_rng(1).normal(size=(16, 64)))
    np.testing.assert_array_equal(rtn(w, "ternary").values, want)
    for found in (rtn(w, "ternary"), gptq(w, hessian, "ternary")):
        elements = np.asarray(found.values) / found.scales.scale.repeat(4, 0)
        assert set(np.unique(elements)) <= {-1, 0, 1}
    quantizer = Quantization(layers={"kernel": "ternary"}).build({"kernel": w})
    np.testing.assert_array_equal(quantizer.weights({"kernel": w})["kernel"].dense(), want)
    assert lost_maxima(w, np.ones(w.shape, bool), "ternary", axis=0).lost == 0

    assert get_format("ternary:8") == Ternary(block=8)
    assert formats.format_text(Ternary(block=8)) == "ternary:8"
    for text, says in (("ternary:asym", "a zero point is of"), ("ternery", "did you mean ternary")):
        with pytest.raises(ValueError, match=says):
            get_format(text)
    with pytest.raises(ValueError, match=r"matmul='native' needs an integer .* are ternary"):
        MatmulFormats(weights="ternary", activations="ternary", matmul="native")
    with pytest.raises(ValueError, match="6 entries are not cut into blocks of 4"):
        rtn(w[:6], "ternary")
    with pytest.raises(ValueError, match="1 of 192 entries are NaN or infinite; Ternary"):
        encode(np.where(w == w.max(), np.nan, w), "ternary")
