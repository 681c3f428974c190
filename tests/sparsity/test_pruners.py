"""Scores and masks of the dense to sparse algorithms, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsity
from sparsity import sparsity_schedules as schedules
from sparsity.algorithms.pruners import generate_random_scores
from sparsity.sparsity_distributions import uniform

HALF = functools.partial(uniform, sparsity=0.5)
KERNEL = jnp.array([[1.0, -4, 3], [-2, 0.5, 6]])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_magnitude():
    params = {"kernel": KERNEL, "bias": jnp.ones(3)}
    updater = sparsity.MagnitudePruning(sparsity_distribution_fn=HALF)
    masked, masks = updater.instant_sparsify(params)
    np.testing.assert_array_equal(masked["kernel"], [[0, -4, 3], [0, 0, 6]])
    np.testing.assert_array_equal(masks["kernel"], [[0, 1, 1], [0, 0, 1]])
    assert masks["kernel"].dtype == jnp.uint8
    assert masks["bias"] is None
    np.testing.assert_array_equal(masked["bias"], np.ones(3))


def test_saliency():
    updater = sparsity.SaliencyPruning(sparsity_distribution_fn=HALF)
    grads = {"kernel": jnp.array([[-9.0, 1, 1], [5, -20, 0]])}
    _, masks = updater.instant_sparsify({"kernel": KERNEL}, grads)
    np.testing.assert_array_equal(masks["kernel"], [[1, 0, 0], [1, 1, 0]])  # 9, 4, 3; 10, 10, 0
    with pytest.raises(ValueError, match="give the gradients"):
        updater.instant_sparsify({"kernel": KERNEL})


@pytest.mark.parametrize("sparsity_type", [sparsity.Unstructured(), sparsity.NByM(2, 4)])
def test_random(sparsity_type):
    updater = sparsity.RandomPruning(sparsity_distribution_fn=HALF, sparsity_type=sparsity_type)
    params = {"a": jnp.ones((16, 8), jnp.bfloat16), "b": jnp.ones((16, 8), jnp.bfloat16)}
    masks = updater.instant_sparsify(params)[1]
    assert np.sum(masks["a"]) == np.sum(masks["b"]) == 64
    assert np.any(masks["a"] != masks["b"])  # leaves have their own keys
    again = updater.instant_sparsify(params)[1]
    np.testing.assert_array_equal(masks["a"], again["a"])
    updater.rng_seed = 9
    assert np.any(updater.instant_sparsify(params)[1]["a"] != masks["a"])
    updater.rng_seed = jax.random.PRNGKey(8)
    np.testing.assert_array_equal(updater.instant_sparsify(params)[1]["a"], masks["a"])


def test_random_scores_of_bfloat16_do_not_tie():
    scores = generate_random_scores({"w": jnp.ones((64, 64), jnp.bfloat16)}, 0)["w"]
    assert len(np.unique(scores)) > 4080


def test_what_random_pruning_pruned_stays_pruned():
    updater = sparsity.RandomPruning(
        scheduler=schedules.PolynomialSchedule(1, 0, 6), sparsity_distribution_fn=HALF
    )
    params = {"kernel": jnp.ones((8, 8))}
    state = updater.init_state(params)
    update = jax.jit(updater.update_state)
    counts = []
    for count in range(6):
        new = update(state._replace(count=jnp.int32(count)), params, None)
        assert np.all(new.masks["kernel"] <= state.masks["kernel"])
        state = new
        counts.append(int(np.sum(state.masks["kernel"])))
    assert counts == [round(64 * (1 - 0.5 * (1 - (1 - (c + 1) / 6) ** 3))) for c in range(6)]


def test_global_magnitude_by_hand():
    params = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[0.6, -0.8, 0.1]]), "c": jnp.ones(2)}
    plain = sparsity.GlobalMagnitudePruning(sparsity=0.6, use_normalization=False)
    masks = plain.instant_sparsify(params)[1]
    np.testing.assert_array_equal(masks["a"], [[1, 1]])
    np.testing.assert_array_equal(masks["b"], [[0, 0, 0]])
    assert masks["c"] is None
    # Over their norms, 5 and sqrt(1.01): 0.6, 0.8; 0.597, 0.796, 0.0995.
    masks = sparsity.GlobalMagnitudePruning(sparsity=0.6).instant_sparsify(params)[1]
    np.testing.assert_array_equal(masks["a"], [[0, 1]])
    np.testing.assert_array_equal(masks["b"], [[0, 1, 0]])


def test_global_saliency_with_a_custom_layer_and_a_filter():
    params = {"a": jnp.array([[1.0, 2, 3]]), "b": jnp.array([[4.0, 5]]), "c": jnp.ones((1, 4))}
    grads = {"a": jnp.array([[9.0, 1, 1]]), "b": jnp.array([[1.0, 0]]), "c": jnp.arange(4.0)[None]}
    updater = sparsity.GlobalSaliencyPruning(
        sparsity=0.6,
        use_normalization=False,
        custom_sparsity_map={("c",): 0.25},
        stacked_fn=lambda path, leaf: 0,
    )
    masks = updater.instant_sparsify(params, grads)[1]
    np.testing.assert_array_equal(masks["a"], [[1, 0, 0]])  # 9, 2, 3
    np.testing.assert_array_equal(masks["b"], [[1, 0]])  # 4, 0
    np.testing.assert_array_equal(masks["c"], [[0, 1, 1, 1]])
    initial = updater.init_state(params)
    assert initial.target_sparsities == 0.6
    assert all(np.all(mask == 1) for mask in jax.tree.leaves(initial.masks))
    updater = sparsity.GlobalMagnitudePruning(sparsity=0.5, filter_fn=lambda key, _: key == ("b",))
    masks = updater.instant_sparsify(params)[1]
    assert masks["a"] is masks["c"] is None
    np.testing.assert_array_equal(masks["b"], [[0, 1]])


@pytest.mark.parametrize("exponent", [-110, -30, 30, 120])
def test_no_scale_changes_the_masks_of_global_pruners(exponent):
    """Squares of float32 numbers beyond 2^64 are infinite, and below 2^-75 nothing."""
    params = {"a": normal(1, 8, 6), "b": 3 * normal(2, 5, 4), "zero": jnp.zeros((3, 2))}
    grads = jax.tree.map(jnp.ones_like, params)
    moved = {k: jnp.asarray(np.ldexp(np.asarray(v), exponent)) for k, v in params.items()}
    one = params | {"a": moved["a"]}  # the norms take out what one layer is scaled by
    for kind in (sparsity.GlobalMagnitudePruning, sparsity.GlobalSaliencyPruning):
        updater = kind(sparsity=0.6)
        expected = updater.instant_sparsify(params, grads)[1]
        for scaled in (moved, one):
            masks = updater.instant_sparsify(scaled, grads)[1]
            for key in params:
                np.testing.assert_array_equal(masks[key], expected[key])
    assert sum(int(mask.sum()) for mask in expected.values()) == round(0.4 * 74)


def test_global_norms_are_those_of_layers():
    """The layers of a stack differ by a factor: each has its own norm and is pruned alike."""
    layer = normal(0, 6, 6)
    params = {"blocks": jnp.stack([layer, 1e5 * layer]), "scale": jnp.ones((2, 6))}
    updater = sparsity.GlobalMagnitudePruning(sparsity=0.5, stacked_fn=lambda path, leaf: 1)
    masks = updater.instant_sparsify(params)[1]
    assert masks["scale"] is None
    counts = np.sum(masks["blocks"], axis=(1, 2))
    assert counts.sum() == 36
    assert abs(int(counts[0]) - int(counts[1])) <= 2  # float32 rounding of the two norms
    whole = sparsity.GlobalMagnitudePruning(sparsity=0.5)
    counts = np.sum(whole.instant_sparsify({"b": params["blocks"]})[1]["b"], axis=(1, 2))
    assert counts[1] == 36  # without the stack, the first layer goes
