"""Adapters: what is trained, what stays, and what comes out merged."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.tiny_models import GPT2, LLAMA, make_batch, make_program, place

from pjit_train.adapters import Lora
from pjit_train.errors import UserError
from pjit_train.optimizers import AdamW, Schedule
from sparsity.masks.layers import KERNELS
from sparsity.numbers.quantized import Quantization
from sparsity.pruning import Pruning
from sparsity.recipes.recipes import Recipe

pytestmark = pytest.mark.usefixtures("quick_compiles")
LORA = Lora(rank=3, alpha=6.0)
OPTIMIZER = AdamW(learning_rate=3e-2, schedule=Schedule(warmup_steps=0))
FOUR_STEPS = 4


def trained(program, steps=FOUR_STEPS, state=None):
    """(state, losses) after some steps, on batches that are the same on every mesh."""
    state = program.new_state() if state is None else state
    step = program.compile_step(make_batch(program, 0))
    losses = []
    for i in range(steps):
        state, metrics = step(state, make_batch(program, i))
        losses.append(float(metrics["loss"]))
    return state, losses


def flat(tree):
    return flatten_dict(jax.device_get(tree), sep="/")


@pytest.fixture(scope="module")
def plain():
    program = make_program(adapters=LORA, optimizer=OPTIMIZER)
    return program, *trained(program)


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_model_and_then_it_falls(plain):
    _, _, losses = plain
    full = make_program(optimizer=OPTIMIZER)
    _, (first, *_) = trained(full, 1)
    np.testing.assert_allclose(losses[0], first, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.1


def test_only_adapters_move_and_merged_is_their_product_beside_the_frozen_weights(plain):
    program, state, _ = plain
    before, after = flat(program.new_state()["params"]), flat(state["params"])
    merged, parts = flat(program.weights(state)), flat(state["adapters"])
    assert all(np.array_equal(before[name], x) for name, x in after.items())
    adapted = {name.rpartition("/")[0] for name in parts}
    assert adapted == {name for name in before if name.endswith("kernel")}
    for name, w in before.items():
        if name not in adapted:
            assert np.array_equal(merged[name], w)
            continue
        down, up = parts[f"{name}/down"], parts[f"{name}/up"]
        layers, rank = down.shape[0], down.shape[-1]
        product = down.reshape(layers, -1, rank).astype(float) @ up.reshape(layers, rank, -1)
        assert np.abs(product).max() > 1e-3
        np.testing.assert_allclose(merged[name], w + 2 * product.reshape(w.shape), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_merged_weights_compute_what_the_step_computes(model):
    program = make_program(model, adapters=LORA, optimizer=OPTIMIZER)
    state, _ = trained(program, 2)
    batch = make_batch(program, 9)
    sums = program.evaluate(program.weights(state), batch)
    _, metrics = program.compile_step(batch)(state, batch)
    np.testing.assert_allclose(sums["loss"] / sums["weight"], metrics["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
@pytest.mark.parametrize("lora", [LORA, dataclasses.replace(LORA, keep_zeros=True)], ids=str)
def test_a_mesh_gives_the_losses_of_one_device(mesh, lora):
    one = make_program(adapters=lora, optimizer=OPTIMIZER)
    start = jax.device_get(one.new_state())
    many = make_program(mesh=mesh, adapters=lora, optimizer=OPTIMIZER)
    want, got = trained(one)[1], trained(many, state=place(many, start))[1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def pruned(state):
    """The state with half of the weights of every kernel at 0, and the mask of each by name."""

    def prune(path, x):
        if path[-1].key != "kernel":
            return x
        keep = np.random.default_rng(x.size).random(x.shape) < 0.5
        return jax.device_put(np.where(keep, x, 0), x.sharding)

    return state | {"params": jax.tree.map_with_path(prune, state["params"])}


def test_zeros_that_are_kept_are_kept_and_the_others_move():
    program = make_program(adapters=dataclasses.replace(LORA, keep_zeros=True), optimizer=OPTIMIZER)
    start = pruned(program.new_state())
    before = flat(start["params"])
    state, losses = trained(program, state=start)
    assert losses[-1] < losses[0]
    for name, x in flat(program.weights(state)).items():
        if name.endswith("kernel"):
            assert np.array_equal(x != 0, before[name] != 0)
            assert (x != before[name])[before[name] != 0].mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_recipe_masks_the_sum(quantization):
    recipe = Recipe(layers={KERNELS: "2:4"})
    formats = Quantization(layers={KERNELS: "int8"})
    program = make_program(
        adapters=LORA,
        optimizer=OPTIMIZER,
        sparsity=recipe,
        quantization=formats if quantization else None,
    )
    state, losses = trained(program)
    assert losses[-1] < losses[0]
    counted = program.updater.validity(program.weights(state))
    assert counted
    assert all(kernel.violations == 0 for kernel in counted.values())
    assert program.observe(None, state, make_batch(program, 0))


@pytest.mark.slow
def test_a_step_holds_frozen_weights_in_their_dtype_and_neither_gradients_nor_moments():
    """By XLA's analysis, for a model whose kernels are most of its memory."""
    model = dataclasses.replace(
        LLAMA, d_model=256, d_ff=1024, num_layers=8, head_dim=64, remat="full"
    )
    memory = {}
    for name, options, dtype in (
        ("full", {}, "float32"),
        ("lora", {"adapters": LORA}, "float32"),
        ("narrow", {"adapters": LORA}, "bfloat16"),
    ):
        program = make_program(dataclasses.replace(model, param_dtype=dtype), **options)
        analysis = program.compile_step(make_batch(program, 0)).memory_analysis()
        sizes = {part: _bytes(x) for part, x in program.abstract_state.items()}
        arguments = sum(sizes.values())
        assert analysis.argument_size_in_bytes < arguments + 10_000
        memory[name] = sizes, arguments + analysis.temp_size_in_bytes
        if name != "full":
            assert sizes["optimizer"] <= 2 * sizes["adapters"] + 100
    (whole, full), (frozen, lora) = memory["full"], memory["lora"]
    weights = whole["params"]
    assert (frozen["params"], memory["narrow"][0]["params"]) == (weights, weights / 2)
    # Weights, moments and gradients of the whole, and what is left: the activations; a little less,
    # as the gradients come when some of those are gone.
    activations = full - 4 * weights
    assert 0 < activations < weights / 2
    assert lora < weights + 4 * frozen["adapters"] + 1.25 * activations


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        (Lora(rank=13), r"rank=13 exceeds the size of blocks/attention/key/kernel, 32 x 12"),
        (Lora(layers=("kernle",)), r"adapters: layers: 'kernle' matches no parameter; the nearest"),
        (Lora(layers=("embedding",)), r"'embedding' matches no kernel of the blocks"),
        (Lora(layers=()), r"layers=\(\) names no kernel"),
    ],
)
def test_a_mistake_is_one_line(lora, line):
    with pytest.raises(UserError, match=line) as caught:
        make_program(adapters=lora)
    assert "\n" not in str(caught.value)


def test_a_packed_recipe_is_refused():
    recipe = Recipe(layers={KERNELS: "2:4"}, fine_tune_fraction=0.5, packed=True)
    with pytest.raises(UserError, match="frozen weights are not packed"):
        make_program(adapters=LORA, sparsity=recipe)


@pytest.mark.parametrize("algorithm", ["rigl", "saliency", "global_saliency", "adam-fisher"])
def test_masks_of_gradients_that_are_not_made_are_refused(algorithm):
    with pytest.raises(UserError, match="makes its masks of; use one that goes by weights"):
        make_program(adapters=LORA, sparsity=Pruning(algorithm=algorithm, sparsity=0.5))
