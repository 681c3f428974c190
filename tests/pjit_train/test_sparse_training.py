"""Recipes of `sparsity` in the trainer: their masks, their sharding, their phases, their resume."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.collectives import collectives
from helpers.run_directories import rows
from helpers.tiny_models import LLAMA, make_batch, make_program

from pjit_train.checkpoint import CheckpointConfig
from pjit_train.errors import UserError
from pjit_train.evaluate import evaluate
from pjit_train.loop import train
from pjit_train.optimizers import SGD, AdamW, Lion, Muon, Schedule
from sparsity import recipes
from sparsity.masks.validity import Validity, by_name
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.post_training.one_shot import KeepZeros
from sparsity.pruning import Pruning
from sparsity.recipes import Recipe
from sparsity.recipes.autoswitch import AutoSwitch
from sparsity.recipes.kernels import MaskedKernel, dense
from sparsity.recipes.patterns import Geometric
from sparsity.updater import Sparsity, Updater

pytestmark = pytest.mark.usefixtures("quick_compiles")
# head_dim of the test model is 6, which no group of 4 divides: the output kernel stays dense.
KERNELS = "(attention/(query|key|value)|feed_forward)/.*kernel"
MESH = (("data", 2), ("fsdp", 2), ("tensor", 2))
STEPS = 12


def recipe(name: str, layers=None) -> Recipe:
    """A recipe by its name."""
    geometric = {"attention/(query|key|value)": "1:2"}
    made = getattr(recipes, name)(
        layers or (geometric if "geometric" in name else {KERNELS: "2:4"})
    )
    if name == "sdgf_geometric":
        made = dataclasses.replace(made, pattern=Geometric(k=8))  # 32 inputs, 16 on a device
    if name == "step":
        switch = AutoSwitch(window=2, min_fraction=0.2, max_fraction=0.4)
        made = dataclasses.replace(made, variance=switch)
    return made


RECIPES = (
    "sr_ste",
    "mask_decay",
    "structure_decay",
    "mdgf_linear",
    "mdgf_exponential",
    "sdgf_stepwise",
    "sdgf_geometric",
    "step",
    "asp",
)


@functools.cache
def trained(name: str, mesh=()):
    """(program, [state after each step on the host], losses) of a short run."""
    program = make_program(LLAMA, dict(mesh), sparsity=recipe(name), steps=STEPS)
    state = program.new_state()
    step = program.compile_step(make_batch(program, 0))
    states, losses = [jax.device_get(state)], []
    for i in range(STEPS):
        state, figures = step(state, make_batch(program, i))
        states.append(jax.device_get(state))
        losses.append(float(figures["loss"]))
    return program, states, losses


def kernels(program, state) -> dict[str, np.ndarray]:
    """The kernels that the recipe is about, as the forward pass reads them."""
    is_kernel = lambda x: isinstance(x, MaskedKernel)
    leaves = jax.tree.leaves_with_path(program.weights(state), is_leaf=is_kernel)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(dense(leaf))
        for path, leaf in leaves
        if is_kernel(leaf)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_ends_with_the_pattern_along_the_contraction_axis(name):
    program, states, losses = trained(name)
    assert losses[-1] < losses[0]
    n, m = (1, 2) if name == "sdgf_geometric" else (2, 4)
    found = kernels(program, states[-1])
    assert len(found) == (3 if name == "sdgf_geometric" else 6)
    for kernel in found.values():  # [layers, inputs, ...]
        groups = kernel.reshape(kernel.shape[0], -1, m, *kernel.shape[2:])
        np.testing.assert_array_equal((groups != 0).sum(2), n)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sr_ste", "mdgf_linear", "step"])
def test_a_sharded_run_has_the_masks_and_losses_of_one_device(name):
    program, states, losses = trained(name)
    _, sharded_states, sharded_losses = trained(name, MESH)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    masks = [program.updater.masks(state["sparsity"]) for state in states]
    sharded_masks = [program.updater.masks(state["sparsity"]) for state in sharded_states]
    differ = [
        max(np.mean(a != b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in zip(masks, sharded_masks, strict=True)
    ]
    # Sums in another order move weights by their last bit, and a tie with it; no more than that.
    assert differ[0] == 0
    assert max(differ) < 1e-3


@pytest.mark.parametrize("name", ["sr_ste", "mdgf_linear", "sdgf_geometric"])
def test_a_recipe_adds_no_collective_to_the_step(name):
    def lines(sparsity):
        program = make_program(LLAMA, dict(MESH), sparsity=sparsity, steps=STEPS)
        hlo = program.compile_step(make_batch(program, 0)).as_text()
        return collectives(hlo), hlo.count("all-reduce("), hlo.count("all-gather(")

    assert lines(recipe(name)) == lines(None)


def test_phases_do_not_retrace_and_masks_settle():
    _, states, _ = trained("mdgf_linear")
    masks = [jax.tree.leaves(state["sparsity"].masks) for state in states]
    ones = [all((np.unpackbits(leaf) == 1).all() for leaf in leaves) for leaves in masks]
    assert ones[0]  # dense for the first 5 %: one step of twelve
    assert not ones[1]
    # fine-tuning for the last 15 %: two steps with the masks that the tenth began with
    for a, b in itertools.pairwise(masks[10:]):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_observed_figures_are_those_of_the_definitions():
    program, _, _ = trained("sr_ste")
    state = program.new_state()
    step = program.compile_step(make_batch(program, 0))
    for i in range(3):
        before = program.masks(state)
        old = jax.device_get(program.updater.masks(state["sparsity"]))
        batch = make_batch(program, i)
        state, _ = step(state, batch)
    got = {name: float(x) for name, x in program.observe(before, state, batch).items()}
    new = jax.device_get(program.updater.masks(state["sparsity"]))
    adam = next(
        s
        for s in jax.tree.leaves(state["optimizer"], is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(s, "mu")
    )
    flips, size, noise = 0, 0, {True: [], False: []}
    for path, mask in jax.tree.leaves_with_path(new):
        at = lambda tree, path=path: functools.reduce(lambda t, k: t[k.key], path, tree)
        flips += np.sum(mask != at(old))
        size += mask.size
        m = np.asarray(at(adam.mu), np.float64) / (1 - 0.9**3)
        v = np.asarray(at(adam.nu), np.float64) / (1 - 0.95**3)
        for kept in (True, False):
            noise[kept].append(np.maximum(v - m * m, 0)[mask == kept])
    assert got["mask_flips"] == pytest.approx(flips / size)
    assert 0 < got["mask_flips"] < 1
    for kept, name in ((True, "kept"), (False, "pruned")):
        mean = np.concatenate(noise[kept]).mean()
        assert got[f"gradient_noise/{name}"] == pytest.approx(mean, rel=1e-3)
    assert {name: x for name, x in got.items() if name.startswith("sparsity/")} == {
        f"sparsity/{kind}": 0.5
        for kind in (
            "attention/query",
            "attention/key",
            "attention/value",
            "feed_forward/up",
            "feed_forward/gate",
            "feed_forward/down",
        )
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdgf_linear", "step", "sr_ste"])
def test_a_run_resumed_in_any_phase_goes_on_bit_for_bit(name, run, tmp_path, reused):
    layers = {"(attention|feed_forward)/.*kernel": "2:4"}
    sparse = dataclasses.replace(
        run,
        sparsity=recipe(name, layers),
        steps=12,
        eval_every=6,
        checkpoints=CheckpointConfig(every_steps=1, keep_last=30, keep_best=0),
    )
    whole = tmp_path / "whole"
    train(sparse, whole, config_text="")
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert {"mask_flips", "gradient_noise/kept", "sparsity/feed_forward/up"} <= found[-1].keys()
    assert ("autoswitch_z" in found[-1]) == (name == "step")
    assert evaluate(sparse, whole)["val_loss"] == found[-1]["val_loss"]
    # Before, at and after each change of phase: back to that checkpoint, and on from there.
    for step in (1, 5, 10):
        for path in (whole / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > step:
                path.rename(tmp_path / f"{step}_{path.name}")
        train(sparse, whole, config_text="")
        assert rows(whole) == found


def test_recipes_that_do_not_fit_are_one_line():
    def program(sparsity, mesh=None, **options):
        return make_program(LLAMA, mesh, sparsity=sparsity, **options)

    with pytest.raises(UserError, match=r"^sparsity: .*'atention'.*matches no parameter"):
        program(Recipe(layers={"atention": "2:4"}))
    with pytest.raises(UserError, match=r"^sparsity: .*out/kernel.*groups of 5"):
        program(Recipe(layers={"attention/out": "2:5"}))
    with pytest.raises(UserError, match=r"^sparsity: .*fsdp|shards"):
        program(Recipe(layers={"feed_forward/up": "4:8"}), {"fsdp": 8})
    with pytest.raises(UserError, match=r"freezes Adam's variance and SGD has none; use AdamW"):
        program(recipe("step"), optimizer=SGD(learning_rate=1e-2))
    packed = dataclasses.replace(recipes.asp({KERNELS: "2:4"}), packed=True)
    with pytest.raises(UserError, match=r"^sparsity: recipe: pack needs .*weight by weight"):
        program(packed, optimizer=Muon(learning_rate=1e-2))
    with pytest.raises(UserError, match=r"^sparsity: .*5"):
        program(Pruning(sparsity_type="2:5", sparsity=0.6, layers=(KERNELS,)))
    with pytest.raises(UserError, match=r"^sparsity: .*[Aa]dam"):
        program(
            Pruning(algorithm="adam-fisher", layers=(KERNELS,)), optimizer=Lion(learning_rate=1e-3)
        )
    for nothing in (Recipe(layers={"norm/scale": "2:4"}), Pruning(layers=("norm/scale",))):
        with pytest.raises(UserError, match=r"^sparsity: layers: .*kernel"):
            program(nothing)
    with pytest.raises(ValueError, match=r"recipe: .*keeps 5 of every 4"):
        Recipe(layers={KERNELS: "5:4"})


def test_a_step_that_is_not_finite_leaves_masks_and_parameters_alone():
    program = make_program(
        LLAMA,
        sparsity=recipe("sr_ste"),
        steps=STEPS,
        optimizer=AdamW(learning_rate=1e-2, schedule=Schedule(warmup_steps=2)),
    )
    state = program.new_state()
    step = program.compile_step(make_batch(program, 0))
    state, _ = step(state, make_batch(program, 0))
    state["params"]["norm"]["scale"] = state["params"]["norm"]["scale"] * np.float32(np.nan)
    before = jax.device_get(state)
    state, figures = step(state, make_batch(program, 1))
    assert not figures["finite"]
    after = jax.device_get(state)
    for name in ("params",):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    jax.tree.map(np.testing.assert_array_equal, after["sparsity"].masks, before["sparsity"].masks)
    assert int(after["sparsity"].count) == int(before["sparsity"].count) + 1


def skip_one_step(sparsity):
    """States: before a step whose loss is not finite, after it, and after one more."""
    program = make_program(
        LLAMA, sparsity=sparsity, steps=4, optimizer=AdamW(learning_rate=1e-2, b2=0.5)
    )
    state, batch = program.new_state(), make_batch(program, 0)
    step = program.compile_step(batch)
    scale = state["params"]["norm"]["scale"]
    state["params"]["norm"]["scale"] = scale * np.float32(np.nan)
    before = jax.device_get(state)
    state, figures = step(state, batch)
    assert not figures["finite"]
    skipped = jax.device_get(state)
    state["params"]["norm"]["scale"] = scale * 0 + 1
    state, figures = step(state, batch)
    assert figures["finite"]
    return before, skipped, jax.device_get(state)


def test_masks_that_were_due_in_a_step_that_is_not_finite_are_made_in_the_next():
    due_at_once = Pruning(
        algorithm="magnitude", sparsity=0.5, layers=(KERNELS,), start_fraction=0, end_fraction=0
    )
    before, skipped, after = skip_one_step(due_at_once)
    jax.tree.map(np.testing.assert_array_equal, skipped["sparsity"], before["sparsity"])
    kernel = after["params"]["blocks"]["feed_forward"]["up"]["kernel"]
    assert np.mean(kernel == 0) == 0.5


def test_a_step_that_is_not_finite_switches_no_autoswitch():
    always = AutoSwitch(window=1, threshold=1e9, min_fraction=0, max_fraction=0.9)
    made = dataclasses.replace(recipe("step"), variance=always)
    before, skipped, after = skip_one_step(made)
    switched = [
        int(optax.tree_utils.tree_get(state["optimizer"], "switched_at"))
        for state in (before, skipped, after)
    ]
    assert switched == [-1, -1, 2]
    assert [int(s["sparsity"].masked_from) for s in (before, skipped, after)] == [-1, -1, 2]


@pytest.mark.slow
def test_a_packed_run_is_the_masked_one_bit_for_bit(run, tmp_path, reused):
    """Clipping, momentum and weight decay at work; stopped and resumed before and after packing."""
    masked = dataclasses.replace(
        run,
        steps=12,
        eval_every=6,
        sparsity=dataclasses.replace(recipes.mdgf_linear(), fine_tune_fraction=0.5),
        optimizer=AdamW(learning_rate=1e-2, clip_norm=0.05, schedule=Schedule(warmup_steps=2)),
        checkpoints=CheckpointConfig(every_steps=1, keep_last=30, keep_best=0),
    )
    packed = dataclasses.replace(masked, sparsity=dataclasses.replace(masked.sparsity, packed=True))
    train(masked, tmp_path / "masked", config_text="")
    train(packed, tmp_path / "packed", config_text="")
    want, got = rows(tmp_path / "masked"), rows(tmp_path / "packed")
    for one, other in zip(want, got, strict=True):
        kept = {name: x for name, x in one.items() if not name.startswith("gradient_noise")}
        assert {name: other[name] for name in kept} == kept
    assert all(row["grad_norm"] > 0.05 for row in want)
    last = evaluate(masked, tmp_path / "masked")
    assert last["sparse"]
    assert evaluate(packed, tmp_path / "packed") == last
    for step in (5, 6, 7):  # the state is packed between the sixth step and the seventh
        for path in (tmp_path / "packed" / "checkpoints").iterdir():
            if path.name.isdigit() and int(path.name) > step:
                path.rename(tmp_path / f"{step}_{path.name}")
        train(packed, tmp_path / "packed", config_text="")
        assert rows(tmp_path / "packed") == got


@pytest.mark.parametrize(("pattern", "bytes_per_weight"), [("2:4", 8.125), ("1:8", 2 + 3 / 64)])
def test_packed_training_holds_so_many_bytes_a_weight(pattern, bytes_per_weight):
    """Weight, two moments and gradient in float32, and the indices; 16 bytes where it is dense."""
    sparsity = dataclasses.replace(recipes.asp({"feed_forward": pattern}), packed=True)
    program = make_program(LLAMA, sparsity=sparsity)
    dense_state, state = program.abstract_state, program.abstract_state_after(1)

    def sizes(tree):
        return [
            x.size * x.dtype.itemsize
            for path, x in jax.tree.leaves_with_path(tree)
            if "'feed_forward'" in jax.tree_util.keystr(path)
        ]

    weights = sum(sizes(dense_state["params"])) / 4
    assert sum(sizes(dense_state)) / weights == pytest.approx(12, rel=0.02)
    gradients = sizes(state["params"])
    assert (sum(sizes(state)) + sum(gradients)) / weights == pytest.approx(
        bytes_per_weight, rel=0.02
    )


def test_a_static_mask_holds_from_the_first_forward_pass_on():
    sparsity = Pruning(algorithm="static_sparse", layers=(KERNELS,))
    program = make_program(LLAMA, sparsity=sparsity, steps=STEPS)
    counted = program.updater.validity(program.weights(program.new_state()))
    assert counted["all"].sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rigl", "magnitude_ste", "topkast", "iterative_nm"])
def test_pruning_algorithms_train_and_end_sparse(algorithm):
    nm = algorithm == "iterative_nm"
    sparsity = Pruning(
        algorithm=algorithm,
        sparsity=0.5 if nm else 0.8,
        sparsity_type="2:4" if nm else "unstructured",
        layers=(KERNELS,),
        end_fraction=0.75,
        update_every=2,
    )
    mesh = MESH if algorithm == "rigl" else ()
    program = make_program(LLAMA, dict(mesh), sparsity=sparsity, steps=STEPS)
    state = program.new_state()
    step = program.compile_step(make_batch(program, 0))
    losses = []
    for i in range(STEPS):
        state, figures = step(state, make_batch(program, i))
        losses.append(float(figures["loss"]))
    assert losses[-1] < losses[0]
    weights = program.weights(state)
    assert all(counted.holds for counted in program.updater.validity(weights).values())
    wrong = program.updater.validity(jax.tree.map(lambda w: w + 1, weights))
    assert not any(counted.holds for counted in wrong.values())
    if nm:  # along the contraction axes, which are not the same for all kernels
        for path in (("attention", "query"), ("feed_forward", "down")):
            kernel = np.asarray(weights["blocks"][path[0]][path[1]]["kernel"])
            groups = kernel.reshape(kernel.shape[0], -1, 4, *kernel.shape[2:])
            assert ((groups != 0).sum(2) == 2).all()


def test_groups_may_go_over_heads_that_devices_share():
    """Heads of 6, over two devices: groups of 4 go from one head into the next."""
    outputs = recipes.sr_ste({"attention/out/kernel": "2:4"})
    masks = []
    for mesh in ({}, {"tensor": 2}):
        program = make_program(LLAMA, mesh, sparsity=outputs, steps=4)
        masks.append(jax.device_get(program.new_state()["sparsity"].masks))
    jax.tree.map(np.testing.assert_array_equal, *masks)


class RowsState(NamedTuple):
    inner_state: Any


@dataclasses.dataclass(frozen=True)
class FirstRows(Sparsity, Updater):
    """A sparsity that the library does not have: the first input of every `up` kernel is unread."""

    def build(self, params, *, steps, contraction=None, scored=None):
        return self

    def wrap_optax(self, inner, learning_rate=None):
        def update(grads, state, params, **extra):
            updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
            return updates, RowsState(inner_state)

        init = lambda params: RowsState(inner.init(params))
        return optax.GradientTransformationExtraArgs(init, update)

    def weights(self, params, state):
        masks = self.masks(state, params)
        read = lambda mask, w: w if mask is None else w * mask
        return jax.tree.map(read, masks, params, is_leaf=lambda x: x is None)

    def post_gradient_update(self, params, state):
        return params

    def skip(self, params, state):
        return state

    def masks(self, state, params):
        def mask(path, w):
            is_up = "up" in jax.tree_util.keystr(path)
            return jnp.arange(w.shape[-2])[:, None] > 0 if is_up else None

        return jax.tree.map_with_path(mask, params)

    def validity(self, weights):
        first = by_name(weights)["blocks/feed_forward/up/kernel"][..., 0, :]
        return {"up": Validity("first", jnp.mean(first == 0))}

    def describe(self):
        return "sparse: the first input of up"


def test_a_sparsity_of_ones_own_trains():
    """What `sparsity.updater` asks for is all that the trainer needs."""
    program = make_program(LLAMA, {}, sparsity=FirstRows(), steps=2)
    state = program.new_state()
    first = jax.device_get(state["params"]["blocks"]["feed_forward"]["up"]["kernel"])
    step = program.compile_step(make_batch(program, 0))
    for i in range(2):
        state, figures = step(state, make_batch(program, i))
        assert figures["finite"]
    last = jax.device_get(state["params"]["blocks"]["feed_forward"]["up"]["kernel"])
    decay = last[:, 0] / first[:, 0]  # no gradient: weight decay alone, the same for all of a row
    np.testing.assert_allclose(decay, decay.flat[0], rtol=1e-5)
    assert np.ptp(last[:, 1] / first[:, 1]) > 1e-3
    read = program.weights(state)
    assert not np.any(read["blocks"]["feed_forward"]["up"]["kernel"][:, 0])
    with pytest.raises(ValueError, match="FirstRows packs nothing"):
        program.updater.pack(state["params"], state["sparsity"])


def test_zeros_are_kept_where_masks_are_of_quantized_weights():
    quantization = Quantization(
        layers={KERNELS: MatmulFormats(weights="int8")}, order="quantize_then_sparsify"
    )
    program = make_program(
        LLAMA,
        {},
        sparsity=KeepZeros(layers={"up/kernel": "0.5"}),
        quantization=quantization,
        steps=2,
    )
    state = program.new_state()
    kernel = state["params"]["blocks"]["feed_forward"]["up"]["kernel"]
    zero = np.arange(kernel.size).reshape(kernel.shape) % 2 == 0
    kernel = jax.device_put(np.where(zero, 0, kernel), kernel.sharding)
    state["params"]["blocks"]["feed_forward"]["up"]["kernel"] = kernel
    step = program.compile_step(make_batch(program, 0))
    state, _ = step(state, make_batch(program, 0))
    after = np.asarray(state["params"]["blocks"]["feed_forward"]["up"]["kernel"])
    np.testing.assert_array_equal(after == 0, zero)


@pytest.mark.slow
def test_a_recipe_is_observed_under_muon_whose_adam_has_none_of_its_kernels():
    program = make_program(
        sparsity=recipes.sr_ste({KERNELS: "2:4"}), optimizer=Muon(learning_rate=1e-2)
    )
    state, batch = program.new_state(), make_batch(program, 0)
    before = program.masks(state)
    state, _ = program.compile_step(batch)(state, batch)
    figures = program.observe(before, state, batch)
    assert figures["sparsity/attention/query"] == 0.5
    assert not any(name.startswith("gradient_noise") for name in figures)
