"""The optical fabric of a pod: slices on blocks, and the cross-connects that make them.

A `Fabric` is never changed: every function gives a new one. What a configuration really connects
is found, and proved, by following the light: `topology.fabric.light`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from topology.arrays import Integers
from topology.fabric.parts import Part, Switch, check_part, switches
from topology.hardware import TPU_V4, BlockPod, OpticalSwitch, block_of, of_blocks, switch_of
from topology.numbers import whole
from topology.torus.shapes import legal_shapes, nearest_shape, times
from topology.torus.slices import Slice, check_same_pod

Connects = Mapping[Switch, Mapping[int, int]]
"""{switch: {port of a + fibre: port of a - fibre}}; the light goes both ways."""


@dataclass(frozen=True)
class Placement:
    """A slice and its blocks, row-major over `slice.block_shape`.

    A slice that is a part of a block takes the block, from its chip (0, 0, 0) on.

    Raises:
      ValueError: the blocks are not whole numbers, different, or as many as the slice has.
    """

    slice: Slice
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        blocks = tuple(whole(f"blocks of {self.slice}: block", b, most=10**9) for b in self.blocks)
        if len(set(blocks)) != self.slice.num_blocks or len(blocks) != self.slice.num_blocks:
            raise ValueError(
                f"blocks {_listed(blocks)}: {self.slice} takes {self.slice.num_blocks} different "
                f"blocks, {len(set(blocks))} given"
            )
        object.__setattr__(self, "blocks", blocks)

    @property
    def chips(self) -> Integers:
        """int [N]: of every chip of the slice, 64 * block + its index in the block."""
        of = block_of(self.slice.pod)
        block, chip = np.divmod(self.slice.coordinates, of.side)
        block = np.ravel_multi_index(tuple(block.T), self.slice.block_shape)
        chips = np.array(self.blocks)[block] * of.chips + chip @ (of.side**2, of.side, 1)
        return np.asarray(chips)


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """State of a pod's fabric: its slices, cross-connects and failed parts.

    Where it is not published how the switches are wired (TPU v5p), slices have their blocks, and
    there are no cross-connects; what asks for those raises a ValueError.

    Attributes:
      placements: the slices, by name.
      connects: the cross-connects that the switches are told to hold.
      patches: {(switch, port by the wiring rule): the spare port to which the fibre was moved}.
      failed: parts that pass no light.
      drained: blocks and switches out of use for maintenance.

    Raises:
      ValueError: the pod is not made of blocks, a slice is of another pod, or the pod has no such
        block, switch, port or part.
    """

    pod: BlockPod = TPU_V4
    placements: Mapping[str, Placement] = field(default_factory=dict)
    connects: Connects = field(default_factory=dict)
    patches: Mapping[tuple[Switch, int], int] = field(default_factory=dict)
    failed: frozenset[Part] = frozenset()
    drained: frozenset[Part] = frozenset()

    def __post_init__(self) -> None:
        of_blocks(self.pod)
        for name, placement in self.placements.items():
            check_same_pod(placement.slice, self.pod)
            for block in placement.blocks:
                whole(f"slice {name!r}: block", block, most=self.pod.num_blocks - 1)
        for switch, held in self.connects.items():
            self._check_ports(switch, {*held, *held.values()})
        for (switch, port), spare in self.patches.items():
            self._check_ports(switch, {port, spare})
        for name in ("failed", "drained"):
            parts = frozenset(check_part(part, self.pod) for part in getattr(self, name))
            object.__setattr__(self, name, parts)

    def _check_ports(self, switch: Switch, ports: Iterable[int]) -> None:
        check_part(Part("ocs", tuple(switch)), self.pod)
        there = range(switch_of(self.pod).ports)
        if wrong := [port for port in ports if port not in there]:
            raise ValueError(f"ocs {switch}: no port {wrong[0]}; there are 0 .. {len(there) - 1}")

    @property
    def unhealthy_blocks(self) -> set[int]:
        """Blocks that are drained, or have a failed chip, host or link; switches are not theirs."""
        blocks = {part.block for part in self.failed | self.drained}
        return {block for block in blocks if block is not None}

    @property
    def free_blocks(self) -> list[int]:
        """Healthy blocks that no slice has, ascending."""
        used = {block for placement in self.placements.values() for block in placement.blocks}
        return [b for b in range(self.pod.num_blocks) if b not in used | self.unhealthy_blocks]

    def port(self, switch: Switch, port: int) -> int:
        """Port that holds the fibre which the wiring rule lays to `port`: that one, or a spare."""
        return self.patches.get((switch, port), port)


@dataclass(frozen=True)
class Changes:
    """Cross-connects to break and then to make, by switch."""

    breaks: Connects
    makes: Connects

    @property
    def num_breaks(self) -> int:
        return sum(map(len, self.breaks.values()))

    @property
    def num_makes(self) -> int:
        return sum(map(len, self.makes.values()))

    def seconds(self, switch: OpticalSwitch, at_a_time: int | None = None) -> float:
        """Seconds until all mirrors of the changed cross-connects have settled.

        The switches work at the same time, and each moves `at_a_time` connections together (all of
        them by default), a break and a make in one move. That links come up again takes a time
        that is not published; add it where it is known.
        """
        if at_a_time is not None:
            whole("at_a_time", at_a_time, least=1)
        moves = [
            max(len(self.breaks.get(s, ())), len(self.makes.get(s, ())))
            for s in self.breaks.keys() | self.makes.keys()
        ]
        rounds = [1 if at_a_time is None else -(-n // at_a_time) for n in moves]
        return switch.switching_seconds * max(rounds, default=0)


@dataclass(frozen=True)
class Drained:
    """Result of a maintenance drain: the fabric after it, blocks moved as {slice: (from, to)}, and
    the slices that go on with fewer links, to be routed around."""

    fabric: Fabric
    moves: Mapping[str, tuple[int, int]]
    reroutes: tuple[str, ...]


Policy = Callable[[Fabric, list[int], int], Sequence[int]]
"""(fabric, free healthy blocks, how many) -> the blocks to take. Any do: switches reach all."""


def lowest_numbered(fabric: Fabric, free: list[int], count: int) -> Sequence[int]:
    return free[:count]


def choose(fabric: Fabric, slice: Slice, policy: Policy = lowest_numbered) -> tuple[int, ...]:
    """Chooses free healthy blocks for a slice.

    Raises:
      ValueError: there are too few; names the nearest shape that fits.
    """
    check_same_pod(slice, fabric.pod)
    free, total = fabric.free_blocks, fabric.pod.num_blocks
    if slice.num_blocks <= len(free):
        return tuple(policy(fabric, free, slice.num_blocks))
    state = f"{len(free)} of {total} are free and healthy"
    fits = legal_shapes(len(free), fabric.pod) if free else []
    nearest = nearest_shape(slice.shape, among=fits, pod=fabric.pod) if fits else None
    advice = f"the nearest that fits is {times(nearest)}" if nearest else "release a slice first"
    blocks = "1 block" if slice.num_blocks == 1 else f"{slice.num_blocks} blocks"
    raise ValueError(f"slice {slice}: needs {blocks}, {state}; {advice}")


def connects_of(fabric: Fabric, placement: Placement) -> dict[Switch, dict[int, int]]:
    """The cross-connects that make a slice of its blocks; none in drained switches, and none where
    the wiring of switches is not published.

    The + face of a block at the place p is joined to the - face of the block at p + e_d, modulo the
    slice's lattice, alike in all 16 switches of d.
    """
    slice, blocks = placement.slice, np.array(placement.blocks)
    connects: dict[Switch, dict[int, int]] = {}
    if not slice.is_whole_blocks or fabric.pod.switch is None:
        return connects
    places, side = np.indices(slice.block_shape).reshape(3, -1).T, fabric.pod.block.side
    for d in range(3):
        to = slice.reduce((places + np.eye(3, dtype=int)[d]) * side) // side
        inside = to[:, d] < slice.block_shape[d]  # the last place of a dimension without wraparound
        to = blocks[np.ravel_multi_index(tuple(to[inside].T), slice.block_shape)]
        pairs = list(zip(blocks[inside].tolist(), to.tolist(), strict=True))
        for switch in switches(fabric.pod):
            if switch.d == d and pairs and Part("ocs", tuple(switch)) not in fabric.drained:
                connects[switch] = {
                    fabric.port(switch, a): fabric.port(switch, fabric.pod.num_blocks + b)
                    for a, b in pairs
                }
    return connects


def place(
    fabric: Fabric,
    name: str,
    slice: Slice,
    blocks: Sequence[int] | None = None,
    policy: Policy = lowest_numbered,
) -> Fabric:
    """Returns the fabric with one more slice.

    Args:
      blocks: row-major over `slice.block_shape`; None lets the policy choose.

    Raises:
      ValueError: the name is taken, the blocks are not free, not healthy, not as many as the slice
        needs, or a port is in use.
    """
    if name in fabric.placements:
        raise ValueError(f"slice {name!r}: the name is taken; release that slice or take another")
    placement = Placement(slice, tuple(choose(fabric, slice, policy) if blocks is None else blocks))
    free = fabric.free_blocks
    for block in placement.blocks:
        if block not in free:
            raise ValueError(
                f"slice {name!r}: block {block} {_why_not(fabric, block)}; "
                f"free and healthy are {_listed(free)}"
            )
    fabric = apply(fabric, Changes({}, connects_of(fabric, placement)))
    return replace(fabric, placements={**fabric.placements, name: placement})


def release(fabric: Fabric, name: str) -> Fabric:
    """The fabric without a slice and its cross-connects."""
    placement = placement_of(fabric, name)
    rest = {n: p for n, p in fabric.placements.items() if n != name}
    held = {
        switch: {out: into for out, into in connects.items() if _held(fabric, switch, out, into)}
        for switch, connects in connects_of(fabric, placement).items()
    }
    return replace(apply(fabric, Changes(held, {})), placements=rest)


def replace_block(
    fabric: Fabric, name: str, old: int, new: int | None = None, policy: Policy = lowest_numbered
) -> Fabric:
    """The fabric in which another block takes the place of one of a slice; the others stay.

    Raises:
      ValueError: the slice does not have the block, or no free healthy one is there.
    """
    placement = placement_of(fabric, name)
    last = fabric.pod.num_blocks - 1
    old = whole(f"slice {name!r}: block", old, most=last)
    if old not in placement.blocks:
        raise ValueError(
            f"slice {name!r}: block {old} is not one of its blocks {_listed(placement.blocks)}"
        )
    if new is None:
        one = Slice(shape=fabric.pod.block.shape, pod=fabric.pod)
        new = choose(fabric, one, policy)[0]
    new = whole(f"slice {name!r}: block", new, most=last)
    free = [b for b in fabric.free_blocks if b != old]
    if new not in free:
        raise ValueError(
            f"slice {name!r}: block {new} {_why_not(fabric, new)}; "
            f"free and healthy are {_listed(free)}"
        )
    blocks = tuple(new if b == old else b for b in placement.blocks)
    without = release(fabric, name)
    moved = Placement(placement.slice, blocks)
    fabric = apply(without, Changes({}, connects_of(without, moved)))
    return replace(fabric, placements={**without.placements, name: moved})


def reconfigure(old: Fabric, new: Fabric) -> Changes:
    """The fewest cross-connects to break and to make that turn one fabric into the other."""

    def only(connects: Connects, others: Connects) -> Connects:
        found = {
            switch: {a: b for a, b in held.items() if others.get(switch, {}).get(a) != b}
            for switch, held in connects.items()
        }
        return {switch: held for switch, held in found.items() if held}

    return Changes(only(old.connects, new.connects), only(new.connects, old.connects))


def apply(fabric: Fabric, changes: Changes) -> Fabric:
    """The fabric with cross-connects broken and then made; its slices are as they were.

    Raises:
      ValueError: one to break is not there, or one to make uses a port that is in use or not there.
    """
    connects = {switch: dict(held) for switch, held in fabric.connects.items()}
    for switch, broken in changes.breaks.items():
        for out, into in broken.items():
            if connects.get(switch, {}).get(out) != into:
                raise ValueError(f"ocs {switch}: ports {out} and {into} are not joined")
            del connects[switch][out]
    for switch, made in changes.makes.items():
        held = connects.setdefault(switch, {})
        joined = dict(held) | {into: out for out, into in held.items()}
        for out, into in made.items():
            for port, other in ((out, into), (into, out)):
                if port in joined or out == into:
                    raise ValueError(
                        f"ocs {switch}: port {port} is already joined to {joined.get(port, port)}; "
                        f"break that before joining it to {other}"
                    )
            joined |= {out: into, into: out}
            held[out] = into
    return replace(fabric, connects={switch: held for switch, held in connects.items() if held})


def fail(fabric: Fabric, part: Part) -> Fabric:
    """The fabric with one more part that passes no light; nothing is switched.

    Raises:
      ValueError: the pod has no such part.
    """
    return replace(fabric, failed=fabric.failed | {check_part(part, fabric.pod)})


def repair(fabric: Fabric, part: Part) -> Fabric:
    """The fabric with a part neither failed nor drained; a drained switch gets its slices back."""
    part = check_part(part, fabric.pod)
    fabric = replace(fabric, failed=fabric.failed - {part}, drained=fabric.drained - {part})
    if part.kind != "ocs":
        return fabric
    switch, missing = Switch(*part.where), dict[int, int]()
    for placement in fabric.placements.values():
        for out, into in connects_of(fabric, placement).get(switch, {}).items():
            if not _held(fabric, switch, out, into):
                missing[out] = into
    return apply(fabric, Changes({}, {switch: missing}))


def patch(fabric: Fabric, part: Part) -> Fabric:
    """The fabric in which the fibre at a port was moved, with its cross-connect, to a spare port.

    Raises:
      ValueError: no fibre is at the port, or no spare port of the switch is left.
    """
    part = check_part(part, fabric.pod)
    if part.kind != "port":
        raise ValueError(f"part {part}: give a port, such as port:x,0,0,17")
    *where, port = part.where
    switch, total = Switch(*where), 2 * fabric.pod.num_blocks
    ports = switch_of(fabric.pod).ports
    lost = {p.where[3] for p in fabric.failed if p.kind == "port" and p.where[:3] == switch}
    used = {spare for (s, _), spare in fabric.patches.items() if s == switch}
    home = [h for h in range(total) if fabric.port(switch, h) == port]
    if not home:
        raise ValueError(f"{part}: no fibre is at this port; blocks have 0 .. {total - 1}")
    spares = [p for p in range(total, ports) if p not in lost | used | {port}]
    if not spares:
        raise ValueError(
            f"{part}: no spare port of ocs {switch} is left; repair one of {sorted(lost)}"
        )

    def moved(end: int) -> int:
        return spares[0] if end == port else end

    connects = dict(fabric.connects)
    if held := fabric.connects.get(switch):
        connects[switch] = {moved(a): moved(b) for a, b in held.items()}
    patches = {**fabric.patches, (switch, home[0]): spares[0]}
    return replace(fabric, connects=connects, patches=patches)


def drain(fabric: Fabric, part: Part, policy: Policy = lowest_numbered) -> Drained:
    """Takes a block (also that of a chip, host or link) or a switch out of use for maintenance.

    A slice on the block gets another, free and healthy one. No other switch sees the fibres of a
    drained one, so slices that use it go on with links fewer. A drained port is patched.

    Raises:
      ValueError: no block or no spare port is there to move to.
    """
    part = check_part(part, fabric.pod)
    if part.kind == "port":
        return Drained(patch(fabric, part), {}, ())
    if part.kind == "ocs":
        switch = Switch(*part.where)
        mine = {n: connects_of(fabric, p).get(switch, {}) for n, p in fabric.placements.items()}
        rest = {s: held for s, held in fabric.connects.items() if s != switch}
        new = replace(fabric, connects=rest, drained=fabric.drained | {part})
        return Drained(new, {}, tuple(name for name, connects in mine.items() if connects))
    block = part.where[0]
    fabric = replace(fabric, drained=fabric.drained | {Part("block", (block,))})
    for name, placement in fabric.placements.items():
        if block in placement.blocks:
            new = replace_block(fabric, name, block, policy=policy)
            taken = new.placements[name].blocks[placement.blocks.index(block)]
            return Drained(new, {name: (block, taken)}, ())
    return Drained(fabric, {}, ())


def boxes(block_shape: Sequence[int], grid: Sequence[int]) -> Integers:
    """int [B, n]: the blocks of every contiguous box of a shape, turned any way, in a fixed grid.

    Blocks of the grid are numbered row-major. This is what a pod without optical switches has to
    choose from; B is 0 where the box does not fit.

    Raises:
      ValueError: a shape or a grid is not three whole numbers from 1.
    """
    block_shape = tuple(whole("block_shape", k, least=1, most=256) for k in block_shape)
    grid = tuple(whole("grid", k, least=1, most=256) for k in grid)
    for name, sizes in (("block_shape", block_shape), ("grid", grid)):
        if len(sizes) != 3:
            raise ValueError(f"{name} {sizes}: blocks along x, y and z")
    found: set[tuple[int, ...]] = set()
    for shape in {tuple(block_shape[d] for d in order) for order in _ORDERS}:
        if any(s > g for s, g in zip(shape, grid, strict=True)):
            continue
        inside = np.indices(shape).reshape(3, -1).T
        for corner in np.ndindex(*(g - s + 1 for g, s in zip(grid, shape, strict=True))):
            found.add(tuple(np.ravel_multi_index(tuple((inside + corner).T), grid).tolist()))
    return np.array(sorted(found), int).reshape(len(found), int(np.prod(block_shape)))


_ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


def placement_of(fabric: Fabric, name: str) -> Placement:
    if name not in fabric.placements:
        there = ", ".join(map(repr, fabric.placements)) or "none"
        raise ValueError(f"slice {name!r}: no such slice; there are {there}")
    return fabric.placements[name]


def _held(fabric: Fabric, switch: Switch, out: int, into: int) -> bool:
    return fabric.connects.get(switch, {}).get(out) == into


def _why_not(fabric: Fabric, block: int) -> str:
    for name, placement in fabric.placements.items():
        if block in placement.blocks:
            return f"is in slice {name!r}"
    for part in sorted(fabric.failed | fabric.drained):
        if part.block == block:
            return f"is not healthy ({part} {'failed' if part in fabric.failed else 'drained'})"
    return f"is none of the blocks 0 .. {fabric.pod.num_blocks - 1}"


def _listed(blocks: Collection[int]) -> str:
    shown = ", ".join(map(str, list(blocks)[:8]))
    return (shown + (f" and {len(blocks) - 8} more" if len(blocks) > 8 else "")) or "none"
