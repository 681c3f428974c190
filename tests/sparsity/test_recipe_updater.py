"""Recipes on sharded arrays, and what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from sparsity import recipes
from sparsity.recipes import Recipe
from sparsity.recipes.autoswitch import AutoSwitch
from sparsity.recipes.decay import Exponential, Linear
from sparsity.recipes.kernels import MaskedKernel
from sparsity.recipes.patterns import Geometric

P = PartitionSpec
RNG = np.random.default_rng(2)
SPECS = {
    "query": P(None, "fsdp", "tensor", None),  # [layers, model, heads, head]
    "out": P(None, "tensor", None, "fsdp"),  # [layers, heads, head, model]
    "up": P(None, "fsdp", "tensor"),  # [layers, model, hidden]
    "scale": P(None, None),
}
SHAPES = {"query": (2, 64, 4, 8), "out": (2, 4, 8, 64), "up": (2, 64, 32), "scale": (2, 64)}
CONTRACTION = {"query": -3, "out": (-3, -2), "up": -2}
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
GRADS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
LAYERS = {"query|out|up": "1:4"}
RECIPES = {
    "masks anew": recipes.sr_ste(LAYERS),
    "stages": Recipe(
        layers=LAYERS,
        pattern=Geometric(k=2),
        decay=Linear(),
        gradient="masked",
        dense_fraction=0.2,
        fine_tune_fraction=0.2,
    ),
}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
COLLECTIVE = re.compile(rf" = .*? ({KINDS})(-start)?\(")


def contraction(name, shape):
    return CONTRACTION[name]


def program(recipe, params):
    """(init, step): everything that a recipe adds to a step, for given gradients."""
    updater = recipe.build(params, steps=10, contraction=contraction)
    optimizer = updater.wrap_optax(optax.adam(0.1))

    def step(params, state, grads):
        pull_back = jax.vjp(lambda p: updater.pre_forward_update(p, state), params)[1]
        (grads,) = pull_back(grads)

        def update(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        if jax.sharding.get_abstract_mesh().empty:
            return update(grads, state, params)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (params, state))
        return auto_axes(update, out_sharding=specs)(grads, state, params)

    return updater, jax.jit(optimizer.init), jax.jit(step)


def mesh_of(kind):
    """A mesh, and what `PARAMS` and `GRADS` are on it."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return mesh, *(jax.device_put(tree, shardings) for tree in (PARAMS, GRADS))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_sharded_masks_are_those_of_one_device_and_cost_no_collective(name):
    _, init, step = program(RECIPES[name], PARAMS)
    want = PARAMS, init(PARAMS)
    mesh, params, grads = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        updater, init, sharded_step = program(RECIPES[name], params)
        got = params, init(params)
        assert got[1].masks["up"].sharding.spec == SPECS["up"]
        compiled = sharded_step.lower(*got, grads).compile()
        assert not COLLECTIVE.search(compiled.as_text())
        changes = 0
        for _ in range(10):
            before = jax.device_get(want[1].masks["up"])
            want, got = step(*want, GRADS), compiled(*got, grads)
            jax.tree.map(np.testing.assert_array_equal, got[1].masks, want[1].masks)
            changes += np.any(before != jax.device_get(want[1].masks["up"]))
    assert changes >= 3
    if updater.freezes_at is not None:
        with jax.set_mesh(mesh):
            pack = jax.jit(updater.pack).lower(*got).compile()
            read = jax.jit(updater.pre_forward_update)
            values, state = pack(*got)
            text = pack.as_text() + read.lower(values, state).compile().as_text()
            assert not COLLECTIVE.search(text)
            jax.tree.map(np.testing.assert_array_equal, read(values, state), read(*got))
            assert values["up"].sharding.spec == SPECS["up"]


