"""Schedules and optimizers against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tiny_models import D, make_batch, make_program

from pjit_train.errors import UserError
from pjit_train.models.roles import Role
from pjit_train.optimizers import SGD, Adafactor, AdamW, Lion, Muon, Schedule, matrix_axes


def rates(shape, steps=100, **options):
    schedule = Schedule(shape=shape, warmup_steps=10, **options).build(2.0, steps)
    return np.array([schedule(s) for s in range(steps + 1)])


def test_warm_up_rises_linearly_and_never_starts_at_zero():
    got = rates("constant")
    np.testing.assert_allclose(got[:11], 2.0 * (np.arange(11) + 1) / 11, rtol=1e-5)
    assert np.all(got[10:] == 2.0)


def test_cosine_is_half_way_at_the_middle_of_what_is_left():
    got = rates("cosine", final_fraction=0.1)
    for step in (10, 32, 55, 100):
        share = (step - 10) / 90
        want = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))
        assert got[step] == pytest.approx(want, rel=1e-5)


def test_linear_ends_at_its_final_fraction():
    got = rates("linear", final_fraction=0.25)
    assert got[55] == pytest.approx(2.0 * (1 - 0.75 * 0.5), rel=1e-5)
    assert got[100] == pytest.approx(0.5, rel=1e-5)


def test_wsd_is_stable_and_then_decays():
    got = rates("wsd", decay_fraction=0.2, final_fraction=0.0)
    assert np.all(got[10:81] == 2.0)
    assert got[90] == pytest.approx(1.0, rel=1e-5)
    assert got[100] == 0


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_a_warm_up_longer_than_the_run_takes_all_of_it_and_says_so(shape):
    schedule = Schedule(shape=shape, warmup_steps=30)
    got = [schedule.build(2.0, 5)(step) for step in range(5)]
    np.testing.assert_allclose(got, 2.0 * (np.arange(5) + 1) / 6, rtol=1e-5)
    assert schedule.notice(5) == (
        "schedule: warmup_steps=30 exceeds the run's 5 steps; "
        "the learning rate rises through all of them and does not fall"
    )
    assert schedule.notice(30) is None


def test_unknown_schedule_is_one_line():
    with pytest.raises(UserError, match="use cosine, linear, constant or wsd"):
        Schedule(shape="cosin")


PARAMS = {
    "embedding": jnp.ones((6, 4)),
    "blocks": {
        "attention": {
            "query": {"kernel": jnp.full((2, 4, 2, 2), 0.5), "bias": jnp.ones((2, 2, 2))},
            "out": {"kernel": jnp.full((2, 2, 2, 4), 0.5)},
        },
        "feed_forward": {"down": {"kernel": jnp.full((2, 8, 4), 0.5)}},
        "norm": {"scale": jnp.ones((2, 4))},
    },
}
ROLES = {
    "embedding": Role(kind="embedding", inputs=(-1,)),
    "blocks/attention/query/kernel": Role(kind="kernel", inputs=(-3,), stacked=True),
    "blocks/attention/query/bias": Role(kind="bias", stacked=True),
    "blocks/attention/out/kernel": Role(kind="kernel", inputs=(-3, -2), stacked=True),
    "blocks/feed_forward/down/kernel": Role(kind="kernel", inputs=(-2,), stacked=True),
    "blocks/norm/scale": Role(kind="norm", stacked=True),
}
FLAT = Schedule(shape="constant", warmup_steps=0)


def update(optimizer, grads, steps=10):
    transformation, _ = optimizer.build(steps, ROLES)
    updates, _ = transformation.update(grads, transformation.init(PARAMS), PARAMS)
    return updates


@pytest.mark.slow
def test_weight_decay_spares_scales_and_biases():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for optimizer in (AdamW, Lion, SGD, Muon, Adafactor):
        decayed = update(optimizer(learning_rate=0.1, schedule=FLAT, weight_decay=0.5), zeros)
        blocks = decayed["blocks"]
        want = -0.1 * 0.5 * 0.5
        np.testing.assert_allclose(blocks["feed_forward"]["down"]["kernel"], want, rtol=1e-5)
        assert not np.any(blocks["norm"]["scale"])
        assert not np.any(blocks["attention"]["query"]["bias"])


def test_clipping_scales_the_whole_gradient_to_the_norm():
    grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    clipped = update(SGD(learning_rate=1.0, schedule=FLAT, momentum=0.0, clip_norm=0.5), grads)
    assert float(optax.tree.norm(clipped)) == pytest.approx(0.5, rel=1e-5)


def test_adamw_first_step_is_the_sign_of_the_gradient():
    grads = jax.tree.map(lambda p: jnp.full_like(p, -2.0), PARAMS)
    updates = update(
        AdamW(learning_rate=0.1, schedule=FLAT, weight_decay=0.0, clip_norm=None), grads
    )
    np.testing.assert_allclose(updates["embedding"], 0.1, rtol=1e-5)


def test_muon_orthogonalises_each_layer_of_each_kernel_by_itself():
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
    updates = update(
        Muon(learning_rate=1.0, schedule=FLAT, weight_decay=0.0, clip_norm=None), grads
    )
    for layer in range(2):
        for name, rows in (("query", 4), ("out", 4)):
            matrix = updates["blocks"]["attention"][name]["kernel"][layer].reshape(rows, -1)
            values = np.linalg.svd(np.asarray(matrix), compute_uv=False)
            # Five Newton-Schulz steps bring every singular value near one.
            assert np.all((values > 0.5) & (values < 1.5)), (name, values)


def test_matrix_axes_are_inputs_and_outputs():
    axes = matrix_axes(ROLES, PARAMS)
    assert axes["embedding"] is None
    query, out = (axes["blocks"]["attention"][n]["kernel"] for n in ("query", "out"))
    assert (query.reduction_axis, query.output_axis) == ((1,), (2, 3))
    assert (out.reduction_axis, out.output_axis) == ((1, 2), (3,))


def adafactor_step(grad_LIO, param_LIO, rate):
    """The first update of Adafactor (Shazeer and Stern, 2018, algorithm 4), layer by layer."""
    update = np.zeros_like(grad_LIO)
    for layer, grad in enumerate(grad_LIO):
        rows, columns = (grad**2).mean(axis=1), (grad**2).mean(axis=0)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                update[layer, i, j] = grad[i, j] / math.sqrt(row * column / rows.mean())
    update /= max(1.0, math.sqrt((update**2).mean()))
    return -rate * update * max(1e-3, math.sqrt((param_LIO**2).mean()))


def test_adafactor_factors_every_block_kernel_as_matrices():
    """Heads narrower than the smallest factored axis are one axis with the others."""
    layers, width, heads, head_dim = 2, 12, 5, 3
    rng = np.random.default_rng(0)
    shapes = {
        "query": (layers, width, heads, head_dim),
        "out": (layers, heads, head_dim, width),
        "up": (layers, width, 11),
    }
    params, grads = (
        {"blocks": {n: {"kernel": jnp.asarray(rng.normal(size=s))} for n, s in shapes.items()}}
        for _ in range(2)
    )
    inputs = {"query": (-3,), "out": (-3, -2), "up": (-2,)}
    roles = {
        f"blocks/{name}/kernel": Role(kind="kernel", inputs=axes, stacked=True)
        for name, axes in inputs.items()
    }
    adafactor = Adafactor(learning_rate=0.3, schedule=FLAT, min_dim_size_to_factor=10)
    transformation, _ = adafactor.build(1, roles)
    state = transformation.init(params)
    moments = [x.size for x in jax.tree.leaves(state) if x.size > 1]
    assert sorted(moments) == sorted(layers * n for n in (width, 15, 15, width, width, 11))
    updates, _ = transformation.update(grads, state, params)
    for name, split in (("query", 2), ("out", 3), ("up", 2)):
        shape = shapes[name]
        matrix = (layers, math.prod(shape[1:split]), math.prod(shape[split:]))
        grad, param = (
            np.asarray(t["blocks"][name]["kernel"]).reshape(matrix) for t in (grads, params)
        )
        got = updates["blocks"][name]["kernel"]
        assert got.shape == shape
        np.testing.assert_allclose(got.reshape(matrix), adafactor_step(grad, param, 0.3), rtol=1e-4)


@pytest.mark.slow
def test_adafactor_trains_alike_on_a_mesh_and_keeps_its_moments_sharded(quick_compiles):
    adafactor = Adafactor(learning_rate=0.1, schedule=FLAT, min_dim_size_to_factor=20)
    losses, initial = [], None
    for mesh in ({}, {"fsdp": 2, "tensor": 2}):
        program = make_program(mesh=mesh, optimizer=adafactor)
        initial = initial or jax.device_get(program.new_state())
        state = jax.device_put(initial, jax.tree.map(lambda x: x.sharding, program.abstract_state))
        step = program.compile_step(make_batch(program, 0))
        values = []
        for i in range(5):
            state, metrics = step(state, make_batch(program, i))
            values.append(float(metrics["loss"]))
        losses.append(values)
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] < 0.95 * losses[0][0]
    created = jax.tree.leaves(program.new_state()["optimizer"])
    assert [x.sharding for x in created] == [
        x.sharding for x in jax.tree.leaves(program.abstract_state["optimizer"])
    ]
    sizes = {(x.shape, x.addressable_shards[0].data.shape) for x in created}
    assert ((3, D), (3, D // 2)) in sizes  # of [layers, d_model] over fsdp
    assert ((3, 4 * 6), (3, 4 * 6 // 2)) in sizes  # of [layers, heads * head_dim] over tensor
