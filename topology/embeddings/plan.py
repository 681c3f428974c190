"""The best sharding for each table of a model on a slice, with a bound below all others."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from topology.arrays import Floats, Integers
from topology.embeddings.choosing import Choice, Problem, choose, exact, latencies
from topology.embeddings.machine import Machine
from topology.embeddings.placing import Placement, improve, place
from topology.embeddings.shardings import PARTS, Sharding, least_memory, shardings
from topology.embeddings.tables import EmbeddingModel
from topology.hardware import Pod
from topology.numbers import number
from topology.torus.shapes import legal_shapes
from topology.torus.slices import Slice

_LARGEST = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)  # of the busiest chip's time, that a shard may take
_MARGINS = (0.98, 0.95, 0.9)  # of the memory, where shards find no room in all of it
_LOSS = 1.15  # times the bound, that smaller shards may take together
_ROUNDS = ((0.1, 3), (0.6, 1))  # of bettering: the part of the time for each, and how many
_MANY = 4000  # ways, beyond which the bound is the relaxed program's
_NEAR = 1.01  # times the bound, where the search ends


class DoNotFitError(ValueError):
    """Tables that no sharding fits into the memory of a slice's chips."""


@dataclass(frozen=True)
class Plan:
    """A place for each table of a model.

    Attributes:
      model: its tables, in order.
      machine: the slice.
      ways: the sharding of each table.
      chips: int of each table: the chips that hold its shards, in the shards' order; for table_row
        the chips of its hosts; all of them where all do alike.
      loads: float [N, 5], seconds of each chip in each of `PARTS`.
      memory: float [N], bytes that each chip holds, without the model's dense part.
      bound: seconds; no plan with these kinds of shardings takes less.
    """

    model: EmbeddingModel
    machine: Machine
    ways: list[Sharding]
    chips: list[Integers]
    loads: Floats
    memory: Floats
    bound: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part of a step: of `PARTS`, of the replicas' all-reduce, and latencies
        of the exchanges."""
        found = {name: float(self.loads[:, k].max()) for k, name in enumerate(PARTS)}
        exchange, reduce = latencies(
            any(way.exchanges for way in self.ways),
            any(way.reduced for way in self.ways),
            self.machine,
        )
        reduced = sum(way.reduced for way in self.ways) * self.machine.reduce_seconds
        return found | {"replicas": reduced + reduce, "latency": exchange}

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())

    @property
    def gap(self) -> float:
        """The part by which a step may be longer than the best possible: seconds / bound - 1."""
        return 0.0 if not self.seconds else max(self.seconds / max(self.bound, 1e-30) - 1, 0.0)

    @property
    def sent(self) -> Floats:
        """float [N]: bytes that each chip sends in a step."""
        N, pair = self.machine.chips, self.machine.pair_seconds
        if N == 1:
            return np.zeros(1)
        ids, vectors, gradients = (self.loads[:, PARTS.index(k)] for k in _EXCHANGED)
        # An owner sends its vectors to each other chip; ids and gradients go to each owner.
        asked = (ids + gradients).sum() - (ids + gradients)
        reduced = 2 * sum(way.reduced for way in self.ways) * (N - 1) / N
        return np.asarray(((N - 1) * vectors + asked) / pair + reduced)


_EXCHANGED = ("ids", "vectors", "gradients")


def plan_tables(
    model: EmbeddingModel, machine: Machine, *, memory: float | None = None, seconds: float = 36.0
) -> Plan:
    """The plan of least step time that fits, as near to the best as its `gap` says.

    Args:
      memory: bytes of a chip for tables and the dense part; all that programs may fill by default.
      seconds: about which the search stops; most models take less.

    Raises:
      DoNotFitError: the tables do not fit; says how much is missing.
    """
    memory = machine.memory if memory is None else number("memory", memory, unit="bytes")
    ways = [shardings(table, model, machine) for table in model.tables]
    problem = Problem(ways, machine, memory - model.dense_bytes)
    if (missing := missing_bytes(problem)) > 0:
        raise DoNotFitError(_too_large(model, machine, memory, missing))
    placement, bound = _search(problem, seconds)
    if placement is None:
        raise DoNotFitError(
            f"tables of {model.name}: no placement on {machine.name} was found that fits "
            f"{memory / 2**30:.2f} GiB a chip"
        )
    return plan_of(model, placement, bound)


def plan_of(model: EmbeddingModel, placement: Placement, bound: float) -> Plan:
    """The plan of a placement."""
    problem = placement.problem
    everything = np.arange(problem.machine.chips)
    pairs = list(zip(placement.ways, placement.sites, strict=True))
    every = sum(way.every for way in placement.ways)
    return Plan(
        model=model,
        machine=problem.machine,
        ways=placement.ways,
        chips=[
            everything if way.is_everywhere else problem.sites(way)[np.sort(at)].ravel()
            for way, at in pairs
        ],
        loads=placement.loads + every,
        memory=placement.held + placement.everywhere,
        bound=bound,
    )


def missing_bytes(problem: Problem) -> float:
    """Bytes of a chip that are certainly too few for the tables, however they are laid; 0 where
    they may fit."""
    N = problem.machine.chips
    least = sum(
        min(
            way.every_memory + way.shard_memory * way.shards * problem.sites(way).shape[1] / N
            for way in of_table
        )
        for of_table in problem.ways
    )
    return float(max(least - problem.memory, 0.0))


def _too_large(model: EmbeddingModel, machine: Machine, memory: float, missing: float) -> str:
    return (
        f"tables of {model.name}: do not fit on {machine.name}: a chip has "
        f"{(memory - model.dense_bytes) / 2**30:.2f} GiB for them and needs at least "
        f"{missing / 2**30:.2f} GiB more, with optimizer state and what a step exchanges"
    )


def _search(problem: Problem, seconds: float) -> tuple[Placement | None, float]:
    """(the best placement found, a bound below all)."""
    began = time.monotonic()

    def left() -> float:
        return max(seconds - (time.monotonic() - began), 0.5)

    many = sum(map(len, problem.ways)) > _MANY
    first = choose(problem, relaxed=many, seconds=left() / 3)
    bound = first.bound
    # Smaller shards lie more evenly, and take longer together: some of each are tried.
    choices = [first]
    for part in _LARGEST:
        choice = choose(problem, largest=part * first.reach, relaxed=many, seconds=left() / 8)
        if choice.bound < _LOSS * bound:
            choices.append(choice)
    best = _evened(problem, choices, left(), bound * _NEAR)
    if best is not None and best.seconds <= bound * _NEAR:
        return best, min(bound, best.seconds)
    if best is None:
        best = _roomier(problem, relaxed=many, seconds=left())
    solved = exact(problem, seconds=left())
    if solved is not None:
        bound = max(bound, solved.bound)
        best = _better_of(best, _of_exact(problem, solved))
    return best, bound if best is None else min(bound, best.seconds)


def _roomier(problem: Problem, *, relaxed: bool, seconds: float) -> Placement | None:
    """A placement where those of the best choices found no room: of choices for less memory, then
    of what takes least of it on every chip."""
    for margin in _MARGINS:
        less = replace(problem, memory=margin * problem.memory)
        choice = choose(less, relaxed=relaxed, seconds=seconds / 8)
        if choice.ways is not None:
            placement = place(problem, choice.ways)
            if placement is not None and placement.fits:
                improve(placement, seconds=seconds / 4)
                return placement
    least = [
        int(np.argmin([way.every_memory if way.is_everywhere else np.inf for way in of_table]))
        for of_table in problem.ways
    ]
    placement = place(problem, least)
    return placement if placement is not None and placement.fits else None


def _evened(
    problem: Problem, choices: list[Choice], seconds: float, goal: float
) -> Placement | None:
    """The best of the choices' placements: the best ones are bettered for a while, and then the
    best of these. None where none fits."""
    ways = dict.fromkeys(tuple(choice.ways) for choice in choices if choice.ways is not None)
    placed = [placement for of in ways if (placement := place(problem, of)) is not None]
    placed = [one for one in placed if one.fits]
    for share, kept in _ROUNDS:
        placed = sorted(placed, key=lambda one: one.seconds)[:kept]
        for placement in placed:
            if placed[0].seconds > goal:
                improve(placement, seconds=share * seconds, goal=goal)
    return min(placed, key=lambda one: one.seconds, default=None)


def _of_exact(problem: Problem, choice: Choice) -> Placement | None:
    if choice.ways is None or choice.sites is None:
        return None
    placement = Placement(problem, choice.ways)
    for t, sites in enumerate(choice.sites):
        placement.add(t, sites)
    return placement


def _better_of(*found: Placement | None) -> Placement | None:
    fitting = [one for one in found if one is not None and one.fits]
    return min(fitting, key=lambda one: one.seconds, default=None)


def fitting_slice(model: EmbeddingModel, pod: Pod, above: int) -> Slice | None:
    """The smallest slice of a pod, of more chips, on which the tables fit with their rows over all
    chips; None where they fit on none."""
    by_chips = {math.prod(shape): shape for shape in legal_shapes(pod=pod)}
    for chips in sorted(count for count in by_chips if count > above):
        memory = pod.chip.hbm_usable or pod.chip.hbm
        small = Machine(
            name="",
            chips=chips,
            pair_seconds=0.0,
            exchange_seconds=0.0,
            bandwidth=1.0,
            access_bytes=0.0,
            reduce_seconds=0.0,
            reduce_latency=0.0,
            memory=memory,
            granule=1,
            hosts=np.zeros((0, 1), int),
        )
        if model.dense_bytes + least_memory(model, small) <= memory:
            return Slice(shape=by_chips[chips], pod=pod)
    return None
