"""Contents of a picture of a slice or of a pod's fabric: places, links, loads, failures, as data.

Nothing here draws: `topology.drawing.page` makes an interactive page of a scene,
`topology.drawing.picture` a PNG.
Places are in units of the distance between neighbouring chips of a block; the middle is at 0.
"""

import colorsys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topology.arrays import Booleans, Floats, Integers
from topology.fabric.fabric import Fabric
from topology.fabric.light import trace
from topology.fabric.losses import lost
from topology.fabric.parts import Part, Switch, face_chip, switches
from topology.hardware import switch_of
from topology.routing.flows import Flow
from topology.routing.loads import link_loads
from topology.routing.routing import dimension_order, direction_loads
from topology.routing.throughput import all_to_all, is_cut, is_quick
from topology.torus.shapes import DIMENSIONS, Shape
from topology.torus.slices import Slice

KINDS = ("inner", "wrap", "twist")
OPTIMUM = "best routing"
DIMENSION_ORDER = "dimension order"
LIT = "fibres lit, of 16"
NO_SLICE = "in no slice"
PORT_STATES = ("free", "used", "spare", "failed")

# Colours read on white and on near-black.
LOAD_COLOURS = ("#3f7fe0", "#27a9b0", "#d9a514", "#ea5f0d")  # from no load to the largest
KIND_COLOURS = ("#7c8aa0", "#1f9d76", "#8b5cf6")
FREE_COLOUR = "#8b95a5"
FAILED_COLOUR = "#e0006f"

TIME_LIMIT = 20.0
"""Seconds for the best routing around failures."""

MANY = 800
"""Links; in a picture of more, wraps and twists are drawn as their two ends at first."""

