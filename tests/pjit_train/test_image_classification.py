"""Image classification: its loss and figures by formula, on meshes, with recipes and formats."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from pjit_train.data.image_sources import Digits
from pjit_train.data.images import ImageData
from pjit_train.data.text import TextData
from pjit_train.errors import UserError
from pjit_train.evaluate import validate, validation_sums
from pjit_train.models.transformer import TransformerConfig
from pjit_train.models.vit import ViTConfig
from pjit_train.optimizers import AdamW, Muon, Schedule
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh
from pjit_train.tasks.image_classification import ImageClassification
from sparsity import recipes
from sparsity.numbers.quantized import MatmulFormats, Quantization

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = ViTConfig(
    image_size=8,
    channels=1,
    patch_size=4,
    num_classes=10,
    d_model=32,
    num_layers=2,
    num_heads=4,
    d_ff=64,
    init_std=0.1,
)
DATA = ImageData(source=Digits(), image_size=8, channels=1, batch_size=16)
STEPS = 6


def make_program(mesh=None, **options) -> Program:
    run = Run(
        **{
            "task": ImageClassification(),
            "model": MODEL,
            "data": DATA,
            "optimizer": AdamW(learning_rate=3e-3, schedule=Schedule(warmup_steps=1)),
            "steps": STEPS,
            "mesh": MeshShape(**{"data": 1, **(mesh or {})}),
            "eval_batches": 2,
            **options,
        }
    )
    return Program(run, make_mesh(run.mesh))


def train(program: Program, batches, steps=STEPS):
    """The state after some steps, all on one batch, and their losses."""
    state, losses, compiled = program.new_state(), [], None
    batch = program.global_batch(lambda rows: batches.train_batch(0, rows))
    for step in range(1, steps + 1):
        if packing := program.packs_after(step - 1):
            state = program.pack(state)
        if packing or compiled is None:
            compiled = program.compile_step(batch, step)
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def batches():
    return DATA.prepare(0)


@pytest.fixture(scope="module")
def plain(batches, quick_compiles):
    program = make_program()
    return program, *train(program, batches)


def test_loss_and_accuracy_are_those_of_the_logits(plain, batches):
    program, state, _ = plain
    with jax.set_mesh(program.mesh):
        model = nnx.merge(program.graph, state["params"])
        read = [batches.eval_batch(i) for i in range(2)]
        logits = np.concatenate([np.asarray(model(b["images"]), np.float64) for b in read])
    labels = np.concatenate([b["labels"] for b in read])
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    losses = log_sum - logits[np.arange(len(labels)), labels]
    figures = validate(program, program.weights(state), batches)
    assert figures["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert figures["val_accuracy"] == np.mean(logits.argmax(1) == labels)

    task, sums = program.run.task, validation_sums(program, program.weights(state), batches)
    classes = task.details(sums, batches)["classes"]
    for label, name in enumerate("0123456789"):
        assert classes[name]["images"] == np.sum(labels == label)
        right = np.sum((labels == label) & (logits.argmax(1) == label))
        if classes[name]["images"]:
            assert classes[name]["accuracy"] == pytest.approx(right / np.sum(labels == label))


def test_images_past_the_end_count_for_nothing(plain, batches):
    program, state, _ = plain
    every = dataclasses.replace(program.run, eval_batches=10**6)
    sums = validation_sums(Program(every, program.mesh), program.weights(state), batches)
    assert sums["weight"] == sums["images"].sum() == 359


def test_training_learns(plain, batches):
    _, _, losses = plain
    assert losses[0] == pytest.approx(np.log(10), rel=0.25)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(data=2), dict(fsdp=2), dict(tensor=2), dict(fsdp=2, sequence=2, tensor=2)]
)
def test_every_mesh_trains_alike(plain, batches, mesh):
    program, state, losses = plain
    sharded = make_program(mesh)
    other, found = train(sharded, batches)
    np.testing.assert_allclose(found, losses, rtol=2e-4)
    figures = validate(sharded, sharded.weights(other), batches)
    expected = validate(program, program.weights(state), batches)
    assert figures["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-3)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(plain, batches):
    _, losses = train(make_program(accumulate=4), batches)
    np.testing.assert_allclose(losses, plain[2], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": recipes.sr_ste()},
        {"sparsity": dataclasses.replace(recipes.asp({"feed_forward": "2:4"}), packed=True)},
        {"quantization": Quantization(attention="int8")},
        {"quantization": Quantization(layers={"head|patches": MatmulFormats(weights="int8")})},
        {"optimizer": Muon(learning_rate=1e-2, schedule=Schedule(warmup_steps=1))},
    ],
    ids=["sr_ste", "packed", "formats", "ends", "muon"],
)
def test_recipes_formats_and_optimizers_train_it(batches, options):
    program = make_program(**options)
    state, losses = train(program, batches)
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()
    if program.updater is not None:
        with jax.set_mesh(program.mesh):
            counted = program.updater.validity(program.weights(state))
        assert counted
        assert all(kernel.holds for kernel in counted.values())
    if program.quantizer is not None:
        batch = program.global_batch(lambda rows: batches.train_batch(0, rows))
        figures = program.observe(None, state, batch)
        assert any(name.startswith("quantization_error/") for name in figures)
        assert all(np.isfinite(x) for x in figures.values())


TEXT = TextData(sources=[], seq_len=8, batch_size=16)
LANGUAGE = TransformerConfig(
    vocab_size=256, max_len=8, d_model=16, num_layers=1, num_heads=2, d_ff=16
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(model=LANGUAGE),
            r"model=TransformerConfig is not for image class.*use ViTConfig,",
        ),
        (dict(data=TEXT), r"data=TextData is not for image classification; use ImageData, or"),
        (dict(data=dataclasses.replace(DATA, channels=3)), r"channels=3 and the model takes .*=1"),
        (dict(model=dataclasses.replace(MODEL, image_size=16)), r"image_size=8 and the model .*16"),
    ],
)
def test_parts_that_do_not_fit_are_told_in_one_line(changes, says):
    with pytest.raises(UserError, match=says):
        make_program(**changes)


def test_language_modelling_says_what_it_is_for():
    from pjit_train.tasks.language_modelling import LanguageModelling

    with pytest.raises(UserError, match="model=ViTConfig is not for language modelling; use Trans"):
        make_program(task=LanguageModelling())


def test_another_number_of_classes_is_told(batches):
    program = make_program(model=dataclasses.replace(MODEL, num_classes=12))
    with pytest.raises(UserError, match="num_classes=12 and the data have 10 classes; use num_cla"):
        program.run.task.check_batches(program.run, batches)


def test_operations_of_a_step_are_those_of_its_matmuls():
    """By hand: four patches and a class token, in each of two layers, and the ends."""
    D, F, T, L = 32, 64, 5, 2
    block = T * (4 * D * D + 2 * D * F) + 2 * T * T * D  # projections, feed-forward, two products
    forward = L * block + 4 * 16 * D + 10 * D
    program = make_program()
    assert program.run.flops_per_step == 16 * 6 * forward
