"""The pod manager: which blocks are healthy, free, in the slice; what is switched when one fails.

Every change is on disk, whole, before it is told, so another manager goes on where this one died.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pjit_train.files import write_whole
from topology import TPU_V4, Fabric, Part, Placement, Slice, fabric, legal_shapes
from topology.drawing import scene
from topology.fabric import light
from topology.hardware import Pod, of_blocks
from topology.routing import throughput

_NAME = "run"  # of the one slice that the pod holds


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
        if self._file.exists():
            state = json.loads(self._file.read_text())
            if state.get("pod", TPU_V4.name) == pod.name:  # on another one nothing has failed
                self._fabric = _read(state, pod)
        self._fabric = replace(self._fabric, drained=self._fabric.drained | self._outside)

    def place(self, wanted: Slice, smaller: list[Slice]) -> dict[str, Any]:
        """The slice on healthy blocks: where it is, or moved, or the first of `smaller` that fits.

        Returns:
          `state()`, and "changes": (cross-connects broken, made, seconds of switching).

        Raises:
          ValueError: too few blocks are free and healthy.
        """
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
            self._keep(after)
            changes = fabric.reconfigure(before, after)
            switch = after.pod.switch  # without one nothing is known to be switched
            seconds = 0.0 if switch is None else changes.seconds(switch)
            return self.state() | {"changes": (changes.num_breaks, changes.num_makes, seconds)}
        raise ValueError(str(error))

    def fail(self, part: str) -> dict[str, Any]:
        """Notes a failed block, host or switch ("host:12,3").

        Returns:
          `state()`, and "hit": whether the slice uses it, a switch only where it has links there.
          Of a switch also "kept", the part of the all-to-all throughput that is left when traffic
          goes around all failed switches, 0 where they cut the slice in two.
        """
        part = Part.parse(part, self._fabric.pod)
        after = fabric.fail(self._fabric, part)
        placement = after.placements.get(_NAME)
        if part.kind == "ocs":
            hit = bool(_links(after, part))
            found = {"hit": hit, "kept": _kept(after, placement) if hit else 1.0}
        else:
            found = {"hit": placement is not None and part.block in placement.blocks}
        self._keep(after)
        return self.state() | found

    def drain(self, part: str) -> dict[str, Any]:
        """Takes a host, with its block, out of use, which is not known to have failed."""
        drained = self._fabric.drained | {Part.parse(part, self._fabric.pod)}
        self._keep(replace(self._fabric, drained=drained))
        return self.state()

    def state(self) -> dict[str, Any]:
        """{"pod", "slice", "blocks", "failed", "drained", "free"}, as JSON has it.

        "slice" is None before one is placed.
        """
        placement = self._fabric.placements.get(_NAME)
        return {
            "pod": self._fabric.pod.name,
            "slice": None if placement is None else str(placement.slice),
            "blocks": [] if placement is None else list(placement.blocks),
            "failed": sorted(str(part) for part in self._fabric.failed),
            "drained": sorted(str(part) for part in self._fabric.drained - self._outside),
            "free": len(self._fabric.free_blocks),
        }

    def placement(self) -> Placement | None:
        """The slice and its blocks; None before it is placed."""
        return self._fabric.placements.get(_NAME)

    def _keep(self, new):
        self._fabric = new
        write_whole(self._file, json.dumps(self.state()))


def _kept(pod, placement):
    switches = [part for part in pod.failed if part.kind == "ocs"]
    links = {link for part in switches for link in _links(pod, part)}
    return float(
        throughput.all_to_all_kept(placement.slice, sorted(links), time_limit=scene.TIME_LIMIT)
    )


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
