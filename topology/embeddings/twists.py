"""Gains of models from twisted slices, and from pooling at the owner or the requester.

Both are asked of a model of many tables alike, so that what is found is of its hotness, width, skew
and batch.
"""

from dataclasses import replace

from topology.embeddings.choosing import Problem, choose
from topology.embeddings.machine import Machine
from topology.embeddings.shardings import all_shardings, everywhere_seconds, shardings
from topology.embeddings.tables import EmbeddingModel, Table
from topology.torus.slices import Slice

TABLES = 64


def alike(
    machine: Machine,
    *,
    hotness: float,
    width: int,
    samples: int,
    skew: float,
    rows: int = 10**7,
    tables: int = TABLES,
) -> EmbeddingModel:
    """A model of tables that are alike, with so many samples a chip."""
    table = Table(name="t", rows=rows, width=width, hotness=(float(hotness),), skew=skew)
    return EmbeddingModel(
        name="alike",
        tables=tuple(replace(table, name=f"t{k}") for k in range(tables)),
        batch=samples * machine.chips,
    )


def least_seconds(model: EmbeddingModel, machine: Machine) -> float:
    """The bound below all plans, of shards that lie as evenly as they can, memory aside."""
    ways = shardings(model.tables[0], model, machine)
    problem = Problem([ways] * len(model.tables), machine, 1e15)
    return choose(problem, relaxed=True).bound


def twist_gain(shape: str, **of_model: float) -> float:
    """Speed of a step on the twisted slice of a shape over the regular one, best plans on both."""
    found = []
    for name in (shape, f"{shape}_twisted"):
        machine = Machine.of(Slice.parse(name))
        found.append(least_seconds(alike(machine, **of_model), machine))  # type: ignore[arg-type]
    return found[0] / found[1]


def pooling_gain(machine: Machine, **of_model: float) -> float:
    """Seconds of a table by rows pooled at its owners over those pooled at the requesters."""
    model = alike(machine, tables=1, **of_model)  # type: ignore[arg-type]
    by = {
        way.pooling: everywhere_seconds(way, machine)
        for way in all_shardings(model.tables[0], model, machine)
        if way.kind == "row"
    }
    return by["owner"] / by["requester"]
