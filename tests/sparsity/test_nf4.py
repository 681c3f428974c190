"""NF4 against the paper's values, a block by hand, and a search by numpy among all of them."""

import jax
import numpy as np
import pytest

from sparsity.numbers.encoding import bits_per_element, decode, encode
from sparsity.numbers.formats import NF4
from sparsity.numbers.quantization import block_scales, clipped, quantize

# QLoRA (Dettmers et al., 2023, arXiv 2305.14314), appendix E, in its order.
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
VALUES = np.float32(PAPER)
WIDE = VALUES.astype(np.float64)
LARGEST, LEAST = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal


def nearest(e, rounding):
    """Of float32 e, the codes, by distance to all sixteen in float64 (exact: e is float32)."""
    e = np.asarray(e, np.float64)
    codes = np.zeros(e.shape, np.uint8)
    for at, v in np.ndenumerate(e):
        distance = np.abs(WIDE - v)
        if rounding == "floor":
            distance[np.abs(WIDE) > abs(v)] = np.inf
            distance[WIDE * v < 0] = np.inf
        [*near] = np.flatnonzero(distance == distance.min())
        if len(near) == 2:
            if rounding == "even":
                near = [c for c in near if c % 2 == 0]
            else:
                near = [max(near, key=lambda c: abs(WIDE[c]))]
        [codes[at]] = near
    return codes


def expected(x, block, rounding="even"):
    """float32 rows in blocks along the last axis: codes and values."""
    codes, values = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.float32)
    for row in range(len(x)):
        for start in range(0, x.shape[1], block):
            part = x[row, start : start + block]
            scale = np.abs(part).max() or np.float32(1)
            at = row, slice(start, start + block)
            codes[at] = nearest(part / scale, rounding)
            # The product to 24 bits, then to a multiple of 2^-149.
            fraction, exponent = np.frexp(scale)
            values[at] = np.ldexp(VALUES[codes[at]] * fraction, exponent)
    return codes, values


def unpacked(encoded, size):
    codes = np.asarray(encoded.codes)
    return np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)[..., :size]


def ties():
    """All midpoints that are float32, and their neighbours, in a block whose maximum is 1."""
    middles = (WIDE[1:] + WIDE[:-1]) / 2
    near = np.float32(middles)
    rows = [np.nextafter(near, np.float32(-9)), near, np.nextafter(near, np.float32(9))]
    assert 3 < np.sum(near == middles) < 15  # ties and others
    return np.stack([np.r_[row, np.float32(1)] for row in rows])


@pytest.mark.parametrize("scale", [1.0, 2.0**100, 3.0])
def test_the_values_are_those_of_the_paper(scale):
    x = np.float32(PAPER) * np.float32(scale)
    np.testing.assert_array_equal(quantize(x, "nf4"), x)
    encoded = encode(x[None], "nf4")
    np.testing.assert_array_equal(unpacked(encoded, 16), [range(16)])
    assert encoded.scales.tolist() == [[scale]]


def test_a_block_by_hand():
    # max 2: quotients -0.8, 0.05, 1, -0.04, 0.3, 0.2, -0.6, 0; the nearest of the sixteen beside.
    x = np.float32([[-1.6, 0.1, 2.0, -0.08, 0.6, 0.4, -1.2, 0.0]])
    encoded = encode(x, "nf4:8")
    np.testing.assert_array_equal(unpacked(encoded, 8), [[1, 8, 15, 7, 11, 9, 2, 7]])
    assert encoded.codes.tolist() == [[0x81, 0x7F, 0x9B, 0x72]]  # the first is the low half
    want = 2 * VALUES[[1, 8, 15, 7, 11, 9, 2, 7]]
    np.testing.assert_array_equal(quantize(x, "nf4:8"), [want])
    np.testing.assert_array_equal(decode(encoded), [want])


@pytest.mark.parametrize("rounding", ["even", "away", "floor"])
def test_the_nearest_of_all_sixteen_and_ties(rounding):
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(2, (24, 16)).astype(np.float32)
    heavy[3] *= np.float32(1e30)
    heavy[4] = 0
    heavy[5] = -heavy[5]
    heavy[6, ::2] = -0.0
    x = np.concatenate([ties(), -ties(), heavy])
    codes, values = expected(x, 16, rounding)
    got = quantize(x, "nf4:16", rounding=rounding)
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(unpacked(encode(x, "nf4:16", rounding=rounding), 16), codes)


