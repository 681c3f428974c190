"""Static masks, SET and RigL: counts, what is dropped and grown, and the optimizer's moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsity
from sparsity import sparsity_schedules as schedules
from sparsity.algorithms.sparse_trainers import restart_inner_state
from sparsity.sparsity_distributions import uniform

# Small programs, mostly compiled: so the compiler is not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
HALF = functools.partial(uniform, sparsity=0.5)


def model(seed=0):
    """A kernel and a bias, and kernels and norm scales of three scanned layers."""
    normal = np.random.default_rng(seed).standard_normal
    params = {
        "head": {"kernel": normal((8, 12)), "bias": np.ones(12)},
        "blocks": {"kernel": normal((3, 10, 16)), "scale": normal((3, 10))},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def stacked(path, leaf):
    return 1 if path[0] == "blocks" else 0


def moved(old, weights, grads, fraction):
    """RigL of one layer by sorting: the mask after dropping by |w| and growing by |g|."""
    old = old.ravel() == 1
    stay = max(1, round(old.sum() * (1 - fraction)))
    kept = np.flatnonzero(old)
    kept = kept[np.argsort(-np.abs(weights.ravel()[kept]), kind="stable")[:stay]]
    others = np.setdiff1d(np.arange(old.size), kept)
    grow = others[np.argsort(-np.abs(grads.ravel()[others]), kind="stable")[: old.sum() - stay]]
    mask = np.zeros(old.size, np.uint8)
    mask[kept] = mask[grow] = 1
    return mask.reshape(weights.shape)


def masked(params, masks):
    return jax.tree.map(
        lambda m, p: p if m is None else p * m, masks, params, is_leaf=lambda x: x is None
    )


def test_rigl_against_sorting():
    updater = sparsity.RigL(
        sparsity_distribution_fn=HALF,
        drop_fraction_fn=lambda step: 0.3,
        stacked_fn=stacked,
        is_debug=True,
    )
    params, grads = model(), model(1)
    state = jit(updater.init_state)(params)
    old = state.masks
    assert old["head"]["bias"] is None
    assert old["blocks"]["scale"] is None
    assert np.sum(old["head"]["kernel"]) == 48
    np.testing.assert_array_equal(np.sum(old["blocks"]["kernel"], axis=(1, 2)), [80, 80, 80])
    params = masked(params, old)
    new = jit(updater.update_state)(state, params, grads).masks
    expected = moved(*(np.asarray(x["head"]["kernel"]) for x in (old, params, grads)), fraction=0.3)
    np.testing.assert_array_equal(new["head"]["kernel"], expected)
    for i in range(3):
        expected = moved(
            *(np.asarray(x["blocks"]["kernel"][i]) for x in (old, params, grads)), fraction=0.3
        )
        np.testing.assert_array_equal(new["blocks"]["kernel"][i], expected)


@settings(max_examples=15, deadline=None)
@given(
    density=st.floats(0.05, 1),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_counts_stay_and_growth_is_where_the_gradient_is_largest(density, fraction, seed, ties):
    rng = np.random.default_rng(seed)
    old = np.zeros(40, np.uint8)
    old[rng.permutation(40)[: max(1, round(40 * density))]] = 1
    weights, grads = rng.normal(size=(2, 40)).astype(np.float32)
    if ties:
        weights, grads = np.round(weights), np.round(grads)
    grads[rng.integers(40)] = np.inf
    new = np.asarray(MOVE(old, np.abs(weights) * old, np.abs(grads), np.float32(fraction)))
    assert new.sum() == old.sum()
    assert set(np.unique(new)) <= {0, 1}
    dropped, grown = (old == 1) & (new == 0), (old == 0) & (new == 1)
    never = (old == 0) & (new == 0)
    stay = max(1, int(np.round(np.float32(old.sum()) * (1 - np.float32(fraction)))))
    assert grown.sum() == dropped.sum() <= old.sum() - stay
    if dropped.any():
        assert np.abs(weights)[dropped].max() <= np.sort(np.abs(weights)[old == 1])[-stay:].min()
    if grown.any() and never.any():
        assert np.abs(grads)[grown].min() >= np.abs(grads)[never].max()


MOVE = jit(functools.partial(sparsity.RigL()._update_masks, sparsity_type=sparsity.Unstructured()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sparsity_type"),
    [
        ("static_sparse", "unstructured"),
        ("static_sparse", "2:4"),
        ("set", "unstructured"),
        ("set", "block_3,5"),
        ("rigl", "2:4"),
        ("rigl", "block_3,5"),
        ("rigl", "channel_1"),
    ],
)
def test_counts_along_a_run(name, sparsity_type):
    """Static masks never change; SET and RigL move weights and keep their number and structure."""
    updater = sparsity.create_updater_from_config(
        {
            "algorithm": name,
            "sparsity": 0.5,
            "sparsity_type": sparsity_type,
            "update_freq": 2,
            "update_start_step": 0,
            "update_end_step": 90,
            "drop_fraction": 0.5,
        }
    )
    optimizer = updater.wrap_optax(optax.adam(0.1))
    params = {"kernel": model()["blocks"]["kernel"][0], "bias": jnp.ones(16)}
    state = jit(optimizer.init)(params)
    first = np.asarray(state.masks["kernel"])
    kept = int(first.sum())
    # Blocks at the edges are smaller: 8 of 16 blocks are kept, of any size.
    assert kept == 80 or sparsity_type == "block_3,5"
    params = updater.post_gradient_update(params, state)

    @jit
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.sin(5 * x + jnp.arange(16) ** 2), params)
        updates, state = optimizer.update(grads, state, params)
        return updater.post_gradient_update(optax.apply_updates(params, updates), state), state

    for _ in range(4):
        params, state = step(params, state)
        mask = np.asarray(state.masks["kernel"])
        assert np.all(np.asarray(params["kernel"])[mask == 0] == 0)
        if sparsity_type == "block_3,5":
            blocks = [mask[i : i + 3, j : j + 5] for i in range(0, 10, 3) for j in range(0, 16, 5)]
            assert {int(b.min()) - int(b.max()) for b in blocks} == {0}
            assert sum(int(b.max()) for b in blocks) == 8
        else:
            assert mask.sum() == kept
        if sparsity_type == "2:4":
            np.testing.assert_array_equal(mask.reshape(10, 4, 4).sum(axis=-1), 2)
        if sparsity_type == "channel_1":
            assert set(mask.sum(axis=0)) == {0, 10}
    assert np.any(mask != first) == (name != "static_sparse")


def test_a_layer_that_the_distribution_left_dense_stays_dense():
    updater = sparsity.RigL(
        sparsity_type=sparsity.NByM(2, 4),
        sparsity_distribution_fn=functools.partial(
            uniform, sparsity=0.5, custom_sparsity_map={("a",): 0.0}
        ),
    )
    params = {"a": jnp.ones((4, 8)), "b": jnp.arange(32.0).reshape(4, 8)}
    state = jit(lambda p: updater.update_state(updater.init_state(p), p, p))(params)
    assert np.all(state.masks["a"] == 1)
    assert np.sum(state.masks["b"]) == 16


def test_static_training_has_no_instant_masks():
    for name in ("static_sparse", "set", "rigl"):
        updater = sparsity.ALGORITHM_REGISTRY[name](sparsity_distribution_fn=HALF)
        with pytest.raises(RuntimeError, match="instant_sparsify has no meaning"):
            updater.instant_sparsify({"w": jnp.ones((2, 2))})


def test_seeds_and_steps_give_other_masks():
    params = {"kernel": jnp.ones((16, 16))}
    masks = [
        jit(sparsity.StaticRandomSparse(sparsity_distribution_fn=HALF, rng_seed=seed).init_state)(
            params
        ).masks["kernel"]
        for seed in (1, 2, jax.random.key(1))
    ]
    assert np.any(masks[0] != masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])
    updater = sparsity.SET(sparsity_distribution_fn=HALF)
    state, update = jit(updater.init_state)(params), jit(updater.update_state)
    new = [
        np.asarray(update(state._replace(count=jnp.int32(c)), params, None).masks["kernel"])
        for c in (3, 4)
    ]
    assert np.any(new[0] != new[1])


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "adamw with a schedule": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 10)),
    "clip and adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "adamw with masked decay": lambda: optax.adamw(
        0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=8, momentum=0.9),
    "adafactor, not factored": lambda: optax.adafactor(0.1),
    "lion": lambda: optax.lion(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.rmsprop(0.1), 3),
    "amsgrad": lambda: optax.amsgrad(0.1),
}
# Arrays of a parameter's shape in the state, for kernels; without those of factored statistics.
MOMENTS = {
    "adam": 2, "adamw with a schedule": 2, "clip and adamw": 2, "adamw with masked decay": 2,
    "sgd with momentum": 1, "adafactor": 1, "adafactor, not factored": 1, "lion": 1, "muon": None,
    "MultiSteps": 3, "inject_hyperparams": 2, "apply_if_finite": 1, "amsgrad": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_grown_weights_are_zero_and_no_others(name):
    """Of a state full of numbers: zeros where a weight was grown, in arrays of its shape."""
    params = model()
    grown = {
        "head": {"kernel": np.asarray(params["head"]["kernel"]) > 1, "bias": None},
        "blocks": {"kernel": np.asarray(params["blocks"]["kernel"]) > 1, "scale": None},
    }
    state = OPTIMIZERS[name]().init(params)
    numbers = iter(range(1, 1000))
    state = jax.tree.map(lambda x: jnp.full(jnp.shape(x), next(numbers), jnp.result_type(x)), state)
    new = restart_inner_state(state, grown)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    found = {"head": 0, "blocks": 0}
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True
    ):
        keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))[-2:]
        expected = np.asarray(before)
        if keys[-1:] == ("kernel",) and before.shape == params[keys[0]]["kernel"].shape:
            expected = np.where(grown[keys[0]]["kernel"], 0, before)
            found[keys[0]] += 1
        np.testing.assert_array_equal(np.asarray(after), expected)
        assert after.dtype == before.dtype
    if MOMENTS[name] is None:  # muon's momentum for the matrix, Adam's two for the stack
        assert found == {"head": 1, "blocks": 2}
    else:
        assert found == {"head": MOMENTS[name], "blocks": MOMENTS[name]}


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "MultiSteps", "inject_hyperparams"])
def test_rigl_trains_with_every_optimizer(name):
    updater = sparsity.RigL(
        scheduler=schedules.PeriodicSchedule(2, 1, None), sparsity_distribution_fn=HALF
    )
    optimizer = updater.wrap_optax(OPTIMIZERS[name]())
    params = model()["head"]
    state = jit(optimizer.init)(params)
    params = updater.post_gradient_update(params, state)

    @jit
    def step(params, state):
        grads = jax.tree.map(lambda x: jnp.cos(3 * x) - 0.5, params)
        updates, state = optimizer.update(grads, state, params)
        return updater.post_gradient_update(optax.apply_updates(params, updates), state), state

    for count in range(4):
        before, (params, state) = (params, state), step(params, state)
        changed = state.masks["kernel"] != before[1].masks["kernel"]
        assert np.any(changed) == (count == 2)  # the multiples of 2 from 1
        if count == 2:  # the optimizer pauses
            jax.tree.map(np.testing.assert_array_equal, params, masked(before[0], state.masks))
    assert np.sum(state.masks["kernel"]) == 48
    assert np.all(np.isfinite(np.asarray(params["kernel"])))