def test_a_mesh_of_automatic_axes_costs_no_collective_either():
    _, init, step = program(RECIPES["masks anew"], PARAMS)
    state = init(PARAMS)
    mesh, params, grads = mesh_of(AxisType.Auto)

    def place(path, x):
        name = next((e.key for e in path if getattr(e, "key", None) in SPECS), None)
        return jax.device_put(x, NamedSharding(mesh, SPECS[name] if x.ndim > 1 else P()))

    placed = jax.tree.map_with_path(place, state)
    sharded_step = program(RECIPES["masks anew"], params)[2]
    compiled = sharded_step.lower(params, placed, grads).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    got, want = compiled(params, placed, grads), step(PARAMS, state, GRADS)
    jax.tree.map(np.testing.assert_array_equal, got[1].masks, want[1].masks)


def test_shards_that_cut_groups_are_refused():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    kernel = jax.ShapeDtypeStruct((24, 16), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    with pytest.raises(ValueError, match="kernel: 4 shards of 6 entries cut groups of 4"):
        recipes.sr_ste({"kernel": "2:4"}).build({"kernel": kernel}, steps=1)
    recipes.sr_ste({"kernel": "1:3"}).build({"kernel": kernel}, steps=1)
    plain = {"kernel": jnp.ones((24, 16))}
    with pytest.raises(ValueError, match="kernel: 2 shards of 12 entries cut groups of 8"):
        recipes.sr_ste({"kernel": "1:8"}).build(plain, steps=1, ways=lambda name: 2)
    heads = jax.ShapeDtypeStruct(
        (4, 6, 8), jnp.float32, sharding=NamedSharding(mesh, P("tensor", None, None))
    )
    two_axes = dict(steps=1, contraction=lambda name, shape: (-3, -2))
    recipes.sr_ste({"out": "1:3"}).build({"out": heads}, **two_axes)
    with pytest.raises(ValueError, match="out: 4 shards of 6 entries cut groups of 8"):
        recipes.sr_ste({"out": "1:8"}).build({"out": heads}, **two_axes)
    within = jax.ShapeDtypeStruct(
        (4, 16, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "tensor", None))
    )
    with pytest.raises(ValueError, match="out: 16 shards of 4 entries cut groups of 8"):
        recipes.sr_ste({"out": "1:8"}).build({"out": within}, **two_axes)


