"""Loss of a slice when parts fail, by the wiring rule; it need not be placed on a pod.

`topology.fabric.light` finds the same of a slice that is placed, by following the light.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from topology.arrays import Integers
from topology.fabric.fabric import Placement
from topology.fabric.parts import Part, Switch, check_part, chips_of, face_chip
from topology.hardware import BlockPod
from topology.routing.throughput import both_ways, switch_links
from topology.torus.slices import Slice


def lost(slice: Slice, parts: Iterable[Part]) -> tuple[Integers, Integers]:
    """Chips (int) and directed link ids (int, 6 * chip + direction) that a slice loses with parts.

    Blocks are those of the slice: 0 .. num_blocks - 1, row-major over `slice.block_shape`; on a pod
    without blocks chips are.

    Raises:
      ValueError: a part is none of the slice's; says which it has.
    """
    chips, links = set[int](), set[int]()
    for part in parts:
        lost_chips, lost_links = _lost(slice, check_part(part, slice.pod))
        if not lost_chips.size and not lost_links.size:
            raise ValueError(
                f"part {part}: carries nothing of {slice}, whose {_has(slice)}; take a part that "
                "it uses"
            )
        chips.update(lost_chips.tolist())
        links.update(lost_links.tolist())
    return np.array(sorted(chips), int), np.array(sorted(links), int)


def lost_one_way(slice: Slice, part: Part) -> Integers:
    """The directed link (int [1], its id) that a slice loses where a link carries nothing in its
    own direction, and still does in the other.

    Raises:
      ValueError: the part is no link, or none of the slice's.
    """
    if part.kind != "link":
        raise ValueError(f"part {part}: only a link fails one way, such as link:0,0,0,0,+x")
    ends = _ends(slice, check_part(part, slice.pod))
    there = ends[slice.neighbours.ravel()[ends] >= 0]
    if not there.size:
        raise ValueError(f"part {part}: carries nothing of {slice}, whose {_has(slice)}")
    return np.asarray(there)


def _lost(slice: Slice, part: Part) -> tuple[Integers, Integers]:
    """(chips, directed links) that a slice loses with one part, both maybe none."""
    nothing = np.zeros(0, int)
    if part.kind == "ocs":
        return nothing, switch_links(slice, *part.where)  # says why there are none
    if part.kind in ("link", "port"):
        ends = _ends(slice, part)
        there = ends[slice.neighbours.ravel()[ends] >= 0]
        return nothing, np.unique([both_ways(slice, end) for end in there]).astype(int)
    chips = _chips(slice, part)
    gone = 6 * chips[:, None] + np.arange(6)
    gone = gone[slice.neighbours[chips] >= 0]
    return chips, np.unique([both_ways(slice, end) for end in gone]).astype(int)


def _chips(slice: Slice, part: Part) -> Integers:
    """The chips of a slice that are in a block, on a host, or one chip."""
    block = slice.pod.block
    if block is None:
        return _at(slice, part.where[: slice.pod.dimensions])
    if part.where[0] >= slice.num_blocks:
        return np.zeros(0, int)
    chips = [part.where[0] * block.chips + c for c in chips_of(part, block)]
    return np.flatnonzero(np.isin(_placed(slice), chips))


def _at(slice: Slice, where: Sequence[int]) -> Integers:
    """The chip of a slice at a place, int [1], or none."""
    place = np.array([*where, *(0,) * (3 - len(where))])
    return slice.index(place[None]) if (place < slice.shape).all() else np.zeros(0, int)


def _ends(slice: Slice, part: Part) -> Integers:
    """The directed links of a slice that a link is, or that enter the switch at a port."""
    *where, last = part.where
    pod = slice.pod
    if not isinstance(pod, BlockPod):
        return 6 * _at(slice, where) + last
    if part.kind == "link":
        chips, direction = _chips(slice, Part("chip", tuple(where))), last
    else:
        minus, block = divmod(last, pod.num_blocks)
        if minus > 1 or block >= slice.num_blocks or not slice.is_whole_blocks:
            return np.zeros(0, int)
        switch = Switch(*where)
        chip = block * pod.block.chips + face_chip(pod.block, switch, minus)
        chips, direction = np.flatnonzero(_placed(slice) == chip), 2 * switch.d + minus
    return 6 * chips + direction


def _placed(slice: Slice) -> Integers:
    """int [N]: of every chip, 64 * block + its index there, on blocks 0, 1, ... of the slice."""
    return Placement(slice, tuple(range(slice.num_blocks))).chips


def _has(slice: Slice) -> str:
    if slice.pod.block is None:
        last = ",".join(str(k - 1) for k in slice.sizes)
        return f"chips are {','.join('0' * len(slice.sizes))} .. {last}"
    most = slice.num_blocks - 1
    return "block is 0" if most == 0 else f"blocks are 0 .. {most}"
