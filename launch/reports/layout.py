"""`torsion layout`: a mesh laid on a slice for given traffic, beside JAX's order and the bound."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.reports.documents import keyed, read_json, short
from launch.reports.failures import WHOLE, Lost, around_text
from launch.reports.sizes import parse_size, shown_size
from pjit_train.errors import UserError
from topology import Network, Slice, Traffic, groups_of_axes, lay_mesh, traffic_seconds
from topology.arrays import Integers
from topology.collectives.collectives import EFFICIENCIES, KINDS, lower_bounds
from topology.collectives.layout import Layout
from topology.hardware import Pod
from topology.numbers import choice, number

_KEYS = ("kind", "axes", "bytes", "count", "strategy")
_FILE = 'a JSON list of {"kind": "all_reduce", "axes": ["data"], "bytes": "64MiB"}'
_MOST_ENTRIES = 1000
_MOST_COUNT = 1e12


def read_traffic(name: str, mesh: Mapping[str, int]) -> list[Traffic]:
    """Reads the traffic of a file, over axes of a mesh.

    Raises:
      UserError: it holds none, or an entry is wrong; names the entry and the key.
    """
    document = read_json(name, _FILE)
    if not isinstance(document, list) or not document:
        raise UserError(f"{name}: holds no traffic; want {_FILE}")
    if len(document) > _MOST_ENTRIES:
        raise UserError(f"{name}: {len(document)} entries, {_MOST_ENTRIES} at most; use count")
    return [_entry(f"{name}: entry {i}", said, mesh) for i, said in enumerate(document, start=1)]


def _entry(where: str, said: Any, mesh: Mapping[str, int]) -> Traffic:
    said = keyed(where, said, _KEYS, _KEYS[:3])
    axes = said["axes"]
    if isinstance(axes, str):
        axes = [axis.strip() for axis in axes.split(",")]
    known = isinstance(axes, list) and all(isinstance(a, str) and a in mesh for a in axes)
    if not axes or not known or len(set(axes)) < len(axes):
        raise UserError(
            f"{where}: axes {short(said['axes'])}: want a list of axes of the mesh, each once: "
            f"{', '.join(mesh)}"
        )
    try:
        kind = choice(f"{where}: kind", said["kind"], KINDS)
        bytes = said["bytes"]
        if isinstance(bytes, str):
            bytes = parse_size(bytes, f"{where}: bytes")
        number(f"{where}: bytes", bytes, most=2**60, unit='a number, or such as "64MiB"')
        count = number(f"{where}: count", said.get("count", 1), above=0, most=_MOST_COUNT)
        strategy = said.get("strategy")
        if strategy is not None:
            choice(f"{where}: strategy", strategy, EFFICIENCIES)
        if kind == "permute" and len(axes) != 1:
            raise UserError(f"{where}: a permute over {', '.join(axes)}; it goes over one axis")
        return Traffic(kind=kind, axes=tuple(axes), bytes=bytes, count=count, strategy=strategy)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_mesh(text: str, chips: int) -> dict[str, int]:
    """Sizes by axis of a text such as `data=16,tensor=8`; one of them may be -1: what is left.

    Raises:
      UserError: it is no mesh of so many chips.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if not axis.isidentifier() or not re.fullmatch(r"[+-]?[0-9]{1,10}", size):
            raise UserError(f"--mesh {text}: {part!r} is no AXIS=SIZE, such as data=16")
        if axis in sizes:
            raise UserError(f"--mesh {text}: {axis} is given twice; give it one size")
        sizes[axis] = int(size)
    rest = [axis for axis, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1:
        raise UserError(f"--mesh {text}: one axis can be -1, not {' and '.join(rest)}")
    if rest and product > 0 and chips % product == 0:
        sizes[rest[0]] = chips // product
    elif rest or product != chips or min(sizes.values()) < 1:
        raise UserError(
            f"--mesh {text}: makes {product} devices{' and the rest' if rest else ''}, and the "
            f"slice has {chips} chips; let the product of the sizes be {chips}"
        )
    return sizes


def read_slice(shape: str, mesh: str, pod: Pod) -> tuple[Slice, dict[str, int]]:
    """The slice, and the mesh of all its chips; UserError where there are none such."""
    try:
        slice = Slice.parse(shape, pod)
    except ValueError as error:
        raise UserError(str(error)) from error
    return slice, read_mesh(mesh, slice.num_chips)


def report(
    slice: Slice,
    mesh: Mapping[str, int],
    traffic: Sequence[Traffic],
    lost: Lost = WHOLE,
) -> dict[str, Any]:
    """The layout of a mesh, as `torsion layout --json` prints it.

    Returns:
      `devices`: chip indices in the mesh's shape, row-major; chip x, y, z of a slice X x Y x Z is
      (x Y + y) Z + z. `axes`: of each mesh axis its digits, the outermost first: `size` chips, one
      after another by `vector`, hops along x, y and z. `seconds` of all the traffic;
      `bound_seconds` that no schedule on these groups goes below, and `any_layout_seconds` that
      none does on any layout: what a chip must receive or send, over all its links. `jax`: the same
      traffic in the order of `source`, `seconds` None where its groups are no translations of each
      other. `traffic`: each entry with these (all `count` times), and the `bound` that is the
      largest. With failures `failed` and `failed_one_way` name them, and `lost_links` counts the
      directed links that carry nothing.
    """
    links = lost.links
    layout = lay_mesh(slice, mesh, traffic, failed_links=links)
    network, names = Network.of(slice.pod), list(mesh)
    source, order = _jax_order(slice, mesh)
    rows = []
    for one, seconds in zip(traffic, layout.traffic_seconds, strict=True):
        groups = groups_of_axes(slice, layout.devices, [names.index(axis) for axis in one.axes])
        bounds = lower_bounds(one.kind, groups, one.bytes, network, failed_links=links)
        bound = max(bounds, key=lambda name: bounds[name])
        rows.append(
            {
                "kind": one.kind,
                "axes": list(one.axes),
                "bytes": one.bytes,
                "count": one.count,
                "members": groups.size,
                "seconds": seconds,
                "bound_seconds": one.count * bounds[bound],
                "bound": bound,
                "any_layout_seconds": one.count * bounds["chip"],
                "jax_seconds": _seconds(slice, mesh, order, one, links),
            }
        )
    theirs = [row["jax_seconds"] for row in rows]
    return {
        "pod": slice.pod.name,
        "slice": str(slice),
        "mesh": dict(mesh),
        "axes": _axes(layout),
        "seconds": layout.seconds,
        "bound_seconds": sum(row["bound_seconds"] for row in rows),
        "any_layout_seconds": sum(row["any_layout_seconds"] for row in rows),
        "jax": {
            "source": source,
            "seconds": None if None in theirs else sum(theirs),
            "devices": order.tolist(),
        },
        **lost.said(),
        "traffic": rows,
        "devices": layout.devices.tolist(),
    }


def _axes(layout: Layout) -> dict[str, list[dict[str, Any]]]:
    return {
        axis: [{"size": digit.size, "vector": list(digit.vector)} for digit in digits]
        for axis, digits in layout.axes.items()
    }


def _seconds(
    slice: Slice, mesh: Mapping[str, int], devices: Integers, one: Traffic, links: Sequence[int]
) -> float | None:
    try:
        return traffic_seconds(slice, mesh, devices, [one], failed_links=links)[0]
    except ValueError:  # groups that are no translations of each other
        return None


MESH_UTILS = "jax.experimental.mesh_utils"
REFUSED = f"row-major ({MESH_UTILS} refuses: it would have to split a dimension of the slice)"
TABLED = f"row-major ({MESH_UTILS} has tables of its own for slices as small)"
_SMALL = {"TPU v5p": 8, "TPU v5e": 16, "TPU v6e": 16}  # chips up to which it has tables


def _jax_order(slice: Slice, mesh: Mapping[str, int]) -> tuple[str, Integers]:
    """(where it is from, int chips in the mesh's shape): `create_device_mesh` where it needs not
    split a dimension, else row-major.

    The rule of JAX: axes from the last to the first, each to the most dimensions whose product it
    is, the earliest of those.
    """
    chips, sizes = np.arange(slice.num_chips), tuple(mesh.values())
    if slice.num_chips <= _SMALL.get(slice.pod.name, 0):
        return TABLED, chips.reshape(sizes)
    left, taken = list(range(3)), dict[int, tuple[int, ...]]()
    for axis in reversed(range(len(sizes))):
        fits = [
            dimensions
            for count in (3, 2, 1)
            for dimensions in itertools.combinations(left, count)
            if math.prod(slice.shape[d] for d in dimensions) == sizes[axis]
        ]
        if not fits and sizes[axis] > 1:
            return REFUSED, chips.reshape(sizes)
        taken[axis] = fits[0] if fits else ()
        left = [d for d in left if d not in taken[axis]]
    order = [d for axis in range(len(sizes)) for d in taken[axis]] + left
    return MESH_UTILS, chips.reshape(slice.shape).transpose(order).reshape(sizes)


_TIMES = ("seconds", "bound_seconds", "any_layout_seconds", "jax_seconds")


def describe(found: dict[str, Any]) -> str:
    """The layout for people."""
    lines = [""]
    width = max(map(len, found["axes"]))
    for axis, digits in found["axes"].items():
        along = ", then ".join(
            f"{d['size']} along {vector_text(d['vector'])}" for d in digits if d["size"] > 1
        )
        lines.append(f"  {axis:<{width}}  {found['mesh'][axis]:>5}: {along or 'one chip'}")
    if "lost_links" in found:
        lines.append(f"  {around_text(found)}")
    names = [_name(row) for row in found["traffic"]]
    width = max(5, *map(len, names))
    lines += ["", f"{'':<{width}}{'time':>15}{'bound':>15}{'any layout':>15}{'JAX order':>15}"]
    for name, row in zip(names, found["traffic"], strict=True):
        times = [row[key] for key in _TIMES]
        lines.append(f"{name:<{width}}" + "".join(map(_time, times)) + f"  ({row['bound']})")
    total = [found[key] for key in _TIMES[:-1]] + [found["jax"]["seconds"]]
    lines.append(f"{'total':<{width}}" + "".join(map(_time, total)))
    lines += [
        "",
        "bound: no schedule on these groups takes less (in parentheses, by which proof)",
        "any layout: no schedule takes less, wherever the axes lie",
        f"JAX order: {found['jax']['source']}",
    ]
    return "\n".join(lines)


def title(slice: Slice, mesh: Mapping[str, int]) -> str:
    """Says what is looked for, before it is found."""
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    return f"mesh {sizes} on {slice} of {slice.pod.name}: outer digits of an axis first"


def vector_text(vector: Sequence[int]) -> str:
    """A vector of hops, such as x, 2z or x-z."""
    text = "".join(
        f"{'+' if s > 0 else '-'}{abs(s) if abs(s) > 1 else ''}{d}"
        for s, d in zip(vector, "xyz", strict=True)
        if s
    )
    return text.removeprefix("+") or "nothing"


def _name(row: dict[str, Any]) -> str:
    times = "" if row["count"] == 1 else f"{row['count']:g} x "
    size = shown_size(row["bytes"])
    return f"{times}{row['kind']} of {size} over {', '.join(row['axes'])}"


def _time(seconds: float | None) -> str:
    return f"{'none':>15}" if seconds is None else f"{seconds * 1e6:>12,.2f} us"
