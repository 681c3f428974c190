"""The scales of SmoothQuant against the paper's formula, and what they are for."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.numbers.quantization import quantize
from sparsity.post_training.smoothquant import smoothing_scales


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), strength=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
def test_scales_are_those_of_the_paper(seed, strength):
    rng = np.random.default_rng(seed)
    maxima = np.exp(rng.normal(size=6) * 2)
    kernels = [rng.normal(size=(6, 4)), rng.normal(size=(6, 3)) * 5]
    found = smoothing_scales(maxima, kernels, strength)
    for j in range(6):
        weight = max(np.abs(kernel[j]).max() for kernel in kernels)
        np.testing.assert_allclose(
            found[j], maxima[j] ** strength / weight ** (1 - strength), rtol=1e-5
        )


def test_half_way_makes_both_maxima_the_same():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(50, 8)) * np.arange(1, 9), rng.normal(size=(8, 5))
    scales = np.asarray(smoothing_scales(np.abs(x).max(0), [kernel], 0.5))
    np.testing.assert_allclose(
        np.abs(x / scales).max(0), np.abs(kernel * scales[:, None]).max(1), rtol=1e-5
    )


def test_outliers_of_activations_cost_less():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(64, 32)), rng.normal(size=(32, 16))
    x[:, 3] *= 100
    scales = np.asarray(smoothing_scales(np.abs(x).max(0), [kernel], 0.5))

    int8 = jax.jit(lambda x: quantize(x, "int8"))

    def error(x, kernel):
        product = np.asarray(int8(x)) @ np.asarray(int8(kernel.T)).T
        return np.linalg.norm(product - x @ kernel)

    assert error(x / scales, kernel * scales[:, None]) < 0.7 * error(x, kernel)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_inputs_and_weights_of_zero_are_left(strength):
    maxima, kernel = np.array([0, 2, 3, 1e-45]), np.ones((4, 2))
    kernel[1] = 0
    found = np.asarray(smoothing_scales(maxima, [kernel], strength))
    assert np.isfinite(found).all()
    assert (found > 0).all()
    np.testing.assert_array_equal(found[:2], 1)


@pytest.mark.parametrize("strength", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("inputs", "weights"), [(80, 0), (-80, 40), (0, 80), (10, -100)])
def test_a_scale_of_inputs_and_weights_is_one_of_the_scales(strength, inputs, weights):
    """By x^a / w^(1 - a): a power of two of either comes out as that power of it."""
    rng = np.random.default_rng(2)
    maxima, kernel = np.exp(rng.normal(size=6)), rng.normal(size=(6, 4))
    plain = np.asarray(smoothing_scales(maxima, [kernel], strength))
    moved = smoothing_scales(np.ldexp(maxima, inputs), [np.ldexp(kernel, weights)], strength)
    factor = 2.0 ** (inputs * strength - weights * (1 - strength))
    np.testing.assert_allclose(np.asarray(moved, np.float64) / factor, plain, rtol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), None, True])
def test_a_strength_out_of_range_is_one_line(strength):
    with pytest.raises(ValueError, match=r"^smoothing: strength .*; use 0 to 1, such as 0.5$"):
        smoothing_scales(np.ones(2), [np.ones((2, 2))], strength)
