"""Adam until the switch, and with frozen second moments after it, against numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsity.recipes.autoswitch import AutoSwitch, scale_by_step_adam

NEVER = AutoSwitch(threshold=1e-30, clip=False)
B1, B2, EPS = 0.9, 0.8, 1e-8


def gradients(steps, seed=0, scale=lambda t: 1.0):
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": np.float32(scale(t) * rng.normal(size=(4, 3))),
            "bias": np.float32(scale(t) * rng.normal(size=3)),
        }
        for t in range(1, steps + 1)
    ]


def run(transformation, grads):
    """The states after, and the updates of, each step."""
    state = transformation.init(jax.tree.map(jnp.zeros_like, grads[0]))
    update, states, updates = jax.jit(transformation.update), [], []
    for g in grads:
        u, state = update(g, state)
        states.append(jax.device_get(state))
        updates.append(jax.device_get(u))
    return states, updates


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def by_hand(grads, switched_at=None, b1=B1, b2=B2, eps=EPS):
    """Updates and v by the formulas, in float64; v is frozen after update `switched_at`."""
    m = v = 0.0
    updates, vs = [], []
    for t, g in enumerate(map(flat, grads), 1):
        m = b1 * m + (1 - b1) * g
        frozen = switched_at is not None and t > switched_at
        v = v if frozen else b2 * v + (1 - b2) * g**2
        v_hat = v / (1 - b2 ** (switched_at if frozen else t))
        updates.append(m / (1 - b1**t) / (np.sqrt(v_hat) + eps))
        vs.append(v)
    return updates, vs


def switch_by_hand(grads, option, window, threshold, first, last):
    """The update after which v is frozen, or None."""
    vs = [np.zeros_like(flat(grads[0])), *by_hand(grads)[1]]
    changes = [np.abs(b - a) for a, b in itertools.pairwise(vs)]
    if option == "arithmetic":
        z = [change.mean() for change in changes]
    else:
        z = [np.exp(np.mean(np.log(c[c > 0]))) if c.any() else 0.0 for c in changes]
    for t in range(1, len(grads) + 1):
        settled = t >= window and np.mean(z[t - window : t]) < threshold and t > first
        if settled or t > last:
            return t
    return None


def test_it_is_adam_to_the_bit_until_the_switch():
    grads = gradients(30)
    step_adam = run(scale_by_step_adam(B1, B2, EPS, switch=NEVER, steps=30), grads)
    adam = run(optax.scale_by_adam(B1, B2, EPS), grads)
    for ours, theirs in zip(step_adam[0], adam[0], strict=True):
        jax.tree.map(np.testing.assert_array_equal, (ours.mu, ours.nu), (theirs.mu, theirs.nu))
        assert ours.count == theirs.count
        assert ours.switched_at == -1
    jax.tree.map(np.testing.assert_array_equal, step_adam[1], adam[1])


def test_after_the_switch_v_stays_and_m_goes_on():
    switch = AutoSwitch(min_fraction=0.0, max_fraction=0.25, threshold=1e-30)
    grads = gradients(40)
    states, updates = run(scale_by_step_adam(B1, B2, EPS, switch=switch, steps=40), grads)
    assert [int(s.switched_at) for s in states] == [-1] * 10 + [11] * 30
    want, vs = by_hand(grads, switched_at=11)
    for state, update, wanted, v in zip(states, updates, want, vs, strict=True):
        np.testing.assert_allclose(flat(update), wanted, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(flat(state.nu), v, rtol=1e-5)
    for state in states[11:]:
        jax.tree.map(np.testing.assert_array_equal, state.nu, states[10].nu)
    # The frozen v keeps the bias correction of its step, which 10 steps later would be another.
    wrong = by_hand(grads, switched_at=11)[1][10] / (1 - B2**21)
    assert np.abs(wrong * (1 - B2**11) / flat(states[10].nu) - 1).min() > 0.05


@pytest.mark.parametrize("option", ["arithmetic", "geometric"])
@given(
    seed=st.integers(0, 99),
    window=st.integers(1, 9),
    threshold=st.floats(1e-4, 0.3),
    first=st.integers(0, 10),
    more=st.integers(0, 20),
)
@settings(max_examples=6, deadline=None)
def test_the_switch_comes_when_the_formula_says(option, seed, window, threshold, first, more):
    steps = 32
    grads = gradients(steps, seed, scale=lambda t: 1.5 / t)
    switch = AutoSwitch(
        option=option,
        threshold=threshold,
        window=window,
        min_fraction=first / steps,
        max_fraction=(first + more) / steps,
    )
    states, _ = run(scale_by_step_adam(B1, B2, EPS, switch=switch, steps=steps), grads)
    want = switch_by_hand(grads, option, window, threshold, first, first + more)
    assert states[-1].switched_at == (-1 if want is None else want)


@pytest.mark.parametrize(("b2", "window"), [(0.999, 1000), (0.95, 20), (0.99, 100), (0.0, 1)])
def test_the_default_window(b2, window):
    """1 / (1 - 0.999) is below 1000 in floating point."""
    state = scale_by_step_adam(b2=b2, steps=10).init(np.zeros(2))
    assert state.z.shape == (window,)


def test_nothing_is_decided_before_the_window_is_full():
    still = [jax.tree.map(np.zeros_like, g) for g in gradients(12)]
    switch = AutoSwitch(window=7, min_fraction=0.0, max_fraction=1.0)
    states, _ = run(scale_by_step_adam(B1, B2, EPS, switch=switch, steps=12), still)
    assert [int(s.switched_at) for s in states] == [-1] * 6 + [7] * 6


def test_without_clipping_neither_bound_counts():
    grads = gradients(20, scale=lambda t: 1e-8)
    early = AutoSwitch(threshold=1.0, window=2, min_fraction=0.5, clip=False)
    late = AutoSwitch(threshold=1e-30, window=2, max_fraction=0.5, clip=False)
    for switch, want in ((early, 2), (late, -1)):
        states, _ = run(scale_by_step_adam(B1, B2, EPS, switch=switch, steps=20), grads)
        assert states[-1].switched_at == want


def test_the_threshold_is_epsilon_by_default():
    grads = gradients(20, scale=lambda t: 1e-3)  # v changes by about 2e-7
    for eps, want in ((1e-8, -1), (1e-5, 5)):
        switch = AutoSwitch(min_fraction=0.0, max_fraction=1.0)
        states, _ = run(scale_by_step_adam(B1, B2, eps, switch=switch, steps=20), grads)
        assert states[-1].switched_at == want


def test_coordinates_that_did_not_change_do_not_pull_the_geometric_mean_to_zero():
    grads = gradients(6)
    for g in grads:
        g["bias"][:] = 0
    z = {}
    for option in ("geometric", "arithmetic"):
        switch = AutoSwitch(option=option, threshold=1e-30, clip=False)
        states, _ = run(scale_by_step_adam(B1, B2, EPS, switch=switch, steps=6), grads)
        z[option] = states[0].z[0]
    changes = (1 - B2) * grads[0]["kernel"] ** 2
    np.testing.assert_allclose(z["geometric"], np.exp(np.mean(np.log(changes))), rtol=1e-5)
    np.testing.assert_allclose(z["arithmetic"], changes.sum() / 15, rtol=1e-5)  # all 15 count


def test_bfloat16_moments_keep_their_type():
    grads = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), g) for g in gradients(3)]
    states, _ = run(scale_by_step_adam(steps=3), grads)
    assert {x.dtype for x in jax.tree.leaves(states[-1][1:3])} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"option": "harmonic"}, "option='harmonic' is unknown; use arithmetic or geometric"),
        ({"threshold": 0.0}, "threshold=0.0; use a number from 1.18e-38 to"),
        ({"window": 0}, "window=0; use a whole number from 1 to 2147483647 or None"),
        ({"min_fraction": 0.6}, "use min_fraction <= max_fraction"),
        ({"max_fraction": 1.5}, "AutoSwitch.max_fraction=1.5; use a number from 0 to 1"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        AutoSwitch(**options)
