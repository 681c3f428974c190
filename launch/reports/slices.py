"""`torsion slice`: bisection, all-to-all and failures of a slice, and a drawing of it."""

import os
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.signals import deferred
from topology import TPU_V4, Part, Slice
from topology.drawing import scene
from topology.fabric import losses
from topology.hardware import Pod
from topology.routing import throughput


def report(
    shape: str, failed_ocs: str | None = None, failed: Sequence[str] = (), pod: Pod = TPU_V4
) -> dict[str, Any]:
    """The figures of a slice, as `torsion slice --json` prints them.

    Args:
      shape: such as "4x4x8" or "4x4x8_twisted", or "8x16" of TPU v5e.
      failed_ocs: "x,0,0": dimension and in-face position of an optical switch that fails.
      failed: parts that fail, as `topology.Part` parses them; blocks are the slice's own, 0 ..
        num_blocks - 1.
      pod: the machine whose slice it is.

    Returns:
      `blocks` is None where the pod is not made of blocks. Links are counted in one direction.
      `wrap` names the dimensions that wrap around, `twist` has the shifts (chips along x, y and z)
      that each wraparound adds. `bisection_links` is the least
      cut into halves where `bisection_exact`, else the smallest that was found.
      `all_to_all.max_link_load` is the load of the most loaded link when each chip sends one unit
      to every other, the least over all routings, and `lower_bound` the proof of it;
      `ratio_to_regular` the regular slice's load over this one's; `bytes_per_second_per_chip` is
      None of one chip. All these are of the whole slice.
      With failures, `failed` names them, `lost_chips` and `lost_links` count what they take, and
      what is left is told as by `kept`; unknown where chips are lost (the slice needs another
      block).

    Raises:
      UserError: there is no such slice or part, or the part is none of this slice's.
    """
    try:
        slice, parts = _parse(shape, failed_ocs, failed, pod)
        flow = regular = throughput.all_to_all(slice)
        if slice.is_twisted:
            regular = throughput.all_to_all(Slice(shape=slice.sizes, pod=pod))
        alone, bandwidth = slice.num_chips == 1, pod.chip.link_bandwidth
        found = {
            "pod": pod.name,
            "slice": str(slice),
            "shape": list(slice.sizes),
            "twisted": slice.is_twisted,
            "twist": [list(row) for row in slice.twist],
            "torus": bool(slice.is_torus),
            "wrap": "".join(d for d, wraps in zip("xyz", slice.wrap, strict=True) if wraps),
            "chips": slice.num_chips,
            "hosts": None if pod.host is None else slice.num_hosts,
            "blocks": None if pod.block is None else slice.num_blocks,
            "diameter": int(slice.diameter),
            "mean_distance": float(slice.mean_distance),
            "bisection_links": int(slice.bisection_links),
            "bisection_exact": throughput.bisection_is_least(slice, flow.lower_bound),
            "all_to_all": {
                "max_link_load": float(flow.max_link_load),
                "lower_bound": float(flow.lower_bound),
                "ratio_to_regular": 1.0 if alone else regular.max_link_load / flow.max_link_load,
                "bytes_per_second_per_chip": None
                if alone
                else throughput.bytes_per_second_per_chip(slice, flow.max_link_load, bandwidth),
            },
        }
        if parts:
            chips, links = losses.lost(slice, parts)
            if failed_ocs is not None:
                found["failed_ocs"] = failed_ocs
            found |= {
                "failed": [str(part) for part in parts],
                "lost_chips": chips.size,
                "lost_links": links.size // 2,
                **(_UNKNOWN if chips.size else kept(slice, links)),
            }
    except ValueError as error:
        raise UserError(str(error)) from error
    return found


def kept(slice: Slice, links) -> dict[str, Any]:
    """Computes what is left of a slice's all-to-all without some links (their directed ids).

    Returns:
      `all_to_all_kept`: the part of the throughput that the best routing found keeps;
      `all_to_all_kept_at_most`: that of no routing is larger, the same where the best is found in
      time. Both are 0 where the slice is `cut_in_two`, and None where a routing takes minutes to
      find.
    """
    if throughput.is_cut(slice, links):
        return {"all_to_all_kept": 0.0, "all_to_all_kept_at_most": 0.0, "cut_in_two": True}
    around = optimum(slice, tuple(int(link) for link in links))
    if around is None:
        return _UNKNOWN
    whole = throughput.all_to_all(slice).max_link_load
    low, high = whole / around.max_link_load, whole / around.lower_bound
    return {
        "all_to_all_kept": float(low),
        "all_to_all_kept_at_most": float(low if around.is_exact else high),
        "cut_in_two": False,
    }


