"""A step with adapters, and one with a teacher, against the full step, in processor time.

Ratios of medians, all alternating in one process.

    python tests/bench/adapters.py [--steps 9] [--shape smollm2]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from pjit_train.adapters import Lora
from pjit_train.data.text import TextData
from pjit_train.distillation import Distillation
from pjit_train.models.transformer import TransformerConfig
from pjit_train.optimizers import AdamW
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import MeshShape, make_mesh

CASES = {
    "full": {},
    "lora": {"adapters": Lora()},
    "lora, zeros kept": {"adapters": Lora(keep_zeros=True)},
    "full with a teacher": {"distillation": Distillation()},
}


SHAPES = {
    "small": {"vocab_size": 256, "d_model": 256, "num_layers": 4, "num_heads": 4, "d_ff": 1024},
    # Four of its thirty layers, and the whole vocabulary.
    "smollm2": {
        "vocab_size": 49152,
        "d_model": 576,
        "num_layers": 4,
        "num_heads": 9,
        "num_kv_heads": 3,
        "d_ff": 1536,
    },
}


def bench_run(shape: str, **options) -> Run:
    return Run(
        model=TransformerConfig(max_len=256, **SHAPES[shape]),
        data=TextData(seq_len=256, batch_size=8),
        optimizer=AdamW(learning_rate=1e-3),
        steps=1000,
        mesh=MeshShape(data=1),
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    args = parser.parse_args()
    steps = args.steps
    tokens = np.random.default_rng(0).integers(0, 256, (8, 257)).astype(np.int32)
    states, compiled, times, batches = {}, {}, {name: [] for name in CASES}, {}
    for name, options in CASES.items():
        run = bench_run(args.shape, **options)
        program = Program(run, make_mesh(run.mesh))
        batches[name] = program.global_batch(
            lambda rows: {"inputs": tokens[rows, :-1], "targets": tokens[rows, 1:]}
        )
        states[name], compiled[name] = program.new_state(), program.compile_step(batches[name])
        if name == "full":
            params = states[name]["params"]
            count = sum(x.size for x in jax.tree.leaves(params))
    for _ in range(steps + 1):
        for name in CASES:
            began = time.process_time()
            states[name], _ = compiled[name](states[name], batches[name])
            jax.block_until_ready(states[name])
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(x[1:]) for name, x in times.items()}
    print(f"{count:,} parameters, 2,048 tokens a step")
    for name, seconds in medians.items():
        print(f"{name:22} {seconds:7.3f} s  {seconds / medians['full']:.2f} of the full step")


if __name__ == "__main__":
    main()
