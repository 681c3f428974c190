"""Every recipe at every step of a short run, against its formulas written out in numpy.

The loss of a step is sum(G * W~) with its own random G, so that the gradient of what is read in
place of W is G, and each published rule is a line of numpy.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsity import recipes
from sparsity.recipes import Recipe
from sparsity.recipes.autoswitch import AutoSwitch, scale_by_step_adam
from sparsity.recipes.decay import Linear
from sparsity.recipes.patterns import Geometric, Stepwise

STEPS, RATE = 20, 0.3
SHAPE = (2, 16, 6)  # layers, in, out
RNG = np.random.default_rng(0)
PARAMS = {
    "up": {
        "kernel": RNG.normal(size=SHAPE).astype(np.float32),
        "bias": RNG.normal(size=(2, 6)).astype(np.float32),
    }
}
GRADS = [
    jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS)
    for _ in range(STEPS)
]


def numpy_mask(w, n, m):
    """N of every M along the inputs, by a stable sort."""
    groups = np.abs(w).reshape(2, 16 // m, m, 6)
    order = np.argsort(-groups, axis=2, kind="stable")
    return (np.argsort(order, axis=2, kind="stable") < n).reshape(SHAPE)


def optimizer(recipe):
    if recipe.variance is None:
        return optax.sgd(RATE)
    adam = scale_by_step_adam(0.9, 0.8, switch=recipe.variance, steps=STEPS)
    return optax.chain(adam, optax.scale_by_learning_rate(RATE))


class Run:
    """A run of a recipe, with what each step read, passed back and left behind."""

    def __init__(self, recipe, params=PARAMS, grads=GRADS, inner=None, state=None, steps=STEPS):
        self.updater = recipe.build(params, steps=steps)
        self.optimizer = self.updater.wrap_optax(inner or optimizer(recipe), RATE)
        self.traces = 0
        self.step = jax.jit(self._step)
        self.params = jax.tree.map(jnp.asarray, params)
        self.state = self.optimizer.init(self.params) if state is None else state
        self.log = []
        for g in grads:
            before = self.params
            self.params, self.state, seen = self.step(self.params, self.state, g)
            self.log.append(jax.device_get({**seen, "before": before, "after": self.params}))

    def _step(self, params, state, g):
        self.traces += 1

        def loss(params):
            read = self.updater.pre_forward_update(params, state)
            return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(read))), read

        grads, read = jax.grad(loss, has_aux=True)(params)
        settings, masks = self.updater.settings(state), self.updater.masks(state)
        updates, state = self.optimizer.update(grads, state, params)
        seen = {"read": read, "grads": grads, "masks": masks, "settings": settings}
        return optax.apply_updates(params, updates), state, seen


def until(*ends):
    """The value of the first (end, value) whose end a step is before."""
    return lambda t: next(value for end, value in ends if t < end)


# Of a run of 20 steps: (recipe, pattern(t), D(t), whether pruned weights get the true derivative,
# lambda), all by hand; the dense phase is the pattern None, and a frozen step D = 0 from FINE on.
TWO_FOUR, ONE_EIGHT, ONE_FOUR = {"kernel": "2:4"}, {"kernel": "1:8"}, {"kernel": "1:4"}
CASES = {
    "sr_ste": (recipes.sr_ste(TWO_FOUR), until((20, (2, 4))), lambda t: 0, False, 2e-4),
    "sr_ste, strength": (
        recipes.sr_ste(TWO_FOUR, strength=0.1),
        until((20, (2, 4))),
        lambda t: 0,
        False,
        0.1,
    ),
    "mdgf_linear": (  # dense 0, decay 1 .. 16, fine-tuning 17 ..
        recipes.mdgf_linear(TWO_FOUR),
        until((1, None), (20, (2, 4))),
        lambda t: 1 - (t - 1) / 16 if t < 17 else 0,
        True,
        0,
    ),
    "mdgf_linear, code": (
        recipes.mdgf_linear(TWO_FOUR, beta=0.2, variant="code"),
        until((1, None), (20, (2, 4))),
        lambda t: max(1 - 0.2 * (t - 1), 0) if t < 17 else 0,
        False,
        0,
    ),
    "mdgf_exponential": (
        recipes.mdgf_exponential(ONE_EIGHT, beta=0.25, dense_fraction=0.1),
        until((2, None), (20, (1, 8))),
        lambda t: math.exp(-0.25 * (t - 2)) if t < 17 else 0,
        True,
        0,
    ),
    "mdgf_exponential, fitted": (
        recipes.mdgf_exponential(ONE_EIGHT, variant="code"),
        until((1, None), (20, (1, 8))),
        lambda t: 0.01 ** ((t - 1) / 16) if t < 17 else 0,
        False,
        0,
    ),
    "sdgf_stepwise": (
        recipes.sdgf_stepwise(ONE_EIGHT),
        until((1, None), (5, (7, 8)), (9, (4, 8)), (13, (2, 8)), (20, (1, 8))),
        lambda t: 0,
        True,
        0,
    ),
    "sdgf_stepwise, code": (  # three stages of 16 / 3 steps
        recipes.sdgf_stepwise({"kernel": "3:8"}, variant="code"),
        until((1, None), (7, (7, 8)), (12, (4, 8)), (20, (3, 8))),
        lambda t: 0,
        False,
        0,
    ),
    "sdgf_geometric": (
        recipes.sdgf_geometric(ONE_FOUR, k=4, dense_fraction=0.1, fine_tune_fraction=0.15),
        until((2, None), (7, (4, 16)), (12, (2, 8)), (20, (1, 4))),
        lambda t: 0,
        True,
        0,
    ),
    "mask_decay": (
        recipes.mask_decay(TWO_FOUR, weight=0.25, every=4),
        until((20, (2, 4))),
        lambda t: max(1 - 0.25 * (t // 4), 0),
        True,
        0,
    ),
    "mask_decay, code": (
        recipes.mask_decay(TWO_FOUR, weight=0.1, every=1, fine_tune_fraction=0.2, variant="code"),
        until((20, (2, 4))),
        lambda t: 1 - 0.1 * min(t, 8) if t < 16 else 0,
        True,
        0,
    ),
    "structure_decay": (
        recipes.structure_decay({"kernel": "1:16"}, dense_fraction=0.0),
        until((4, (15, 16)), (8, (8, 16)), (12, (4, 16)), (16, (2, 16)), (20, (1, 16))),
        lambda t: 0,
        True,
        0,
    ),
    "structure_decay, code": (
        recipes.structure_decay({"kernel": "1:16"}, dense_fraction=0.2, variant="code"),
        until((4, None), (8, (15, 16)), (12, (4, 16)), (16, (2, 16)), (20, (1, 16))),
        lambda t: 0,
        True,
        0,
    ),
    "asp": (recipes.asp(TWO_FOUR), until((20, (2, 4))), lambda t: 0, True, 0),
    "a mix": (
        Recipe(
            layers=ONE_FOUR,
            pattern=Stepwise(),
            decay=Linear(),
            sr_ste=0.05,
            dense_fraction=0.25,
            fine_tune_fraction=0.25,
            freeze=False,
        ),
        until((5, None), (9, (3, 4)), (12, (2, 4)), (20, (1, 4))),
        lambda t: 1 - (t - 5) / 10 if t < 15 else 0,
        False,
        0.05,
    ),
}


def check(run, t, mask, decay, scale, strength, before, after):
    """One step: what is read, the gradient, and what the step led to (numpy, all of them)."""
    seen, g = run.log[t], GRADS[t]["up"]["kernel"]
    np.testing.assert_array_equal(seen["masks"]["up"]["kernel"], mask)
    assert seen["masks"]["up"]["bias"] is None
    close = dict(rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(seen["before"]["up"]["kernel"], before, **close)
    read = np.where(mask, before, decay * before)
    np.testing.assert_allclose(seen["read"]["up"]["kernel"], read, **close)
    got = seen["grads"]["up"]["kernel"]
    np.testing.assert_allclose(got, np.where(mask, g, scale * g), **close)
    if decay == 0:
        assert not seen["read"]["up"]["kernel"][~mask].any()
    if scale == 0:
        assert not got[~mask].any()
    np.testing.assert_allclose(seen["after"]["up"]["kernel"], after, **close)


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_the_formulas(name):
    recipe, pattern, decay, true_derivative, strength = CASES[name]
    run = Run(recipe)
    assert run.traces == 1
    fine = STEPS - round(recipe.fine_tune_fraction * STEPS)
    fixed = fine if recipe.freeze and fine < STEPS else STEPS + 1
    assert run.updater.freezes_at == (fixed if fixed < STEPS else None)
    w = PARAMS["up"]["kernel"].copy()
    start = next(t for t in range(STEPS) if pattern(t))
    for t in range(STEPS):
        nm = pattern(t)
        frozen = t >= fixed
        due = t == fine or (t - start) % recipe.update_every == 0
        if nm is None:
            mask = np.ones(SHAPE, bool)
        elif t <= fixed and due:
            mask = numpy_mask(w, *nm)
        settings = run.log[t]["settings"]
        assert settings["phase"] == (0 if nm is None else 2 if t >= fine else 1)
        assert settings["frozen"] == frozen
        np.testing.assert_allclose(settings["decay"], 1 if nm is None else decay(t), rtol=1e-5)
        (shown,) = settings["patterns"].values()
        if nm is not None:
            assert tuple(shown) == nm
        scale = 0 if frozen else decay(t) if true_derivative else 1
        g = np.where(mask, 1, scale) * GRADS[t]["up"]["kernel"]
        after = w - RATE * (g + strength * np.where(mask, 0, w))
        if t + 1 >= fixed:
            after_mask = mask if frozen else numpy_mask(after, *pattern(t + 1))
            after = np.where(after_mask, after, 0)
        check(run, t, mask, decay(t) if nm else 1, scale, strength, w, after)
        w = after
    bias = PARAMS["up"]["bias"] - RATE * sum(g["up"]["bias"] for g in GRADS)
    np.testing.assert_allclose(run.params["up"]["bias"], bias, rtol=1e-4, atol=1e-5)


def test_the_defaults_are_those_of_the_papers():
    for make in (
        recipes.mdgf_linear,
        recipes.mdgf_exponential,
        recipes.sdgf_stepwise,
        recipes.sdgf_geometric,
    ):
        assert 0.0125 <= make().dense_fraction <= 0.1
        assert 0.1 <= make().fine_tune_fraction <= 0.2
        assert make().gradient == "masked"
        assert make(variant="code").gradient == "straight_through"
    assert recipes.sr_ste() == Recipe(sr_ste=2e-4)
    assert recipes.sdgf_geometric().pattern.stages(1, 8)[0] == (16, 128)
    assert recipes.sdgf_geometric(variant="code").pattern.stages(1, 8)[0] == (8, 64)


def test_step_freezes_v_and_then_learns_masks():
    """Dense Adam for 5 updates (T_max = 4), then masks with the v of update 5."""
    recipe = recipes.step(
        TWO_FOUR, switch=AutoSwitch(min_fraction=0, max_fraction=0.2), strength=0.05
    )
    run = Run(recipe)
    assert run.traces == 1
    w, m, v = PARAMS["up"]["kernel"].astype(np.float64), 0.0, 0.0
    for t in range(1, STEPS + 1):
        dense = t <= 5
        mask = np.ones(SHAPE, bool) if dense else numpy_mask(w, 2, 4)
        g = GRADS[t - 1]["up"]["kernel"] + 0.05 * np.where(mask, 0, w)
        m = 0.9 * m + 0.1 * g
        v = 0.8 * v + 0.2 * g**2 if dense else v
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.8 ** min(t, 5))) + 1e-8)
        seen = run.log[t - 1]
        np.testing.assert_array_equal(seen["masks"]["up"]["kernel"], mask)
        assert seen["settings"]["phase"] == (0 if dense else 1)
        np.testing.assert_array_equal(seen["grads"]["up"]["kernel"], GRADS[t - 1]["up"]["kernel"])
        w = w - RATE * step
        np.testing.assert_allclose(run.log[t - 1]["after"]["up"]["kernel"], w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shortest_runs_end_sparse(steps):
    for make in (recipes.mdgf_exponential, recipes.sdgf_stepwise, recipes.mask_decay):
        updater = make({"kernel": "1:2"}).build(PARAMS, steps=steps)
        end = jax.device_get(updater.settings(steps))
        assert end["decay"] == 0
        assert end["patterns"] == {"1:2": (1, 2)}


def test_the_forward_pass_does_not_read_the_optimizer():
    switch = AutoSwitch(min_fraction=0, max_fraction=0.2)
    run = Run(recipes.step(TWO_FOUR, switch=switch), grads=GRADS[:8])
    alone = run.state._replace(inner_state=None)
    for state in (run.state, alone):
        read = run.updater.pre_forward_update(run.params, state)["up"]["kernel"]
        assert np.mean(np.asarray(read) == 0) == 0.5
        assert run.updater.settings(state)["phase"] == 1


def test_step_with_fine_tuning_fixes_its_masks():
    switch = AutoSwitch(min_fraction=0, max_fraction=0.2)
    run = Run(recipes.step(TWO_FOUR, switch=switch, fine_tune_fraction=0.25))
    assert run.updater.freezes_at == 15
    phases = [int(seen["settings"]["phase"]) for seen in run.log]
    assert phases == [0] * 5 + [1] * 10 + [2] * 5
    fixed = run.log[15]["masks"]["up"]["kernel"]
    for seen in run.log[15:]:
        np.testing.assert_array_equal(seen["masks"]["up"]["kernel"], fixed)
        assert not seen["after"]["up"]["kernel"][~fixed].any()


def test_decoupled_sr_ste_does_not_go_through_the_optimizer():
    """Adam's moments stay those of the gradient; a learning rate times lambda W is taken off."""
    recipe = recipes.sr_ste(TWO_FOUR, strength=0.1, where="decoupled")
    schedule = optax.linear_schedule(0.3, 0.1, STEPS)
    updater = recipe.build(PARAMS, steps=STEPS)
    ours, adam = updater.wrap_optax(optax.adam(schedule), schedule), optax.adam(schedule)
    params, state, plain = PARAMS, ours.init(PARAMS), adam.init(PARAMS)
    for t in range(4):
        want, plain = jax.jit(adam.update)(GRADS[t], plain, params)
        got, state = jax.jit(ours.update)(GRADS[t], state, params)
        w = np.asarray(params["up"]["kernel"])
        decayed = np.where(numpy_mask(w, 2, 4), 0, (0.3 - 0.01 * t) * 0.1 * w)
        np.testing.assert_allclose(
            got["up"]["kernel"], want["up"]["kernel"] - decayed, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_array_equal(got["up"]["bias"], want["up"]["bias"])
        params = optax.apply_updates(params, got)


def test_masks_are_made_when_they_are_due():
    """Every fifth step of the decay phase, at each stage, and when they are fixed."""
    recipe = Recipe(
        layers={"kernel": "1:4"},
        pattern=Geometric(k=2),
        update_every=5,
        dense_fraction=0.1,
        fine_tune_fraction=0.15,
    )
    run = Run(recipe)
    masks = [seen["masks"]["up"]["kernel"] for seen in run.log]
    new = [t for t in range(1, STEPS) if np.any(masks[t] != masks[t - 1])]
    # The phase begins at step 2; its stages are 7.5 steps each; masks are fixed at 17.
    assert new == [2, 7, 10, 12, 17]
    for t in new:
        n, m = (2, 8) if t < 10 else (1, 4)
        want = numpy_mask(run.log[t - 1]["after"]["up"]["kernel"], n, m) if t < 17 else masks[t]
        np.testing.assert_array_equal(masks[t], want)


@pytest.mark.parametrize(
    "inner",
    [optax.adamw(RATE, weight_decay=0.1), optax.sgd(RATE, 0.9), optax.lion(RATE, weight_decay=1.0)],
    ids=["adamw", "momentum", "lion"],
)
def test_fixed_masks_leave_exactly_n_of_m_whatever_the_optimizer(inner):
    run = Run(recipes.mdgf_linear(TWO_FOUR, fine_tune_fraction=0.3), inner=inner)
    for seen in run.log[13:]:  # the update of step 13 leads to fixed masks
        w = seen["after"]["up"]["kernel"].reshape(2, 4, 4, 6)
        assert np.all(np.sum(w != 0, axis=2) == 2)
        assert not np.signbit(w[w == 0]).any()
    assert np.all(run.log[12]["after"]["up"]["kernel"] != 0)


def test_the_optimizer_sees_no_gradient_of_pruned_weights_once_masks_are_fixed():
    """Nor of a trainer that does not go through `weights`, as JaxPruner's users do not."""
    seen = []

    def spy(updates, state, params=None):
        seen.append(updates)
        return updates, state

    spying = optax.GradientTransformation(lambda params: optax.EmptyState(), spy)
    updater = recipes.asp(TWO_FOUR).build(PARAMS, steps=3)
    wrapped = updater.wrap_optax(spying)
    state = wrapped.init(PARAMS)
    mask = numpy_mask(PARAMS["up"]["kernel"], 2, 4)
    updates, state = wrapped.update(GRADS[0], state, PARAMS)
    got = seen[0]["up"]["kernel"]
    np.testing.assert_array_equal(got, np.where(mask, GRADS[0]["up"]["kernel"], 0))
    loose = optax.apply_updates(PARAMS, updates)
    loose["up"]["kernel"] += 1
    settled = updater.post_gradient_update(loose, state)
    np.testing.assert_array_equal(settled["up"]["kernel"], np.where(mask, loose["up"]["kernel"], 0))
    np.testing.assert_array_equal(settled["up"]["bias"], loose["up"]["bias"])


def test_a_step_whose_numbers_are_not_finite_does_not_spoil_the_masks():
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), PARAMS)
    for recipe in (recipes.asp(TWO_FOUR), recipes.sr_ste(TWO_FOUR)):
        updater = recipe.build(PARAMS, steps=9)
        wrapped = updater.wrap_optax(optax.adam(0.1))
        state = wrapped.update(bad, wrapped.init(PARAMS), PARAMS)[1]
        mask = updater.masks(state)["up"]["kernel"]
        np.testing.assert_array_equal(mask, numpy_mask(PARAMS["up"]["kernel"], 2, 4))


