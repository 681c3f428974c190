import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity import dot_interplay, lost_maxima, nm_mask, quantize, tensor_interplay, topk_mask
from sparsity.numbers.formats import FORMATS, MX, Int

MAX_SCALED = [name for name in FORMATS if not name.startswith("fp8")]


def magnitude(n, m, axis):
    return lambda x: nm_mask(jnp.abs(x), n, m, axis=axis)


def half(x):
    return topk_mask(jnp.abs(x), x.size // 2)


def adversarial(kind, rng):
    """[64, 8]: numbers near ties of masks and of rounding, where orders differ most."""
    shape = (64, 8)
    if kind == "gauss":
        return rng.normal(size=shape)
    if kind == "near ties":
        return 1 + 0.02 * rng.normal(size=shape)
    if kind == "half steps":
        return (rng.integers(-7, 8, shape) + 0.5) / 7.5
    if kind == "outliers":
        return rng.normal(size=shape) * np.where(rng.random(shape) < 0.03, 1000, 1)
    return np.exp2(rng.integers(-20, 20, shape)) * rng.choice([-1, 1], shape)


KINDS = ["gauss", "near ties", "half steps", "outliers", "powers of two"]
PAIRS = [
    ("int4", "2:4"),
    ("int8", "1:4"),
    ("hbfp4", "half"),
    ("mxfp4_e2m1", "2:4"),
    ("mxfp8_e4m3", "1:4"),
    ("nvfp4", "half"),
]


@functools.cache
def kept_and_arrays(name, mask):
    """Of x: the mask, x sparse, quantized, both in the order of Theorem 3.5, and the reverse."""
    mask_of = {"2:4": magnitude(2, 4, 0), "1:4": magnitude(1, 4, 0), "half": half}[mask]

    def arrays(x):
        kept, dense = mask_of(x), quantize(x, name, axis=0)
        sparse = jnp.where(kept, x, 0)
        reverse = jnp.where(mask_of(dense), dense, 0)
        return kept, sparse, dense, quantize(sparse, name, axis=0), reverse

    return jax.jit(arrays)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PAIRS),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
def test_theorems_3_5_and_3_7(pair, kind, seed):
    x = adversarial(kind, np.random.default_rng(seed)).astype(np.float32)
    kept, *arrays = map(np.asarray, kept_and_arrays(*pair)(x))
    sparsity, quantization, first, second = (a.astype(np.float64) - x for a in arrays)
    # 3.5: what is kept has the value that it has in the dense array.
    np.testing.assert_array_equal(arrays[2], np.where(kept, arrays[1], 0))
    for p in (1, 2, np.inf):
        norm = functools.partial(np.linalg.norm, ord=p)
        bound = norm(sparsity.ravel()) + norm(quantization.ravel())
        assert norm(first.ravel()) <= bound * (1 + 1e-12)
    # 3.7: the reverse passes the bound by at most the quantization error of what is pruned.
    bound = np.abs(sparsity).sum() + np.abs(quantization).sum()
    assert np.abs(second).sum() <= bound + np.abs(quantization[~kept]).sum() + 1e-9 * bound


