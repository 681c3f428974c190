"""How fast arrays are fake-quantized, next to a jitted copy: ratios of medians of one run.

    python tests/bench/formats.py [--size 4096] [--runs 9] [--rounding even] [--format NAME]...

Both sides read a float32 matrix and write one, and alternate. "of copy" is the bandwidth of the
quantizer in terms of that of the copy, by wall time and by processor time, which other work on the
machine disturbs less.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from sparsity.numbers.formats import FORMATS, Int
from sparsity.numbers.quantization import quantize


def seconds(function, *args) -> tuple[float, float]:
    """Wall and processor time of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - wall, time.process_time() - processor


def medians(times):
    return [statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rounding", default="even")
    parser.add_argument("--format", action="append", choices=list(FORMATS), default=[])
    options = parser.parse_args()
    size, rounding = options.size, options.rounding
    x = jax.random.normal(jax.random.key(0), (size, size))
    key = jax.random.key(1) if rounding == "stochastic" else None
    copy = jax.jit(jnp.copy)
    copy(x).block_until_ready()
    formats = {name: FORMATS[name] for name in options.format or FORMATS}
    if not options.format:
        formats["int8 asymmetric, groups of 128"] = Int(symmetric=False, block=128)
        formats["int8 per tensor"] = Int(block="tensor")
    print(f"{size} x {size} float32, {rounding}, {jax.devices()[0].device_kind}")
    print(f"{'':32} axis  copy GB/s  GB/s  of copy  of copy (processor)")
    for name, format in formats.items():
        for axis in (1, 0):
            ours = jax.jit(functools.partial(quantize, format=format, axis=axis, rounding=rounding))
            ours(x, key=key).block_until_ready()
            times = [
                (*seconds(copy, x), *seconds(functools.partial(ours, key=key), x))
                for _ in range(options.runs)
            ]
            copied, copied_processor, wall, processor = medians(times)
            print(
                f"{name:32} {axis:4} {2 * x.nbytes / copied / 1e9:10.1f} "
                f"{2 * x.nbytes / wall / 1e9:5.1f} {copied / wall:8.2f} "
                f"{copied_processor / processor:12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
