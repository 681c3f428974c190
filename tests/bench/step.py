"""The training step against a bare hand-written one: ratio of medians, the two alternating.

python tests/bench/step.py [--steps 20]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import plain

from pjit_train.data import TextData
from pjit_train.optimizers import AdamW, Schedule
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh
from pjit_train.transformer import TransformerConfig


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 255, (2, plain.BATCH, plain.LENGTH)).astype(np.int32)

    program = Program(bench_run(), make_mesh(MeshShape(data=1), jax.devices()[:1]))
    batch = program.global_batch(lambda rows: {"inputs": inputs[rows], "targets": targets[rows]})
    ours, our_state = program.compile_step(batch), program.new_state()
    state, bare = plain.make_step()

    times = {"bare": [], "torsion": []}
    processor = {"bare": [], "torsion": []}
    for _ in range(steps + 2):
        began, busy = time.perf_counter(), time.process_time()
        state, loss = bare(state, inputs, targets)
        jax.block_until_ready(loss)
        times["bare"].append(time.perf_counter() - began)
        processor["bare"].append(time.process_time() - busy)
        began, busy = time.perf_counter(), time.process_time()
        our_state, metrics = ours(our_state, batch)
        jax.block_until_ready(metrics)
        times["torsion"].append(time.perf_counter() - began)
        processor["torsion"].append(time.process_time() - busy)
    medians = {name: statistics.median(t[2:]) for name, t in times.items()}
    for name, seconds in medians.items():
        tokens = plain.BATCH * plain.LENGTH / seconds
        print(
            f"{name:8} {seconds:.3f} s a step (least {min(times[name]):.3f})  {tokens:,.0f} tok/s"
        )
        print(f"         {statistics.median(processor[name][2:]):.3f} s of processor time")
    print(f"losses {float(loss):.4f} and {float(metrics['loss']):.4f}")
    print(f"torsion is {medians['bare'] / medians['torsion']:.2f} times as fast as the bare step")


if __name__ == "__main__":
    main()
