"""One update: its loss, its gradient, its accumulation, and what a bad number does to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.tiny_models import LLAMA, B, T, V, initial, make_batch, make_program, place

from pjit_train.optimizers import SGD, Schedule

pytestmark = pytest.mark.usefixtures("quick_compiles")
RATE = 0.5
OPTIMIZER = SGD(
    learning_rate=RATE, clip_norm=None, schedule=Schedule(shape="constant", warmup_steps=3)
)
# Rows count differently, so that the parts of an accumulated batch do.
WEIGHTS = np.random.default_rng(5).uniform(size=(B, T)).astype(np.float32) ** 4


def trainer(**options):
    program = make_program(optimizer=OPTIMIZER, **options)
    return program, program.compile_step(make_batch(program, 0, weights=WEIGHTS))


@pytest.fixture(scope="module")
def whole():
    return trainer()


def test_loss_and_update_are_those_of_plain_gradient_descent(whole):
    program, step = whole
    batch = make_batch(program, 0, weights=WEIGHTS)

    def plain(params):
        """The weighted mean of -log p of the targets, from all the logits."""
        log_p = jax.nn.log_softmax(nnx.merge(program.graph, params)(batch["inputs"]))
        picked = jnp.sum(log_p * (batch["targets"][..., None] == jnp.arange(V)), axis=-1)
        return -jnp.sum(picked * WEIGHTS) / np.sum(WEIGHTS)

    state = program.new_state()
    before = jax.device_get(state["params"])
    with jax.set_mesh(program.mesh):
        loss, gradient = jax.jit(jax.value_and_grad(plain))(state["params"])
    after, metrics = step(state, batch)
    rate = RATE / 4  # the first of three steps of warm-up
    want = jax.tree.map(lambda p, g: p - rate * g, before, jax.device_get(gradient))
    jax.tree.map(lambda a, w: np.testing.assert_allclose(a, w, atol=1e-6), after["params"], want)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
    assert metrics["finite"]
    assert after["step"] == 1


def test_state_is_donated(whole):
    program, step = whole
    state = program.new_state()
    step(state, make_batch(program, 0, weights=WEIGHTS))
    assert all(x.is_deleted() for x in jax.tree.leaves(state["params"]))


def test_accumulated_update_is_that_of_the_whole_batch(whole):
    program, step = whole
    parts, parts_step = trainer(accumulate=4, mesh={"data": 2})
    state = jax.device_get(program.new_state())
    before = state["params"]
    want, want_metrics = step(program.new_state(), make_batch(program, 0, weights=WEIGHTS))
    got, metrics = parts_step(place(parts, state), make_batch(parts, 0, weights=WEIGHTS))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), want["params"], before)
    assert min(jax.tree.leaves(moved)) > 1e-5  # what is compared below has changed
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-6), got["params"], want["params"]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_an_update_that_is_not_finite_leaves_parameters_and_optimizer(whole, bad):
    program, step = whole
    poisoned = WEIGHTS.copy()
    poisoned[3] = bad  # 1e38: weights are finite, and their sum is not
    state, _ = step(program.new_state(), make_batch(program, 0, weights=WEIGHTS))
    before = jax.device_get(state)
    state, metrics = step(state, make_batch(program, 1, weights=poisoned))
    assert not metrics["finite"]
    after = jax.device_get(state)
    assert after["step"] == 2

    def unchanged(new, old):  # counts go on: the schedule stays with the step
        counted = np.issubdtype(np.asarray(new).dtype, np.integer)
        np.testing.assert_array_equal(new, old + 1 if counted else old)

    for part in ("params", "optimizer"):
        jax.tree.map(unchanged, after[part], before[part])
    state, metrics = step(state, make_batch(program, 2, weights=WEIGHTS))
    assert metrics["finite"]  # and training goes on
    assert np.any(state["params"]["head"] != after["params"]["head"])


def test_same_state_and_batch_give_the_same_bits(whole):
    program, step = whole
    batch = make_batch(program, 0, weights=WEIGHTS)
    first, second = (jax.device_get(step(program.new_state(), batch)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_evaluation_sums_losses_and_weights_over_batches():
    program = make_program(mesh={"data": 2, "tensor": 2})
    params = place(program, initial(LLAMA)["params"])
    sums = None
    total = 0.0
    for i in range(2):
        batch = make_batch(program, i, weights=WEIGHTS)
        sums = program.evaluate(params, batch, sums)
        with jax.set_mesh(program.mesh):
            model = nnx.merge(program.graph, params)
            logits = np.asarray(jax.jit(lambda m, x: m(x))(model, batch["inputs"]), np.float64)
        log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
        picked = np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], axis=-1)
        total -= float(np.sum(picked[..., 0] * WEIGHTS))
    np.testing.assert_allclose(sums["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], 2 * np.sum(WEIGHTS), rtol=1e-6)


def test_bfloat16_activations_train_parameters_in_float32():
    model = dataclasses.replace(LLAMA, dtype="bfloat16")
    program = make_program(model, mesh={"fsdp": 2, "tensor": 2})
    step, state = program.compile_step(make_batch(program, 0)), place(program, initial(LLAMA))
    values = []
    for i in range(20):
        state, metrics = step(state, make_batch(program, i))
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.8 * values[0]
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