def test_a_run_goes_on_from_a_saved_state_with_the_same_bits(tmp_path):
    switch = AutoSwitch(min_fraction=0, max_fraction=0.3)
    for recipe in (recipes.sdgf_stepwise(ONE_EIGHT), recipes.step(TWO_FOUR, switch=switch)):
        whole = Run(recipe)
        half = Run(recipe, grads=GRADS[:9])
        leaves, treedef = jax.tree.flatten((half.params, half.state))
        np.savez(tmp_path / "state.npz", *leaves)
        saved = np.load(tmp_path / "state.npz")
        params, state = treedef.unflatten([saved[name] for name in saved.files])
        rest = Run(recipe, params=params, state=state, grads=GRADS[9:])
        jax.tree.map(
            np.testing.assert_array_equal, (rest.params, rest.state), (whole.params, whole.state)
        )


def test_layers_have_patterns_of_their_own():
    params = {
        "query": {"kernel": RNG.normal(size=(8, 2, 4))},
        "out": {"kernel": RNG.normal(size=(2, 4, 8))},
        "up": {"kernel": RNG.normal(size=(8, 16))},
        "head": RNG.normal(size=(8, 8)),
    }
    layers = {"query": "1:4", "out": "1:8", "up": None, "kernel|head": "2:4"}
    contraction = {"query/kernel": -3, "out/kernel": (-3, -2)}
    recipe = Recipe(layers=layers, pattern=Stepwise())
    updater = recipe.build(
        params, steps=6, contraction=lambda name, shape: contraction.get(name, -2)
    )
    state = jax.jit(updater.wrap_optax(optax.sgd(0.1)).init)(params)
    masks = jax.device_get(updater.masks(state))
    assert masks["up"]["kernel"] is None
    query = masks["query"]["kernel"].reshape(2, 4, 2, 4)  # groups of d_model
    assert np.all(query.sum(1) == 3)
    out = masks["out"]["kernel"].reshape(1, 8, 8)  # the heads' eight inputs are one axis
    assert np.all(out.sum(1) == 7)
    assert np.all(masks["head"].reshape(2, 4, 8).sum(1) == 3)
    stages = [jax.device_get(updater.settings(t)["patterns"]) for t in range(6)]
    assert [int(s["1:8"][0]) for s in stages] == [7, 7, 4, 2, 2, 1]
    assert [int(s["1:4"][0]) for s in stages] == [3, 3, 2, 2, 1, 1]
    assert [int(s["2:4"][0]) for s in stages] == [3, 3, 3, 2, 2, 2]
