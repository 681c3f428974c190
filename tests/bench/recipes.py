"""Sparse training against dense: time and memory of a step, and bytes a weight of a packed run.

    python tests/bench/recipes.py [--steps 20] [--recipes sr_ste ...] [--patterns 2:4 ...]

Time: the model of configs/quickstart.gin with each recipe of configs/recipes, a dense step and a
sparse one in turn over a whole run of so many steps; ratios of medians in each phase of the recipe.
In the decay phase of most recipes the masks are made anew in every step. Memory: what XLA says of
the compiled steps. The bytes a weight are those of a model of little else than kernels.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from launch import process
from launch.configure import build_run
from pjit_train.program import Program
from pjit_train.sharding import MeshShape, make_mesh
from pjit_train.study import RECIPES

PHASES = ("dense", "decay", "fine-tuning")
KERNELS = "(attention|feed_forward)/.*kernel"
WIDE = {  # next to nothing but kernels: 24 layers of 0.8 million weights, 16 tokens
    "transformer.TransformerConfig.d_model": 256,
    "transformer.TransformerConfig.d_ff": 704,
    "transformer.TransformerConfig.num_heads": 8,
    "transformer.TransformerConfig.num_layers": 24,
    "transformer.TransformerConfig.layers": "scan",
    "text.TextData.batch_size": 1,
    "text.TextData.seq_len": 16,
}


def make_program(recipe: str | None, pattern: str, bindings: dict) -> Program:
    """A run of the quickstart's model, with a recipe at a pattern."""
    files = ["configs/quickstart.gin"]
    if recipe is not None:
        files.append(f"configs/recipes/{recipe}.gin")
        bindings = bindings | {"recipes.Recipe.layers": {KERNELS: pattern}}
    imported = "from sparsity.recipes import recipes\n"
    run, _ = build_run(files, [f"{imported}{name} = {value!r}" for name, value in bindings.items()])
    return Program(run, make_mesh(MeshShape(data=1), jax.devices()[:1]))


def make_batch(program: Program):
    data = program.run.data
    shape = (2, data.batch_size, data.seq_len)
    inputs, targets = np.random.default_rng(0).integers(0, 255, shape, np.int32)
    return program.global_batch(lambda rows: {"inputs": inputs[rows], "targets": targets[rows]})


def memory(compiled) -> int:
    """Bytes of a compiled step: its arguments, and what it makes beside them."""
    m = compiled.memory_analysis()
    sizes = m.argument_size_in_bytes, m.temp_size_in_bytes, m.output_size_in_bytes
    return sum(sizes) - m.alias_size_in_bytes


class Side:
    """One of the two that are compared: its state, and the times of its steps."""

    def __init__(self, program: Program):
        self.program, self.batch = program, make_batch(program)
        self.step, self.state = program.compile_step(self.batch), program.new_state()
        self.seconds, self.processor = [], []

    def run(self) -> None:
        began, busy = time.perf_counter(), time.process_time()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - began)
        self.processor.append(time.process_time() - busy)

    def phase(self) -> int:
        return int(self.program.updater.settings(self.state["sparsity"])["phase"])


def compare(recipe: str, pattern: str, steps: int) -> None:
    bindings = {"run.Run.steps": steps}
    dense = Side(make_program(None, pattern, bindings))
    sparse = Side(make_program(recipe, pattern, bindings))
    phases = []
    for _ in range(steps):
        phases.append(PHASES[sparse.phase()])
        dense.run()
        sparse.run()
    ratio = memory(sparse.step) / memory(dense.step)
    print(f"{recipe:17} {pattern:5} memory {ratio:.3f}", end="")
    for phase in PHASES:
        places = [i for i, p in enumerate(phases) if p == phase and i > 0]  # the first warms up
        if len(places) >= 3:
            medians = [
                statistics.median(times[i] for i in places)
                for side in (sparse, dense)
                for times in (side.seconds, side.processor)
            ]
            print(
                f"  {phase} {medians[0] / medians[2]:.3f} ({medians[1] / medians[3]:.3f} of the "
                f"processor's {medians[3]:.2f} s)",
                end="",
            )
    print(flush=True)


def packed_bytes() -> None:
    """Bytes a kernel weight, of the weight, its gradient and both moments, for AdamW in float32."""
    for pattern in (None, "2:4", "1:8"):
        bindings = WIDE | {"run.Run.steps": 20}
        if pattern is not None:
            bindings |= {"recipes.Recipe.packed": True}
        program = make_program(pattern and "mdgf_linear", pattern or "", bindings)
        kernels = sum(
            x.size
            for path, x in jax.tree.leaves_with_path(program.abstract_state_after(0)["params"])
            if path[0].key == "blocks" and path[-1].key == "kernel"
        )
        others = sum(x.size for x in jax.tree.leaves(program.abstract_state["params"])) - kernels
        step = program.compile_step(make_batch(program), 20)
        m = step.memory_analysis()
        arguments = m.argument_size_in_bytes - 12 * others
        total = memory(step) - 16 * others
        print(
            f"{pattern or 'dense':6} {total / kernels:6.2f} bytes a weight ("
            f"{arguments / kernels:.2f} of them held between steps), {kernels:,} weights",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    args = parser.parse_args()
    process.prepare()
    packed_bytes()
    for recipe in args.recipes:
        for pattern in args.patterns:
            compare(recipe, pattern, args.steps)


if __name__ == "__main__":
    main()
