"""Utilisation against the size of the buffer, for each dataflow, and pictures."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.dataflow import DATAFLOWS, Cost, attention_cost, layer_cost
from topology.accelerator.workloads import BATCH, Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, Sequence[float | None]]]
"""{scope: {dataflow: [utilisation with each buffer, None where it is too small]}}."""

SCOPES = ("attention", "layer")
_COLORS = {"naive": "#7f7f7f", "flex": "#1f77b4", "flat": "#d62728"}


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
    model: Model,
    sequence: int,
    buffers: Sequence[int],
    *,
    batch: int = BATCH,
    softmax: str = "free",
) -> Curves:
    """Computes the utilisation in each scope, with each dataflow and buffer."""

    def utilisation(scope: str, dataflow: str, size: int) -> float | None:
        machine = accelerator.replace(buffer=size)
        try:
            found = cost(machine, model, sequence, dataflow, scope, batch=batch, softmax=softmax)
        except ValueError:
            return None
        return found.utilisation

    return {
        scope: {x: [utilisation(scope, x, size) for size in buffers] for x in DATAFLOWS}
        for scope in SCOPES
    }


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
        for name, color in _COLORS.items():
            for scope, style in zip(SCOPES, ("-", ":"), strict=True):
                values = panel["curves"][scope][name]
                heights = [math.nan if value is None else value for value in values]
                axes.plot(panel["buffers"], heights, style, color=color, label=f"{name}, {scope}")
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


def _figure(panels: int, columns: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows + 0.5), layout="constrained")
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
