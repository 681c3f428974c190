"""TorchRec's way to a plan, with the prices of this model: its greedy proposer and partitioner.

The proposer begins with each table's sharding of the shortest longest shard, and in each round lays
the table that holds most memory its next way. The partitioner puts what all chips do alike
everywhere, then tables on hosts, then shards on chips, the longest first, each on the chip that has
least to do and room. The best round counts. TorchRec knows no hot rows, pools at the owner, and its
own prices are of other machines; here both planners see one machine.
"""

import time

import numpy as np

from topology.embeddings.choosing import Problem
from topology.embeddings.machine import Machine
from topology.embeddings.placing import Placement
from topology.embeddings.shardings import Sharding, all_shardings, everywhere_seconds
from topology.embeddings.tables import EmbeddingModel


def greedy_plan(
    model: EmbeddingModel, machine: Machine, *, memory: float | None = None, seconds: float = 5.0
) -> Placement | None:
    """The placement that TorchRec's greedy takes; None where none of its rounds fits.

    Args:
      memory: bytes of a chip for tables and the dense part; all that programs may fill by default.
      seconds: after which it tries no further round.
    """
    end = time.monotonic() + seconds
    ways = [
        [way for way in all_shardings(table, model, machine) if _is_known(way)]
        for table in model.tables
    ]
    room = (machine.memory if memory is None else memory) - model.dense_bytes
    problem = Problem(ways, machine, room)
    lengths = [[_longest(problem, way) for way in of_table] for of_table in ways]
    order = [sorted(range(len(of)), key=of.__getitem__) for of in lengths]
    at = [0] * len(order)
    best: Placement | None = None
    while True:
        placement = _partition(problem, [ks[k] for ks, k in zip(order, at, strict=True)])
        if placement is not None and (best is None or placement.seconds < best.seconds):
            best = placement
        held = [
            (_largest(problem, ways[t][ks[k]]), -t)
            for t, (ks, k) in enumerate(zip(order, at, strict=True))
            if k + 1 < len(ks)
        ]
        if not held or (time.monotonic() > end and best is not None):
            return best
        at[-max(held)[1]] += 1


def _is_known(way: Sharding) -> bool:
    """Tells whether TorchRec has a way: it pools at the owner, and sums replicas' whole arrays."""
    return way.pooling == "owner" or way.gradients == "dense"


def _longest(problem: Problem, way: Sharding) -> float:
    """Seconds of a sharding's longest shard."""
    return everywhere_seconds(way, problem.machine) + float(way.shard.sum())


def _largest(problem: Problem, way: Sharding) -> tuple[float, float]:
    """(the largest shard's bytes, those of all)."""
    if way.is_everywhere:
        return way.every_memory, way.every_memory * problem.machine.chips
    sites = way.shards * problem.sites(way).shape[1]
    return way.shard_memory, way.shard_memory * sites


def _partition(problem: Problem, chosen: list[int]) -> Placement | None:
    placement = Placement(problem, chosen)
    ways = placement.ways
    if placement.room < 0:
        return None
    placed = [t for t, way in enumerate(ways) if not way.is_everywhere]
    for t in sorted(placed, key=lambda t: (-ways[t].on_hosts, -float(ways[t].shard.sum()))):
        chips = problem.sites(ways[t])
        full = placement.held[chips].max(axis=1) + ways[t].shard_memory > placement.room
        busy = placement.loads.sum(axis=1)[chips].max(axis=1)
        sites = np.lexsort((busy, full))[: ways[t].shards]
        if full[sites].any():
            return None
        placement.add(t, sites)
    return placement
