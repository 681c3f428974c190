"""Training on packed weights and moments, held against the masked run bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsity import recipes
from sparsity.recipes import Recipe
from sparsity.recipes.kernels import PackedKernel

STEPS, FROZEN = 20, 10
RNG = np.random.default_rng(1)
LAYERS = {"up/kernel": "2:4", "down/kernel": "1:8"}
RECIPE = Recipe(layers=LAYERS, fine_tune_fraction=0.5)
PARAMS = {
    "up": {"kernel": RNG.normal(size=(16, 32)), "bias": RNG.normal(size=32)},
    "down": {"kernel": RNG.normal(size=(32, 8)) / 5, "bias": RNG.normal(size=8)},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
X = RNG.normal(size=(STEPS, 24, 16)).astype(np.float32)
Y = RNG.normal(size=(STEPS, 24, 8)).astype(np.float32)


def decayed(params):
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


OPTIMIZERS = {
    "adamw": lambda: optax.chain(
        optax.clip_by_global_norm(1e6),
        optax.adamw(optax.linear_schedule(0.02, 0.001, STEPS), weight_decay=0.1, mask=decayed),
    ),
    "momentum": lambda: optax.sgd(0.01, 0.9),
    "lion": lambda: optax.lion(0.002, weight_decay=0.1),
    "adam of some": lambda: optax.multi_transform(
        {"adam": optax.adam(0.01), "sgd": optax.sgd(0.01, 0.9)},
        {"up": "adam", "down": {"kernel": "sgd", "bias": "adam"}},
    ),
}


def make(inner):
    updater = RECIPE.build(PARAMS, steps=STEPS)
    optimizer = updater.wrap_optax(inner)

    def step(params, state, x, y):
        def loss(params):
            read = updater.pre_forward_update(params, state)
            hidden = jax.nn.gelu(x @ read["up"]["kernel"] + read["up"]["bias"])
            out = hidden @ read["down"]["kernel"] + read["down"]["bias"]
            return jnp.mean((out - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    optimizer = optimizer._replace(init=jax.jit(optimizer.init))
    return updater, optimizer, jax.jit(step)


def train(step, params, state, first, last):
    losses = []
    for t in range(first, last):
        params, state, loss = step(params, state, X[t], Y[t])
        losses.append(np.asarray(loss))
    return params, state, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packed_training_is_masked_training_to_the_bit(name):
    updater, optimizer, step = make(OPTIMIZERS[name]())
    params, state, _ = train(step, PARAMS, optimizer.init(PARAMS), 0, FROZEN)
    read_masks, unpack = jax.jit(updater.masks), jax.jit(updater.unpack)
    masks = read_masks(state)
    packed, packed_state = jax.jit(updater.pack)(params, state)
    assert packed["up"]["kernel"].shape == (8, 32)
    assert packed["down"]["kernel"].shape == (4, 8)
    assert {x.shape for x in jax.tree.leaves(packed_state.inner_state)} <= {
        x.shape for x in jax.tree.leaves((packed, ()))
    } | {()}

    want_params, want_state, want = train(step, params, state, FROZEN, STEPS)
    got_params, got_state, got = train(step, packed, packed_state, FROZEN, STEPS)
    np.testing.assert_array_equal(got, want)
    assert want[-1] != want[0]
    assert got_state.count == STEPS

    jax.tree.map(np.testing.assert_array_equal, read_masks(got_state), masks)
    got_params, got_state = unpack(got_params, got_state)
    jax.tree.map(np.testing.assert_array_equal, got_params, want_params)
    jax.tree.map(np.testing.assert_array_equal, got_state.masks, want_state.masks)
    # Moments of pruned weights are dropped; those of all others are the very same.
    kept = unpack(*jax.jit(updater.pack)(want_params, want_state))[1]
    jax.tree.map(np.testing.assert_array_equal, got_state.inner_state, kept.inner_state)


def test_the_values_are_the_kept_weights_in_order_with_their_moments():
    updater, optimizer, step = make(optax.adam(0.01))
    params, state, _ = train(step, PARAMS, optimizer.init(PARAMS), 0, FROZEN)
    packed, packed_state = jax.jit(updater.pack)(params, state)
    kernel = updater.weights(packed, packed_state)["up"]["kernel"]
    assert isinstance(kernel, PackedKernel)
    mask = np.asarray(updater.masks(state)["up"]["kernel"])
    moments = state.inner_state[0], packed_state.inner_state[0]
    for dense, values in (
        (params, packed),
        (moments[0].mu, moments[1].mu),
        (moments[0].nu, moments[1].nu),
    ):
        columns = [dense["up"]["kernel"][:, o][mask[:, o]] for o in range(32)]
        np.testing.assert_array_equal(values["up"]["kernel"], np.stack(columns, axis=1))
        np.testing.assert_array_equal(values["up"]["bias"], dense["up"]["bias"])
    # A bit for each dense weight of 2:4, 3/8 for those of 1:8.
    assert packed_state.codes["up"]["kernel"].nbytes == 16 * 32 // 8
    assert packed_state.codes["down"]["kernel"].nbytes == 32 * 8 * 3 // 64


def test_bytes_of_a_weight():
    """AdamW in float32, weight and moments and a gradient: 8.125 for 2:4, 2.05 for 1:8."""
    for pattern, want in (("2:4", 8.125), ("1:8", 2.047)):
        params = {"kernel": jnp.ones((64, 64))}
        updater = recipes.asp({"kernel": pattern}).build(params, steps=2)
        wrapped = updater.wrap_optax(optax.adamw(0.1))
        shapes = jax.eval_shape(lambda p, w=wrapped, u=updater: u.pack(p, w.init(p)), params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes) if x.ndim)
        gradient = shapes[0]["kernel"].size * 4
        assert (size + gradient) / 64**2 == pytest.approx(want, abs=0.001)


@pytest.mark.parametrize(
    "inner", [optax.adafactor(0.1), optax.contrib.muon(0.1), optax.rmsprop(0.1)]
)
def test_other_optimizers_are_refused(inner):
    updater = recipes.asp(LAYERS).build(PARAMS, steps=4)
    state = updater.wrap_optax(inner).init(PARAMS)
    with pytest.raises(ValueError, match="use adam, adamw, sgd or lion") as error:
        updater.pack(PARAMS, state)
    assert "\n" not in str(error.value)


def test_masks_that_are_not_fixed_are_refused():
    updater, optimizer, step = make(optax.adam(0.01))
    params, state, _ = train(step, PARAMS, optimizer.init(PARAMS), 0, 3)
    with pytest.raises(ValueError, match="after 3 updates; the masks are fixed after 10"):
        updater.pack(params, state)
    updater = recipes.sr_ste(LAYERS).build(PARAMS, steps=4)
    state = updater.wrap_optax(optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="use fine_tune_fraction > 0 and freeze"):
        updater.pack(PARAMS, state)


def test_groups_over_several_axes_are_refused():
    params = {"out": jnp.ones((4, 4, 8))}
    updater = recipes.asp({"out": "2:8"}).build(
        params, steps=4, contraction=lambda name, shape: (-3, -2)
    )
    state = updater.wrap_optax(optax.sgd(0.1)).init(params)
    with pytest.raises(ValueError, match=r"groups of out of 2:8 that go over the axes \(-3, -2\)"):
        updater.pack(params, state)
