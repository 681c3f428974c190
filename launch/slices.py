"""`torsion slice`: what the interconnect of a slice gives, and a drawing of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.signals import deferred
from topology import TPU_V4, Part, Slice, scene, throughput


def report(shape: str, failed_ocs: str | None = None, failed: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a slice, as `torsion slice --json` prints them.

    Args:
      shape: such as "4x4x8" or "4x4x8_twisted".
      failed_ocs: "x,0,0": dimension and in-face position of an optical switch that fails.
      failed: parts that fail, as `topology.Part` parses them; blocks are the slice's own, 0 ..
        num_blocks - 1.

    Returns:
      Links are counted in one direction. `all_to_all.max_link_load` is the load of the most loaded
      link when each chip sends one unit to every other, the least over all routings, and
      `lower_bound` the proof of it; `ratio_to_regular` the regular slice's load over this one's.
      With failures, `failed` names them, `lost_chips` and `lost_links` count what they take, and
      `all_to_all_kept` is the fraction of the throughput that the best routing keeps: None where
      chips are lost (the slice needs another block), or where that takes minutes to find.

    Raises:
      UserError: there is no such slice or part, or the part is none of this slice's.
    """
    try:
        slice, parts = _parse(shape, failed_ocs, failed)
        flow = throughput.all_to_all(slice)
        regular = throughput.all_to_all(Slice(shape=slice.shape)) if slice.is_twisted else flow
        bandwidth = TPU_V4.chip.link_bandwidth
        found = {
            "shape": list(slice.shape),
            "twisted": slice.is_twisted,
            "torus": bool(slice.is_torus),
            "chips": slice.num_chips,
            "blocks": slice.num_blocks,
            "diameter": int(slice.diameter),
            "mean_distance": float(slice.mean_distance),
            "bisection_links": int(slice.bisection_links),
            "all_to_all": {
                "max_link_load": float(flow.max_link_load),
                "lower_bound": float(flow.lower_bound),
                "ratio_to_regular": float(regular.max_link_load / flow.max_link_load),
                "bytes_per_second_per_chip": throughput.bytes_per_second_per_chip(
                    slice, flow.max_link_load, bandwidth
                ),
            },
        }
        if parts:
            chips, links = scene.lost(slice, parts)
            around = None if chips.size else scene.optimum(slice, links)
            kept = None if around is None else float(flow.max_link_load / around.max_link_load)
            if failed_ocs is not None:
                found["failed_ocs"] = failed_ocs
            found |= {
                "failed": [str(part) for part in parts],
                "lost_chips": chips.size,
                "lost_links": links.size // 2,
                "all_to_all_kept": kept,
            }
    except ValueError as error:
        raise UserError(f"slice: {error}") from error
    return found


def describe(found: dict[str, Any]) -> str:
    """A report as a page for people."""
    rows = figures(found)
    return "\n".join([_title(found), *(f"  {name:<22}{value}" for name, value in rows)])


def figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a report, as names and values to read."""
    a2a = found["all_to_all"]
    rows = [
        ("diameter", f"{found['diameter']} hops"),
        ("mean distance", f"{found['mean_distance']:.3f} hops"),
        ("bisection", f"{found['bisection_links']} links, one way"),
        (
            "all-to-all",
            f"{a2a['bytes_per_second_per_chip'] / 1e9:.1f} GB/s a chip, "
            f"most loaded link {a2a['max_link_load']:.2f} units (proved: no routing has less than "
            f"{a2a['lower_bound']:.2f})",
        ),
    ]
    if found["twisted"]:
        rows.append(("against untwisted", f"{a2a['ratio_to_regular']:.3f} times the all-to-all"))
    if "failed" in found:
        kept = found["all_to_all_kept"]
        if found["lost_chips"]:
            says = f"lost {count(found['lost_chips'], 'chip')}: the slice needs another block"
        elif kept is None:
            links = count(found["lost_links"], "link")
            says = f"lost {links}; the optimum around what is left takes minutes"
        else:
            says = f"{kept:.2%} of the all-to-all kept"
        if found["failed"] == [f"ocs:{found.get('failed_ocs')}"]:
            rows.append((f"without OCS {found['failed_ocs']}", says))
        else:
            rows.append(("failed", f"{', '.join(found['failed'])}: {says}"))
    return rows


def draw(
    shape: str,
    found: dict[str, Any],
    path: str,
    failed_ocs: str | None = None,
    failed: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Writes the page and the picture of a slice beside each other.

    Args:
      found: of `report`.
      path: of either, or without a suffix; of a directory, or "", for names made of the shape.

    Raises:
      UserError: nothing was written, because of what the message says.
    """
    from topology import page, picture

    try:
        slice, parts = _parse(shape, failed_ocs, failed)
        drawn = scene.slice_scene(slice, parts)
        lead, rows = _title(found).partition(": ")[2], figures(found)
        short = [f"{name}: {value.partition(' (')[0]}" for name, value in rows]
        a2a = found["all_to_all"]
        at = next(i for i, (name, _) in enumerate(rows) if name == "all-to-all")
        rows[at : at + 1] = [
            ("all-to-all", f"{a2a['bytes_per_second_per_chip'] / 1e9:.1f} GB/s a chip"),
            ("most loaded link", f"{a2a['max_link_load']:.2f} units"),
            ("proved lower bound", f"{a2a['lower_bound']:.2f} units"),
        ]
        note = _note(drawn)
        html = page.page(
            drawn,
            heading=str(slice),
            lead=lead,
            sections=[page.figures("Interconnect", rows, note)],
        )
        png = picture.picture(drawn, heading=str(slice), lines=[lead, "; ".join(short)])
        with deferred():
            return page.write(named(path, str(slice)), html, png)
    except ValueError as error:
        raise UserError(f"--draw: {error}") from error


def named(path: str, name: str) -> Path:
    """Where a drawing goes: `path`, or in that directory a file of a name made of `name`."""
    folder = Path(path or ".")
    inside = os.path.isdir(folder) or path.endswith("/")  # no error where a name is too long
    return folder / name.replace(":", "-").replace("/", "_") if inside else folder


def count(n: int, what: str) -> str:
    """2, "chip" -> "2 chips"."""
    return f"{n} {what}" + ("" if n == 1 else "s")


def _parse(shape, failed_ocs, failed):
    """(slice, parts that failed)."""
    names = ([f"ocs:{failed_ocs}"] if failed_ocs is not None else []) + list(failed)
    parts = [Part.parse(name, TPU_V4) for name in names]
    return Slice.parse(shape), list(dict.fromkeys(parts))


def _title(found):
    kind = "twisted torus" if found["twisted"] else "torus" if found["torus"] else "mesh"
    chips = f"a {kind} of {found['chips']} chips in {count(found['blocks'], 'block')}"
    return f"{'x'.join(map(str, found['shape']))}: {chips}"


def _note(drawn):
    """What the colours of links mean."""
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
