"""The dataflow model's time of a tile of rows on one core of this CPU, beside the measured one.

    python tests/bench/dataflow.py [--lengths 2048 8192] [--runs 5]

The core is described as an accelerator by a few measurements, printed first; none is of attention.
Both sides are the forward pass of 4 heads of 64, float32, no mask, a head at a time: the model's
seconds of a core, and processor time of `attend_rows` (all heights alternating, medians).
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.attention.masks import Mask
from pjit_train.attention.rows import Tiles, attend_rows
from topology.accelerator.accelerator import Accelerator, Energy, MatrixArray
from topology.accelerator.dataflow_cost import SOFTMAX_OPERATIONS
from topology.accelerator.dataflow_flat import FlatMapping, flat_cost
from topology.accelerator.workloads import Attention

HEADS, SIZE = 4, 64
_REGISTERS = 8, 32  # outputs that a matmul holds in registers (assumed): its array


def seconds(function, *args) -> float:
    """Processor time of a call: median of some, after one that compiles."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(9):
        began = time.process_time()
        jax.block_until_ready(function(*args))
        times.append(time.process_time() - began)
    return statistics.median(times)


def copied(mebibytes: float) -> float:
    """Bytes/s, read and written, of copying so much again and again."""
    x = np.ones(int(mebibytes * 2**18), np.float32)
    y, times = np.empty_like(x), int(256 // mebibytes)

    def copies():
        for _ in range(times):
            np.copyto(y, x)

    return 2 * x.nbytes * times / seconds(copies)


def core() -> Accelerator:
    """One core: its second-level cache is the buffer, what lies behind it the memory."""
    buffer = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    buffer = int(buffer.removesuffix("K")) * 2**10
    x = jnp.ones((1024, 1024))
    peak = 2 * 1024**3 / seconds(jax.jit(jnp.matmul), x, x)
    frequency = peak / 2 / (_REGISTERS[0] * _REGISTERS[1])  # of a step of all of them
    logits = jnp.ones((buffer // 4 // 4 // 1024, 1024))  # a quarter of the buffer
    rounds = 64
    softmax = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: jax.nn.softmax(x), x))
    a_second = rounds * logits.size / seconds(softmax, logits)
    steps = 4096
    loop = jax.jit(lambda x: jax.lax.map(lambda x: jnp.sum(x * x), x))
    return Accelerator(
        name="core",
        array=MatrixArray(rows=_REGISTERS[0], columns=_REGISTERS[1]),
        vector_lanes=max(1, round(SOFTMAX_OPERATIONS * a_second / frequency)),
        buffer=buffer,
        on_chip_bandwidth=copied(buffer / 4 / 2**20),
        off_chip_bandwidth=copied(8),
        frequency=frequency,
        energy=Energy(mac=0, vector_operation=0, on_chip_byte=0, off_chip_byte=0),
        tile_seconds=seconds(loop, jnp.ones((steps, 16))) / steps,
        sources={},
    )


def predicted(machine: Accelerator, length: int, rows: int):
    """The cost with the best choice of what is kept on chip; matmuls and softmax in turn."""
    work = Attention(batch=1, heads=HEADS, rows=length, head_dim=SIZE, bytes_per_element=4)
    kept = ["".join(x) for n in range(5) for x in itertools.combinations("QKVO", n)]
    mappings = [FlatMapping(granularity="R", rows=rows, kept=names + "L") for names in kept]
    costs = [flat_cost(machine, work, mapping, softmax="in-turn") for mapping in mappings]
    return min(costs, key=lambda cost: cost.seconds)


def measured(length: int, heights: list[int], runs: int) -> list[float]:
    """Processor time of each height."""
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, (1, length, HEADS, SIZE)) for key in keys]
    mask, calls = Mask(False, None, 0, False), []
    for rows in heights:
        tiles = Tiles(rows, rows * length, 128, 2**17)
        calls.append(jax.jit(lambda *x, tiles=tiles: attend_rows(*x, None, 0, mask, tiles)))
        jax.block_until_ready(calls[-1](*qkv))
    times = [[] for _ in heights]
    for _ in range(runs):
        for call, some in zip(calls, times, strict=True):
            began = time.process_time()
            jax.block_until_ready(call(*qkv))
            some.append(time.process_time() - began)
    return list(map(statistics.median, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    machine = core()
    print(
        f"one core: {machine.frequency * 2 * machine.array.elements / 1e9:.0f} GFLOP/s, "
        f"softmax {machine.vector_lanes * machine.frequency / SOFTMAX_OPERATIONS / 1e9:.2f} G "
        f"logits/s, buffer {machine.buffer / 2**20:g} MiB at {machine.on_chip_bandwidth / 1e9:.0f} "
        f"GB/s, behind it {machine.off_chip_bandwidth / 1e9:.0f} GB/s, a tile "
        f"{machine.tile_seconds * 1e6:.2f} us"
    )
    for length in options.lengths:
        heights = [2**i for i in range(3, 12) if 2**i <= length]
        costs = [predicted(machine, length, rows) for rows in heights]
        times = measured(length, heights, options.runs)
        best = min(cost.seconds for cost in costs), min(times)
        print(f"\nlength {length}: milliseconds, and how many times those of the fastest")
        print("| rows | live buffer, KiB | predicted | | measured | | measured / predicted |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for rows, cost, taken in zip(heights, costs, times, strict=True):
            print(
                f"| {rows} | {cost.live_buffer / 2**10:,.0f} | {1e3 * cost.seconds:.1f} | "
                f"{cost.seconds / best[0]:.2f} | {1e3 * taken:.1f} | {taken / best[1]:.2f} | "
                f"{taken / cost.seconds:.2f} |",
                flush=True,
            )
        lower = 4 * length**2 * SIZE * HEADS / (machine.frequency * 2 * machine.array.elements)
        print(f"matmuls alone: {1e3 * lower:.1f} ms")


if __name__ == "__main__":
    main()
