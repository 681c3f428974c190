"""Decisions of a pod's scheduler, each a small class that can be exchanged.

Where a slice goes (`AnyBlocks`, `ContiguousBox`), who is next (`InOrder`, `Backfill`), and what to
do when a part under a job fails (`Cheapest`, `AsPublished`, `NeverReroute`).
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from topology.fleet.availability import grid_boxes
from topology.fleet.workload import Job
from topology.hardware import of_blocks
from topology.numbers import number, whole
from topology.torus.shapes import Shape
from topology.torus.slices import Slice

Blocks = tuple[int, ...]
Held = Mapping[str, tuple[Slice, Blocks]]
"""{name: (slice, blocks)} of jobs that may move, their blocks all healthy."""
Room = tuple[Blocks, dict[str, Blocks]]
"""Blocks for a slice, and {name: blocks} to which others move for it."""


@dataclass(frozen=True)
class AnyBlocks:
    """Optical switches: any free blocks make any slice; the lowest-numbered are taken."""

    def choose(self, slice: Slice, free: Sequence[int]) -> Blocks | None:
        """Blocks for a slice out of the free and healthy ones; None if it does not fit."""
        n = slice.num_blocks
        return tuple(sorted(free)[:n]) if n <= len(free) else None

    def replace(
        self, slice: Slice, held: Sequence[int], failed: Set[int], free: Sequence[int]
    ) -> Blocks | None:
        """Blocks with which a slice goes on when some of its own failed; None if there are none.

        The others stay where they are.
        """
        if len(failed) > len(free):
            return None
        others = iter(sorted(free))
        return tuple(next(others) if block in failed else block for block in held)

    def make_room(self, slice: Slice, free: Sequence[int], held: Held) -> Room | None:
        """Returns None: where any blocks will do, moving slices makes no room."""
        return None


@dataclass(frozen=True)
class ContiguousBox:
    """Static wiring: a slice is a box in the fixed grid of blocks, turned any way.

    Attributes:
      grid: blocks along x, y and z; by default those of the slices' pod.
      wraparound: a box may reach over an edge of the grid to the opposite one.
    """

    grid: tuple[int, int, int] | None = None
    wraparound: bool = False

    def choose(self, slice: Slice, free: Sequence[int]) -> Blocks | None:
        """Chooses the first box, by block numbers, that is free and healthy."""
        open_ = _bits(free)
        return next((_blocks(box) for box in self._boxes(slice) if box & open_ == box), None)

    def replace(
        self, slice: Slice, held: Sequence[int], failed: Set[int], free: Sequence[int]
    ) -> Blocks | None:
        """Chooses another box for the slice, that may overlap its own; see `AnyBlocks.replace`."""
        return self.choose(slice, [*free, *(block for block in held if block not in failed)])

    def make_room(self, slice: Slice, free: Sequence[int], held: Held) -> Room | None:
        """Defragmentation: a box for a slice, and the boxes to which the slices in it move.
        Of the boxes in which the fewest blocks are held, the first from which all slices can move,
        the largest first, each to the first box that is then free.
        """
        open_ = _bits(free)
        bits = {name: _bits(blocks) for name, (_, blocks) in held.items()}
        movable = open_ | sum(bits.values())
        candidates = [box for box in self._boxes(slice) if box & movable == box]
        for box in sorted(candidates, key=lambda box: (box & ~open_).bit_count()):
            moving = sorted((n for n in bits if bits[n] & box), key=lambda n: -bits[n].bit_count())
            space = (open_ | sum(bits[name] for name in moving)) & ~box
            moves: dict[str, Blocks] = {}
            for name in moving:
                blocks = self.choose(held[name][0], _blocks(space))
                if blocks is None:
                    break
                moves[name] = blocks
                space &= ~_bits(blocks)
            else:
                return _blocks(box), moves
        return None

    def _boxes(self, slice: Slice) -> list[int]:
        grid = self.grid or of_blocks(slice.pod).block_grid
        return _boxes(slice.block_shape, grid, self.wraparound)


@dataclass(frozen=True)
class InOrder:
    """First come, first served, the higher priority before: who does not fit holds up the rest."""

    def holds_up(self, job: Job, waited: float) -> bool:
        """Returns True: no job behind may start before one that does not fit now."""
        return True


@dataclass(frozen=True)
class Backfill:
    """Jobs behind one that does not fit may start, until it has waited for `patience` seconds."""

    patience: float = 86400.0

    def holds_up(self, job: Job, waited: float) -> bool:
        return waited >= self.patience


@dataclass(frozen=True)
class Cheapest:
    """Takes the way out that is expected to cost the job the least time."""

    def choose(self, kind: str, costs: Mapping[str, float]) -> str:
        """Chooses what to do after a failure: the option that is expected to cost least.

        Args:
          kind: of the part: host, link, ocs or block.
          costs: {way out: expected seconds}, of those that there are: reroute; swap (restart from
            the checkpoint on other blocks); wait (keep the blocks until the switch is repaired, and
            restart); requeue.
        """
        return min(costs, key=lambda way: costs[way])


@dataclass(frozen=True)
class AsPublished:
    """Reroutes around a failed switch, and reconfigures when a machine or link fails (Zu et al.,
    NSDI 2024)."""

    def choose(self, kind: str, costs: Mapping[str, float]) -> str:
        if kind == "ocs" and "reroute" in costs:
            return "reroute"
        return _without_reroute(costs)


@dataclass(frozen=True)
class NeverReroute:
    """Restarts after every failure, also where the job could route around it."""

    def choose(self, kind: str, costs: Mapping[str, float]) -> str:
        return _without_reroute(costs)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Policy of a pod's scheduler: all its decisions together.

    Attributes:
      spares: free healthy blocks that no job may start on: they replace those that fail.
      preempt: a job that does not fit takes the blocks of jobs of lower priority, which save a
        checkpoint and go back to the queue.
      defragment: running jobs move so that a box becomes free.
      interval: seconds of work between checkpoints; None: Daly's, for the failures of the job's
        blocks.
    """

    placement: AnyBlocks | ContiguousBox = AnyBlocks()
    queue: InOrder | Backfill = Backfill()
    recovery: Cheapest | AsPublished | NeverReroute = Cheapest()
    spares: int = 0
    preempt: bool = False
    defragment: bool = False
    interval: float | None = None

    def __post_init__(self) -> None:
        whole("policy: spares", self.spares)
        if self.interval is not None:
            number("policy: interval", self.interval, above=0, unit="seconds", endless=True)


DEFAULT_POLICY = Policy()


def _without_reroute(costs: Mapping[str, float]) -> str:
    return Cheapest().choose("", {way: cost for way, cost in costs.items() if way != "reroute"})


def _bits(blocks: Iterable[int]) -> int:
    return sum(1 << block for block in blocks)


def _blocks(bits: int) -> Blocks:
    return tuple(block for block in range(bits.bit_length()) if bits >> block & 1)


@lru_cache
def _boxes(block_shape: Shape, grid: Shape, wraparound: bool) -> list[int]:
    return sorted(grid_boxes(block_shape, grid, wraparound), key=_blocks)
