import math

import ml_dtypes
import numpy as np
import pytest

from sparsity import formats
from sparsity.formats import FORMATS, FP8, HBFP, MX, NVFP4, Int, check_blocks, get_format

ELEMENTS = [
    (formats.E4M3, ml_dtypes.float8_e4m3fn),
    (formats.E5M2, ml_dtypes.float8_e5m2),
    (formats.E3M2, ml_dtypes.float6_e3m2fn),
    (formats.E2M3, ml_dtypes.float6_e2m3fn),
    (formats.E2M1, ml_dtypes.float4_e2m1fn),
]


def test_names():
    names = "int4 int8 fp8_e4m3 fp8_e5m2 hbfp4 hbfp6 hbfp8 mxfp8_e4m3 mxfp8_e5m2 mxfp6_e3m2"
    assert " ".join(FORMATS) == f"{names} mxfp6_e2m3 mxfp4_e2m1 mxint8 nvfp4"
    assert all(get_format(name) is format for name, format in FORMATS.items())
    assert len({*FORMATS.values()}) == len(FORMATS)
    mine = MX(element=formats.E2M3, block=8)
    assert get_format(mine) is mine


@pytest.mark.parametrize("name", ["fp4", "INT8", None, 8])
def test_an_unknown_format_lists_the_names(name):
    with pytest.raises(ValueError, match=r"^unknown format .*int4, int8, .*nvfp4.*$") as error:
        get_format(name)
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int(bits=9), "bits=9; use 2 to 8"),
        (lambda: Int(bits=4, symmetric=False, narrow=True), "narrow=True with symmetric=False"),
        (lambda: Int(block="row"), "block='row'; use a number from 1 or 'channel' or 'tensor'"),
        (lambda: MX(block=0), "block=0; use a number"),
        (lambda: FP8(block=True), "block=True; use a number"),
        (lambda: NVFP4(block="tensor"), "block='tensor'; use a number from 1$"),
        (lambda: HBFP(mantissa_bits=0), "mantissa_bits=0; use 1 to 15"),
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