_GAP = 1.0  # between blocks, beside the distance of two chips
_SPACING = 2.0  # of blocks in a picture of a fabric


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Drawing of N nodes (chips, or blocks) and L links, each link once for both directions.

    Attributes:
      nodes: what a node is, such as "chip".
      radius: half the side of a node's cube.
      labels: of the nodes.
      positions: float [N, 3].
      groups: int [N], into group_names; what a node belongs to.
      node_failed: bool [N].
      links: int [L, 2]; a link leaves its first node in + direction and enters the second.
      dimensions: int [L], 0, 1 or 2.
      kinds: int [L], into KINDS: a wrap leads from the end of a dimension to its beginning, a twist
        does so with a shift along another.
      controls: float [L, 2, 3]; a link is drawn as the cubic Bezier curve from its first node by
        these two points to its second.
      link_failed: bool [L].
      values: {what is measured: float [L, 2]}, in the direction of the link and back.
      captions: texts with their places, float [3].
    """

    title: str
    nodes: str
    radius: float
    labels: tuple[str, ...]
    positions: Floats
    groups: Integers
    group_names: tuple[str, ...]
    node_failed: Booleans
    links: Integers
    dimensions: Integers
    kinds: Integers
    controls: Floats
    link_failed: Booleans
    values: Mapping[str, Floats]
    captions: tuple[tuple[str, Floats], ...]


def optimum(
    slice: Slice,
    failed_links: npt.ArrayLike = (),
    *,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[float, float], object] | None = None,
) -> Flow | None:
    """`throughput.all_to_all` in seconds, or None where even a first routing would take minutes.

    That is around failures of a large slice that leave few of its symmetries, such as a single
    link's; one optical switch leaves enough. Where the time limit ends the search, the best found
    by then and its bound.

    Raises:
      ValueError: the failures cut the slice in two.
    """
    failed = np.asarray(failed_links, int)
    if not is_quick(slice, failed):
        return None
    return all_to_all(slice, failed, time_limit=time_limit, progress=progress)


def slice_scene(slice: Slice, parts: Iterable[Part] = (), flow: Flow | None = None) -> Scene:
    """The chips of a slice and their links, with the load of uniform all-to-all on each.

    Args:
      parts: that failed (see `lost`). Around failed links `values` has only the optimum, or nothing
        where that is None or the slice is cut in two; where chips are lost the slice does not run,
        and the loads are those that it has when whole.
      flow: the optimum, where the caller has it.

    Raises:
      ValueError: a part is none of the slice's.
    """
    chips, failed = lost(slice, parts)
    around = failed if not chips.size else failed[:0]
    if flow is None and not is_cut(slice, around):
        flow = optimum(slice, around)
    loads = {} if flow is None else {OPTIMUM: flow.loads}
    if slice.num_chips == 1:
        loads = {}
    elif not around.size:
        loads[DIMENSION_ORDER] = _dimension_order_loads(slice)

    places, block = slice.coordinates, slice.pod.block
    apart = 0 if block is None else _GAP * (places // block.side)
    box = _box(slice, slice.shape, slice.neighbours[:, ::2], places + apart)
    (tails, heads), forward = box.links.T, 2 * box.dimensions
    ahead, back = 6 * tails + forward, 6 * heads + forward + 1
    low, high = box.positions.min(axis=0), box.positions.max(axis=0)
    corner = low - 0.8
    ends = [np.where(np.arange(3) == d, high + 0.6, corner) for d in range(3)]
    return Scene(
        title=str(slice),
        nodes="chip",
        radius=0.17,
        labels=_chip_labels(slice),
        groups=np.zeros(slice.num_chips, int),
        group_names=("chip",),
        node_failed=np.isin(np.arange(slice.num_chips), chips),
        link_failed=np.isin(ahead, failed) | np.isin(back, failed),
        values={
            name: np.column_stack([load.ravel()[ahead], load.ravel()[back]])
            for name, load in loads.items()
        },
        captions=(
            ("0", corner),
            *(
                (f"{d} = {k - 1}", end)
                for d, k, end in zip(DIMENSIONS, slice.shape, ends, strict=True)
                if k > 1
            ),
        ),
        **vars(box),
    )


def fabric_scene(fabric: Fabric) -> Scene:
    """The blocks of a pod: every slice as its own torus of blocks, and beside them the free ones.

    A link stands for the 16 fibres between two faces, one through each switch of a dimension;
    `values` counts those that carry light, and it is failed where some do not.
    """
    block, lanes = fabric.pod.block, switches(fabric.pod)
    far = trace(fabric).reshape(-1, block.chips, 6)
    used = {block for placement in fabric.placements.values() for block in placement.blocks}
    rest = [block for block in range(fabric.pod.num_blocks) if block not in used]
    order: list[int] = []
    boxes, lit, captions = list[_Box](), list[int](), list[str]()
    for name, placement in fabric.placements.items():
        slice, blocks = placement.slice, np.array(placement.blocks)
        places = np.indices(slice.block_shape).reshape(3, -1).T
        ahead = np.full((len(places), 3), -1)
        if slice.is_whole_blocks:
            for d in range(3):
                ahead_of = (places + np.eye(3, dtype=int)[d]) * block.side
                to = slice.reduce(ahead_of) // block.side
                inside = to[:, d] < slice.block_shape[d]
                ahead[inside, d] = np.ravel_multi_index(tuple(to[inside].T), slice.block_shape)
        box = _box(slice, slice.block_shape, ahead, _SPACING * places)
        for (tail, _), d in zip(box.links, box.dimensions, strict=True):
            mine = [face_chip(block, s) for s in lanes if s.d == d]
            lit.append(int((far[blocks[tail], mine, 2 * d] >= 0).sum()))
        # The longest dimension lies across, the shortest in depth.
        turn = np.argsort(-np.array(slice.block_shape), kind="stable")
        box.positions, box.controls = box.positions[:, turn], box.controls[:, :, turn]
        boxes.append(box)
        order.extend(placement.blocks)
        captions.append(f"{name}: {slice}")
    if rest:
        columns = int(np.ceil(np.sqrt(2.5 * len(rest))))
        sheet = np.array([(i % columns, -(i // columns), 0) for i in range(len(rest))]) * 0.8
        boxes.append(_unlinked(_SPACING * sheet))
        order.extend(rest)
        captions.append(NO_SLICE)
    groups = np.repeat(np.arange(len(boxes)), [len(box.positions) for box in boxes])
    tops = _lay_out(boxes)
    first = np.cumsum([0] + [len(box.positions) for box in boxes[:-1]])
    for box, start in zip(boxes, first, strict=True):
        box.links = box.links + start
    whole = {key: np.concatenate([getattr(box, key) for box in boxes]) for key in vars(boxes[0])}
    fibres = np.array(lit, float)
    return Scene(
        title="fabric",
        nodes="block",
        radius=0.5,
        labels=tuple(f"block {block}" for block in order),
        groups=groups,
        group_names=tuple(captions),
        node_failed=np.isin(order, sorted(fabric.unhealthy_blocks)),
        link_failed=fibres < block.side**2,
        values={LIT: np.column_stack([fibres, fibres])},
        captions=tuple(zip(captions, tops, strict=True)),
        **whole,
    )


def slice_colour(number: int) -> str:
    """The colour of a pod's slice, counted from 0: "#rrggbb"."""
    hue = (0.58 + 0.381966 * number) % 1  # steps of the golden angle keep neighbours apart
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, 0.52, 0.55))


