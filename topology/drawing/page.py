"""Interactive HTML page of a scene, one file: turn, zoom, and values beside it; needs no network.

The file holds all that it shows: the template `page.html`, the scene as JSON, and `scene.js`, which
draws it by WebGL. Its content security policy lets it load nothing.
"""

import contextlib
import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from topology.drawing.scene import (
    FAILED_COLOUR,
    FREE_COLOUR,
    KIND_COLOURS,
    KINDS,
    LOAD_COLOURS,
    MANY,
    PORT_STATES,
    Scene,
    group_colours,
    port_states,
    slice_colour,
    stubs,
)
from topology.fabric.fabric import Fabric
from topology.fabric.parts import switches
from topology.hardware import switch_of

# Stand in what is written here, so that no other files are replaced.
_MARKS = {".html": b'name="generator" content="torsion"', ".png": b"Software\0torsion"}


def page(
    scene: Scene, *, heading: str, lead: str, sections: Sequence[str], script: str = ""
) -> str:
    """Makes the HTML page of a scene.

    Args:
      lead: a line below the heading.
      sections: HTML that stands in the panel beside the picture, one at least; see `figures`.
      script: more of it, that runs after the scene's.
    """
    values = {
        "title": html.escape(f"{heading}: {lead}"),
        "heading": html.escape(heading),
        "lead": html.escape(lead),
        "summary": sections[0],
        "more": "\n".join(sections[1:]),
        "scene": json.dumps(_data(scene), separators=(",", ":")).replace("<", "\\u003c"),
        "script": source("scene.js") + script,
    }
    return re.sub(r"{{(\w+)}}", lambda name: values[name[1]], source("page.html"))


def figures(title: str, rows: Sequence[tuple[str, str]], note: str = "") -> str:
    """HTML of a table of named figures, for the panel beside a picture."""
    lines = [f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows]
    note = note and f'<p class="note">{html.escape(note)}</p>'
    return f"<h2>{html.escape(title)}</h2>\n<dl>{''.join(lines)}</dl>{note}"


def fabric_sections(fabric: Fabric) -> tuple[list[str], str]:
    """Makes the panel beside a picture of a fabric: its blocks, and every port of every switch.

    Returns:
      HTML for the panel, and the script that draws the ports.
    """
    of = {block: n for n, p in enumerate(fabric.placements.values()) for block in p.blocks}
    names, unhealthy = list(fabric.placements), fabric.unhealthy_blocks
    cells = []
    for block in range(fabric.pod.num_blocks):
        colour = FAILED_COLOUR if block in unhealthy else slice_colour(of.get(block, 0))
        free = block not in of and block not in unhealthy
        state = "failed" if block in unhealthy else "free" if free else f"slice {names[of[block]]}"
        cells.append(
            f'<span{" class=free" if free else ""} style="background:{colour};{_ink(colour)}" '
            f'title="block {block}: {html.escape(state)}">{block}</span>'
        )
    rows = [
        f'<tr><td><span class="swatch" style="background:{slice_colour(n)}"></span>{name}</td>'
        f"<td>{html.escape(str(p.slice))}</td><td>{ranges(p.blocks)}</td></tr>"
        for n, (name, p) in enumerate(fabric.placements.items())
    ]
    head = "<tr><th></th><th>slice</th><th>its blocks, in order</th></tr>"
    joined = {
        switch: dict(held) | {into: out for out, into in held.items()}
        for switch, held in fabric.connects.items()
    }
    homes = {(s, port): home for (s, home), port in fabric.patches.items()}
    spares = 2 * fabric.pod.num_blocks
    ports = range(switch_of(fabric.pod).ports)
    lanes = switches(fabric.pod)
    data = {
        "names": [str(switch) for switch in lanes],
        "states": PORT_STATES,
        "state": port_states(fabric).tolist(),
        "joined": [[joined.get(s, {}).get(port, -1) for port in ports] for s in lanes],
        # The fibre at each port: 0 .. num_blocks - 1 the + one of a block, then the - ones.
        "fibre": [
            [-1 if (s, port) in fabric.patches else homes.get((s, port), port) for port in ports]
            for s in lanes
        ],
        "blocks": fabric.pod.num_blocks,
        "colours": [FREE_COLOUR, LOAD_COLOURS[0], KIND_COLOURS[1], FAILED_COLOUR],
    }
    data["fibre"] = [[f if f < spares else -1 for f in row] for row in data["fibre"]]
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return [
        f'<h2>Blocks</h2><div class="floor">{"".join(cells)}</div>',
        f'<h2>Slices</h2><table class="list">{head}{"".join(rows)}</table>' if rows else "",
        "<h2>Ports of the optical switches</h2>"
        '<canvas id="ports" role="img" aria-label="every port of every switch"></canvas>'
        f'<p class="note" id="port"></p><script type="application/json" id="portData">{text}'
        "</script>",
    ], source("ports.js")


