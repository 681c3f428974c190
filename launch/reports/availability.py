"""`torsion availability`: goodput of a pod by availability of hosts, for slices of a size."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.reports.pictures import chart, save
from pjit_train.errors import UserError
from pjit_train.markdown import markdown_table
from topology import Slice
from topology.fleet.availability import (
    WORD,
    block_availability,
    ocs_goodput,
    sample_goodput,
    static_goodput,
)
from topology.hardware import Pod, of_blocks
from topology.numbers import number
from topology.torus.shapes import legal_shapes, times

WIRINGS = ("switches", "static")
_CLOSED = 12  # blocks of a slice from which on static wiring has a closed form, in 64 blocks


def read_slices(text: str, pod: Pod) -> list[Slice]:
    """Slices of whole blocks out of a text such as `8x8x16,2048`.

    Raises:
      UserError: one is no slice of the pod, or is a part of a block.
    """
    try:
        of_blocks(pod)
        return [_slice(name.strip(), pod) for name in text.split(",")]
    except ValueError as error:
        raise UserError(str(error)) from error


def _slice(name: str, pod: Pod) -> Slice:
    side = of_blocks(pod).block.side
    if re.fullmatch(r"[0-9]{1,9}", name):
        shapes = [s for s in legal_shapes(pod=pod) if not any(k % side for k in s)]
        fitting = [shape for shape in shapes if math.prod(shape) == int(name)]
        if not fitting:
            sizes = sorted({math.prod(shape) for shape in shapes})
            near = min(sizes, key=lambda size: abs(size - int(name)))
            raise UserError(
                f"--slice {name}: no slice of whole blocks has {name} chips; the nearest has {near}"
            )
        return Slice.parse(times(min(fitting, key=sum)), pod)  # the nearest to a cube
    slice = Slice.parse(name, pod)
    if not slice.is_whole_blocks:
        block = times((side,) * 3)
        raise UserError(f"--slice {name}: is a part of a block; take {block} or whole blocks")
    return slice


def read_hosts_up(text: str) -> list[float]:
    """Parts of the time out of a text such as `0.99,0.999`; UserError where they are none."""
    parts = []
    for word in text.split(","):
        try:
            part = float(word)
        except ValueError:
            part = math.nan
        try:
            number("--hosts-up", part, most=1)
        except ValueError as error:
            wanted = "want parts of the time, 0 .. 1, such as 0.99"
            raise UserError(f"--hosts-up {word.strip() or text}: {wanted}") from error
        parts.append(part)
    return parts


def report(
    slices: Sequence[Slice],
    hosts_up: Sequence[float],
    pod: Pod,
    *,
    trials: int = 1_000_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The goodput of each slice, as `torsion availability --json` prints it.

    Returns:
      `block_up`: the part of the time that a block is up, all its hosts being; no wiring's goodput
      is larger. `rows`: of each slice and availability, by wiring (`switches`, `static`):
      `goodput`, the part of the pod in slices; `slices`, how many there are on average; `method`,
      "closed form", or "sampled" with its `standard_error`. `exact` is false where static slices
      are packed one by one, which gives a lower bound. None where nothing can be said.
    """
    total = of_blocks(pod).num_blocks
    rows = [
        {
            "slice": str(slice),
            "chips": slice.num_chips,
            "blocks": slice.num_blocks,
            "hosts_up": part,
            "block_up": block_availability(part, pod),
            **{
                wiring: goodput(slice, part, wiring, pod, trials=trials, seed=seed)
                for wiring in WIRINGS
            },
        }
        for slice in slices
        for part in hosts_up
    ]
    return {"pod": pod.name, "blocks": total, "rows": rows}


def goodput(
    slice: Slice, hosts_up: float, wiring: str, pod: Pod, *, trials: int, seed: int = 0
) -> dict[str, Any] | None:
    """Goodput with a wiring, by the closed form where it is one that takes no long."""
    n, total = slice.num_blocks, of_blocks(pod).num_blocks
    error, exact = None, True
    if wiring == "switches" or n == 1:  # a slice of one block needs no neighbour
        mean = ocs_goodput(hosts_up, n, pod)
    elif total > WORD:
        return None
    elif n >= _CLOSED:
        mean = static_goodput(hosts_up, slice.block_shape, pod)
    else:
        found = sample_goodput(
            hosts_up, slice.block_shape, static=True, trials=trials, seed=seed, pod=pod
        )
        mean, error, exact = found.mean, found.error, found.exact
    return {
        "goodput": mean,
        "slices": mean * total / n,
        "method": "closed form" if error is None else "sampled",
        "standard_error": error,
        "exact": exact,
    }


def describe(found: dict[str, Any]) -> str:
    """The goodput for people."""
    head = ("slice", "chips", "hosts up", "blocks up", "switches", "static wiring", "static")
    cells, static = [], [row["static"] for row in found["rows"]]
    for row in found["rows"]:
        fixed = row["static"]
        cells.append(
            (
                row["slice"],
                f"{row['chips']}",
                f"{row['hosts_up']:.6g}",
                f"{row['block_up']:.5f}",
                f"{row['switches']['goodput']:.5f}",
                "unknown" if fixed is None else f"{fixed['goodput']:.5f}",
                _how(fixed),
            )
        )
    lines = [
        f"goodput of a {found['pod']} pod of {found['blocks']} blocks: its part in slices of one "
        "size",
        "",
        markdown_table(head, cells),
        "",
        "No wiring has more than the blocks that are up. Switches: closed form.",
    ]
    if any(fixed and not fixed["exact"] for fixed in static):
        lines.append("At least: static slices are placed one by one, so more may fit.")
    if None in static:
        lines.append(f"Unknown: static wiring of more than {WORD} blocks is not computed.")
    return "\n".join(lines)


def _how(fixed: dict[str, Any] | None) -> str:
    if fixed is None:
        return ""
    if fixed["standard_error"] is None:
        return fixed["method"]
    return f"sampled, +- {fixed['standard_error']:.5f}" + ("" if fixed["exact"] else ", at least")


def draw(found: dict[str, Any], slices: Sequence[Slice], pod: Pod, path: Path) -> None:
    """Draws goodput against availability; points are the rows of a report."""
    figure, axes = chart(7.5, 4.6)
    lowest = min(row["hosts_up"] for row in found["rows"])
    parts = np.linspace(max(0.0, min(lowest, 0.985) - 0.1 * (1 - lowest)), 1, 61)
    colours = {"switches": "#1f77b4", "static": "#d62728"}
    for place, slice in enumerate(dict.fromkeys(slices)):
        style = ("-", "--", ":", "-.")[place % 4]
        for wiring in WIRINGS:
            line = [goodput(slice, float(a), wiring, pod, trials=30_000) for a in parts]
            if None not in line:
                values = [100 * one["goodput"] for one in line if one]
                label = f"{slice}, {wiring}"
                axes.plot(100 * parts, values, style, color=colours[wiring], label=label)
    for row in found["rows"]:
        for wiring in WIRINGS:
            if row[wiring] is not None:
                at = 100 * row["hosts_up"], 100 * row[wiring]["goodput"]
                axes.plot(*at, "o", color=colours[wiring], markersize=5)
    axes.set(xlabel="availability of a host, %", ylabel="goodput of the pod, %", ylim=(-2, 102))
    axes.set_title(f"{found['pod']}, {found['blocks']} blocks", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)