def test_theorem_3_5_is_attained_and_3_6_has_a_counterexample():
    # All that is pruned has no error of its own: the errors add up exactly in L1.
    x = np.float32([[7.0], [0.0], [3.4], [0.0], [1.0], [1.0], [3.0], [3.3]])
    format = Int(bits=4, narrow=True)
    got = tensor_interplay(x, magnitude(2, 4, 0), format, axis=0, order=1)
    assert got.sparsity == 2
    np.testing.assert_allclose(got.quantization, 0.4 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(got.sparsify_then_quantize, got.bound, rtol=1e-6)
    assert got.lost == 0


def test_theorem_3_6_by_a_counterexample_that_attains_3_7():
    # Steps of 1: 0.51 and 1.49 both become 1, and of equals the mask keeps the first.
    x = np.float32([[7.0], [0], [0], [0], [0.51], [1.49], [0], [0]])
    format = Int(bits=4, narrow=True)
    got = tensor_interplay(x, magnitude(1, 4, 0), format, axis=0, order=1)
    np.testing.assert_allclose(got[:2], (0.51, 0.98), rtol=1e-6)
    np.testing.assert_allclose(got.quantize_then_sparsify, 0.49 + 1.49, rtol=1e-6)
    assert got.excess["sparsify_then_quantize"] == 0
    np.testing.assert_allclose(got.excess["quantize_then_sparsify"], 0.49, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAX_SCALED)
def test_gaussians_keep_their_values_along_the_blocks(name):
    w = jax.random.normal(jax.random.key(0), (512, 64))
    kept = magnitude(2, 4, 0)(w)
    dense = quantize(w, name, axis=0)
    both = quantize(jnp.where(kept, w, 0), name, axis=0)
    np.testing.assert_array_equal(both, jnp.where(kept, dense, 0))
    assert lost_maxima(w, kept, name, axis=0) == (0, 0)


def test_the_premise_breaks_across_the_blocks():
    w = jax.random.normal(jax.random.key(1), (512, 256))
    kept = magnitude(2, 4, 1)(w)
    format = Int(bits=4, block=32)
    lost = lost_maxima(w, kept, format, axis=0).lost
    assert 0.001 < lost < 0.02
    same = quantize(jnp.where(kept, w, 0), format, axis=0) == quantize(w, format, axis=0)
    assert 0.99 < jnp.mean(same, where=kept) < 0.9995  # 99.58 % were measured with other numbers
    assert lost_maxima(w, kept, "int4", axis=0).lost <= lost


def test_lost_maxima_counts_blocks():
    x = np.float32([[4, 1, 1, 1, 1, 5, 1, 1, -9, 1, 1, 3, 1, 1, 1, 1]])
    mask = np.ones(x.shape, bool)
    mask[0, [5, 11]] = False
    mask[0, 12:] = False
    got = lost_maxima(x, mask, MX(block=4))
    assert (got.lost, got.empty) == (0.25, 0.25)
    got = lost_maxima(x, mask, Int(symmetric=False, block=4))  # 3 was the greatest above zero
    assert (got.lost, got.empty) == (0.5, 0.25)
    mask[0, 8] = False  # the greatest of the array
    assert lost_maxima(x, mask, "nvfp4").lost == 1
    got = lost_maxima(np.float32([[2, 2, 1, 1]]), np.array([[0, 1, 1, 1]]), MX(block=4))
    assert got.lost == 0  # its equal stays


def test_norms_are_those_of_the_errors():
    x = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
    mask_of = magnitude(2, 4, 0)
    got = tensor_interplay(x, mask_of, "mxfp4_e2m1", axis=0)
    q = np.asarray(quantize(x, "mxfp4_e2m1", axis=0))
    sparse = np.where(mask_of(x), x, 0)
    arrays = [sparse, q, quantize(sparse, "mxfp4_e2m1", axis=0), np.where(mask_of(q), q, 0)]
    norms = [np.linalg.norm(np.asarray(a) - x) for a in arrays]
    np.testing.assert_allclose(got[:4], norms, rtol=1e-5)
    np.testing.assert_allclose(got.bound, norms[0] + norms[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "quantization", "first", "second"),
    [
        ("mxfp4_e2m1", 3.76, 8.90, 9.09),
        ("hbfp8", None, 8.233, 8.196),
        ("int4", 4.30, 9.04, 9.21),
    ],
)
def test_dot_products_of_gaussians(name, quantization, first, second):
    """Root mean squares and shares that were measured with K = 512 and other random numbers."""
    x, w = (jax.random.normal(key, (512, 512)) for key in jax.random.split(jax.random.key(2)))
    format = Int(bits=4, narrow=True) if name == "int4" else name
    got = jax.jit(functools.partial(dot_interplay, mask_of=magnitude(2, 4, 0), format=format))(x, w)
    np.testing.assert_allclose(got.sparsity, 8.23, rtol=0.02)
    if quantization is not None:
        np.testing.assert_allclose(got.quantization, quantization, rtol=0.03)
    np.testing.assert_allclose(got.sparsify_then_quantize, first, rtol=0.02)
    np.testing.assert_allclose(got.quantize_then_sparsify, second, rtol=0.02)
    # Theorem 3.9: neither order keeps to the bound.
    assert 0.18 < got.violations[0] < 0.23
    assert 0.30 < got.violations[1] < 0.42
    assert (got.mean_excess > 0).all()


def test_dot_products_one_by_one():
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=(64, 5)).astype(np.float32)
    mask_of = magnitude(2, 4, 0)
    got = dot_interplay(x, w, mask_of, "mxfp4_e2m1", x_format="mxfp8_e4m3")
    qx = np.asarray(quantize(x, "mxfp8_e4m3"), np.float64)
    qw = np.asarray(quantize(w, "mxfp4_e2m1", axis=0), np.float64)
    sw = np.where(mask_of(w), w, 0).astype(np.float32)
    sq = np.asarray(quantize(sw, "mxfp4_e2m1", axis=0), np.float64)
    exact = x.astype(np.float64) @ w
    errors = [x @ sw.astype(np.float64), qx @ qw, qx @ sq, qx @ np.where(mask_of(qw), qw, 0)]
    s, q, first, second = (np.abs(e - exact) for e in errors)
    np.testing.assert_allclose(
        got[:4], [np.sqrt(np.mean(e**2)) for e in (s, q, first, second)], rtol=1e-4
    )
    np.testing.assert_allclose(got.violations, [np.mean(e > s + q) for e in (first, second)])
    over = first - s - q
    np.testing.assert_allclose(got.mean_excess[0], over[over > 0].mean(), rtol=1e-3)
