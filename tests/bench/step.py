"""The training step against a bare hand-written one, and against itself with plain attention.

Ratios of medians, all three alternating in one run.

    python tests/bench/step.py [--steps 20]
"""

import argparse
import os
import statistics
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import plain

from pjit_train.data import TextData
from pjit_train.models import blocks
from pjit_train.models.transformer import TransformerConfig
from pjit_train.optimizers import AdamW, Schedule
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh


def bench_run(**model) -> Run:
    """The run that trains the model of `plain`."""
    return Run(
        model=TransformerConfig(
            vocab_size=plain.VOCAB,
            max_len=plain.LENGTH,
            d_model=plain.WIDTH,
            num_layers=plain.LAYERS,
            num_heads=plain.HEADS,
            d_ff=4 * plain.WIDTH,
            norm="layernorm",
            positions="learned",
            activation="gelu_tanh",
            use_bias=True,
            tie_head=True,
            scale_residual_init=True,
            **{"layers": "unroll", **model},
        ),
        data=TextData(seq_len=plain.LENGTH, batch_size=plain.BATCH),
        optimizer=AdamW(learning_rate=1e-3, schedule=Schedule(shape="constant", warmup_steps=0)),
        steps=1000,
        mesh=MeshShape(data=1),
    )


def plain_attention(q, k, v, *, causal, segments, **ways):
    """All logits at once, in place of `pjit_train.attention.attention` in the model's blocks."""
    assert (causal, segments, q.shape) == (True, None, k.shape)
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def trainer(inputs, targets, attention):
    """The trainer's step with this attention: a function that makes a step and gives its loss."""
    with mock.patch.object(blocks, "attention", attention):
        program = Program(bench_run(), make_mesh(MeshShape(data=1), jax.devices()[:1]))
        batch = program.global_batch(
            lambda rows: {"inputs": inputs[rows], "targets": targets[rows]}
        )
        compiled, state = program.compile_step(batch), program.new_state()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        return jax.block_until_ready(metrics)["loss"]

    return step


def bare(inputs, targets):
    """The same of `plain`."""
    state, compiled = plain.make_step()

    def step():
        nonlocal state
        state, loss = compiled(state, inputs, targets)
        return jax.block_until_ready(loss)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 255, (2, plain.BATCH, plain.LENGTH)).astype(np.int32)
    sides = {
        "bare": bare(*batch),
        "plain attention": trainer(*batch, plain_attention),
        "torsion": trainer(*batch, blocks.attention),
    }
    losses = {}
    wall, processor = ({name: [] for name in sides} for _ in range(2))
    for _ in range(steps + 2):
        for name, step in sides.items():
            began, busy = time.perf_counter(), time.process_time()
            loss = step()
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - busy)
            losses[name] = float(loss)
    medians = {name: statistics.median(t[2:]) for name, t in wall.items()}
    busy = {name: statistics.median(t[2:]) for name, t in processor.items()}
    print("losses", *(f"{loss:.4f}" for loss in losses.values()))
    for name, seconds in medians.items():
        tokens = plain.BATCH * plain.LENGTH / seconds
        print(
            f"{name:15} {seconds:.3f} s a step (least {min(wall[name]):.3f})  {tokens:,.0f} tok/s, "
            f"{busy[name]:.3f} s of processor time"
        )
    for name in ("bare", "plain attention"):
        print(
            f"torsion is {medians[name] / medians['torsion']:.2f} times as fast as {name}, "
            f"{busy[name] / busy['torsion']:.2f} by processor time"
        )


if __name__ == "__main__":
    main()
