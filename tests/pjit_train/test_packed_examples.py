"""Examples side by side in a row are as if each were alone, in every model, attention and mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import GPT2, LLAMA, B, T, V, make_program

from pjit_train.data.cache import TokenSplit
from pjit_train.data.packing import PackedExamples

pytestmark = pytest.mark.usefixtures("quick_compiles")
WINDOW = dataclasses.replace(LLAMA, window=5, local_layers=(True, False), num_layers=2)


def split_of(sizes, seed=0):
    """Random examples of these sizes, most of their tokens answers."""
    rng = np.random.default_rng(seed)
    answers = rng.random(sum(sizes)) < 0.7
    ends = np.cumsum(sizes)
    answers[ends - 1] = True
    return TokenSplit(
        tokens=rng.integers(1, V, sum(sizes)).astype(np.uint8),
        starts=(ends - sizes).astype(np.int64),
        text_bytes=0,
        sha256="",
        largest=V - 1,
        answers=answers,
        num_answers=int(answers.sum()),
    )


SIZES = np.array([9, 25, 4, 11, 2, 13, 8, 3, 7, 6, 5, 24, 10, 12])


def batch_of(rows):
    """Rows as a batch of B, empty ones after them."""
    nothing = {name: np.zeros_like(x) for name, x in rows[0].items()}
    rows = [*rows, *[nothing] * (B - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def loss_and_gradients(program, batch, on_mesh=True):
    """The sum of the losses of answers, and its gradients; on the program's mesh or on none."""

    def loss(params, batch):
        return program.run.task.loss(nnx.merge(program.graph, params), batch)[0]

    params, value = program.new_state()["params"], jax.jit(jax.value_and_grad(loss))
    if not on_mesh:
        return jax.device_get(value(jax.device_get(params), batch))
    with jax.set_mesh(program.mesh):
        arrays = program.global_batch(lambda rows: {n: x[rows] for n, x in batch.items()})
        return jax.device_get(value(params, arrays))


def compare(model, mesh=None, **options):
    packed = PackedExamples(split=split_of(SIZES), seq_len=T)
    rows = [packed[i] for i in range(len(packed))]
    assert len(rows) <= B < len(SIZES)
    assert max(row["segments"].max() for row in rows) > 2
    program = make_program(model, mesh, **options)
    loss, grads = loss_and_gradients(program, batch_of(rows), mesh is not None)

    # Each alone from the first place on, in rows of its own; no segments, no positions.
    alone = []
    for start, size in zip(np.cumsum(SIZES) - SIZES, SIZES, strict=True):
        tokens = packed.split.tokens[start : start + size].astype(np.int32)
        row = {name: np.zeros(T, np.int32) for name in ("inputs", "targets")}
        row["weights"] = np.zeros(T, np.float32)
        row["inputs"][: size - 1], row["targets"][: size - 1] = tokens[:-1], tokens[1:]
        row["weights"][: size - 1] = packed.split.answers[start + 1 : start + size]
        alone.append(row)
    single = make_program(dataclasses.replace(model, attention="rows"))
    batches = (batch_of(alone[i : i + B]) for i in range(0, len(alone), B))
    parts = [loss_and_gradients(single, batch) for batch in batches]
    want = sum(part[0] for part in parts)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    sums = jax.tree.map(lambda *x: sum(x), *(part[1] for part in parts))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(sums))
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(sums), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("way", ["rows", "flat"])
@pytest.mark.parametrize("model", [LLAMA, GPT2, WINDOW], ids=["rotary", "learned", "window"])
def test_packed_examples_have_the_loss_of_each_alone(model, way):
    compare(dataclasses.replace(model, attention=way))


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2}, {"sequence": 4}], ids=str
)
@pytest.mark.parametrize("sequence", ["gather", "ring"])
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["rotary", "learned"])
def test_on_any_mesh(model, mesh, sequence):
    compare(dataclasses.replace(model, attention_sequence=sequence), mesh)


def test_a_step_weighs_answers_alone_whatever_the_parts():
    """The mean over answers, in one part and in four, whose numbers of answers differ."""
    packed = PackedExamples(split=split_of(SIZES), seq_len=T)
    batch = batch_of([packed[i] for i in range(len(packed))])
    losses = []
    for accumulate in (1, 4):
        program = make_program(LLAMA, accumulate=accumulate)
        arrays = program.global_batch(lambda rows: {n: x[rows] for n, x in batch.items()})
        _, metrics = program.compile_step(arrays)(program.new_state(), arrays)
        losses.append(float(metrics["loss"]))
    total, _ = loss_and_gradients(make_program(LLAMA), batch)
    np.testing.assert_allclose(losses, total / batch["weights"].sum(), rtol=1e-6)