def ranges(numbers: Sequence[int]) -> str:
    """Writes ascending numbers as ranges: (0, 1, 2, 9) -> "0-2, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def source(name: str) -> str:
    """The text of a file that lies beside this one."""
    return resources.files("topology.drawing").joinpath(name).read_text(encoding="utf-8")


def write(path: str | Path, page: str, picture: bytes) -> tuple[Path, Path]:
    """Writes a page and a picture beside each other: PATH.html and PATH.png.

    Only files that were written here before are replaced, and only when both are complete.

    Args:
      path: with or without one of the two suffixes.

    Raises:
      ValueError: the path has another suffix, its folder is not there, a file of somebody else's
        is, or it cannot be written.
    """
    path = Path(path)
    if path.suffix not in ("", ".html", ".png") or not path.name:
        raise ValueError(
            f"{path}: a page .html and a picture .png are written; give it as NAME.html"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent} to write in")
    contents = {path.with_suffix(".html"): page.encode(), path.with_suffix(".png"): picture}
    beside = {}
    try:
        for file in contents:
            mark = _MARKS[file.suffix]
            if file.exists() and not (file.is_file() and mark in file.read_bytes()[:4096]):
                raise ValueError(f"{file} exists and is no drawing of torsion's; take another name")
        for file, content in contents.items():
            beside[file] = file.with_name(f".{file.name}.{os.getpid()}")
            beside[file].write_bytes(content)
        for file, unfinished in beside.items():
            unfinished.replace(file)
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot write here: {error.strerror}") from error
    finally:
        for unfinished in beside.values():
            with contextlib.suppress(OSError):  # not there, or not even its folder
                unfinished.unlink()
    page, data = contents
    return page, data


def _ink(colour: str) -> str:
    """The style of text that is read on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "color:#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else "color:#10141b"


def _data(scene: Scene) -> dict[str, Any]:
    """Returns the scene as the JSON that `scene.js` reads."""
    bent = scene.kinds > 0
    values = []
    for name, value in scene.values.items():
        # Rounded, so that the many equal ones are one entry of a table.
        table, index = np.unique(np.round(value, 6), return_inverse=True)
        index = index.reshape(value.shape)
        values.append(
            {
                "name": name,
                "table": table.tolist(),
                "ahead": index[:, 0].tolist(),
                "back": index[:, 1].tolist(),
            }
        )
    chips = scene.nodes == "chip"
    return {
        "nodes": scene.nodes,
        "radius": scene.radius,
        "labels": scene.labels,
        "at": np.round(scene.positions, 3).ravel().tolist(),
        "group": scene.groups.tolist(),
        "groups": [
            {"name": name, "colour": colour}
            for name, colour in zip(scene.group_names, group_colours(scene), strict=True)
        ],
        "failed": np.flatnonzero(scene.node_failed).tolist(),
        "tail": scene.links[:, 0].tolist(),
        "head": scene.links[:, 1].tolist(),
        "dimension": scene.dimensions.tolist(),
        "kind": scene.kinds.tolist(),
        "kinds": KINDS,
        "control": np.round(scene.controls[bent], 3).ravel().tolist(),
        "stub": np.round(stubs(scene)[bent], 3).ravel().tolist(),
        "many": MANY,
        "cut": np.flatnonzero(scene.link_failed).tolist(),
        "cutText": "failed: carries nothing" if chips else "some of its 16 fibres are dark",
        "values": values,
        "valueText": "all-to-all load, " if chips else "",
        "colours": {"load": LOAD_COLOURS, "kinds": KIND_COLOURS, "failed": FAILED_COLOUR},
        "captions": [[text, *np.round(place, 3).tolist()] for text, place in scene.captions],
        "blocks": not chips,
    }
