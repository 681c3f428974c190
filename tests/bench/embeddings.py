"""Lookup with update of an embedding table, next to plain JAX and torch: ratios of medians.

    python tests/bench/embeddings.py [--rows 4000000] [--width 64] [--batch 4096] [--runs 5]
        [--devices 1]

The plain side is `jnp.take`, its gradient and a dense Adagrad; torch, where it is installed, has
`EmbeddingBag(sparse=True)` with its Adagrad. All look up `batch` bags of 20 ids, Zipf 1.05, sum
them, and update with one same gradient; the sides alternate. With several (emulated) devices the
bytes that a step sends are counted, beside the least that the batch allows and what plain XLA sends
(from its compiled program).
"""

import argparse
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pjit_train.data.click_sources import zipf
from pjit_train.embeddings.collection import Embeddings
from pjit_train.embeddings.row_optimizers import Adagrad
from pjit_train.embeddings.tables import Bags, Feature, Table


def parse():
    parser = argparse.ArgumentParser()
    sizes = dict(rows=4_000_000, width=64, batch=4096, hotness=20, runs=5, devices=1)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


OPTIONS = parse()
# Before the first use of a device; imports use none.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", OPTIONS.devices)

RATE, EPSILON = 0.01, 1e-10


def plain_step(state, ids, gradients):
    table, squares = state
    take = lambda table: jnp.take(table, ids, axis=0).sum(axis=1)
    found, backward = jax.vjp(take, table)
    (dense,) = backward(gradients)
    squares = squares + dense * dense
    return (table - RATE * dense / (jnp.sqrt(squares) + EPSILON), squares), found


def torch_side(ids, gradients):
    """A function that makes a step of torch; None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    bag = torch.nn.EmbeddingBag(OPTIONS.rows, OPTIONS.width, mode="sum", sparse=True)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=RATE, initial_accumulator_value=0.1)
    ids, gradients = torch.tensor(ids, dtype=torch.int64), torch.tensor(gradients)

    def step():
        optimizer.zero_grad(set_to_none=True)
        bag(ids).backward(gradients)
        optimizer.step()

    return step


def seconds(step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main():
    n, options = OPTIONS.devices, OPTIONS
    rng = np.random.default_rng(0)
    ids = zipf(rng.random((options.batch, options.hotness)), options.rows, 1.05)
    gradients = rng.standard_normal((options.batch, options.width)).astype(np.float32)
    mesh = jax.make_mesh((n,), ("data",), (AxisType.Explicit,)) if n > 1 else None
    optimizer = Adagrad(learning_rate=RATE, epsilon=EPSILON)
    table = Table(name="t", rows=options.rows, width=options.width, optimizer=optimizer)
    feature = Feature(name="f", table=table, hotness=options.hotness)
    embeddings = Embeddings([feature], mesh, axes=("data",) if mesh else ())

    def step(state, ids, gradients):
        found, routing = embeddings.lookup(state, {"f": Bags(ids)})
        # By what was found, as in training: the lookup is before the update.
        given = gradients + 0 * found["f"]
        return embeddings.update(state, routing, {"f": given}, 1), found["f"], routing

    placed = jax.device_put((ids, gradients))
    if mesh:
        placed = jax.device_put(placed, NamedSharding(mesh, PartitionSpec("data")))
    ours, plain = jax.jit(step, donate_argnums=0), jax.jit(plain_step, donate_argnums=0)
    state = embeddings.init()
    start = (
        embeddings.rows(embeddings.saved(state), "t", np.arange(options.rows)) if n > 1 else None
    )
    if n > 1:
        count_bytes(embeddings, ours, state, placed, ids, start)
        return
    dense = jnp.zeros((options.rows, options.width)), jnp.full((options.rows, options.width), 0.1)

    def run_ours():
        nonlocal state
        state, found, _ = ours(state, *placed)
        jax.block_until_ready((state, found))

    def run_plain():
        nonlocal dense
        dense, found = plain(dense, *placed)
        jax.block_until_ready((dense, found))

    sides = {"ours": run_ours, "plain": run_plain, "torch": torch_side(ids, gradients)}
    sides = {name: side for name, side in sides.items() if side is not None}
    for side in sides.values():
        side()
    times = [{name: seconds(side) for name, side in sides.items()} for _ in range(options.runs)]
    medians = {name: statistics.median(t[name] for t in times) for name in sides}
    for name, median in medians.items():
        ratio = median / medians["ours"]
        print(f"{name:6} {1e3 * median:9.1f} ms a step, {ratio:6.2f} times ours")


def count_bytes(embeddings, ours, state, placed, ids, start):
    """Prints what a step sends between devices, and what a batch needs at least."""
    n, width = OPTIONS.devices, OPTIONS.width
    _, found, routing = ours(state, *placed)
    np.testing.assert_allclose(np.asarray(found), start[ids].sum(axis=1), atol=1e-3)
    key = np.asarray(routing.units["t"].key).reshape(n, -1)
    [stack] = embeddings.stacks
    owners = [k[k < n * stack.slots] // stack.slots for k in key]
    sent = sum((of != device).sum() for device, of in enumerate(owners))
    each = 4 + 2 * 4 * width  # the id, its row, its gradient
    positions = embeddings.tables["t"].bijection(ids).reshape(n, -1)
    block = embeddings.tables["t"].positions // n
    least = sum((np.unique(p) // block != device).sum() for device, p in enumerate(positions))
    capacity = routing.asked["t"].shape[-1]
    plain = jax.jit(plain_step)
    auto = jax.make_mesh((n,), ("data",), (AxisType.Auto,))
    split = NamedSharding(auto, PartitionSpec("data"))
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in placed]
    shape = jax.ShapeDtypeStruct((OPTIONS.rows, width), jnp.float32, sharding=split)
    text = plain.lower((shape, shape), *args).compile().as_text()
    print(f"{n} devices, bytes of all devices in a step:")
    print(f"  least for this batch (ids, rows, gradients)  {least * each:14,}")
    print(f"  ours, units                                  {sent * each:14,}")
    print(f"  ours, buffers with what is unused            {n * (n - 1) * capacity * each:14,}")
    print(f"  plain XLA                                    {n * collective_bytes(text, n):14,}")


def collective_bytes(text: str, n: int) -> int:
    """Bytes that a device sends in the collectives of a program, by ring algorithms."""
    total = 0
    pattern = r" = \(?(.*?)\)? (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\("
    for result, kind in re.findall(pattern, text):
        size = sum(
            4 * int(np.prod([int(x) for x in dims.split(",") if x]))
            for dims in re.findall(r"[fsu]32\[([\d,]*)\]", result)
        )
        factor = {"all-reduce": 2 / n, "all-gather": 1 / n, "all-to-all": 1 / n}.get(kind, 1)
        total += int(size * factor * (n - 1))
    return total


if __name__ == "__main__":
    main()
