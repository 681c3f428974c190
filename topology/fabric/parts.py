"""The parts of a pod that fail or are drained, and the rule by which its fibres are laid.

A block's chips are (x, y, z), each 0 .. 3. Of each of its six faces, 16 links leave by fibre. The
link at place (i, j) of the faces across dimension d (i and j being the chip's other two
coordinates, in the order x, y, z) goes to the optical switch (d, i, j): 3 x 16 = 48 switches, each
with one fibre of the + face and one of the - face of every block (Jouppi et al., ISCA 2023).

Port b of a switch takes the + fibre of block b, port num_blocks + b its - fibre, and the last
ports are spares.
"""

import re
from typing import NamedTuple

from topology.hardware import Pod
from topology.numbers import whole
from topology.torus.shapes import BLOCK, DIMENSIONS

CHIPS = BLOCK**3  # of a block
ENDS = 6 * CHIPS  # link ends of a block: 6 directions of each chip


class Switch(NamedTuple):
    """The optical switch of place (i, j) of the faces across dimension d (0, 1, 2 for x, y, z)."""

    d: int
    i: int
    j: int

    def __str__(self) -> str:
        return f"{DIMENSIONS[self.d]},{self.i},{self.j}"


SWITCHES = [Switch(d, i, j) for d in range(3) for i in range(BLOCK) for j in range(BLOCK)]


class Part(NamedTuple):
    """A part of a pod, written as `Part.parse` reads it.

    kind and where:
      block (block,), host (block, host), chip (block, x, y, z);
      link (block, x, y, z, direction): the link that leaves that chip in a direction 0 .. 5 of
        +x, -x, +y, -y, +z, -z; inside the block a wire, at its face the fibre to the switch;
      ocs (d, i, j), port (d, i, j, port).
    A host has the 2x2x1 chips whose (x // 2, y // 2, z) counts to its number, row-major.
    """

    kind: str
    where: tuple[int, ...]

    def __str__(self) -> str:
        where = [str(n) for n in self.where]
        if self.kind in ("ocs", "port"):
            where[0] = DIMENSIONS[self.where[0]]
        if self.kind == "link":
            where[4] = _DIRECTIONS[self.where[4]]
        return f"{self.kind}:{','.join(where)}"

    @classmethod
    def parse(cls, text: str, pod: Pod) -> "Part":
        """The part that a text names: block:12, host:12,3, chip:12,0,1,3, link:12,0,1,3,+x,
        ocs:x,0,0 or port:x,0,0,17.

        Raises:
          ValueError: the pod has no such part; says what it has.
        """
        kind, _, where = text.strip().partition(":")
        names = where.split(",")
        ranges = _ranges(pod).get(kind)
        if ranges is None:
            raise ValueError(f"part {text!r}: no such kind; write for example {_EXAMPLES}")
        if len(names) != len(ranges):
            raise ValueError(f"part {text!r}: write it like {_example(kind)}")
        values = []
        for name, (what, allowed) in zip(names, ranges, strict=True):
            if isinstance(allowed, int):
                value = int(name) if re.fullmatch(r"[0-9]{1,6}", name) else -1
                has = f"0 .. {allowed - 1}"
                value = value if value < allowed else -1
            else:
                value = allowed.index(name) if name in allowed else -1
                has = " ".join(allowed)
            if value < 0:
                raise ValueError(f"part {text!r}: {name!r} is no {what}; there are {has}")
            values.append(value)
        return cls(kind, tuple(values))

    @property
    def block(self) -> int | None:
        """The block that it belongs to; None of a switch and of its ports."""
        return None if self.kind in ("ocs", "port") else self.where[0]


_DIRECTIONS = [sign + d for d in DIMENSIONS for sign in "+-"]
_EXAMPLES = "block:12, host:12,3, chip:12,0,1,3, link:12,0,1,3,+x, ocs:x,0,0 or port:x,0,0,17"


def _example(kind):
    return next(one for one in re.split(r", (?=[a-z])| or ", _EXAMPLES) if one.startswith(kind))


def _ranges(pod):
    block = ("block", pod.num_blocks)
    chip = [("coordinate of a chip", BLOCK)] * 3
    switch = [
        ("dimension", tuple(DIMENSIONS)),
        ("place in a face", BLOCK),
        ("place in a face", BLOCK),
    ]
    return {
        "block": [block],
        "host": [block, ("host of a block", pod.block.hosts)],
        "chip": [block, *chip],
        "link": [block, *chip, ("direction", tuple(_DIRECTIONS))],
        "ocs": switch,
        "port": [*switch, ("port", pod.switch.ports)],
    }


def check_part(part: Part, pod: Pod) -> Part:
    """The part, its numbers as ints.

    Raises:
      ValueError: the pod has no such part.
    """
    if not isinstance(part, Part) or not isinstance(part.where, tuple):
        raise ValueError(f"part {part!r}: is no Part; Part.parse reads for example {_EXAMPLES}")
    ranges = next((r for kind, r in _ranges(pod).items() if kind == part.kind), None)
    if ranges is None or len(ranges) != len(part.where):
        raise ValueError(f"part {tuple(part)}: no such part; for example {_EXAMPLES}")
    where = []
    for value, (what, allowed) in zip(part.where, ranges, strict=True):
        count = allowed if isinstance(allowed, int) else len(allowed)
        where.append(whole(f"part {part.kind} {part.where}: {what}", value, most=count - 1))
    return Part(part.kind, tuple(where))


def chip_in_block(x: int, y: int, z: int) -> int:
    """The index of a chip in its block: row-major, z the fastest."""
    return (x * BLOCK + y) * BLOCK + z


def link_end(block: int, chip: int, direction: int) -> int:
    """The number of the end of a link at a chip: 6 * (64 * block + chip in block) + direction."""
    return block * ENDS + 6 * chip + direction


def fibre_end(switch: Switch, port: int, num_blocks: int) -> int | None:
    """The link end whose fibre is laid to a port of a switch; None of a spare port."""
    if port >= 2 * num_blocks:
        return None
    chip = [switch.i, switch.j]
    minus, block = divmod(port, num_blocks)
    chip.insert(switch.d, 0 if minus else BLOCK - 1)
    return link_end(block, chip_in_block(*chip), 2 * switch.d + minus)


def chips_of(part: Part) -> list[int]:
    """The chips, by index in their block, that are lost with a part; none of links and switches."""
    if part.kind == "block":
        return list(range(CHIPS))
    if part.kind == "chip":
        return [chip_in_block(*part.where[1:])]
    if part.kind == "host":
        x, rest = divmod(part.where[1], 2 * BLOCK)
        y, z = divmod(rest, BLOCK)
        return [chip_in_block(2 * x + i, 2 * y + j, z) for i in range(2) for j in range(2)]
    return []
