"""`torsion packets`: the curve of latency against injection rate, and where it saturates."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launch.reports.pictures import chart, save, written
from launch.reports.traffic import Demands
from pjit_train.errors import UserError
from topology.routing.loads import link_loads, lower_bounds
from topology.routing.open_loop import OVERLOAD, Point, latency_curve
from topology.routing.routing import dimension_order

_COLUMNS = tuple(field.name for field in dataclasses.fields(Point))


def check_sends(demands: Demands) -> None:
    """Raises a UserError where no chip sends anything to another."""
    if not np.any(demands.matrix * (1 - np.eye(len(demands.matrix)))):
        raise UserError(
            f"--pattern {demands.name}: on {demands.slice} no chip sends anything to another; take "
            "a larger slice or another pattern"
        )


def report(
    demands: Demands,
    *,
    places: int | None = None,
    cycles: int | None = None,
    seed: int = 0,
    tell: Callable[[dict[str, Any]], object] = lambda row: None,
) -> dict[str, Any]:
    """The curve of a pattern, as `torsion packets --json` prints it.

    Args:
      demands: that `check_sends` lets through.
      places: packets of a buffer; None for any number.
      cycles: of the window of each point.
      tell: is called with each point as soon as it is measured.

    Returns:
      Rates in packets that a chip makes a cycle, as many as a link moves being 1. `bound`: the rate
      at which the fullest link of dimension order is full; `bound_any` that of the best routing is
      not larger. `saturation`: the largest rate that was stable, and the smallest that was not,
      or the bound. `overload`: packets that arrive, by chip and cycle, at 1.1 times the bound.
      `points`: by rate, the fields of `topology.routing.open_loop.Point`, latency in cycles.
    """
    slice, matrix = demands.slice, demands.matrix
    routing = dimension_order(slice)
    largest = float(link_loads(slice, routing, matrix).max())
    window = cycles or max(1000, min(4000, 64_000 // slice.num_chips))
    curve = latency_curve(
        slice,
        routing,
        matrix,
        1 / largest,
        places=places,
        cycles=window,
        seed=seed,
        told=lambda point: tell(_row(point, largest)),
    )
    return {
        "pod": slice.pod.name,
        "slice": str(slice),
        "chips": slice.num_chips,
        "pattern": demands.name,
        "places": places,
        "cycles": window,
        "seed": seed,
        "bound": 1 / largest,
        "bound_any": 1 / max(lower_bounds(slice, matrix).values()),
        "saturation": list(curve.saturation),
        "overload": curve.points[-1].accepted,
        "points": [_row(point, largest) for point in curve.points],
    }


def _row(point: Point, largest: float) -> dict[str, Any]:
    """Turns a point into a row for JSON, which has no NaN."""
    row = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in dataclasses.asdict(point).items()
    }
    return row | {"of_bound": point.rate * largest}


def title(demands: Demands) -> str:
    """Says what is measured, and the heads of the rows that follow."""
    slice = demands.slice
    return (
        f"{demands.name} on {slice} of {slice.pod.name}, {slice.num_chips} chips: packets a chip "
        f"makes a cycle, and their latency in cycles\n\n{'rate':>9}{'of bound':>10}{'arrived':>10}"
        f"{'latency':>10}{'99 %':>8}{'hops':>8}"
    )


def row_text(row: dict[str, Any]) -> str:
    """A point for people."""
    latency = f"{'none':>10}{'':>8}{'':>8}"
    if row["latency"] is not None:
        latency = f"{row['latency']:>10.2f}{row['latency_99']:>8.0f}{row['hops']:>8.2f}"
    text = f"{row['rate']:>9.4f}{row['of_bound']:>10.1%}{row['accepted']:>10.4f}{latency}"
    return text if row["stable"] else f"{text}  saturated"


def summary(found: dict[str, Any]) -> str:
    """Says where it saturates, beside the bounds."""
    low, high = found["saturation"]
    bound = found["bound"]
    parts = f"{low / bound:.1%} to {high / bound:.1%} of the bound"
    places = "any number of" if found["places"] is None else found["places"]
    return "\n".join(
        [
            "",
            f"saturates between {low:.4f} and {high:.4f}, {parts}",
            f"overload  {found['overload']:.4f} packets arrive at {OVERLOAD} times the bound",
            f"bound     {bound:.4f}: the fullest link of dimension order is full",
            f"          {found['bound_any']:.4f}: no routing carries more",
            f"{places} places a buffer, windows of {found['cycles']} cycles",
        ]
    )


def write_curve(found: dict[str, Any], path: Path) -> None:
    """Writes a row for each point."""
    text = io.StringIO()
    rows = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    rows.writerows(found["points"])
    with written(path, "--csv") as new:
        new.write_text(text.getvalue())


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws mean and 99 % latency against the rate, with saturation and the bounds."""
    figure, axes = chart(7.5, 4.6)
    stable = [p for p in found["points"] if p["stable"] and p["latency"] is not None]
    wild = [p for p in found["points"] if not p["stable"] and p["latency"] is not None]
    for key, label, style in (("latency", "mean", "o-"), ("latency_99", "99 %", ".--")):
        rates = [p["rate"] for p in stable]
        axes.plot(rates, [p[key] for p in stable], style, label=label, color="#1f77b4")
    if wild:
        axes.plot(
            [p["rate"] for p in wild],
            [p["latency"] for p in wild],
            "x",
            label="mean, saturated (grows with the run)",
            color="#d62728",
        )
    axes.axvspan(*found["saturation"], color="#ffcc80", alpha=0.5, lw=0, label="saturation")
    axes.axvline(found["bound"], color="k", ls="--", lw=1, label="bound, dimension order")
    axes.axvline(found["bound_any"], color="k", ls=":", lw=1, label="bound, any routing")
    axes.set_yscale("log")
    axes.set(xlabel="packets that a chip makes a cycle", ylabel="latency, cycles", xlim=(0, None))
    places = "any number of" if found["places"] is None else found["places"]
    axes.set_title(f"{found['pattern']} on {found['slice']}, {places} places a buffer", fontsize=10)
    axes.legend(fontsize=8)
    save(figure, path)
