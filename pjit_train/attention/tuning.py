"""Tiles of row-tiled attention, measured on this machine's CPU and kept for the next run.

The default tiles are always one side of the measurement, and stay unless others are clearly faster:
what is chosen is never slower, as far as a clock can tell. A choice is part of the program's
numbers (sums in another order), so it is only made where it is asked for.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.attention.masks import Mask
from pjit_train.attention.rows import Tiles, attend_rows
from pjit_train.data.cache import default_cache_dir
from pjit_train.files import replacing

_RUNS = 5  # of each side
_CLEARLY = 0.95  # of the default's time, or the default stays


@functools.cache
def fastest_tiles(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype, mask: Mask, default: Tiles
) -> Tiles:
    """The fastest tiles for a forward and backward pass of these shapes, [B, T, H, D] each.

    Measured once on a machine: the result is in `default_cache_dir()` from then on (where that
    cannot be written, it holds for this process). Several processes that share a run take the
    default, since each would find its own.
    """
    if jax.process_count() > 1:
        return default
    key = {
        "machine": [_processor(), os.cpu_count(), jax.__version__],
        "shapes": [*q_shape, *k_shape, str(jnp.dtype(dtype))],
        "mask": dataclasses.asdict(mask),
        "default": dataclasses.asdict(default),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = default_cache_dir() / f"attention-tiles-{digest}.json"
    try:
        return Tiles(**json.loads(path.read_text())["tiles"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or unreadable: measure
    # Another thread is outside of the trace and of the mesh that ask for the tiles.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        tiles = thread.submit(_measure, q_shape, k_shape, dtype, mask, default).result()
    _keep(path, key | {"tiles": dataclasses.asdict(tiles)})
    return tiles


def candidates(default: Tiles) -> list[Tiles]:
    """The default, and others that were fastest for some shape on some machine."""
    some = [default]
    some += [dataclasses.replace(default, rows=r) for r in (64, 256)]
    some += [dataclasses.replace(default, block=b) for b in (128, 256, 512)]
    for logits in (default.logits * 2, default.logits * 4):
        block_logits = default.block_logits * logits // default.logits
        some.append(dataclasses.replace(default, logits=logits, block_logits=block_logits))
    return list(dict.fromkeys(some))


def _measure(q_shape, k_shape, dtype, mask: Mask, default: Tiles) -> Tiles:
    rng = np.random.default_rng(0)
    random = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    q, k, v, d_out = map(random, (q_shape, k_shape, k_shape, q_shape))
    segments = None
    if mask.segmented:
        segments = jnp.zeros(q_shape[:2], jnp.int32), jnp.zeros(k_shape[:2], jnp.int32)
    offset = mask.offset or 0

    def run(tiles):
        @jax.jit
        def both(q, k, v, d_out):
            attend = lambda *a: attend_rows(*a, segments, offset, mask, tiles)
            out, pull_back = jax.vjp(attend, q, k, v)
            return out, pull_back(d_out)

        jax.block_until_ready(both(q, k, v, d_out))  # compiles
        return lambda: jax.block_until_ready(both(q, k, v, d_out))

    runs = {tiles: run(tiles) for tiles in candidates(default)}
    times: dict[Any, list[float]] = {tiles: [] for tiles in runs}
    for _ in range(_RUNS):
        for tiles, function in runs.items():
            times[tiles].append(_seconds(function))
    medians = {tiles: statistics.median(t) for tiles, t in times.items()}
    best = min(medians, key=medians.get)
    return best if medians[best] < _CLEARLY * medians[default] else default


def _seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _processor() -> str:
    """The processor's name, as exactly as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _keep(path: Path, document: dict) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(json.dumps(document, indent=1))
