"""`torsion fabric`: a pod's blocks, slices and optical switches, and a drawing of them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from launch.reports.slices import count, kept, kept_text, named
from pjit_train.errors import UserError
from pjit_train.signals import deferred
from topology import TPU_V4, Fabric, Part, Slice, fabric, hardware
from topology.drawing import scene
from topology.drawing.page import ranges
from topology.fabric import light
from topology.fabric.parts import switches
from topology.hardware import switched
from topology.torus.shapes import times

WIDTH = 120  # characters that the tables need


@dataclass(frozen=True)
class Pod:
    """A pod with its slices, before and after parts of it failed.

    Attributes:
      moves: (slice, block that failed, block that took its place).
      asked: of each slice, by its name, the shape as it was asked for.
    """

    before: Fabric
    after: Fabric
    moves: tuple[tuple[str, int, int], ...]
    asked: dict[str, str]


def place(slices: Sequence[str], failed: Sequence[str] = (), machine: hardware.Pod = TPU_V4) -> Pod:
    """Places slices on a pod, then lets parts fail.

    A slice whose block fails gets a free healthy one in its place, and the fibre at a failed port
    goes to a spare one; slices go on without the links of a failed switch. The slices are named 1,
    2, ... in the order given.

    Args:
      slices: such as "4x4x8_twisted", or "4x4x8@3,17" on blocks of one's choice; several may stand
        in one text, with commas between.
      failed: parts as `topology.Part` parses them.

    Raises:
      UserError: the wiring of the pod's switches is not known; a slice cannot be wired, does not
        fit into the healthy blocks, or asks for a block (and so for its ports) that another has; or
        there is no such part.
    """
    wanted = [one for text in slices for one in re.split(r",(?=\d+x)", text.strip())]
    for text in slices:
        if not text.strip(" ,"):
            raise UserError(f"--slices {text!r}: no slice; write for example 4x4x8_twisted,8x8x8")
    try:
        dark = Fabric(pod=switched(machine))
        parts = frozenset(Part.parse(text, machine) for text in failed)
        asked = [_parse(text, machine) for text in wanted]
        _put(replace(dark, failed=parts), asked)  # or says that they do not fit
        before = _put(dark, asked)
    except ValueError as error:
        said = re.sub(
            r"slice '(\d+)'", lambda m: f"slice {m[1]} ({wanted[int(m[1]) - 1]})", str(error)
        )
        raise UserError(f"fabric: {said}") from error
    after, moves = replace(before, failed=parts), []
    for name, placement in before.placements.items():
        for block in placement.blocks:
            if block in after.unhealthy_blocks:
                after = fabric.replace_block(after, name, block)
                at = placement.blocks.index(block)
                moves.append((name, block, after.placements[name].blocks[at]))
    for part in sorted(parts):
        if part.kind == "port" and part.where[3] < 2 * after.pod.num_blocks:
            try:
                after = fabric.patch(after, part)
            except ValueError:  # no spare port is left: its link stays dark
                continue
    shapes = {str(n): text.partition("@")[0] for n, text in enumerate(wanted, start=1)}
    return Pod(before, _in_order(after), tuple(moves), shapes)


def report(pod: Pod) -> dict[str, Any]:
    """Reports the state of a pod's fabric, as `torsion fabric --json` prints it.

    Returns:
      `blocks`: state (a slice's name, "free" or "failed") of each; `slices` with the shape as it
      was `asked` for, their blocks, the cross-connects that they use, the links (each counted
      once) that get no light, and what is left of all-to-all, as `reports.slices.kept` tells;
      `switches` with their ports by what they do and their cross-connects; `cost` of placing the
      slices in a dark pod, and of what the failures changed; `checked`: what the light, followed
      from port to port, shows to be wrong: nothing.
    """
    now = pod.after
    wrong = light.check(replace(now, failed=frozenset()))
    far = light.trace(now).reshape(-1, 6)
    states = scene.port_states(now)
    changed = fabric.reconfigure(pod.before, now)
    return {
        "pod": now.pod.name,
        "blocks": _states(now),
        "failed": [str(part) for part in sorted(now.failed)],
        "slices": [_slice(now, name, far) | {"asked": pod.asked[name]} for name in now.placements],
        "switches": [
            {"ocs": str(switch)}
            | {state: int(np.sum(row == code)) for code, state in enumerate(scene.PORT_STATES)}
            | {"cross_connects": sorted(map(list, now.connects.get(switch, {}).items()))}
            for switch, row in zip(switches(now.pod), states, strict=True)
        ],
        "cross_connects": sum(map(len, now.connects.values())),
        "cost": {
            "place": _cost(fabric.reconfigure(Fabric(pod=now.pod), pod.before), now.pod),
            "failures": _cost(changed, now.pod)
            | {
                "moves": [dict(zip(("slice", "from", "to"), m, strict=True)) for m in pod.moves],
                "fibres_moved": len(now.patches),
            },
        },
        "checked": wrong,
    }


def show(pod: Pod, found: dict[str, Any], console) -> None:
    """Prints a report for people, on a rich console."""
    from rich.table import Table
    from rich.text import Text

    states = found["blocks"]
    counts = Counter("used" if s not in ("free", "failed") else s for s in states)
    names = [row["name"] for row in found["slices"]]
    called = _called(found)
    colour = {name: scene.slice_colour(n) for n, name in enumerate(names)}
    colour |= {"free": "bright_black", "failed": f"bold {scene.FAILED_COLOUR}"}
    console.print(
        f"{found['pod']} pod: {len(states)} blocks of {times(pod.after.pod.block.shape)} chips, "
        f"{counts['used']} in slices, {counts['free']} free, {counts['failed']} failed"
    )
    grid = Table.grid(padding=(0, 1))
    width = max(2, *(len(name) for name in names)) if names else 2
    for first in range(0, len(states), 8):
        cells = [Text(f"{first:>3} ", style="bright_black")]
        for state in states[first : first + 8]:
            text = {"free": "·", "failed": "✗"}.get(state, state)
            cells.append(Text(text.rjust(width), style=colour[state]))
        grid.add_row(*cells)
    console.print(grid)
    console.print("  the number of a block's slice;  · free  ✗ failed", style="bright_black")

    if names:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
        left = ("", "slice", "blocks", "all-to-all")
        for title in ("", "slice", "blocks", "chips", "cross-connects", "dark links", "all-to-all"):
            justify: Literal["left", "right"] = "left" if title in left else "right"
            table.add_column(title, justify=justify, overflow="fold")
        for row in found["slices"]:
            table.add_row(
                Text(row["name"], style=colour[row["name"]]),
                row["asked"],
                ranges(row["blocks"]),
                str(row["chips"]),
                str(row["cross_connects"]),
                str(row["dark_links"]),
                kept_text(row),
            )
        console.print()
        console.print(table)
    console.print()
    console.print(_switch_table(found))
    cost, failures = found["cost"]["place"], found["cost"]["failures"]
    lines = [
        f"placing the slices in a dark pod: {count(cost['makes'], 'cross-connect')} made, "
        f"{cost['seconds'] * 1e3:g} ms at most"
    ]
    for move in failures["moves"]:
        lines.append(f"{called[move['slice']]}: block {move['to']} in the place of {move['from']}")
    if failures["breaks"] or failures["makes"]:
        lines.append(
            f"the failures: {count(failures['breaks'], 'cross-connect')} broken and "
            f"{failures['makes']} made, {failures['seconds'] * 1e3:g} ms at most"
        )
    if failures["fibres_moved"]:
        lines.append(f"{count(failures['fibres_moved'], 'fibre')} moved by hand to a spare port")
    right = "checked: the light, followed from port to port, makes these slices and nothing else"
    lines += [f"wrong: {line}" for line in found["checked"]] or [right]
    console.print()
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def draw(pod: Pod, found: dict[str, Any], path: str) -> tuple[Path, Path]:
    """Writes the page and the picture of a pod beside each other.

    Args:
      path: of either, or without a suffix; of a directory, or "", for the name `fabric`.

    Raises:
      UserError: nothing was written, because of what the message says.
    """
    from topology.drawing import page, picture

    drawn = scene.fabric_scene(pod.after)
    counts = Counter(s if s in ("free", "failed") else "used" for s in found["blocks"])
    lead = (
        f"{count(len(found['slices']), 'slice')} on {count(counts['used'], 'block')}, "
        f"{counts['free']} free, {counts['failed']} failed"
    )
    cost, failures = found["cost"]["place"], found["cost"]["failures"]
    rows = [
        ("cross-connects", f"{found['cross_connects']:,}"),
        ("to place the slices", f"{cost['makes']:,} made, {cost['seconds'] * 1e3:g} ms at most"),
    ]
    if found["failed"]:
        change = f"{failures['breaks']} broken, {failures['makes']} made"
        rows += [("failed", ", ".join(found["failed"])), ("what that changed", change)]
    called = _called(found)
    for move in failures["moves"]:
        rows.append((called[move["slice"]], f"block {move['from']} gave way to {move['to']}"))
    for row in found["slices"]:
        if row["dark_links"]:
            dark = count(row["dark_links"], "link")
            rows.append((called[row["name"]], f"{dark} dark; all-to-all {kept_text(row)}"))
    rows.append(("followed light", "proves it" if not found["checked"] else found["checked"][0]))
    note = "Each slice is laid out as its own torus of blocks; a line is the 16 fibres between two."
    sections, script = page.fabric_sections(pod.after)
    html = page.page(
        drawn,
        heading=f"{found['pod']} fabric",
        lead=lead,
        sections=[page.figures("Pod", rows, note), *sections],
        script=script,
    )
    png = picture.picture(drawn, heading=f"{found['pod']} fabric", lines=[lead])
    try:
        with deferred():
            return page.write(named(path, "fabric"), html, png)
    except ValueError as error:
        raise UserError(f"--draw: {error}") from error


def _called(found):
    """{name: what a slice is called} in a report for people."""
    return {row["name"]: f"slice {row['name']} ({row['asked']})" for row in found["slices"]}


def _parse(text, machine):
    """Parses "4x4x8@3,17" into (slice, its blocks or None)."""
    name, at, blocks = text.partition("@")
    if not at:
        return Slice.parse(name, machine), None
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", blocks):
        raise ValueError(f"slice {text!r}: after @ stand its blocks, such as {name}@0,1")
    return Slice.parse(name, machine), tuple(map(int, blocks.split(",")))


def _put(pod, asked):
    """The pod with the slices; those that ask for blocks come first, the names stay in order."""
    for n in sorted(range(len(asked)), key=lambda n: asked[n][1] is None):
        pod = fabric.place(pod, str(n + 1), *asked[n])
    return _in_order(pod)


def _in_order(pod):
    ordered = {name: pod.placements[name] for name in sorted(pod.placements, key=int)}
    return replace(pod, placements=ordered)


def _states(pod):
    states = ["free"] * pod.pod.num_blocks
    for name, placement in pod.placements.items():
        for block in placement.blocks:
            states[block] = name
    for block in pod.unhealthy_blocks:
        states[block] = "failed"
    return states


def _slice(pod, name, far):
    placement = pod.placements[name]
    slice = placement.slice
    dark = np.flatnonzero((far[placement.chips] < 0) & (slice.neighbours >= 0))
    return {
        "name": name,
        "slice": str(slice),
        "shape": list(slice.shape),
        "twisted": slice.is_twisted,
        "chips": slice.num_chips,
        "blocks": list(placement.blocks),
        "cross_connects": sum(map(len, fabric.connects_of(pod, placement).values())),
        "dark_links": dark.size // 2,
        **kept(slice, dark),
    }


def _cost(changes, machine):
    return {
        "breaks": changes.num_breaks,
        "makes": changes.num_makes,
        "seconds": changes.seconds(machine.switch),
    }


def _switch_table(found):
    """Ports in use of each switch, as three faces of 4 x 4; what they are in all below."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for d in "xyz":
        table.add_column(f"ports used, OCS {d},i,j")
    each, side = iter(found["switches"]), math.isqrt(len(found["switches"]) // 3)
    faces = [[[next(each) for _ in range(side)] for _ in range(side)] for _ in range(3)]
    for i in range(side):
        cells = []
        for face in faces:
            line = Text()
            for switch in face[i]:
                alive = switch["used"] + switch["free"] + switch["spare"]
                text = f"{switch['used']}" if alive else "✗"
                bad = "" if not switch["failed"] or not alive else "!"
                style = f"bold {scene.FAILED_COLOUR}" if switch["failed"] else ""
                line.append(f"{text + bad:>4} ", style=style)
            cells.append(line)
        table.add_row(*cells)
    total = Counter()
    for switch in found["switches"]:
        total.update({state: switch[state] for state in scene.PORT_STATES})
    used, free, spare, failed = (total[state] for state in ("used", "free", "spare", "failed"))
    table.caption = (
        f"of {used + free + spare + failed:,} ports {used:,} are used, {free:,} free, "
        f"{spare:,} spare, {failed:,} failed"
    )
    table.caption_justify = "left"
    return table
