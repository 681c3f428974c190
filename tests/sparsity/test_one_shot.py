"""One-shot pruning against straightforward numpy in float64, and by what it promises."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.post_training import one_shot
from sparsity.post_training.gptq import gptq
from sparsity.post_training.hessian import add_grams, check_hessian, from_gram, gram, inverse_factor

INPUTS, OUTPUTS, TOKENS = 48, 12, 400


def problem(seed: int, inputs: int = INPUTS, outputs: int = OUTPUTS):
    """A kernel and correlated inputs, some far larger than others, as a language model has them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) * np.exp(-np.arange(inputs) / 8)[:, None]
    x = rng.normal(size=(TOKENS, inputs)) @ mixing + 0.1 * rng.normal(size=(TOKENS, inputs))
    x *= np.exp(rng.normal(size=inputs))
    kernel = rng.normal(size=(inputs, outputs))
    return kernel.astype(np.float32), x.astype(np.float32)


def largest(scores, keep: int):
    """Mask of the `keep` largest of a vector."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def groupwise(scores, n: int, m: int):
    mask = np.zeros(scores.shape, bool)
    for first in range(0, scores.shape[0], m):
        for o in range(scores.shape[1]):
            mask[first : first + m, o] = largest(scores[first : first + m, o], n)
    return mask


def brain_surgeon(kernel, hessian, n_m=None, fraction=None, block=None):
    """Prunes inputs one by one, every update applied at once, an inverse made anew for each."""
    w, inputs = np.array(kernel, np.float64), len(hessian)
    h = hessian.astype(np.float64) + 0.01 * np.mean(np.diag(hessian)) * np.eye(inputs)
    inverses = [np.linalg.inv(h[j:, j:])[0] for j in range(inputs)]  # row of the first input left
    cost = np.array([row[0] for row in inverses])[:, None]
    for j in range(inputs):
        if n_m is not None and j % n_m[1] == 0:
            at = slice(j, j + n_m[1])
            mask = groupwise(w[at] ** 2 / cost[at], *n_m)
        elif n_m is None and j % block == 0:
            at = slice(j, min(j + block, inputs))
            scores = w[at] ** 2 / cost[at]
            mask = largest(scores, round(scores.size * (1 - fraction)))
        pruned = np.where(mask[j - at.start], 0, w[j])
        w[j:] -= np.outer(inverses[j] / inverses[j][0], pruned)
        w[j][~mask[j - at.start]] = 0
    return w


def lost(kernel, changed, x) -> float:
    whole = x.astype(np.float64) @ kernel
    return np.linalg.norm(whole - x @ np.asarray(changed, np.float64)) / np.linalg.norm(whole)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (5, 6)])
def test_magnitude_keeps_the_largest_of_each_group(n, m):
    kernel, _ = problem(0)
    mask = one_shot.magnitude_mask(kernel, f"{n}:{m}")
    np.testing.assert_array_equal(mask, groupwise(np.abs(kernel), n, m))


@pytest.mark.parametrize("fraction", [0, 0.5, 0.73])
def test_magnitude_of_a_fraction_compares_the_whole_kernel(fraction):
    kernel, _ = problem(1)
    keep = round(kernel.size * (1 - fraction))
    for pattern in (fraction, str(fraction)):
        mask = one_shot.magnitude_mask(kernel, pattern)
        np.testing.assert_array_equal(mask, largest(np.abs(kernel), keep))


def test_at_2_4_magnitude_is_the_best_of_the_six_patterns():
    kernel, _ = problem(2)
    patterns = [p for p in np.ndindex(2, 2, 2, 2) if sum(p) == 2]
    mask = np.asarray(one_shot.magnitude_mask(kernel, "2:4"))
    for first in range(0, INPUTS, 4):
        group, kept = np.abs(kernel[first : first + 4]), mask[first : first + 4]
        best = max(patterns, key=lambda p: group[:, 0] @ np.array(p))
        np.testing.assert_array_equal(kept[:, 0], np.array(best, bool))
        assert (kept.sum(0) == 2).all()


def test_wanda_scores_by_hand():
    kernel = jnp.array([[1.0, -4.0], [-3.0, 0.5]])
    scores = one_shot.wanda_scores(kernel, jnp.array([2.0, 0.5]))
    np.testing.assert_allclose(scores, [[2.0, 8.0], [1.5, 0.25]])


def test_wanda_compares_within_an_output():
    kernel, x = problem(3)
    norms = np.sqrt((x.astype(np.float64) ** 2).sum(0))
    scores = np.abs(kernel) * norms[:, None]
    mask = one_shot.wanda_mask(kernel, norms.astype(np.float32), 0.625)
    expected = np.stack([largest(scores[:, o], 18) for o in range(OUTPUTS)], axis=1)
    np.testing.assert_array_equal(mask, expected)
    mask = one_shot.wanda_mask(kernel, norms.astype(np.float32), "1:4")
    np.testing.assert_array_equal(mask, groupwise(scores, 1, 4))


@pytest.mark.parametrize("block_size", [128, 16, 20])
@pytest.mark.parametrize("n_m", [(2, 4), (1, 8)])
def test_sparsegpt_is_the_brain_surgeon_input_by_input(n_m, block_size):
    kernel, x = problem(4)
    hessian = x.T @ x
    pattern = "{}:{}".format(*n_m)
    pruned = one_shot.sparsegpt(kernel, hessian, pattern=pattern, block_size=block_size)
    expected = brain_surgeon(kernel, hessian, n_m)
    np.testing.assert_array_equal(pruned != 0, expected != 0)
    np.testing.assert_allclose(pruned, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block_size", [128, 16, 20])
def test_sparsegpt_of_a_fraction_chooses_within_blocks(block_size):
    kernel, x = problem(5)
    hessian = x.T @ x
    pruned = one_shot.sparsegpt(kernel, hessian, pattern=0.6, block_size=block_size)
    expected = brain_surgeon(kernel, hessian, fraction=0.6, block=block_size)
    np.testing.assert_array_equal(pruned != 0, expected != 0)
    np.testing.assert_allclose(pruned, expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), pattern=st.sampled_from(["2:4", "0.5"]))
def test_sparsegpt_loses_less_than_masks_alone(seed, pattern):
    kernel, x = problem(seed)
    norms = np.linalg.norm(x, axis=0)
    by_sparsegpt = one_shot.sparsegpt(kernel, x.T @ x, pattern=pattern)
    by_wanda = np.where(one_shot.wanda_mask(kernel, norms, pattern), kernel, 0)
    by_magnitude = np.where(one_shot.magnitude_mask(kernel, pattern), kernel, 0)
    assert lost(kernel, by_sparsegpt, x) < lost(kernel, by_wanda, x)
    assert lost(kernel, by_sparsegpt, x) < lost(kernel, by_magnitude, x)
    assert np.mean(np.asarray(by_sparsegpt) == 0) == 0.5
    if pattern == "2:4":
        assert ((np.asarray(by_sparsegpt) != 0).reshape(-1, 4, OUTPUTS).sum(1) == 2).all()


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "0.5"])
def test_without_correlations_sparsegpt_is_magnitude(pattern):
    kernel, _ = problem(6)
    pruned = one_shot.sparsegpt(kernel, 7.0 * np.eye(INPUTS), pattern=pattern)
    expected = np.where(one_shot.magnitude_mask(kernel, pattern), kernel, 0)
    np.testing.assert_allclose(pruned, expected, rtol=1e-6)


def test_of_two_equal_inputs_one_takes_over_the_weight_of_the_other():
    rng = np.random.default_rng(7)
    x = np.repeat(rng.normal(size=(TOKENS, 8)), 2, axis=1)
    kernel = rng.normal(size=(16, 5)).astype(np.float32)
    pruned = one_shot.sparsegpt(kernel, x.T @ x, pattern="1:2", damping=1e-6)
    together = lambda w: np.asarray(w).reshape(8, 2, 5).sum(1)
    np.testing.assert_allclose(together(pruned), together(kernel), atol=1e-3)


def test_inputs_that_are_always_zero_get_zero_weights():
    kernel, x = problem(8)
    x[:, [3, 17]] = 0
    pruned = np.asarray(one_shot.sparsegpt(kernel, x.T @ x, pattern="2:4"))
    assert not pruned[[3, 17]].any()
    assert np.isfinite(pruned).all()
    assert lost(kernel, pruned, x) < 1


def test_fewer_tokens_than_inputs_are_enough():
    kernel, x = problem(9)
    pruned = one_shot.sparsegpt(kernel, x[:10].T @ x[:10], pattern="2:4")
    by_magnitude = np.where(one_shot.magnitude_mask(kernel, "2:4"), kernel, 0)
    assert lost(kernel, pruned, x[:10]) < lost(kernel, by_magnitude, x[:10])


def test_sparsegpt_keeps_the_dtype():
    kernel, x = problem(10)
    pruned = one_shot.sparsegpt(jnp.asarray(kernel, jnp.bfloat16), x.T @ x, pattern="2:4")
    assert pruned.dtype == jnp.bfloat16
    assert ((np.asarray(pruned) != 0).reshape(-1, 4, OUTPUTS).sum(1) <= 2).all()


@pytest.mark.parametrize("inputs", [48, 200])
def test_the_factor_is_that_of_the_inverse(inputs):
    _, x = problem(11, inputs)
    hessian = x.T.astype(np.float64) @ x
    factor, dead = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(inputs)
    damped /= 2.0 ** (1 + np.floor(np.log2(np.diag(hessian).max())))
    np.testing.assert_array_equal(factor, np.triu(factor))
    factor = factor.astype(np.float64)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(inputs), atol=1e-4)
    assert not dead.any()


def test_transposable_kernels_are_2_4_both_ways():
    kernel, x = problem(12)
    mask = one_shot.magnitude_mask(kernel, "2:4", transposable=True)
    norms = np.linalg.norm(x, axis=0)
    by_wanda = one_shot.wanda_mask(kernel, norms, "2:4", transposable=True)
    pruned = one_shot.sparsegpt(kernel, x.T @ x, pattern="2:4", transposable=True)
    for kept in (np.asarray(mask), np.asarray(by_wanda), np.asarray(pruned) != 0):
        assert (kept.reshape(-1, 4, OUTPUTS).sum(1) == 2).all()
        assert (kept.reshape(INPUTS, -1, 4).sum(2) == 2).all()
    assert lost(kernel, pruned, x) < lost(kernel, np.where(mask, kernel, 0), x)


def test_masks_of_stacked_layers_by_vmap():
    kernels = np.stack([problem(seed)[0] for seed in range(3)])
    norms = np.exp(np.random.default_rng(0).normal(size=(3, INPUTS))).astype(np.float32)
    for pattern in ("2:4", 0.5):
        masks = jax.vmap(lambda k, p=pattern: one_shot.magnitude_mask(k, p))(kernels)
        by_wanda = jax.vmap(lambda k, s, p=pattern: one_shot.wanda_mask(k, s, p))(kernels, norms)
        for layer in range(3):
            scores = np.abs(kernels[layer])
            expected = (
                groupwise(scores, 2, 4) if pattern == "2:4" else largest(scores, scores.size // 2)
            )
            np.testing.assert_array_equal(masks[layer], expected)
            assert (np.asarray(by_wanda[layer]).sum(0) == INPUTS // 2).all()


@pytest.mark.parametrize(
    ("pattern", "options", "says"),
    [
        ("5:4", {}, "5:4: cannot keep 5 of every 4"),
        ("0:4", {}, "0:4: cannot keep 0 of every 4"),
        ("2;4", {}, "'2;4' is unknown; use N:M"),
        ("1.0", {}, "'1.0' is unknown; use N:M"),
        (-0.1, {}, "-0.1 is unknown; use N:M"),
        ("nan", {}, "'nan' is unknown"),
        ("2:5", {}, "48 entries .* groups of 5; use an M that divides 48"),
        ("0.5", {"transposable": True}, "only N:M is kept along both axes"),
    ],
)
def test_a_pattern_that_cannot_be_is_told_in_one_line(pattern, options, says):
    kernel, x = problem(0)
    norms = np.linalg.norm(x, axis=0)
    for prune in (
        lambda: one_shot.magnitude_mask(kernel, pattern, **options),
        lambda: one_shot.wanda_mask(kernel, norms, pattern, **options),
        lambda: one_shot.sparsegpt(kernel, x.T @ x, pattern=pattern, **options),
    ):
        with pytest.raises(ValueError, match=says) as raised:
            prune()
        assert "\n" not in str(raised.value)


def test_outputs_that_4_does_not_divide_are_not_transposable():
    with pytest.raises(ValueError, match=r"block/kernel \(its outputs\): 6 entries"):
        one_shot.check_pattern("2:4", 8, 6, transposable=True, name="block/kernel")


@pytest.mark.parametrize(
    ("hessian", "options", "says"),
    [
        (lambda h: h * np.where(np.arange(h.size) == 50, np.nan, 1).reshape(h.shape), {},
         r"hessian_II: entry \[1, 2\] is not finite"),
        (lambda h: h * np.inf, {}, "hessian_II: entry .* is not finite"),
        (lambda h: h[1:, 1:], {}, r"hessian_II: shape \(47, 47\); use .*48 inputs, \(48, 48\)"),
        (lambda h: h[0], {}, r"hessian_II: shape \(48,\)"),
        (lambda h: np.triu(h), {}, "hessian_II: entry .* is not that of its transpose"),
        (lambda h: -h, {}, "hessian_II: entry .* is -.*; the diagonal of X"),
        (lambda h: np.ones_like(h), {"damping": 0.0}, "hessian_II: not positive definite .*damp"),
        (lambda h: np.ones_like(h) - np.eye(len(h)) / 2, {}, "hessian_II: not positive definite"),
        (lambda h: h, {"damping": float("nan")}, "damping=nan; use a number from 0"),
        (lambda h: h, {"damping": -1}, "damping=-1; use"),
        (lambda h: h, {"block_size": 0}, "block_size=0; use a whole number from 1"),
    ],
)  # fmt: skip
def test_a_hessian_that_cannot_be_is_told_in_one_line(hessian, options, says):
    kernel, x = problem(0)
    wrong = hessian(x.T.astype(np.float64) @ x)
    for change in (
        lambda: one_shot.sparsegpt(kernel, wrong, pattern="2:4", **options),
        lambda: gptq(kernel, wrong, "int4", **options),
    ):
        with pytest.raises(ValueError, match=f"^{says}") as raised:
            change()
        assert "\n" not in str(raised.value)


def test_numbers_that_are_not_finite_are_named():
    kernel, x = problem(0)
    norms, hessian = np.linalg.norm(x, axis=0), x.T @ x
    bad = np.where(np.arange(kernel.size).reshape(kernel.shape) == 14, -np.inf, kernel)
    for change in (
        lambda: one_shot.magnitude_mask(bad, "2:4"),
        lambda: one_shot.wanda_mask(bad, norms, "2:4"),
        lambda: one_shot.sparsegpt(bad, hessian, pattern="2:4"),
        lambda: gptq(bad, hessian, "int4"),
    ):
        with pytest.raises(ValueError, match=r"^kernel_IO: entry \[1, 2\] is -inf; use finite"):
            change()
    for wrong, says in [
        (norms[1:], r"shape \(47,\); use one to each of 48 inputs"),
        (norms * np.nan, r"entry \[0\] is nan"),
        (-norms, "is below 0"),
    ]:
        with pytest.raises(ValueError, match=f"^input_norms_I: .*{says}"):
            one_shot.wanda_mask(kernel, wrong, "2:4")
    with pytest.raises(ValueError, match=r"^kernel_IO: shape \(48,\); use \[inputs, outputs\]"):
        one_shot.magnitude_mask(kernel[:, 0], "2:4")
    with pytest.raises(ValueError, match=r"^mask_IO: shape \(12, 48\); use the kernel's"):
        gptq(kernel, hessian, "int4", mask_IO=np.ones((12, 48)))


def summed(x):
    """X^T X as calibration sums it, of three batches."""
    parts = [gram(jnp.asarray(part)) for part in np.array_split(x, 3)]
    return from_gram(add_grams(add_grams(parts[0], parts[1]), parts[2]))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "transposable"])
def test_no_scale_of_weights_or_inputs_changes_a_mask(pattern):
    """Powers of two from 1e-30 to 1e30, whose squares float32 does not have."""
    kernel, x = problem(14)
    x[:, 5] = 0
    options = {"pattern": "2:4", "transposable": True}
    options = options if pattern == "transposable" else {"pattern": pattern}
    expected = None
    for weights, inputs in [(0, 0), (100, 100), (-100, -100), (100, -100), (-100, 0), (0, 100)]:
        w, x_now = np.ldexp(kernel, weights), np.ldexp(x, inputs)
        hessian = summed(x_now)
        norms = np.sqrt(np.diagonal(hessian))
        pruned = one_shot.sparsegpt(w, hessian, **options)
        found = (
            one_shot.magnitude_mask(w, **options),
            one_shot.wanda_mask(w, norms, **options),
            np.ldexp(np.asarray(pruned), -weights),
            np.ldexp(np.asarray(gptq(w, hessian, "int4").values), -weights),
        )
        expected = found if expected is None else expected
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert lost(kernel, found[2], x) < 0.9


@pytest.mark.parametrize("scale", [-140, -75, 0, 75, 110])
def test_sums_of_products_neither_overflow_nor_vanish(scale):
    _, x = problem(15)
    x = np.ldexp(x, scale)
    exact = x.astype(np.float64).T @ x
    np.testing.assert_allclose(summed(x), exact, rtol=2e-4, atol=1e-6 * np.abs(exact).max())
    check_hessian(summed(x), INPUTS)


SCRIPT = """
import hashlib, sys
import numpy as np, jax.numpy as jnp
from sparsity.post_training import one_shot
from sparsity.post_training.gptq import gptq
from sparsity.post_training.hessian import from_gram, gram, inverse_factor
rng = np.random.default_rng(0)
x = rng.normal(size=(1100, 260)) @ rng.normal(size=(260, 260))
kernel = rng.normal(size=(260, 96)).astype(np.float32)
hessian = from_gram(gram(jnp.asarray(x, jnp.float32)))
pruned = one_shot.sparsegpt(kernel, hessian, pattern="2:4")
roots = rng.integers(-8, 8, (700, 700)).astype(float)  # whose products are exact in any order
factor, _ = inverse_factor(roots.T @ roots, 1e-9)
found = hessian, pruned, gptq(kernel, hessian, "int4").values, factor
print(*(hashlib.sha256(np.asarray(y).tobytes()).hexdigest() for y in found))
"""


def test_the_number_of_cores_changes_no_bit():
    """Up to 16 threads of XLA and of BLAS; 700 inputs are no whole tiles of a kernel of BLAS."""
    found = set()
    for threads in ("1", "16"):
        limits = {"PJRT_NPROC": threads, "OPENBLAS_NUM_THREADS": threads}
        environment = os.environ | limits | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", SCRIPT]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.add(run.stdout)
    assert len(found) == 1


def test_zeros_are_kept_in_training_and_nothing_else_is():
    rng = np.random.default_rng(13)
    kernel = np.where(rng.random((8, 6)) < 0.5, 0, rng.normal(size=(8, 6))).astype(np.float32)
    params = {"dense": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(6)}, "head": jnp.zeros(6)}
    x, y = rng.normal(size=(2, 32, 8)).astype(np.float32)
    y = y[:, :6]
    updater = one_shot.KeepZeros(layers={"kernel": "2:4"}).build(params, steps=5)
    optimizer = updater.wrap_optax(optax.adamw(0.1, weight_decay=0.1))
    state = optimizer.init(params)

    def loss(params):
        params = updater.weights(params, state)
        out = x @ params["dense"]["kernel"] + params["dense"]["bias"] + params["head"]
        return jnp.mean((out - y) ** 2)

    for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = updater.post_gradient_update(optax.apply_updates(params, updates), state)
    pruned = kernel == 0
    trained = np.asarray(params["dense"]["kernel"])
    assert not trained[pruned].any()
    assert (trained[~pruned] != kernel[~pruned]).all()
    assert np.asarray(params["dense"]["bias"]).all()
    assert np.asarray(params["head"]).all()
    moments = state.inner_state[0]
    assert not np.asarray(moments.mu["dense"]["kernel"])[pruned].any()
    assert not np.asarray(moments.nu["dense"]["kernel"])[pruned].any()
    masks = updater.masks(state, params)
    np.testing.assert_array_equal(masks["dense"]["kernel"], ~pruned)
    assert masks["head"] is None


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'quary' matches no parameter.*query/kernel"):
        one_shot.KeepZeros(layers={"quary": "2:4"}).build({"query": {"kernel": jnp.ones((4, 4))}})
