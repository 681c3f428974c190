"""The decay of pruned weights, step by step against the formulas."""

import math

import jax
import numpy as np
import pytest

from sparsity.recipes.decay import Exponential, Hard, Linear, MaskDecay, check_decay

LENGTH = 40
CASES = {
    "hard": (Hard(), lambda j: 0.0),
    "linear": (Linear(), lambda j: 1 - j / LENGTH),
    "linear, beta": (Linear(beta=0.05), lambda j: max(1 - 0.05 * j, 0.0)),
    "exponential": (Exponential(), lambda j: 0.01 ** (j / LENGTH)),
    "exponential, beta": (Exponential(beta=0.3), lambda j: math.exp(-0.3 * j)),
    "stairs": (
        MaskDecay(weight=0.125, every=3),
        lambda j: max(1 - 0.125 * (j // 3), 0.0),
    ),
    "stairs, slow": (
        MaskDecay(weight=0.0625, every=2, max_updates=10),
        lambda j: 0.0 if j // 2 >= 10 else 1 - 0.0625 * (j // 2),
    ),
    "stairs, fitted": (MaskDecay(max_updates=8), lambda j: max(1 - (j // 5) / 8, 0.0)),
    "stairs, code": (
        MaskDecay(weight=0.0625, every=2, variant="code"),
        lambda j: 1 - 0.0625 * min(j // 2, 8),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_decay(name):
    decay, formula = CASES[name]
    steps = range(LENGTH + 1)
    want = np.array([formula(j) for j in steps])
    traced = jax.jit(jax.vmap(decay, in_axes=(0, None)))(np.arange(LENGTH + 1), LENGTH)
    np.testing.assert_allclose([decay(j, LENGTH) for j in steps], want, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(traced, want, rtol=2e-6, atol=1e-7)
    assert traced.dtype == np.float32


@pytest.mark.parametrize("length", [1, 3, 7, 49, 1000, 123_457])
def test_linear_begins_at_one_and_ends_at_zero_exactly(length):
    assert Linear()(0, length) == 1
    assert Linear()(length, length) == 0


def test_exponential_ends_at_a_hundredth():
    np.testing.assert_allclose(Exponential()(1000, 1000), 0.01, rtol=1e-5)


def test_stairs_are_one_until_the_first_update_and_zero_after_the_last():
    decay = MaskDecay(weight=0.01, every=1000)
    assert decay(999, 1) == 1
    assert decay(15_999, 1) == np.float32(1 - 0.15)
    assert decay(16_000, 1) == 0


def test_stairs_as_programmed_never_reach_their_last_update():
    decay = MaskDecay(weight=0.01, every=1000, variant="code")
    assert decay(16_000, 1) == decay(8_000, 1) == np.float32(1 - 0.08)


def test_a_linear_decay_too_slow_for_the_phase_is_refused_with_one_that_does():
    with pytest.raises(
        ValueError, match=r"beta=0.001 leaves D at 0.25 after the 750 steps"
    ) as error:
        check_decay(Linear(beta=0.001), 750, fine_tuned=True)
    assert "\n" not in str(error.value)
    beta = float(str(error.value).split("beta >= ")[1].split(",")[0])
    check_decay(Linear(beta=beta), 750, fine_tuned=True)
    assert beta == pytest.approx(1 / 750, rel=1e-2)


@pytest.mark.parametrize("length", [1, 3, 41, 750, 1000, 123_457])
def test_the_slowest_linear_decay_for_a_phase(length):
    check_decay(Linear(beta=1 / length), length, fine_tuned=True)
    with pytest.raises(ValueError, match="use beta >= ") as error:
        check_decay(Linear(beta=0.99 / length), length, fine_tuned=True)
    beta = float(str(error.value).split("beta >= ")[1].split(",")[0])
    assert 1 / length <= beta <= 1.02 / length


@pytest.mark.parametrize("decay", [Exponential(), MaskDecay(weight=0.01, every=1000)])
def test_a_decay_that_leaves_the_run_dense_is_refused(decay):
    check_decay(decay, 1000, fine_tuned=True)
    with pytest.raises(ValueError, match="at the end of the run, and no weight is pruned"):
        check_decay(decay, 1000, fine_tuned=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(beta=0), "Linear.beta=0; use a number from .* or None"),
        (
            lambda: Exponential(beta=-1.0),
            "Exponential.beta=-1.0; use a number from .* or None",
        ),
        (lambda: MaskDecay(weight=0), "MaskDecay.weight=0; use a number from 1.18e-38"),
        (
            lambda: MaskDecay(every=0),
            "MaskDecay.every=0; use a whole number from 1 to",
        ),
        (
            lambda: MaskDecay(max_updates=0),
            "MaskDecay.max_updates=0; use a whole number from 1",
        ),
        (lambda: MaskDecay(variant="repo"), "variant='repo' is unknown; use paper or code"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