def test_ties_go_where_it_is_written():
    half = float(VALUES[8]) / 2  # between 0 (code 7) and code 8
    x = np.float32([half, float(VALUES[6]) / 2, 1.0])
    assert quantize(x, "nf4").tolist() == [VALUES[8], VALUES[6], 1]
    assert quantize(x, "nf4", rounding="away").tolist() == [VALUES[8], VALUES[6], 1]
    assert quantize(x, "nf4", rounding="floor").tolist() == [0, 0, 1]
    middle = (float(VALUES[11]) + float(VALUES[12])) / 2
    x = np.float32([middle, 1.0])
    assert quantize(x, "nf4").tolist() == [VALUES[12], 1]
    middle = (float(VALUES[2]) + float(VALUES[3])) / 2
    x = np.float32([middle, 1.0])
    assert float(x[0]) == middle
    assert quantize(x, "nf4").tolist() == quantize(x, "nf4", rounding="away").tolist()
    middle = np.float32((float(VALUES[9]) + float(VALUES[10])) / 2)
    assert quantize(np.float32([middle, 1]), "nf4").tolist() == [VALUES[10], 1]


def test_blocks_that_do_not_divide_axes_and_subnormals():
    x = np.random.default_rng(1).standard_t(2, (5, 150)).astype(np.float32)
    x[2] *= np.float32(1e-38)
    x[3, :70] = 0
    x[4, :64] = LEAST * np.arange(64)
    x[0, 3] = LARGEST
    want = expected(x, 64)[1]
    np.testing.assert_array_equal(quantize(x, "nf4"), want)
    np.testing.assert_array_equal(quantize(x.T, "nf4", axis=0), want.T)
    got = np.asarray(decode(encode(x, "nf4")))
    np.testing.assert_array_equal(got.view(np.int32), np.asarray(quantize(x, "nf4")).view(np.int32))
    assert bits_per_element("nf4", (8, 4096)) == 4.5
    assert bits_per_element("nf4:32", (8, 4096)) == 5
    assert encode(x, "nf4").nbytes == 5 * 75 + 5 * 3 * 4


def test_stochastic_rounding_is_between_neighbours_and_without_bias():
    row = np.float32([0.3, -0.3, 0.01, -0.99, 0.7229568362236023, 0.0, 1.0, 0.9])
    x = row[None].repeat(4000, 0)
    drawn = np.asarray(quantize(x, "nf4:8", rounding="stochastic", key=jax.random.key(3)))
    for column, v in zip(drawn.T, row, strict=True):
        low, high = VALUES[v >= VALUES].max(), VALUES[v <= VALUES].min()
        assert set(np.unique(column)) == {low, high}
        deviation = np.sqrt(max((v - low) * (high - v), 0) / len(x))
        assert abs(column.mean() - v) <= 4.5 * deviation + 1e-6


def test_given_scales_clip_and_other_blocks_stay():
    x = np.random.default_rng(4).normal(size=(3, 128)).astype(np.float32)
    scale, zero_point = block_scales(x, NF4())
    assert zero_point is None
    np.testing.assert_array_equal(scale, np.abs(x.reshape(3, 2, 64)).max(2))
    np.testing.assert_array_equal(quantize(x, NF4(), scale=scale), quantize(x, NF4()))
    over = np.float32([[3.0, -np.inf, np.nan, 0.5]])
    got = quantize(over, "nf4:4", scale=np.float32([[0.5]]))
    np.testing.assert_array_equal(got, [[0.5, -0.5, np.nan, 0.5]])
    np.testing.assert_array_equal(
        clipped(over, "nf4:4", scale=np.float32([[0.5]]))[:, [0, 1, 3]], [[True, True, False]]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bad):
    x = np.random.default_rng(5).normal(size=(1, 128)).astype(np.float32)
    clean = np.asarray(quantize(x, "nf4"))
    x[0, 70] = bad
    got = np.asarray(quantize(x, "nf4"))
    assert np.isnan(got[0, 64:]).all()
    np.testing.assert_array_equal(got[0, :64], clean[0, :64])
    with pytest.raises(ValueError, match="1 of 128 entries are NaN or infinite; NF4"):
        encode(x, "nf4")