_UNKNOWN = {"all_to_all_kept": None, "all_to_all_kept_at_most": None, "cut_in_two": False}


def kept_text(found: dict[str, Any]) -> str:
    """Says in words what `kept` returns."""
    low, high = found["all_to_all_kept"], found["all_to_all_kept_at_most"]
    if found["cut_in_two"]:
        return "none: cut in two, chips cannot reach each other"
    if low is None:
        return "unknown: the best routing takes minutes to find"
    if low == high:
        return f"{low:.2%} kept"
    return f"{low:.2%} to {high:.2%} kept"


@lru_cache(maxsize=4)
def optimum(slice: Slice, links: tuple[int, ...]):
    """`scene.optimum` of failed links; says on standard error how far it is."""
    began = told = time.monotonic()
    whole = throughput.all_to_all(slice).max_link_load

    def progress(low, high):
        nonlocal told
        now = time.monotonic()
        if now - told > _TELL:
            told = now
            say(
                f"looking for the best routing around the failures, {now - began:.0f} s of at most "
                f"{scene.TIME_LIMIT:.0f}: {whole / high:.2%} to {whole / low:.2%} of the "
                "all-to-all kept"
            )

    return scene.optimum(slice, links, progress=progress)


_TELL = 2.0  # seconds between two lines about how far it is


def say(line: str) -> None:
    """Tells on standard error how far a long search is."""
    print(line, file=sys.stderr, flush=True)


def describe(found: dict[str, Any]) -> str:
    """Formats a report as text for people."""
    lines = [_title(found)]
    for heading, rows in figures(found):
        lines += [heading] if heading else []
        lines += [f"  {name:<22}{value}" for name, value in rows]
    return "\n".join(lines)


