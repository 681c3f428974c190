"""The parts of a pod that fail or are drained, and the rule by which TPU v4's fibres are laid.

A block's chips are (x, y, z), each 0 .. 3. Of each of its six faces, 16 links leave by fibre. The
link at place (i, j) of the faces across dimension d (i and j being the chip's other two
coordinates, in the order x, y, z) goes to the optical switch (d, i, j): 3 x 16 = 48 switches, each
with one fibre of the + face and one of the - face of every block (Jouppi et al., ISCA 2023).

Port b of a switch takes the + fibre of block b, port num_blocks + b its - fibre, and the last
ports are spares.
"""

import re
from typing import NamedTuple

from topology.hardware import TPU_V4, Block, BlockPod, Pod, SwitchedPod, switched
from topology.numbers import whole
from topology.torus.shapes import DIMENSIONS


class Switch(NamedTuple):
    """The optical switch of place (i, j) of the faces across dimension d (0, 1, 2 for x, y, z)."""

    d: int
    i: int
    j: int

    def __str__(self) -> str:
        return f"{DIMENSIONS[self.d]},{self.i},{self.j}"


def switches(pod: Pod) -> list[Switch]:
    """Lists all optical switches of a pod; ValueError where their wiring is not published."""
    places = range(switched(pod).block.side)
    return [Switch(d, i, j) for d in range(3) for i in places for j in places]


SWITCHES = switches(TPU_V4)


class Part(NamedTuple):
    """A part of a pod, written as `Part.parse` reads it.

    kind and where, on a pod of blocks:
      block (block,), host (block, host), chip (block, x, y, z);
      link (block, x, y, z, direction): the link that leaves that chip in a direction 0 .. 5 of
        +x, -x, +y, -y, +z, -z; inside the block a wire, at its face the fibre to the switch;
      ocs (d, i, j), port (d, i, j, port), of TPU v4.
    On a pod without blocks chip (x, y) and link (x, y, direction), counted in the slice.
    A host of a block has the 2x2x1 chips whose (x // 2, y // 2, z) counts to its number, row-major.
    """

    kind: str
    where: tuple[int, ...]

    def __str__(self) -> str:
        where = [str(n) for n in self.where]
        if self.kind in ("ocs", "port"):
            where[0] = DIMENSIONS[self.where[0]]
        if self.kind == "link":
            where[-1] = _DIRECTIONS[self.where[-1]]
        return f"{self.kind}:{','.join(where)}"

    @classmethod
    def parse(cls, text: str, pod: Pod) -> "Part":
        """The part that a text names: block:12, host:12,3, chip:12,0,1,3, link:12,0,1,3,+x,
        ocs:x,0,0 or port:x,0,0,17; on a pod without blocks chip:0,1 or link:0,1,+x, with a third
        coordinate where it has three dimensions.

        Raises:
          ValueError: the pod has no such part; says what it has.
        """
        kind, _, where = text.strip().partition(":")
        names = where.split(",")
        ranges = _ranges(pod, kind, f"part {text!r}")
        if len(names) != len(ranges):
            raise ValueError(f"part {text!r}: write it like {_examples(pod)[kind]}")
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
        """The block that it belongs to; None of a switch and its ports, and without blocks."""
        in_slice = len(self.where) < {"chip": 4, "link": 5}.get(self.kind, 0)
        return None if self.kind in ("ocs", "port") or in_slice else self.where[0]


_DIRECTIONS = [sign + d for d in DIMENSIONS for sign in "+-"]


_Range = tuple[str, int | tuple[str, ...]]
"""What a number of a part is, and how many or which there are."""


def _examples(pod: Pod) -> dict[str, str]:
    """{kind of part that the pod has: an example of it}."""
    if not isinstance(pod, BlockPod):
        chip = ",".join(("0", "1", "0")[: pod.dimensions])
        return {"chip": f"chip:{chip}", "link": f"link:{chip},+x"}
    examples = {
        "block": "block:12",
        "host": "host:12,3",
        "chip": "chip:12,0,1,3",
        "link": "link:12,0,1,3,+x",
    }
    if isinstance(pod, SwitchedPod):
        examples |= {"ocs": "ocs:x,0,0", "port": "port:x,0,0,17"}
    return examples


def example_text(pod: Pod) -> str:
    """Examples of all kinds of parts that a pod has: "chip:0,1 or link:0,1,+x"."""
    *most, last = _examples(pod).values()
    return f"{', '.join(most)} or {last}"


