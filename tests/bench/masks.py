"""How long masks take, next to sorting: ratios of medians of one run, the two sides alternating.

    python tests/bench/masks.py [--size 4096] [--runs 5]

The other side is a jitted double argsort: the rank of every score in its group, or in the array.
Wall time is given and processor time, which other work on the machine disturbs less.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from sparsity.masks.bits import pack_bits
from sparsity.masks.nm import nm_mask, transposable_mask
from sparsity.masks.topk import topk_mask


def sorted_nm(scores, n, m, axis):
    groups = scores.reshape(*scores.shape[:axis], -1, m, *scores.shape[axis + 1 :])
    ranks = jnp.argsort(jnp.argsort(groups, axis=axis + 1), axis=axis + 1)
    return (ranks >= m - n).reshape(scores.shape)


def sorted_topk(scores, keep):
    ranks = jnp.argsort(jnp.argsort(scores.ravel()))
    return (ranks >= scores.size - keep).reshape(scores.shape)


def seconds(function, *args) -> tuple[float, float]:
    """Wall and processor time of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - wall, time.process_time() - processor


def compare(name, ours, sort, *args, runs) -> None:
    ours, sort = jax.jit(ours), jax.jit(sort)
    began = time.perf_counter()
    mask = ours(*args).block_until_ready()
    compiled = time.perf_counter() - began
    assert (mask == sort(*args)).all()  # of these scores no two are equal within a group
    # Many masks to one sort, which takes as long.
    times = [
        (median([seconds(ours, *args) for _ in range(5)]), seconds(sort, *args))
        for _ in range(runs)
    ]
    (wall, processor), (sort_wall, sort_processor) = map(median, zip(*times, strict=True))
    print(
        f"{name:26} {1e3 * wall:8.1f} {1e3 * processor:8.1f} {1e3 * sort_wall:9.0f} "
        f"{1e3 * sort_processor:9.0f} {sort_wall / wall:7.0f} {sort_processor / processor:7.0f} "
        f"{compiled:8.1f}",
        flush=True,
    )


def median(pairs):
    return tuple(map(statistics.median, zip(*pairs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    size, runs = options.size, options.runs
    # Distinct float32 in a random order: what a double argsort ranks as a mask does.
    order = jax.random.permutation(jax.random.key(0), size * size)
    scores = (order.astype(jnp.float32) / (size * size) - 0.5).reshape(size, size)
    print(
        f"{size} x {size} float32, {jax.devices()[0].device_kind}; milliseconds, ratios to sorting"
    )
    print(
        f"{'':26} {'wall':>8} {'cpu':>8} {'sort wall':>9} {'sort cpu':>9} {'x wall':>7} "
        f"{'x cpu':>7} {'compile':>8}"
    )
    for n, m in [(2, 4), (1, 8), (4, 32), (16, 128)]:
        for axis in (1, 0):
            compare(
                f"{n}:{m} along axis {axis}",
                lambda s, n=n, m=m, axis=axis: nm_mask(s, n, m, axis=axis),
                lambda s, n=n, m=m, axis=axis: sorted_nm(s, n, m, axis),
                scores,
                runs=runs,
            )
    for density in (0.1, 0.5):
        keep = round(scores.size * density)
        compare(
            f"unstructured, {density:.0%} kept",
            lambda s, keep: topk_mask(s, keep),
            lambda s, keep: sorted_topk(s, keep),
            scores,
            keep,
            runs=max(1, runs // 2),
        )
    alone = {
        "16:128, n traced": (lambda s, n: nm_mask(s, n, 128, axis=0), scores, jnp.int32(16)),
        "unstructured, all equal": (topk_mask, jnp.zeros_like(scores), scores.size // 2),
        "2:4 along both axes": (transposable_mask, scores),
        "2:4 to bits": (lambda s: pack_bits(nm_mask(s, 2, 4, axis=0), axis=0), scores),
    }
    for name, (function, *args) in alone.items():
        function = jax.jit(function)
        began = time.perf_counter()
        function(*args).block_until_ready()
        compiled = time.perf_counter() - began
        wall, processor = median([seconds(function, *args) for _ in range(runs)])
        print(
            f"{name:26} {1e3 * wall:8.1f} {1e3 * processor:8.1f} {'':37} {compiled:6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