def figures(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The figures of a report to read, as (heading, names and values): whole, after failures."""
    a2a = found["all_to_all"]
    most = "" if found["bisection_exact"] else "at most "
    rows = [("wraps around in", ", ".join(found["wrap"]) or "no dimension")]
    for d, row in zip("xyz", found["twist"], strict=True):
        shifts = [f"{s} along {e}" for s, e in zip(row, "xyz", strict=True) if s]
        if shifts:
            rows.append((f"twist of {d}", f"past its end also {' and '.join(shifts)}"))
    rows += [
        ("diameter", count(found["diameter"], "hop")),
        ("mean distance", f"{found['mean_distance']:.3f} hops"),
        ("bisection", f"{most}{count(found['bisection_links'], 'link')}, one way"),
        ("all-to-all", _all_to_all_text(a2a)),
    ]
    if found["twisted"]:
        rows.append(("against untwisted", f"{a2a['ratio_to_regular']:.3f} times the all-to-all"))
    if "failed" not in found:
        return [("", rows)]
    after = [("failed", ", ".join(found["failed"]))]
    if found["lost_chips"]:
        lost = count(found["lost_chips"], "chip")
        needs = "other chips" if found["blocks"] is None else "another block"
        after.append(("lost", f"{lost}: the slice needs {needs}"))
    else:
        after.append(("lost", count(found["lost_links"], "link")))
        after.append(("all-to-all", kept_text(found)))
    return [("before the failure", rows), ("after it", after)]


def _all_to_all_text(a2a):
    if a2a["bytes_per_second_per_chip"] is None:
        return "none: one chip has no other to send to"
    return (
        f"{a2a['bytes_per_second_per_chip'] / 1e9:.1f} GB/s a chip, "
        f"most loaded link {a2a['max_link_load']:.2f} units (proved: no routing has less than "
        f"{a2a['lower_bound']:.2f})"
    )


def draw(
    shape: str,
    found: dict[str, Any],
    path: str,
    failed_ocs: str | None = None,
    failed: Sequence[str] = (),
    pod: Pod = TPU_V4,
) -> tuple[Path, Path]:
    """Writes the page and the picture of a slice beside each other.

    Args:
      found: of `report`.
      path: of either, or without a suffix; of a directory, or "", for names made of the shape.

    Raises:
      UserError: nothing was written, because of what the message says.
    """
    from topology.drawing import page, picture

    try:
        slice, parts = _parse(shape, failed_ocs, failed, pod)
        chips, links = losses.lost(slice, parts)
        around = None
        if links.size and not chips.size and not found["cut_in_two"]:
            around = optimum(slice, tuple(links.tolist()))
        drawn = scene.slice_scene(slice, parts, around)
        lead, (whole, *after) = _title(found).partition(": ")[2], figures(found)
        lines = [lead] + [
            (f"{heading}: " if heading else "")
            + "; ".join(f"{name}: {value.partition(' (')[0]}" for name, value in rows)
            for heading, rows in (whole, *after)
        ]
        rows, a2a = whole[1], found["all_to_all"]
        at = next(i for i, (name, _) in enumerate(rows) if name == "all-to-all")
        if slice.num_chips > 1:
            rows[at : at + 1] = [
                ("all-to-all", f"{a2a['bytes_per_second_per_chip'] / 1e9:.1f} GB/s a chip"),
                ("most loaded link", f"{a2a['max_link_load']:.2f} units"),
                ("proved lower bound", f"{a2a['lower_bound']:.2f} units"),
            ]
        title = ", ".join(filter(None, ["Interconnect", whole[0]]))
        sections = [page.figures(title, rows, "" if after else _note(drawn, found))]
        if after:
            sections[0] += page.figures("After it", after[0][1], _note(drawn, found))
        html = page.page(drawn, heading=str(slice), lead=lead, sections=sections)
        png = picture.picture(drawn, heading=str(slice), lines=lines)
        with deferred():
            return page.write(named(path, str(slice)), html, png)
    except ValueError as error:
        raise UserError(f"--draw: {error}") from error


def check_drawing(path: str | None) -> None:
    """Checks before long work that the drawing can be written at a `--draw` path.

    Raises:
      UserError: its folder is missing or cannot be written.
    """
    if path is None:
        return
    check_folder(path, named(path, "x").parent)


def check_folder(path: str, folder: Path, option: str = "--draw") -> None:
    """Checks that the folder of an option's path is there to write in; else raises UserError."""
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: no folder {folder} to write in")


def named(path: str, name: str) -> Path:
    """Path of a drawing: `path`, or in that directory a file of a name made of `name`."""
    folder = Path(path or ".")
    inside = os.path.isdir(folder) or path.endswith("/")  # no error where a name is too long
    return folder / name.replace(":", "-").replace("/", "_") if inside else folder


def count(n: int, what: str) -> str:
    """Writes a number with its noun: 2, "chip" -> "2 chips"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def _parse(shape, failed_ocs, failed, pod):
    """Parses the arguments of a report into (slice, parts that failed)."""
    names = ([f"ocs:{failed_ocs}"] if failed_ocs is not None else []) + list(failed)
    parts = [Part.parse(name, pod) for name in names]
    return Slice.parse(shape, pod), list(dict.fromkeys(parts))


def _title(found):
    kind = "twisted torus" if found["twisted"] else "torus" if found["torus"] else "mesh"
    title = f"{found['slice']}: a {kind} of {found['chips']} chips"
    if found["chips"] == 1:
        title = f"{found['slice']}: one chip"
    if found["blocks"] is not None:
        title += f" in {count(found['blocks'], 'block')}"
    if found["pod"] != TPU_V4.name:
        title += f" of {found['pod']}"
    if found["wrap"] and not found["torus"]:
        title += f", wrapped in {', '.join(found['wrap'])}"
    return title


def _note(drawn, found):
    """Explains the colours of links."""
    if found.get("cut_in_two"):
        return "No loads are shown: the slice is cut in two."
    if not drawn.links.size:
        return "One chip has no links."
    if not drawn.values:
        return (
            "No loads are shown: the best routing around these failures takes minutes to find. "
            "One failed optical switch takes a second."
        )
    note = (
        "Load: units over a link when each chip sends one to every other. The best routing is one "
        "of those whose most loaded link carries least, with paths that split at will"
    )
    if drawn.node_failed.any():
        note += "; a slice without a chip does not run, and the loads are those that it has whole"
    elif drawn.link_failed.any():
        note += ", around what failed"
    if scene.DIMENSION_ORDER in drawn.values:
        note += "; dimension order takes shortest paths, x before y before z, ties in equal parts"
    return note + "."