def group_colours(scene: Scene) -> list[str]:
    """A colour for each of `group_names`; the blocks in no slice, and chips, are grey."""
    return [
        FREE_COLOUR if name in ("chip", NO_SLICE) else slice_colour(g)
        for g, name in enumerate(scene.group_names)
    ]


def port_states(fabric: Fabric) -> Integers:
    """int [48, ports], into PORT_STATES: what each port of each of `parts.switches` does.

    Used are those that a cross-connect joins; free ones have a fibre of a block, spare ones none.
    """
    ports, spares = switch_of(fabric.pod).ports, 2 * fabric.pod.num_blocks
    rows = {switch: row for row, switch in enumerate(switches(fabric.pod))}
    states = np.zeros((len(rows), ports), int)
    states[:, spares:] = PORT_STATES.index("spare")
    for (switch, _), port in fabric.patches.items():
        states[rows[switch], port] = PORT_STATES.index("free")
    for switch, held in fabric.connects.items():
        states[rows[switch], [*held, *held.values()]] = PORT_STATES.index("used")
    for part in fabric.failed:
        if part.kind == "ocs":
            states[rows[Switch(*part.where)]] = PORT_STATES.index("failed")
        if part.kind == "port":
            states[rows[Switch(*part.where[:3])], part.where[3]] = PORT_STATES.index("failed")
    return states


def curves(scene: Scene, points: int = 2) -> Floats:
    """float [L, points, 3]: points along every link, from its first node to its second."""
    t = np.linspace(0, 1, points)
    weights = np.column_stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    ends = scene.positions[scene.links]
    corners = np.concatenate([ends[:, :1], scene.controls, ends[:, 1:]], axis=1)
    return np.asarray(np.einsum("pc,lcd->lpd", weights, corners))


def stubs(scene: Scene) -> Floats:
    """float [L, 3]: where a wrap or twist leaves the box, as a vector from its first node.

    It points ahead, and aside where the link is shifted; at the second node its negative.
    """
    step: Floats = scene.positions[scene.links[:, 1]] - scene.positions[scene.links[:, 0]]
    rows = np.arange(len(step))
    step[rows, scene.dimensions] = 0
    length = np.linalg.norm(step, axis=1, keepdims=True)
    out = 0.6 * step / np.where(length > 0, length, 1)
    out[rows, scene.dimensions] = 0.9
    return np.asarray(out)


