"""Straight-through training: what the forward pass reads, and where gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsity
from sparsity import sparsity_schedules as schedules
from sparsity.sparsity_distributions import uniform

HALF = functools.partial(uniform, sparsity=0.5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params_of(seed):
    return {"kernel": normal(seed, 6, 8), "bias": jnp.ones(8)}


@pytest.mark.parametrize("name", ["magnitude_ste", "random_ste"])
def test_masks_of_each_step_and_dense_parameters(name):
    updater = sparsity.ALGORITHM_REGISTRY[name](
        scheduler=schedules.PolynomialSchedule(1, 1, 5), sparsity_distribution_fn=HALF
    )
    optimizer = updater.wrap_optax(optax.adam(0.1))
    params = params_of(0)
    state = optimizer.init(params)
    assert jax.tree.leaves(state.masks) == []

    @jax.jit
    def step(params, state):
        masked = updater.pre_forward_update(params, state)
        updates, state = optimizer.update(masked, state, params)
        new = optax.apply_updates(params, updates)
        return masked, updater.post_gradient_update(new, state), state

    seen = []
    for count in range(7):
        masked, new, state = step(params, state)
        rise = 1 - (1 - min(max(count, 0), 4) / 4) ** 3
        zeros = np.sum(np.asarray(masked["kernel"]) == 0)
        assert zeros == round(48 * 0.5 * rise)
        kept = np.asarray(masked["kernel"]) != 0
        np.testing.assert_array_equal(masked["kernel"][kept], params["kernel"][kept])
        if name == "magnitude_ste" and zeros:
            dense = np.abs(params["kernel"])
            assert dense[~kept].max() <= dense[kept].min()
        np.testing.assert_array_equal(masked["bias"], params["bias"])
        assert np.all(np.asarray(new["kernel"]) != 0)
        params = new
        seen.append(kept)
    if name == "random_ste":
        assert np.any(seen[-1] != seen[-2])  # another draw each time


def test_gradients_are_those_of_the_masked_parameters():
    """The same whether one differentiates by what is returned, or through it."""
    updater = sparsity.SteMagnitudePruning(sparsity_distribution_fn=HALF)
    params = params_of(1)
    state = updater.init_state(params)

    def loss(p):
        return jnp.sum(jnp.sin(p["kernel"])) + jnp.sum(p["bias"] ** 2)

    through = jax.jit(jax.grad(lambda p: loss(updater.pre_forward_update(p, state))))(params)
    masked = np.asarray(jax.jit(updater.pre_forward_update)(params, state)["kernel"])
    assert np.sum(masked == 0) == 24
    np.testing.assert_allclose(through["kernel"], np.cos(masked), rtol=1e-6)
    np.testing.assert_allclose(through["bias"], 2 * np.ones(8))


def test_n_of_m_by_stacked_layers():
    updater = sparsity.SteMagnitudePruning(
        sparsity_distribution_fn=HALF,
        sparsity_type=sparsity.NByM(2, 4, axis=-2),
        stacked_fn=lambda path, leaf: 1,
    )
    params = {"kernel": normal(0, 3, 8, 5), "scale": jnp.ones((3, 8))}
    masked = jax.jit(updater.pre_forward_update)(params, updater.init_state(params))
    kept = np.asarray(masked["kernel"] != 0).reshape(3, 2, 4, 5)
    np.testing.assert_array_equal(kept.sum(axis=2), 2)
    np.testing.assert_array_equal(masked["scale"], np.ones((3, 8)))
