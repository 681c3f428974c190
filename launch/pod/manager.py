"""The pod manager: which blocks are healthy, free, in the slice; what is switched when one fails.

Every change is on disk, whole, before it is told, so another manager goes on where this one died.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pjit_train.files import write_whole
from topology import TPU_V4, Fabric, Part, Placement, Slice, fabric, legal_shapes
from topology.drawing import scene
from topology.fabric import light
from topology.hardware import Pod, of_blocks
from topology.routing import throughput

_NAME = "run"  # of the one slice that the pod holds


@dataclass(frozen=True, kw_only=True)
class State:
    """State of a pod.

    Attributes:
      placement: the slice and its blocks; None before one is placed.
      failed, drained: parts out of use, by their texts; not the blocks that may not be used.
      added: blocks that came to those that may be used.
      free: number of blocks that are healthy and hold no slice.
    """

    pod: Pod
    placement: Placement | None
    failed: tuple[Part, ...]
    drained: tuple[Part, ...]
    added: tuple[Part, ...]
    free: int

    def write(self) -> str:
        """The state as the pod manager's file has it, in JSON."""
        held = self.placement
        return json.dumps(
            {
                "pod": self.pod.name,
                "slice": None if held is None else str(held.slice),
                "blocks": [] if held is None else list(held.blocks),
                "failed": [str(part) for part in self.failed],
                "drained": [str(part) for part in self.drained],
                "added": [str(part) for part in self.added],
                "free": self.free,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A slice that was placed: cross-connects that were broken and made, seconds of switching."""

    placement: Placement
    failed: tuple[Part, ...]
    breaks: int
    makes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Impact:
    """Impact of a failure, or of a repair.

    Attributes:
      hit: whether the slice uses the part, a switch only where it has links there.
      kept: of a switch, the part of the all-to-all throughput that is left when traffic goes around
        all failed switches, 0 where they cut the slice in two; 1 where no switch it passes failed,
        and of another part.
      links: of a switch, the directed links that the slice has lost with all failed ones.
      free: number of blocks that are healthy and hold no slice.
    """

    hit: bool
    kept: float
    links: tuple[int, ...] = ()
    free: int


class Manager:
    """The fabric of a pod with one slice.

    Args:
      file: its state; read where it exists and is of the same pod.
      blocks: of the pod that may be used, the lowest-numbered; the others count as drained.
      pod: whose fabric it is.
    """

    def __init__(self, file: str, blocks: int, pod: Pod = TPU_V4):
        self._file = Path(file)
        self._fabric = Fabric(pod=of_blocks(pod))
        spare = range(blocks, self._fabric.pod.num_blocks)
        self._outside = frozenset(Part("block", (b,)) for b in spare)
        self._added: frozenset[Part] = frozenset()
        if self._file.exists():
            state = json.loads(self._file.read_text())
            if state.get("pod", TPU_V4.name) == pod.name:  # on another one nothing has failed
                self._fabric = _read(state, pod)
                self._added = frozenset(Part.parse(text, pod) for text in state.get("added", ()))
        self._outside -= self._added
        self._fabric = replace(self._fabric, drained=self._fabric.drained | self._outside)

    def place(self, wanted: Slice, smaller: list[Slice]) -> Placed:
        """The slice on healthy blocks: where it is, or moved, or the first of `smaller` that fits.

        Raises:
          ValueError: too few blocks are free and healthy.
        """
        before = self._fabric
        after = self._placed(wanted, smaller)
        self._keep(after)
        changes = fabric.reconfigure(before, after)
        switch = after.pod.switch  # without one nothing is known to be switched
        seconds = 0.0 if switch is None else changes.seconds(switch)
        return Placed(
            placement=after.placements[_NAME],
            failed=self.state().failed,
            breaks=changes.num_breaks,
            makes=changes.num_makes,
            seconds=seconds,
        )

    def would_place(self, wanted: Slice, smaller: list[Slice]) -> Slice:
        """The slice that `place` would place, which changes nothing.

        Raises:
          ValueError: too few blocks are free and healthy.
        """
        return self._placed(wanted, smaller).placements[_NAME].slice

    def _placed(self, wanted: Slice, smaller: list[Slice]) -> Fabric:
        before, error = self._fabric, None
        for slice in (wanted, *smaller):
            held = before.placements.get(_NAME)
            try:
                if held is not None and held.slice == slice:
                    after = before
                    for block in held.blocks:
                        if block in before.unhealthy_blocks:
                            after = fabric.replace_block(after, _NAME, block)
                else:
                    after = before if held is None else fabric.release(before, _NAME)
                    after = fabric.place(after, _NAME, slice)
            except ValueError as refusal:
                error = error or refusal
                continue
            return after
        raise ValueError(str(error))

    def fail(self, part: Part) -> Impact:
        """Notes a failed block, host or switch.

        Raises:
          ValueError: the pod has no such part.
        """
        return self._change(part, fabric.fail(self._fabric, part))

    def repair(self, part: Part) -> Impact:
        """Notes that a part is back: of a block all of it, and also one that was none of the pod's.

        Raises:
          ValueError: the pod has no such part, or it was not out of use.
        """
        before = self._fabric
        back = [
            out
            for out in before.failed | before.drained
            if out == part or (part.kind == "block" and out.block == part.block)
        ]
        if not back:
            raise ValueError(f"{part} is not out of use")
        after = before
        for one in back:
            after = fabric.repair(after, one)
        self._added |= self._outside & {part}
        self._outside -= {part}
        return self._change(part, after)

    def _change(self, part: Part, after: Fabric) -> Impact:
        """Keeps the fabric in which a part failed or came back."""
        placement, kept = after.placements.get(_NAME), 1.0
        lost: tuple[int, ...] = ()
        if part.kind == "ocs":
            hit = bool(_links(after, part))
            if hit:
                switches = [one for one in after.failed if one.kind == "ocs"]
                lost = tuple(sorted({link for one in switches for link in _links(after, one)}))
                kept = float(
                    throughput.all_to_all_kept(placement.slice, lost, time_limit=scene.TIME_LIMIT)
                )
        else:
            hit = placement is not None and part.block in placement.blocks
        self._keep(after)
        return Impact(hit=hit, kept=kept, links=lost, free=len(after.free_blocks))

    def drain(self, part: Part) -> None:
        """Takes a host, with its block, out of use, which is not known to have failed."""
        self._keep(replace(self._fabric, drained=self._fabric.drained | {part}))

    def state(self) -> State:
        return State(
            pod=self._fabric.pod,
            placement=self._fabric.placements.get(_NAME),
            failed=tuple(sorted(self._fabric.failed, key=str)),
            drained=tuple(sorted(self._fabric.drained - self._outside, key=str)),
            added=tuple(sorted(self._added, key=str)),
            free=len(self._fabric.free_blocks),
        )

    def _keep(self, new: Fabric) -> None:
        self._fabric = new
        write_whole(self._file, self.state().write())


def _links(pod, part):
    """The directed links that the slice, if nothing else had failed, loses with a part."""
    hit = light.impact(replace(pod, failed=frozenset()), part).get(_NAME)
    return () if hit is None else hit.links


def smaller_shapes(slice: Slice) -> list[Slice]:
    """Lists smaller slices than a given one, the largest first, of equals the nearest to a cube."""
    shapes = legal_shapes(slice.num_blocks, slice.pod)
    slices = [Slice(shape=shape, pod=slice.pod) for shape in shapes]
    fewer = [one for one in slices if one.num_chips < slice.num_chips]
    return sorted(fewer, key=lambda one: (-one.num_chips, one.shape[2] - one.shape[0]))


def _read(state, pod):
    failed = frozenset(Part.parse(text, pod) for text in state["failed"])
    drained = frozenset(Part.parse(text, pod) for text in state["drained"])
    switches = frozenset(part for part in drained if part.kind == "ocs")
    found = Fabric(pod=pod, drained=switches)
    if state["slice"] is not None:
        found = fabric.place(found, _NAME, Slice.parse(state["slice"], pod), state["blocks"])
    return replace(found, failed=failed, drained=drained)
