"""Connections that a fabric really makes, found by following the light from port to port.

Nothing here asks how a configuration was built. `trace` starts at every fibre, goes to the port at
which it ends, through the cross-connect that the switch holds there, and out along the fibre at
the other port; inside a block it follows the wires. `verify` then checks, link by link, that the
claimed map from a slice's chips to the pod's is an isomorphism, and nothing else is joined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from topology.arrays import Integers
from topology.fabric.fabric import Fabric, fail, placement_of
from topology.fabric.parts import (
    Part,
    Switch,
    chip_in_block,
    chips_of,
    ends_of,
    fibre_end,
    link_end,
    switches,
)
from topology.hardware import Block


def trace(fabric: Fabric) -> Integers:
    """int [384 * blocks]: the link end that each link end reaches; -1 where no light comes.

    Link ends are numbered as in `parts.link_end`. Where ports are used twice (see
    `port_conflicts`), the later cross-connect counts.
    """
    far: Integers = np.tile(_wires(fabric.pod.block), (fabric.pod.num_blocks, 1))
    first = ends_of(fabric.pod.block) * np.arange(len(far))[:, None]
    far = np.where(far >= 0, far + first, -1).ravel()
    ends = {switch: _fibres(fabric, switch) for switch in switches(fabric.pod)}
    for switch, held in fabric.connects.items():
        for out, into in held.items():
            a, b = ends[switch].get(out), ends[switch].get(into)
            if a is not None and b is not None:
                far[a], far[b] = b, a
    dark = [end for part in fabric.failed for end in _dark_ends(fabric, part, ends)]
    reached = far[dark]
    far[reached[reached >= 0]] = -1
    far[dark] = -1
    return far


def port_conflicts(fabric: Fabric) -> list[str]:
    """A line for every port that more than one cross-connect uses."""
    lines = []
    for switch, held in fabric.connects.items():
        users: dict[int, list[tuple[int, int]]] = {}
        for pair in held.items():
            for port in pair:
                users.setdefault(port, []).append(pair)
        for port, pairs in sorted(users.items()):
            if len(pairs) > 1:
                joined = " and ".join(f"{out}-{into}" for out, into in pairs)
                lines.append(f"ocs {switch}: port {port} is used twice, by {joined}")
    return lines


def verify(fabric: Fabric, name: str) -> list[str]:
    """Verifies that the light makes a slice what it claims to be: no line means it is proved.

    The map from the slice's chips to the pod's, which the placement claims, is an isomorphism: it
    takes different chips to different chips, and each of the six links of each chip ends where the
    slice's neighbour is, at its opposite direction; where the slice has no neighbour, no light
    leaves (but inside a block, where the wires to chips beside the slice are always there).

    Returns:
      A line for every link that is wrong.
    """
    return _wrong_links(fabric, name, trace(fabric))


def check(fabric: Fabric) -> list[str]:
    """Lists all that is wrong with a fabric; no line means that every slice is proved, and apart.

    No port and no block is used twice, every slice verifies, and no light joins a block to one
    that is not of its slice.
    """
    lines, owner = port_conflicts(fabric), np.full(fabric.pod.num_blocks, -1)
    for n, (name, placement) in enumerate(fabric.placements.items()):
        blocks = np.array(placement.blocks)
        for block in np.unique(blocks[owner[blocks] >= 0]):
            lines.append(f"block {block} is in slice {name!r} and in another")
        owner[blocks] = n
    far, pod = trace(fabric), fabric.pod
    for name in fabric.placements:
        lines += _wrong_links(fabric, name, far)
    near = np.flatnonzero(far >= 0)
    block, other = near // ends_of(pod.block), far[near] // ends_of(pod.block)
    here, there = owner[block], owner[other]
    apart = (block != other) & ((here != there) | (here < 0))
    for end in near[apart]:
        to = _link(pod.block, far[end])
        lines.append(f"{_link(pod.block, end)} reaches {to}, which is not of the same slice")
    return lines


_Ends = Mapping[Switch, Mapping[int, int]]


@dataclass(frozen=True)
class Impact:
    """Loss of a slice: chips by their index, links by their directed ids 6 * chip + direction (both
    directions of each; those of lost chips too)."""

    chips: tuple[int, ...]
    links: tuple[int, ...]


def impact(fabric: Fabric, part: Part) -> dict[str, Impact]:
    """The slices that the failure of a part touches, and how."""
    before, after = trace(fabric), trace(fail(fabric, part))
    block, lost = fabric.pod.block, []
    if part.block is not None:
        lost = [part.block * block.chips + c for c in chips_of(part, block)]
    touched = {}
    for name, placement in fabric.placements.items():
        chips = placement.chips
        dark = (before != after).reshape(-1, 6)[chips] & (placement.slice.neighbours >= 0)
        gone = np.flatnonzero(np.isin(chips, lost))
        if dark.any() or gone.size:
            touched[name] = Impact(tuple(gone.tolist()), tuple(np.flatnonzero(dark).tolist()))
    return touched


def _wrong_links(fabric: Fabric, name: str, far: Integers) -> list[str]:
    placement = placement_of(fabric, name)
    slice, chips, block = placement.slice, placement.chips, fabric.pod.block
    if len(np.unique(chips)) < len(chips):
        return [f"slice {name!r}: a block stands twice in its blocks {placement.blocks}"]
    to = slice.neighbours
    should = np.where(to >= 0, 6 * chips[to] + (np.arange(6) ^ 1), -1)
    does = far.reshape(-1, 6)[chips]
    wrong = does != should
    if not slice.is_whole_blocks:
        wrong &= to >= 0
    return [
        f"slice {name!r}: chip {c} ({_link(block, 6 * chips[c] + j)}) reaches "
        f"{_link(block, does[c, j])}, should reach {_link(block, should[c, j])}"
        for c, j in np.argwhere(wrong).tolist()
    ]


def _fibres(fabric: Fabric, switch: Switch) -> dict[int, int]:
    """{port: link end} of the fibres that are at the ports of a switch."""
    pod = fabric.pod
    fibres = range(2 * pod.num_blocks)
    return {fabric.port(switch, p): fibre_end(switch, p, pod) for p in fibres}


def _dark_ends(fabric: Fabric, part: Part, ends: _Ends) -> list[int]:
    """The link ends that get no light because a part failed."""
    pod = fabric.pod
    if part.kind == "ocs":
        return list(ends[Switch(*part.where)].values())
    if part.kind == "port":
        *switch, port = part.where
        end = ends[Switch(*switch)].get(port)
        return [] if end is None else [end]
    if part.kind == "link":
        block, *chip, direction = part.where
        return [link_end(pod, block, chip_in_block(pod.block, *chip), direction)]
    return [link_end(pod, part.where[0], c, j) for c in chips_of(part, pod.block) for j in range(6)]


def _link(of: Block, end: int) -> str:
    if end < 0:
        return "nothing"
    block, rest = divmod(int(end), ends_of(of))
    chip, direction = divmod(rest, 6)
    place = (chip // of.side**2, chip // of.side % of.side, chip % of.side)
    return str(Part("link", (block, *place, direction)))


@cache
def _wires(block: Block) -> Integers:
    """int [384]: the link ends of a block that its own wires join; -1 at the faces."""
    ends = np.full((*block.shape, 3, 2), -1)
    number = np.arange(ends_of(block)).reshape(ends.shape)
    for d in range(3):
        low, high = np.moveaxis(ends, d, 0)[:-1], np.moveaxis(ends, d, 0)[1:]
        numbers = np.moveaxis(number, d, 0)
        low[..., d, 0] = numbers[1:][..., d, 1]
        high[..., d, 1] = numbers[:-1][..., d, 0]
    return ends.ravel()
