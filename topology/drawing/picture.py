"""A PNG of a scene, by matplotlib: the same links, kinds, loads and failures as on its page."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from topology.arrays import Floats, Integers
from topology.drawing.scene import (
    FAILED_COLOUR,
    KIND_COLOURS,
    KINDS,
    LOAD_COLOURS,
    MANY,
    Scene,
    curves,
    group_colours,
    stubs,
)

_STYLES: tuple[Any, ...] = ("-", "-", (0, (3, 2)))  # of KINDS
_WIDTHS = (1.0, 0.7, 0.8)
_LAYERS = 24
_LEAST = 2.0  # chips that there is room for, however few are drawn


def picture(scene: Scene, *, heading: str, lines: Sequence[str]) -> bytes:
    """Draws the PNG of a scene.

    Links have the colour of the first of the scene's `values`, or of what their node belongs to
    where the scene has groups; what is further away is paler. Failed parts lie on top.

    Args:
      lines: what is said below the heading, a paragraph each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    ramp = LinearSegmentedColormap.from_list("load", LOAD_COLOURS)
    palette = np.array([to_rgb(colour) for colour in group_colours(scene)])
    grouped = scene.nodes == "block"
    norm, name = None, None
    if grouped:
        colours = palette[scene.groups[scene.links[:, 0]]]
    elif scene.values:
        name, values = next(iter(scene.values.items()))
        norm = Normalize(0, max(values.max(initial=0), 1e-12))
        colours = ramp(norm(values.max(axis=1)))[:, :3]
    else:
        colours = np.array([to_rgb(colour) for colour in KIND_COLOURS])[scene.kinds]

    figure = Figure(figsize=(11, 8), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.84))
    axes.set_axis_off()
    axes.set_aspect("equal")

    right, above, toward = _view(scene)
    whole = grouped or len(scene.links) <= MANY
    points = curves(scene, 25)
    flat, ends = np.array([right, above]).T, stubs(scene)[:, None] * [[0], [1]]
    strips, owner = [], []
    for link, (line, kind) in enumerate(zip(points, scene.kinds, strict=True)):
        if kind == 0:
            parts = [line[[0, -1]]]
        elif whole or scene.link_failed[link]:
            parts = [line]
        else:
            parts = [line[[0]] + ends[link], line[[-1]] - ends[link]]
        strips += [part @ flat for part in parts]
        owner += [link] * len(parts)
    owner = np.array(owner, int)
    span = scene.positions @ toward
    far, near = span.min(initial=0), span.max(initial=0) + 1e-9
    depth = points.mean(axis=1) @ toward
    size = 72 * 10 / max(np.ptp(scene.positions @ right), np.ptp(scene.positions @ above) * 1.3, 6)

    def paler(colour: Floats, depth: Floats) -> Floats:
        part = 0.66 * (1 - np.clip((depth - far) / (near - far), 0, 1))
        return np.asarray(colour + (1 - colour) * part[:, None])

    # From the far to the near, in layers, so that near cubes hide far lines.
    edges = np.linspace(far, near, _LAYERS + 1)
    layer_of_link = np.clip(np.digitize(depth, edges) - 1, 0, _LAYERS - 1)
    layer_of_node = np.clip(np.digitize(span, edges) - 1, 0, _LAYERS - 1)
    at = scene.positions @ flat
    # The three faces of a cube that are seen, and how light they are.
    signs = np.sign([toward @ e for e in np.eye(3)])
    corners = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)])
    faces = [np.insert(corners, d, signs[d], axis=1) @ flat * scene.radius for d in range(3)]
    lights = [
        0.6 + 0.4 * max(0, s * (0.62 * toward + 0.75 * above + 0.2 * right)[d])
        for d, s in enumerate(signs)
    ]

    def cubes(nodes: Integers, colours: Floats, zorder: float, size: float = 1.0) -> None:
        for face, light in zip(faces, lights, strict=True):
            axes.add_collection(
                PolyCollection(
                    at[nodes][:, None] + face * size,
                    facecolors=colours * min(1, light),
                    edgecolors=colours * 0.55,
                    linewidths=0.25,
                    zorder=zorder,
                )
            )

    for layer in range(_LAYERS):
        for kind, style in enumerate(_STYLES):
            of = layer_of_link[owner] == layer
            mine = np.flatnonzero(of & (scene.kinds[owner] == kind) & ~scene.link_failed[owner])
            axes.add_collection(
                LineCollection(
                    [strips[i] for i in mine],
                    colors=paler(colours[owner[mine]], depth[owner[mine]]),
                    linewidths=np.clip(size / 22, 0.35, 2.2) * _WIDTHS[kind],
                    linestyles=style,
                    zorder=2 * layer,
                )
            )
        mine = np.flatnonzero((layer_of_node == layer) & ~scene.node_failed)
        cubes(mine, paler(palette[scene.groups[mine]], span[mine]), 2 * layer + 1)
    bad = np.flatnonzero(scene.link_failed[owner])
    axes.add_collection(
        LineCollection(
            [strips[i] for i in bad],
            colors=FAILED_COLOUR,
            linewidths=np.clip(size / 15, 0.8, 2.6),
            linestyles=(0, (1, 1)),
            zorder=2 * _LAYERS,
        )
    )
    lost = np.flatnonzero(scene.node_failed)
    cubes(
        lost,
        np.tile(to_rgb(FAILED_COLOUR), (len(lost), 1)),
        2 * _LAYERS + 1,
        1.0 if grouped else 1.25,
    )
    cross = (1.3 * scene.radius * size) ** 2
    x, y = at[lost].T
    axes.scatter(x, y, s=cross, c="white", marker="x", zorder=2 * _LAYERS + 2)
    if scene.nodes == "chip":
        corner, *tips = [place for _, place in scene.captions]
        lines_of_axes = [np.array([corner, tip]) @ flat for tip in tips]
        axes.add_collection(
            LineCollection(lines_of_axes, colors="#9aa4b2", linewidths=0.7, zorder=0)
        )
    for text, place in scene.captions:
        axes.text(
            float(right @ place),
            float(above @ place),
            text,
            color="#55606f",
            size=8,
            ha="center",
            va="center",
            zorder=2 * _LAYERS + 3,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
    axes.autoscale_view()
    for low, high, set_limits in (
        (*axes.get_xlim(), axes.set_xlim),
        (*axes.get_ylim(), axes.set_ylim),
    ):
        if high - low < _LEAST:
            set_limits((low + high - _LEAST) / 2, (low + high + _LEAST) / 2)

    figure.text(0.03, 0.955, heading, size=17, weight="bold", color="#1b2330", va="center")
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, 92))
    figure.text(0.03, 0.925, text, size=9.5, color="#4b5768", va="top", linespacing=1.5)
    shape = "hoop" if whole else "stubs"
    kinds = (KINDS[0], f"{KINDS[1]} ({shape})", f"{KINDS[2]} ({shape})")
    there = sorted(set(scene.kinds.tolist()))
    handles = [
        Line2D([], [], color="#1b2330", linestyle=_STYLES[k], label=kinds[k], linewidth=1.4)
        for k in there
    ]
    if scene.link_failed.any():
        dotted: dict[str, Any] = {
            "linestyle": (0, (1, 1)),
            "linewidth": 2.2,
            "color": FAILED_COLOUR,
        }
        handles.append(
            Line2D(
                [],
                [],
                label="failed link" if not grouped else "dark fibres",
                **dotted,
            )
        )
    if scene.node_failed.any():
        marked: dict[str, Any] = {"marker": "s", "color": FAILED_COLOUR, "linestyle": ""}
        handles.append(Line2D([], [], label=f"failed {scene.nodes}", **marked))
    if handles:
        figure.legend(
            handles=handles,
            loc="upper right",
            bbox_to_anchor=(0.97, 0.985),
            frameon=False,
            fontsize=9,
            ncols=len(handles),
        )
    if norm is not None:
        bar = figure.add_axes((0.70, 0.915, 0.265, 0.014))
        figure.colorbar(ScalarMappable(norm, ramp), cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=7.5, length=2)
        bar.set_xlabel(f"all-to-all load, {name}", size=8, labelpad=1)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "torsion"})
    return out.getvalue()


def _view(scene: Scene) -> tuple[Floats, Floats, Floats]:
    """The directions across, up and toward the reader, as the page shows a scene at first."""
    reach = np.ptp(scene.positions, axis=0)
    if scene.nodes == "block":
        up, yaw, pitch = 1, -0.28, 0.3
    else:
        up = 2 if reach[2] <= min(reach[:2]) else 0 if reach[0] < reach[1] else 1
        wide = reach[(up + 1) % 3] > reach[(up + 2) % 3]
        yaw, pitch = np.pi + (np.pi / 2 - 0.5 if wide else 0.5), 0.4
    a, b, u = (np.eye(3)[(up + i) % 3] for i in (1, 2, 0))
    flat = np.cos(yaw) * a + np.sin(yaw) * b
    right = -np.sin(yaw) * a + np.cos(yaw) * b
    return right, np.cos(pitch) * u - np.sin(pitch) * flat, np.cos(pitch) * flat + np.sin(pitch) * u