def _ranges(pod: Pod, kind: str, name: str) -> list[_Range]:
    """The range of each number of a part of a kind.

    Raises:
      ValueError: the pod has no parts of this kind; begins with the name.
    """
    directions = _DIRECTIONS[: 2 * pod.dimensions]
    direction: _Range = ("direction", tuple(directions))
    kinds: dict[str, list[_Range]]
    if not isinstance(pod, BlockPod):
        longest = max(map(max, pod.shapes)) if pod.shapes else pod.largest_slice
        chip: list[_Range] = [("coordinate of a chip", longest)] * pod.dimensions
        kinds = {"chip": chip, "link": [*chip, direction]}
        if kind in ("block", "host", "ocs", "port"):
            raise ValueError(
                f"{name}: {pod.name} has neither blocks nor optical switches; write for example "
                f"{example_text(pod)}"
            )
    else:
        block: _Range = ("block", pod.num_blocks)
        chip = [("coordinate of a chip", pod.block.side)] * 3
        kinds = {
            "block": [block],
            "host": [block, ("host of a block", pod.block.hosts)],
            "chip": [block, *chip],
            "link": [block, *chip, direction],
        }
        if kind in ("ocs", "port"):
            place: _Range = ("place in a face", pod.block.side)
            switch: list[_Range] = [("dimension", tuple(DIMENSIONS)), place, place]
            ports = switched(pod).switch.ports
            kinds |= {"ocs": switch, "port": [*switch, ("port", ports)]}
    if kind not in kinds:
        raise ValueError(f"{name}: no such kind; write for example {example_text(pod)}")
    return kinds[kind]


def check_part(part: Part, pod: Pod) -> Part:
    """Checks the numbers of a part, and returns it with them as ints.

    Raises:
      ValueError: the pod has no such part.
    """
    named = isinstance(part, Part) and isinstance(part.kind, str)
    if not named or not isinstance(part.where, tuple):
        raise ValueError(
            f"part {part!r}: is no Part; Part.parse reads for example {example_text(pod)}"
        )
    ranges = _ranges(pod, part.kind, f"part {tuple(part)}")
    if len(ranges) != len(part.where):
        raise ValueError(f"part {tuple(part)}: no such part; for example {example_text(pod)}")
    where = []
    for value, (what, allowed) in zip(part.where, ranges, strict=True):
        count = allowed if isinstance(allowed, int) else len(allowed)
        where.append(whole(f"part {part.kind} {part.where}: {what}", value, most=count - 1))
    return Part(part.kind, tuple(where))


def chip_in_block(block: Block, x: int, y: int, z: int) -> int:
    """The index of a chip in its block: row-major, z the fastest."""
    return (x * block.side + y) * block.side + z


def host_in_block(block: Block, chip: int) -> int:
    """The number, in its block, of the host of a chip (see `Part`)."""
    x, rest = divmod(chip, block.side**2)
    y, z = divmod(rest, block.side)
    return (x // 2 * (block.side // 2) + y // 2) * block.side + z


def ends_of(block: Block) -> int:
    """Link ends of a block: 6 directions of each chip."""
    return 6 * block.chips


def link_end(pod: BlockPod, block: int, chip: int, direction: int) -> int:
    """The number of the end of a link at a chip: 6 * (64 * block + chip in block) + direction."""
    return block * ends_of(pod.block) + 6 * chip + direction


def fibre_end(switch: Switch, port: int, pod: BlockPod) -> int:
    """The link end whose fibre is laid to a port of a switch that is no spare one."""
    minus, block = divmod(port, pod.num_blocks)
    return link_end(pod, block, face_chip(pod.block, switch, minus), 2 * switch.d + minus)


def face_chip(block: Block, switch: Switch, minus: int = 0) -> int:
    """The index, in its block, of the chip whose + (or -) link goes to a switch."""
    chip = [switch.i, switch.j]
    chip.insert(switch.d, 0 if minus else block.side - 1)
    return chip_in_block(block, *chip)


def chips_of(part: Part, block: Block) -> list[int]:
    """The chips, by index in their block, that are lost with a part; none of links and switches."""
    if part.kind == "block":
        return list(range(block.chips))
    if part.kind == "chip":
        return [chip_in_block(block, *part.where[1:])]
    if part.kind == "host":
        x, rest = divmod(part.where[1], block.side // 2 * block.side)
        y, z = divmod(rest, block.side)
        return [chip_in_block(block, 2 * x + i, 2 * y + j, z) for i in range(2) for j in range(2)]
    return []
