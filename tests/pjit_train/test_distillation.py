"""Distillation: its loss by the formulas, its cost, its state, and teachers that do not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import LLAMA, make_batch, make_program, place

from pjit_train.adapters import Lora
from pjit_train.distillation import Distillation
from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.sharding import Rules
from pjit_train.step import new_params, split_model
from sparsity.masks.layers import KERNELS
from sparsity.numbers.quantized import Quantization
from sparsity.recipes.recipes import Recipe

pytestmark = pytest.mark.usefixtures("quick_compiles")
BOTH = Distillation(temperature=2.0, weight=0.7, features=0.3)
# As a folder gives it.
MODEL = dataclasses.replace(LLAMA, layers="unroll")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher of other weights than the student's."""
    folder = tmp_path_factory.mktemp("teacher") / "hf"
    huggingface.save(folder, MODEL, jax.device_get(new_params(MODEL, Rules(), 7)))
    return folder


def losses(program, steps=3, state=None):
    state = program.new_state() if state is None else state
    step, found = program.compile_step(make_batch(program, 0)), []
    for i in range(steps):
        state, metrics = step(state, make_batch(program, i))
        found.append(float(metrics["loss"]))
    return state, found


def by_formula(program, state, teacher, batch):
    """The loss from all logits and from the layers applied one after the other."""

    def outputs(params):
        model = nnx.merge(program.graph, params)
        found = [short(n)(params, batch["inputs"]) for n in range(1, MODEL.num_layers + 1)]
        return np.asarray(model(batch["inputs"]), float), np.asarray(jnp.stack(found), float)

    def short(layers):
        """The output of the first layers of the model."""
        config = dataclasses.replace(MODEL, num_layers=layers)
        graph, _ = split_model(config, Rules())

        def body(params, inputs):
            blocks = jax.tree.map(lambda x: x[:layers], params["blocks"])
            return nnx.merge(graph, params | {"blocks": blocks}).body(inputs)[0]

        return body

    (logits, layers), (taught, taught_layers) = outputs(state["params"]), outputs(teacher)
    log = lambda x: np.asarray(jax.nn.log_softmax(x), float)
    task = -np.take_along_axis(log(logits), np.asarray(batch["targets"])[..., None], -1).mean()
    p, q = log(taught / 2), log(logits / 2)
    apart = (np.exp(p) * (p - q)).sum(-1).mean()
    ratios = ((layers - taught_layers) ** 2).mean((1, 2, 3)) / (taught_layers**2).mean((1, 2, 3))
    return task + 0.7 * 4 * apart + 0.3 * ratios.sum()


@pytest.mark.slow
def test_the_loss_is_that_of_the_formulas(folder):
    program = make_program(MODEL, distillation=dataclasses.replace(BOTH, teacher=str(folder)))
    state, batch = program.new_state(), make_batch(program, 0)
    with jax.set_mesh(program.mesh):
        teacher = huggingface.load(folder, MODEL)[1]
        want = by_formula(program, state, teacher, batch)
    _, (first, *_, last) = losses(program, 8, state)
    np.testing.assert_allclose(first, want, rtol=1e-5)
    assert last < first


def test_a_student_that_is_its_teacher_has_the_loss_of_the_task():
    plain, taught = make_program(MODEL), make_program(MODEL, distillation=BOTH)
    np.testing.assert_allclose(losses(taught, 1)[1], losses(plain, 1)[1], rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_costs_one_forward_pass_and_no_more(folder):
    """In XLA's count of the operations of a step."""

    def flops(program):
        analysis = program.compile_step(make_batch(program, 0)).cost_analysis()
        return analysis["flops"]

    distillation = Distillation(teacher=str(folder))
    plain, taught = make_program(MODEL), make_program(MODEL, distillation=distillation)
    batch, state = make_batch(plain, 0), plain.new_state()
    with jax.set_mesh(plain.mesh):
        forward = jax.jit(lambda p, x: nnx.merge(plain.graph, p)(x))
        once = forward.lower(state["params"], batch["inputs"]).compile().cost_analysis()["flops"]
    assert once < flops(taught) - flops(plain) < 1.2 * once
    moved = losses(taught, 2)[0]
    kept = huggingface.load(folder, MODEL)[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(moved["teacher"]), kept)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(moved["optimizer"]) < 2 * size(moved["params"]) + 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"adapters": Lora(rank=3)},
        {"sparsity": Recipe(layers={KERNELS: "2:4"})},
        {"quantization": Quantization(layers={KERNELS: "int8"})},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_mesh_gives_the_losses_of_one_device(options):
    one = make_program(MODEL, distillation=BOTH, **options)
    start = jax.device_get(one.new_state())
    assert ("teacher" in start) == ("adapters" not in options)
    many = make_program(MODEL, {"data": 2, "fsdp": 2, "tensor": 2}, distillation=BOTH, **options)
    want, got = losses(one)[1], losses(many, state=place(many, start))[1]
    # A weight at the edge of two numbers of a format may be rounded to either of them.
    np.testing.assert_allclose(got, want, rtol=2e-4 if "quantization" in options else 1e-5)


def test_a_state_is_saved_without_its_teacher_and_comes_back(folder):
    program = make_program(
        MODEL, distillation=Distillation(teacher=str(folder)), adapters=Lora(rank=3)
    )
    state, _ = losses(program, 2)
    saved = program.saved(state)
    assert {"params", "teacher"}.isdisjoint(saved)
    again = program.loaded(saved)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (again, state)))
    other = jax.tree.map(lambda x: x + 1, saved["frozen"]["teacher"])
    with pytest.raises(UserError, match=r"teacher=.*not the weights that the run began with"):
        program.loaded(saved | {"frozen": saved["frozen"] | {"teacher": other}})


@pytest.mark.parametrize(
    ("change", "features", "line"),
    [
        ({"vocab_size": 40}, 0.0, "has vocab_size=40 and the model 56"),
        ({"num_layers": 2}, 1.0, "has num_layers=2 and the model 3"),
        ({"max_len": 16}, 0.0, "takes sequences up to 16 and seq_len=24"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(change, features, line, tmp_path):
    config = dataclasses.replace(MODEL, **change)
    huggingface.save(tmp_path / "hf", config, jax.device_get(new_params(config, Rules(), 0)))
    with pytest.raises(UserError, match=line):
        make_program(
            MODEL, distillation=Distillation(teacher=str(tmp_path / "hf"), features=features)
        )


def test_a_teacher_with_another_tokenizer_is_one_line(folder, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class File:
        text: str = json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []})

    run = make_program(MODEL).run
    data = type("Data", (), {"seq_len": 8, "tokenizer_file": File()})()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    taught = type("Run", (), {"model": run.model, "data": data, "rules": run.rules})()
    with pytest.raises(UserError, match="has another tokenizer than the run"):
        Distillation(teacher=str(folder)).build(taught)
    (folder / "tokenizer.json").write_text(File().text)
    Distillation(teacher=str(folder)).build(taught)
    (folder / "tokenizer.json").unlink()


def test_a_teacher_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is no Hugging Face folder"):
        make_program(MODEL, distillation=Distillation(teacher=str(tmp_path)))