def test_a_mask_is_packed_alike_on_every_mesh_or_refused():
    """Or a checkpoint would fit only the mesh that it was written on."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    recipe = recipes.sr_ste({"kernel": "2:4"})
    for spec in (P(), P("fsdp"), P("tensor"), P(None, "fsdp"), P("tensor", "fsdp")):
        kernel = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
        (plan,) = recipe.build({"kernel": kernel}, steps=1).plans
        assert plan.bits_axis == plan.code_axis == -1
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    kernel = jax.ShapeDtypeStruct(
        (8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor"))
    )
    with pytest.raises(ValueError, match="along the axis of 16; use at most 2 shards there"):
        recipes.sr_ste({"kernel": "2:4"}).build({"kernel": kernel}, steps=1)


def test_stacked_layers_carry_their_scalars():
    updater = RECIPES["stages"].build(PARAMS, steps=10, contraction=contraction)
    state = jax.jit(updater.wrap_optax(optax.sgd(0.1)).init)(PARAMS)
    weights = jax.jit(updater.weights)(PARAMS, state)
    assert isinstance(weights["query"], MaskedKernel)
    assert weights["query"].decay.shape == (2,)
    layer = jax.tree.map(lambda x: x[1], weights["query"])
    np.testing.assert_array_equal(layer.dense(), PARAMS["query"][1])  # the dense phase
    assert weights["scale"] is PARAMS["scale"] or isinstance(weights["scale"], jax.Array)


def test_phases_go_beyond_the_run_without_change():
    updater = recipes.mdgf_linear({"w": "2:4"}).build({"w": jnp.ones((4, 4))}, steps=20)
    assert updater.settings(25)["phase"] == 2
    whole = Recipe(layers={"w": "2:4"}, decay=Linear()).build({"w": jnp.ones((4, 4))}, steps=20)
    assert whole.settings(20)["decay"] == whole.settings(99)["decay"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"w": "4:2"}}, "'w': pattern '4:2' keeps 4 of every 2; N is the number kept"),
        ({"layers": {"w": "half"}}, "'w': pattern 'half' is not N:M"),
        ({"gradient": "ste"}, "gradient='ste' is unknown; use straight_through or masked"),
        ({"sr_ste_where": "weight"}, "sr_ste_where='weight' is unknown; use gradient or decoupled"),
        ({"sr_ste": -1.0}, "Recipe.sr_ste=-1.0; use a number from 0 to"),
        ({"update_every": 0}, "Recipe.update_every=0; use a whole number from 1 to 2147483647"),
        ({"packed": True}, "packed=True needs masks that stay fixed; use fine_tune_fraction > 0"),
        ({"dense_fraction": 1.5}, "Recipe.dense_fraction=1.5; use a number from 0 to 1"),
        (
            {"dense_fraction": 0.6, "fine_tune_fraction": 0.5},
            "dense_fraction=0.6 and fine_tune_fraction=0.5 are more than the whole run",
        ),
        (
            {"dense_fraction": 0.1, "variance": AutoSwitch()},
            "dense_fraction=0.1 and an AutoSwitch, .* use dense_fraction=0",
        ),
        (
            {"fine_tune_fraction": 0.6, "variance": AutoSwitch()},
            "AutoSwitch.max_fraction=0.5 and fine_tune_fraction=0.6 are more than the whole run",
        ),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Recipe(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipes.sr_ste({"wide": "2:4"}), "'wide' matches no parameter"),
        (recipes.sr_ste({"bias": "2:4"}), r"bias of shape \(6,\) has no input axis for 2:4"),
        (recipes.sr_ste({"kernel": "1:5"}), "kernel: 12 entries are not cut into groups of 5"),
        (recipes.sdgf_geometric({"kernel": "1:3"}), "kernel: 12 entries .* groups of 48"),
        (recipes.mdgf_linear({"kernel": "2:4"}, beta=0.01), "beta=0.01 leaves D at 0.2"),
        (Recipe(layers={"kernel": "2:4"}, decay=Exponential()), "D is 0.01 at the end of the run"),
    ],
)
def test_what_does_not_fit_a_model_or_a_run(recipe, message):
    params = {"kernel": jnp.ones((12, 6)), "bias": jnp.ones(6)}
    with pytest.raises(ValueError, match=message) as error:
        recipe.build(params, steps=100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("axis", [0, -3, (-1, -2), (-2, 0)])
def test_contraction_axes_are_negative_and_adjacent(axis):
    with pytest.raises(ValueError, match="use adjacent negative axes in order, from -2 to -1"):
        recipes.sr_ste({"w": "2:4"}).build(
            {"w": jnp.ones((4, 4))}, steps=1, contraction=lambda name, shape: axis
        )


def test_what_wrap_optax_needs():
    params = {"w": jnp.ones((4, 4))}
    decoupled = recipes.sr_ste({"w": "2:4"}, where="decoupled").build(params, steps=4)
    with pytest.raises(ValueError, match="give wrap_optax the learning_rate"):
        decoupled.wrap_optax(optax.adam(0.1))
    step = recipes.step({"w": "2:4"}).build(params, steps=4)
    with pytest.raises(ValueError, match="is built with scale_by_step_adam in place of Adam"):
        step.wrap_optax(optax.adam(0.1)).init(params)
    with pytest.raises(ValueError, match="depend on the state; give that"):
        step.settings(3)
    wrapped = recipes.sr_ste({"w": "2:4"}).build(params, steps=4).wrap_optax(optax.sgd(0.1))
    with pytest.raises(ValueError, match="update needs the parameters"):
        wrapped.update(params, wrapped.init(params))
    with pytest.raises(ValueError, match="steps=0; use 1 or more"):
        recipes.sr_ste({"w": "2:4"}).build(params, steps=0)
