"""Attention against plain attention and jax.nn's: ratios of medians, all alternating in one run.

    python tests/bench/attention.py [--lengths 256 2048 8192 16384] [--runs 3] [--quickstart]

4 heads of 64, batch 1, float32, with and without a causal mask (--quickstart: 16 sequences of 256,
6 heads of 32 instead). Processor time is given too, which other work on the machine disturbs less.
Lengths over 8,192 are measured forward only: there plain attention's gradient would not fit. From
8,192 on memory is given, what a process of its own gains in peak resident size over its size before
the call, since XLA's analysis misses the buffers of fused attention. All of it takes under ten
minutes on a quiet machine of two cores.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from pjit_train.attention import attention

_MOST_BACKWARD = 8192  # tokens of which attention is differentiated
_LEAST_MEMORY = 8192  # tokens of which it is asked how much memory they take


def plain(q, k, v, *, causal):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen, logits, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def jax_nn(q, k, v, *, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


SIDES = {"plain": plain, "jax.nn": jax_nn, "torsion": attention}


def call(side: str, causal: bool, backward: bool):
    attend = functools.partial(SIDES[side], causal=causal)
    if not backward:
        return jax.jit(lambda q, k, v, d_out: attend(q, k, v))

    @jax.jit
    def both(q, k, v, d_out):
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(d_out)

    return both


def inputs(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape) for key in keys]


def measure(shape, causal: bool, backward: bool, runs: int) -> None:
    args, calls = inputs(shape), {s: call(s, causal, backward) for s in SIDES}
    for function in calls.values():
        jax.block_until_ready(function(*args))
    times = {s: ([], []) for s in SIDES}
    for _ in range(runs):
        for side, function in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*args))
            times[side][0].append(time.perf_counter() - wall)
            times[side][1].append(time.process_time() - processor)
    medians = {s: tuple(map(statistics.median, t)) for s, t in times.items()}
    ours = medians["torsion"]
    for side in SIDES:
        wall, processor = medians[side]
        ratios = f"{wall / ours[0]:6.2f} {processor / ours[1]:6.2f}" if side != "torsion" else ""
        gained = ""
        if shape[1] >= _LEAST_MEMORY:
            gained = f"{memory(side, shape, causal, backward):.1f}"
        print(
            f"{shape[1]:6} {'causal' if causal else 'full':6} {'both' if backward else 'fwd':4} "
            f"{side:8} {1e3 * wall:9.1f} {1e3 * processor:9.1f} {gained:>9}  {ratios}",
            flush=True,
        )


def memory(side, shape, causal, backward) -> float:
    """MiB that a first call of the compiled function adds to a process."""
    command = [sys.executable, __file__, "--memory", json.dumps([side, shape, causal, backward])]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(side, shape, causal, backward) -> None:
    args = jax.block_until_ready(inputs(shape))
    compiled = call(side, causal, backward).lower(*args).compile()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that compiling had
    jax.block_until_ready(compiled(*args))
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 2**10 for x in lines if x.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048, 8192, 16384])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return print_memory(*json.loads(options.memory))
    shapes = [(1, n, 4, 64) for n in options.lengths]
    if options.quickstart:
        shapes = [(16, 256, 6, 32)]
    print(f"{'':27}{'wall ms':>9} {'cpu ms':>9} {'MiB':>9}  {'x wall':>6} {'x cpu':>6}")
    for shape in shapes:
        for causal in (False, True):
            for backward in (False, True)[: 1 + (shape[1] <= _MOST_BACKWARD)]:
                # Short calls are repeated more often: the machine's other work comes in bursts.
                measure(shape, causal, backward, options.runs * max(1, 4096 // shape[1]))


if __name__ == "__main__":
    main()
