"""AC/DC, Adam-Fisher, iterative N:M, Top-KAST, sparse activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsity
from sparsity import sparsity_schedules as schedules
from sparsity.algorithms import acdc, activation_sparsity, adam_fisher, iterative_nm
from sparsity.sparsity_distributions import uniform

# Small programs, mostly compiled: so the compiler is not to optimize.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)
HALF = functools.partial(uniform, sparsity=0.5)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def phases(begin, end, sparse, dense, steps):
    """Whether each step trains sparse, phase by phase."""
    plan = [False] * begin
    while len(plan) < end:
        plan += [True] * sparse + [False] * dense
    return (plan[:end] + [True] * steps)[:steps]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 14), st.integers(1, 4), st.integers(1, 4))
def test_acdc_phases(begin, length, sparse, dense):
    end = begin + length
    schedule = acdc.CycleSchedule(begin, end, sparse, dense)
    kept_sparse, seen = False, []
    for step in range(end + 4):
        if schedule.is_mask_update_iter(step):
            kept_sparse = bool(schedule.begins_sparse(step))
        seen.append(kept_sparse)
    assert seen == phases(begin, end, sparse, dense, end + 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_acdc_masks_and_moments(packed, reset, capfd):
    updater = sparsity.ACDC(
        sparsity_distribution_fn=HALF,
        init_dense_steps_end=2,
        final_sparse_steps_start=8,
        cycle_sparse_steps=2,
        cycle_dense_steps=1,
        reset_optimizer=reset,
        use_packed_masks=packed,
    )
    optimizer = updater.wrap_optax(optax.adam(0.1))
    params = {"kernel": normal(0, 4, 6), "bias": jnp.ones(6)}
    state = jit(optimizer.init)(params)

    @jit
    def step(params, state):
        grads = jax.tree.map(lambda x: x + 1, params)
        updates, state = optimizer.update(grads, state, params)
        return updater.post_gradient_update(optax.apply_updates(params, updates), state), state

    plan = phases(2, 8, 2, 1, 11)
    for count, is_sparse in enumerate(plan):
        dense, gradient = np.abs(params["kernel"]), np.asarray(params["bias"]) + 1
        params, state = step(params, state)
        mask = np.asarray(updater.unpack(state.masks, params)["kernel"])
        assert mask.sum() == (12 if is_sparse else 24)
        if is_sparse and (count == 0 or not plan[count - 1]):
            assert dense[mask == 0].max() <= dense[mask == 1].min()
        zeros = np.asarray(params["kernel"]) == 0
        np.testing.assert_array_equal(zeros, mask == 0)
        begins = count > 0 and (plan[count - 1] != is_sparse or count == 8)
        # One update after zeros, mu = (1 - b1) g.
        fresh = np.allclose(state.inner_state[0].mu["bias"], 0.1 * gradient, rtol=1e-4)
        assert fresh == (count == 0 or (reset and begins))
        assert state.inner_state[0].count == count + 1  # counts are no moments
    assert capfd.readouterr() == ("", "")
    acdc.add_to_jaxpruner()


def test_acdc_errors():
    with pytest.raises(ValueError, match="final_sparse_steps_start=1 is before"):
        sparsity.ACDC(init_dense_steps_end=3, final_sparse_steps_start=1)


def test_adam_fisher_by_hand():
    config = {"algorithm": "adam-fisher", "sparsity": 0.5, "reset_adam": True}
    updater = sparsity.create_updater_from_config(
        config | {"update_start_step": 1, "update_end_step": 1, "skip_gradients": True}
    )
    optimizer = updater.wrap_optax(optax.chain(optax.clip(100.0), optax.adamw(1e-3, b2=0.5)))
    params = {"w": jnp.array([[1.0, 2, 3, 4]]), "bias": jnp.ones(2)}
    grads = {"w": jnp.array([[8.0, 3, 1, -1]]), "bias": jnp.ones(2)}
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    scores = updater.calculate_scores(params, sparse_state=state)["w"]
    np.testing.assert_allclose(scores, [[32, 18, 4.5, 8]])  # w^2 g^2 / 2
    np.testing.assert_allclose(adam_fisher.find_adamstate(state).nu["w"], [[32, 4.5, 0.5, 0.5]])
    _, state = optimizer.update(grads, state, params)
    np.testing.assert_array_equal(state.masks["w"], [[1, 1, 0, 0]])
    adam = adam_fisher.find_adamstate(state)
    assert all(np.all(x == 0) for x in jax.tree.leaves((adam.mu, adam.nu)))
    assert adam.count == 1


@pytest.mark.parametrize("wrap", [lambda o: optax.MultiSteps(o, 2), optax.apply_if_finite])
def test_adam_is_found_in_any_state(wrap):
    inner = wrap(optax.adam(0.1)) if wrap is not optax.apply_if_finite else wrap(optax.adam(0.1), 2)
    state = inner.init({"w": jnp.ones((2, 2))})
    found = adam_fisher.find_adamstate(state)
    assert isinstance(found, optax.ScaleByAdamState)
    replaced = adam_fisher.replace_adamstate(state, found._replace(nu={"w": jnp.full((2, 2), 7.0)}))
    assert np.all(adam_fisher.find_adamstate(replaced).nu["w"] == 7)
    assert adam_fisher.find_adamstate(optax.sgd(0.1).init({})) is None


def test_adam_fisher_errors():
    updater = sparsity.AdamBasedFisherPruning(sparsity_distribution_fn=HALF)
    params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match="adam-fisher reads Adam's moments"):
        updater.instant_sparsify(params)
    with pytest.raises(ValueError, match="w: the optimizer has no Adam moments of it"):
        updater.wrap_optax(optax.sgd(0.1)).init(params)
    state = updater.wrap_optax(optax.adam(0.1)).init(params)
    updater.instant_sparsify(params, sparse_state=state)  # of these moments, zeros


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.95), st.integers(0, 9))
def test_iterative_n_of_m(target, seed):
    scores = np.abs(np.random.default_rng(seed).normal(size=(4, 12))).astype(np.float32)
    ours = np.asarray(ITERATIVE(scores, np.float32(target)))
    groups = scores.reshape(4, 3, 4)
    ranks = np.argsort(np.argsort(-groups, axis=-1), axis=-1)
    nm = (ranks < 2).reshape(4, 12)
    assert ours.sum() == max(1, int(np.floor(48 * (1 - np.float64(np.float32(target))) + 0.5)))
    if ours.sum() >= 24:
        assert np.all(ours >= nm)
        beyond = ours & ~nm
        if beyond.any() and not ours.all():
            assert scores[beyond].min() >= scores[~ours].max()
    else:
        assert np.all(ours <= nm)
        assert scores[ours].min() >= scores[nm & ~ours].max()


ITERATIVE = jit(lambda s, t: iterative_nm.iterative_nm_mask(s, t, sparsity.NByM(2, 4)))


def test_iterative_n_of_m_ends_at_n_of_m():
    updater = sparsity.create_updater_from_config(
        {
            "algorithm": "iterative_nm",
            "sparsity": "2:4",
            "update_freq": 1,
            "update_start_step": 0,
            "update_end_step": 3,
        }
    )
    optimizer = updater.wrap_optax(optax.sgd(0.0))
    params = {"kernel": normal(0, 4, 16), "bias": jnp.ones(3)}
    state, update = optimizer.init(params), jit(optimizer.update)
    kept = []
    for _ in range(4):
        _, state = update(params, state, params)
        kept.append(int(np.sum(state.masks["kernel"])))
    assert kept == [round(64 * (1 - 0.5 * (1 - (1 - p) ** 3))) for p in (1 / 3, 2 / 3, 1, 1)]
    np.testing.assert_array_equal(np.sum(np.asarray(state.masks["kernel"]).reshape(-1, 4), 1), 2)
    iterative_nm.add_to_jaxpruner()


def kast(**options):
    return sparsity.TopKAST(
        sparsity_distribution_fn=functools.partial(uniform, sparsity=0.75),
        backward_extra_density=0.25,
        **options,
    )


def test_topkast_sets_and_regularization_by_hand():
    updater = kast()
    params = {"w": jnp.array([[1.0, -8, 3, 2, 0.5, 4, -7, 6]]), "bias": jnp.ones(3)}
    state = jit(updater.init_state)(params)
    np.testing.assert_array_equal(state.masks["w"], [[0, 1, 0, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(state.backward_masks["w"], [[0, 1, 0, 0, 0, 1, 1, 1]])
    assert state.masks["bias"] is None
    np.testing.assert_array_equal(
        updater.pre_forward_update(params, state)["w"], [[0, -8, 0, 0, 0, 0, -7, 0]]
    )
    # A: 8, 7. B without A: 4, 6, over D = 1/4.
    assert updater.regularization(params, state, 0.1) == pytest.approx(0.1 * (113 + 52 * 4))
    code = updater.regularization(params, state, 0.1, variant="code")
    assert code == pytest.approx(0.1 * (np.sqrt(113) + np.sqrt(52) * 4))
    gradient = jit(jax.grad(updater.regularization))(params, state, 0.1)
    np.testing.assert_allclose(
        gradient["w"], [[0, -1.6, 0, 0, 0, 0.2 * 4 * 4, -1.4, 0.2 * 6 * 4]], rtol=1e-6
    )
    np.testing.assert_array_equal(gradient["bias"], 0)
    zero = {"w": jnp.zeros((1, 8)), "bias": jnp.ones(3)}
    gradient = jit(jax.grad(functools.partial(updater.regularization, variant="code")))(
        zero, state, 1.0
    )
    np.testing.assert_array_equal(gradient["w"], 0)
    with pytest.raises(ValueError, match="variant='sum'; use 'paper' or 'code'"):
        updater.regularization(params, state, 0.1, variant="sum")


def test_topkast_trains_b_alone_and_refreshes_its_sets():
    updater = kast(scheduler=schedules.PeriodicSchedule(3, 1, None), use_packed_masks=True)
    optimizer = updater.wrap_optax(optax.adamw(0.2, weight_decay=0.1))
    params = {"w": normal(0, 8, 8)}
    state = jit(optimizer.init)(params)

    @jit
    def step(params, state):
        def loss(params):
            forward = updater.pre_forward_update(params, state)
            return jnp.sum(forward["w"] ** 2 + forward["w"]) + updater.regularization(
                params, state, 0.1
            )

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return updater.post_gradient_update(params, state), state

    sets = []
    for count in range(6):
        before = np.asarray(params["w"])
        params, state = step(params, state)
        a = np.asarray(updater.unpack(state.masks, params)["w"])
        b = np.asarray(updater.unpack(state.backward_masks, params)["w"])
        assert (a.sum(), b.sum()) == (16, 32)
        assert np.all(a <= b)
        np.testing.assert_array_equal(np.asarray(params["w"] != before), b == 1)
        if count == 3:  # the multiples of 3 from 1
            assert np.abs(before)[a == 1].min() >= np.abs(before)[a == 0].max()
            assert np.abs(before)[b == 1].min() >= np.abs(before)[b == 0].max()
        sets.append((a, b))
    for count in range(1, 6):
        same = all(np.array_equal(x, y) for x, y in zip(*sets[count - 1 : count + 1], strict=True))
        assert same == (count != 3)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_topkast_regularization_of_a_stack_is_that_of_its_layers(variant):
    layers = normal(0, 3, 4, 8)

    def term(updater, x):
        return updater.regularization({"w": x}, updater.init_state({"w": x}), 1.0, variant)

    one = jit(functools.partial(term, kast()))
    whole = jit(functools.partial(term, kast(stacked_fn=lambda path, leaf: 1)))
    assert float(whole(layers)) == pytest.approx(sum(float(one(x)) for x in layers), rel=1e-5)


def test_sparse_activations():
    x = jnp.array([[1.0, 4, 2, 3], [-1, 5, 0.5, 6]])
    relu, dense = linen.relu, linen.Dense
    with activation_sparsity.get_activation_context("nm_1,4"):
        np.testing.assert_array_equal(linen.relu(x), [[0, 4, 0, 0], [0, 0, 0, 6]])
    with activation_sparsity.get_activation_context(0.75):
        np.testing.assert_array_equal(linen.relu(x), [[0, 0, 0, 0], [0, 5, 0, 6]])
    with activation_sparsity.get_activation_context("block_2,2_0.5"):
        np.testing.assert_array_equal(linen.relu(x), [[0, 0, 2, 3], [0, 0, 0.5, 6]])
    layer = dense(4)
    params = layer.init(jax.random.key(0), x)
    full = layer.apply(params, x)
    with activation_sparsity.add_activation_sparsity_layers(
        lambda path, shape: (sparsity.NByM(2, 4), None), score_fn=jnp.abs
    ):
        out = np.asarray(linen.Dense(4).apply(params, x))
    assert np.all((out != 0).sum(axis=-1) == 2)
    np.testing.assert_array_equal(out[out != 0], np.asarray(full)[out != 0])
    assert (linen.relu, linen.Dense) == (relu, dense)
    with (
        pytest.raises(ValueError, match=r"(?i)sparsity type"),
        activation_sparsity.get_activation_context("half"),
    ):
        pass
