"""Quantized training against dense: time and memory of a step.

    python tests/bench/quantized_step.py [--steps 10] [--recipes mxfp8_2_4 ...]

The model of configs/quickstart.gin with each recipe of configs/recipes, and dense; a step of each
in turn, so that whatever else the machine does slows both. Ratios of medians, of the processor's
time and of the clock's. Memory: what XLA says of the compiled steps.
"""

import argparse
import os
import statistics

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from recipes import Side, memory

from launch import process
from launch.configure import build_run
from pjit_train.program import Program
from pjit_train.sharding import MeshShape, make_mesh

RECIPES = ("mxfp8_2_4", "mxfp8", "int8_2_4", "hbfp6_1_4", "nvfp4")


def make_side(recipe: str | None, bindings: list[str]) -> Side:
    files = ["configs/quickstart.gin"] + ([f"configs/recipes/{recipe}.gin"] if recipe else [])
    run, _ = build_run(files, bindings)
    return Side(Program(run, make_mesh(MeshShape(data=1), jax.devices()[:1])))


def compare(dense: Side, recipe: str, steps: int, bindings: list[str]) -> None:
    side = make_side(recipe, bindings)
    sides = (side, dense)
    first = {id(s): len(s.seconds) for s in sides}
    for _ in range(steps + 1):
        for s in sides:
            s.run()

    def ratio(times):
        return statistics.median(times(side)) / statistics.median(times(dense))

    processor = ratio(lambda s: s.processor[first[id(s)] + 1 :])  # the first warms up
    clock = ratio(lambda s: s.seconds[first[id(s)] + 1 :])
    size = memory(side.step) / memory(dense.step)
    seconds = statistics.median(dense.processor)
    print(
        f"{recipe:12} processor {processor:.3f}  clock {clock:.3f}  memory {size:.3f}  "
        f"(dense: {seconds:.2f} s of the processor)",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--gin", action="append", default=[], help="binding of the quantized run")
    args = parser.parse_args()
    process.prepare()
    dense = make_side(None, [])
    for recipe in args.recipes:
        compare(dense, recipe, args.steps, args.gin)


if __name__ == "__main__":
    main()
