"""Utilisation by the size of the buffer, where whole rows are the best tiles, and pictures."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.dataflow import (
    Cost,
    attention_cost,
    layer_cost,
    rows_against_tiles,
)
from topology.accelerator.workloads import BATCH, Attention, Model
from topology.arrays import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, Sequence[float | None]]]
"""{scope: {dataflow: [utilisation with each buffer, None where it is too small]}}."""

SCOPES = ("attention", "layer")
_COLORS = {"naive": "#7f7f7f", "flex": "#1f77b4", "flat": "#d62728", "flash": "#2ca02c"}
_STYLES = dict(zip(SCOPES, ("-", ":"), strict=True))


def cost(
    accelerator: Accelerator,
    model: Model,
    sequence: int,
    dataflow: str,
    scope: str,
    *,
    batch: int = BATCH,
    softmax: str = "free",
    granularity: str = "M",
) -> Cost:
    """The cost of a scope: "attention", both of its matmuls, or the whole "layer"."""
    options = {"softmax": softmax, "granularity": granularity}
    if scope == "attention":
        return attention_cost(accelerator, model.attention(sequence, batch), dataflow, **options)
    return layer_cost(accelerator, model, sequence, dataflow, batch=batch, **options)


def utilisation_curves(
    accelerator: Accelerator,
    costs: Mapping[str, Callable[[Accelerator, str], Cost]],
    buffers: Sequence[int],
    dataflows: Sequence[str],
) -> Curves:
    """Computes the utilisation in each scope, with each dataflow and buffer.

    Args:
      costs: {scope: (accelerator, dataflow) -> Cost}; a ValueError means that the buffer is too
        small.
    """

    def utilisation(scope: str, dataflow: str, size: int) -> float | None:
        try:
            return costs[scope](accelerator.replace(buffer=size), dataflow).utilisation
        except ValueError:
            return None

    return {
        scope: {x: [utilisation(scope, x, size) for size in buffers] for x in dataflows}
        for scope in costs
    }


def rows_map(
    accelerator: Accelerator,
    works: Sequence[Attention],
    buffers: Sequence[int],
    *,
    softmax: str = "overlapped",
) -> Floats:
    """Times that the best tiles of fewer columns are as fast as whole rows, [works, buffers]; see
    `dataflow.rows_against_tiles`.

    Infinite where whole rows do not fit, NaN where no tile does.
    """
    found = np.full((len(works), len(buffers)), np.nan)
    for i, work in enumerate(works):
        for j, size in enumerate(buffers):
            machine = accelerator.replace(buffer=size)
            rows, tiles = rows_against_tiles(machine, work, softmax=softmax)
            if tiles is not None:
                found[i, j] = np.inf if rows is None else rows.seconds / tiles.seconds
            elif rows is not None:
                found[i, j] = 1.0
    return found


def draw_rows_map(
    found: Floats, sequences: Sequence[int], buffers: Sequence[int], title: str, path: Path
) -> None:
    """Draws a map of `rows_map`.

    Args:
      path: of the picture, .png, .svg or .pdf.
    """
    from matplotlib.colors import LogNorm

    figure, [axes] = _figure(1, 1, width=8.0, height=4.6)
    shown = np.ma.masked_invalid(found)
    edges = [np.arange(n + 1) - 0.5 for n in (len(buffers), len(sequences))]
    image = axes.pcolormesh(*edges, shown, cmap="RdBu", norm=LogNorm(vmin=0.5, vmax=2.0))
    for (i, j), value in np.ndenumerate(found):
        text = "no rows" if np.isinf(value) else "-" if np.isnan(value) else f"{value:.2f}"
        color = "gray" if not np.isfinite(value) else "white" if value > 1.5 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(buffers)), [size_text(x) for x in buffers], rotation=60, fontsize=8)
    axes.set_yticks(range(len(sequences)), [f"{n:,}" for n in sequences], fontsize=8)
    axes.set(title=title, xlabel="buffer", ylabel="sequence")
    bar = figure.colorbar(image, ax=axes, ticks=[0.5, 0.71, 1, 1.41, 2], format="{x:.2g}")
    bar.ax.minorticks_off()
    bar.set_label("time of whole rows over that of tiles (red: rows win)")
    figure.savefig(path, dpi=100)


class CurvesPanel(TypedDict):
    """Panel of utilisation against the size of the buffer.

    Attributes:
      buffers: sizes in bytes.
      mark: bytes of a buffer to mark.
    """

    title: str
    buffers: Sequence[int]
    curves: Curves
    mark: int


class GainsPanel(TypedDict):
    """Panel of times as fast by sequence.

    Attributes:
      lines: {label: value at each sequence}.
      levels: {label: value}, published ones.
    """

    title: str
    lines: Mapping[str, Sequence[float]]
    levels: Mapping[str, float]


def draw_curves(panels: Sequence[CurvesPanel], path: Path) -> None:
    """Draws curves of `utilisation_curves`, two panels a row.

    Args:
      path: of the picture, .png, .svg or .pdf.
    """
    columns = min(2, len(panels))
    figure, all_axes = _figure(len(panels), columns)
    for axes, panel in zip(all_axes, panels, strict=True):
        for scope, curves in panel["curves"].items():
            for name, values in curves.items():
                heights = [math.nan if value is None else value for value in values]
                axes.plot(
                    panel["buffers"],
                    heights,
                    _STYLES[scope],
                    color=_COLORS[name],
                    label=f"{name}, {scope}",
                )
        axes.axvline(panel["mark"], color="black", linewidth=0.8, linestyle="--")
        axes.text(panel["mark"], 1.02, " its buffer", fontsize=7)
        shown = [2**i for i in range(10, 60, 4)]
        shown = [x for x in shown if panel["buffers"][0] <= x <= panel["buffers"][-1]]
        _scale(axes, shown, [size_text(x) for x in shown])
        axes.set_ylim(0, 1.08)
        axes.set(title=panel["title"], xlabel="buffer", ylabel="used of the matrix array")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def draw_gains(panels: Sequence[GainsPanel], sequences: Sequence[int], path: Path) -> None:
    """Draws how many times as fast FLAT is, by sequence.

    Args:
      path: of the picture, .png, .svg or .pdf.
    """
    figure, all_axes = _figure(len(panels), len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        styles = itertools.cycle(("-", "-", "-", "--"))
        for (label, values), style in zip(panel["lines"].items(), styles, strict=False):
            axes.plot(sequences, values, style, marker=".", label=label)
        for (label, value), style in zip(panel["levels"].items(), ("--", ":"), strict=True):
            axes.axhline(value, color="black", linestyle=style, linewidth=1, label=label)
        _scale(axes, sequences, [str(n) for n in sequences])
        axes.set_ylim(bottom=0.9)
        axes.set(title=panel["title"], xlabel="sequence", ylabel="times as fast as FLEX, a layer")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def _figure(
    panels: int, columns: int, *, width: float = 5.0, height: float = 3.4
) -> tuple["Figure", list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _scale(axes: "Axes", ticks: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def size_text(size: float) -> str:
    """Writes a number of bytes in the largest unit that fits, such as "512 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