def _chip_labels(slice: Slice) -> tuple[str, ...]:
    places, block = slice.coordinates, slice.pod.block
    if block is None:
        return tuple(f"chip ({x}, {y})" for x, y, _ in places.tolist())
    blocks = np.ravel_multi_index(tuple((places // block.side).T), slice.block_shape)
    return tuple(
        f"chip ({x}, {y}, {z}), block {b}"
        for (x, y, z), b in zip(places.tolist(), blocks.tolist(), strict=True)
    )


def _dimension_order_loads(slice: Slice) -> Floats:
    """float [N, 6]: when each chip sends one unit to every other."""
    routing = dimension_order(slice)
    if slice.is_torus:
        return np.tile(direction_loads(routing), (slice.num_chips, 1))
    return link_loads(slice, routing, np.ones((slice.num_chips,) * 2))


@dataclass
class _Box:
    """Nodes and their links, as in `Scene`."""

    positions: Floats
    links: Integers
    dimensions: Integers
    kinds: Integers
    controls: Floats


def _unlinked(positions: Floats) -> _Box:
    """Nodes without links, their middle at 0."""
    middle = (positions.min(axis=0) + positions.max(axis=0)) / 2
    nothing = np.zeros(0, int)
    return _Box(
        positions=positions - middle,
        links=np.zeros((0, 2), int),
        dimensions=nothing,
        kinds=nothing,
        controls=np.zeros((0, 2, 3)),
    )


def _box(slice: Slice, shape: Shape, ahead: Integers, positions: Floats) -> _Box:
    """A box of nodes, row-major, its middle at 0.

    Args:
      ahead: int [N, 3], the node one step along +x, +y and +z; -1 where there is none.
    """
    low, high = positions.min(axis=0), positions.max(axis=0)
    positions = positions - (low + high) / 2
    tails, dimensions = np.nonzero(ahead >= 0)
    heads = ahead[tails, dimensions]
    places = np.indices(shape).reshape(3, -1).T
    step = places[heads] - places[tails]
    ring = np.array(shape)[dimensions]
    along = step[np.arange(len(tails)), dimensions]
    beside = np.abs(step).sum(axis=1) - np.abs(along)
    wraps = places[tails, dimensions] == ring - 1
    kinds = np.where(wraps, np.where(beside > 0, 2, 1), 0)
    controls = np.stack(
        [positions[tails] * (1 - t) + positions[heads] * t for t in (1 / 3, 2 / 3)],
        axis=1,
    )
    half = (high - low) / 2
    for d in range(3):
        mine = np.flatnonzero(wraps & (dimensions == d))
        if mine.size:
            controls[mine] = _hoops(slice, positions, half, tails[mine], heads[mine], d)
    return _Box(positions, np.column_stack([tails, heads]), dimensions, kinds, controls)


def _hoops(
    slice: Slice, positions: Floats, half: Floats, tails: Integers, heads: Integers, d: int
) -> Floats:
    """float [n, 2, 3]: controls of links that go around the outside of a box from +d to -d.

    They pass over the face that is nearest, and links of inner columns pass further out, so that
    hoops lie inside each other.
    """
    over = min(
        ((d + 1) % 3, (d + 2) % 3), key=lambda e: (slice.twist[d][e] != 0, round(float(half[e]), 6))
    )
    middle = (positions[tails, over] + positions[heads, over]) / 2
    side = np.where(middle == 0, np.sign(positions[tails, over] + 1e-9), np.sign(middle))
    depth = half[over] - side * middle
    height = half[over] + 1.2 + 0.65 * depth
    beyond = half[d] + 1.1 + 0.25 * depth
    controls = np.stack([positions[tails], positions[heads]], axis=1)
    controls[:, :, over] = (side * height)[:, None]
    controls[:, 0, d], controls[:, 1, d] = beyond, -beyond
    return controls


def _lay_out(boxes: list[_Box]) -> list[Floats]:
    """Moves boxes apart, in rows along x; gives the place of each one's caption."""
    # A curve comes to three quarters of the way to its control points.
    reach = [
        np.maximum(
            np.abs(box.positions).max(axis=0) + 0.5,
            0.75 * np.abs(box.controls).max(axis=(0, 1), initial=0),
        )
        for box in boxes
    ] + np.array((1.0, 1.2, 0))
    width = max(2 * reach[:, 0].max(), 1.3 * np.sqrt((4 * reach[:, 0] * reach[:, 1]).sum()))
    corners, x, y, row = [], 0.0, 0.0, 0.0
    for half in reach:
        if x and x + 2 * half[0] > width:
            x, y, row = 0.0, y - row, 0.0
        corners.append((x + half[0], y - half[1], 0))
        x, row = x + 2 * half[0], max(row, 2 * half[1])
    places = np.array(corners)
    low, high = (places - reach).min(axis=0), (places + reach).max(axis=0)
    places -= (low + high) / 2
    for box, place in zip(boxes, places, strict=True):
        box.positions = box.positions + place
        box.controls = box.controls + place
    tops = reach * (0, 1, 0) - (0, 0.45, 0)
    return list(places + tops)
