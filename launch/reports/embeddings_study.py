"""`torsion study embeddings`: what SparseCores gain, as published and as computed; then twists and
pooling.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.study_files import compute_and_write
from pjit_train.markdown import markdown_table
from topology import TPU_V3, TPU_V4, Slice
from topology.embeddings import systems
from topology.embeddings.machine import Machine
from topology.embeddings.plan import plan_tables
from topology.embeddings.tables import DLRM_V2
from topology.embeddings.twists import pooling_gain, twist_gain

SOCKETS = systems.LEARNERS + systems.SERVERS


@dataclass(frozen=True, kw_only=True)
class EmbeddingsStudy:
    """Extent of the study.

    Attributes:
      hotness: ids a sample of the tables of the second part.
      samples: of a chip.
      skews: of the tables where twists are compared.
      pooling_skews: where poolings are.
      width: of the tables.
      shapes: whose twisted slices are compared with regular ones.
      planned: whether DLRM-v2 is planned on both.
    """

    hotness: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    samples: tuple[int, ...] = (32, 256, 2048)
    skews: tuple[float, ...] = (0.0, 1.1)
    pooling_skews: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
    width: int = 64
    shapes: tuple[str, ...] = ("4x4x8", "4x8x8")
    planned: bool = True


def study_embeddings(
    out: Path, *, as_json: bool = False, study: EmbeddingsStudy | None = None
) -> int:
    """Runs `torsion study embeddings`; see `study_files.compute_and_write`."""
    return compute_and_write(
        out,
        lambda tell: find(study or EmbeddingsStudy(), tell),
        make_table,
        {"embeddings.png": draw},
        as_json=as_json,
    )


def find(study: EmbeddingsStudy, tell: Callable[[str], None] = lambda part: None) -> dict[str, Any]:
    """Computes all results, as they stand in results.json. `tell` hears the name of each part."""
    tell("published figures, by each reading")
    found = [_by_reading(reading) for reading in systems.readings()]
    best = min(found, key=lambda row: row["residual"])
    tell("twists")
    gains = [
        {
            "shape": shape,
            "skew": skew,
            "samples": samples,
            "gains": [
                twist_gain(shape, hotness=h, width=study.width, samples=samples, skew=skew)
                for h in study.hotness
            ],
        }
        for shape in study.shapes
        for skew in study.skews
        for samples in study.samples
    ]
    tell("pooling")
    machine = Machine.of(Slice.parse(study.shapes[0]))
    pooling = [
        {
            "skew": skew,
            "samples": study.samples[1],
            "owner_over_requester": [
                pooling_gain(
                    machine, hotness=h, width=study.width, samples=study.samples[1], skew=skew
                )
                for h in study.hotness
            ],
        }
        for skew in study.pooling_skews
    ]
    return {
        "best": best,
        "readings": found,
        "checks": checks(),
        "bisections": [_bisections(chips) for chips in systems.SHAPES],
        "hotness": list(study.hotness),
        "twists": gains,
        "pooling": pooling,
        "dlrm_v2": _planned(study.shapes[0], tell) if study.planned else None,
    }


def _by_reading(reading: systems.Reading) -> dict[str, Any]:
    fit = systems.fitted(reading)
    found = systems.figures(fit, reading)
    gains = {chips: systems.network_gain(chips, fit, reading) for chips in systems.SHAPES}
    return {
        "reading": dataclasses.asdict(reading),
        "rows": fit.rows,
        "network": fit.network,
        "peers": fit.peers,
        "gather_efficiency": systems.gather_efficiency(fit, reading),
        "figures": [dataclasses.asdict(figure) | {"residual": figure.residual} for figure in found],
        "residual": systems.root_mean_residual(found),
        "bend": math.exp(systems.bend(fit, reading)),
        "network_gains": [
            {"chips": chips, "ratio": ratio, "gain": gain} for chips, (ratio, gain) in gains.items()
        ],
    }


def checks() -> list[dict[str, Any]]:
    """Figures that follow from the published ones alone."""
    busy, balanced = 0.75, (1 + 0.75) / 2
    v3, v4 = TPU_V3.chip, TPU_V4.chip
    dram = systems.HOST_SOCKETS * systems.SOCKET_DRAM
    edge = systems.HOST_CHIPS * v4.hbm_bandwidth / dram
    values = {
        "sockets that a v4 chip is worth": systems.CPU_GAIN * SOCKETS / systems.CHIPS,
        "sockets that a v3 chip is worth": 9.8 * SOCKETS / systems.CHIPS,
        "v4 without SparseCores over the processors, least": systems.CPU_GAIN / 7,
        "v4 without SparseCores over the processors, most": systems.CPU_GAIN / 5,
        "gain where SparseCores and matrix units are balanced": 1 / balanced,
        "embeddings alone in host memory, times slower, least": 5 / busy,
        "embeddings alone in host memory, times slower, most": 7 / busy,
        "HBM's bandwidth over host memory's": edge,
        "part of that which SparseCores keep, least": 5 / busy / edge,
        "part of that which SparseCores keep, most": 7 / busy / edge,
        "v4 over v3: SparseCores and their clock": 1 / systems.sparse_rate("v3", "sparsecore"),
        "v4 over v3: HBM": 1 / systems.sparse_rate("v3", "hbm"),
        "v4 over v3: peak": v4.peak_bf16 / v3.peak_bf16,
        "exchange's part of the slower time: gain 2.0 by a ratio of 4": _part(2.0, 4),
        "exchange's part of the slower time: gain 1.1 by a ratio of 2": _part(1.1, 2),
        "TFLOP/s of a learner's socket": systems.learner_flops() / 1e12,
    }
    return [{"what": name, "value": value} for name, value in values.items()]


def _part(gain: float, ratio: float) -> float:
    """The part of a time that shrinks by `ratio` where the whole shrinks by `gain`."""
    return (1 - 1 / gain) / (1 - 1 / ratio)


def _bisections(chips: int) -> dict[str, Any]:
    """All-to-all of v4 over v3's, by each reading of both."""
    row: dict[str, Any] = {"chips": chips}
    for twists in (False, True):
        for wraps in (True, False):
            reading = systems.Reading(v3_wraps=wraps, v4_twists=twists)
            ratio = systems.exchange("v3", chips, reading) / systems.exchange("v4", chips, reading)
            name = f"{'twisted' if twists else 'regular'} over {'torus' if wraps else 'mesh'}"
            row[name] = ratio
    return row


def _planned(shape: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    tell("DLRM-v2, planned")
    rows = []
    for name in (shape, f"{shape}_twisted"):
        plan = plan_tables(DLRM_V2, Machine.of(Slice.parse(name)))
        rows.append({"slice": name, "step_seconds": plan.seconds, "gap": plan.gap})
    return rows


def make_table(results: dict[str, Any]) -> str:
    """The results in Markdown, to be read on a terminal too."""
    best = results["best"]
    sections = [
        "Published and computed: by the reading that fits best, and over all readings.",
        _figures(results),
        f"Best reading: {_said(best['reading'])}. On 128 chips of v4 the SparseCores' time is "
        f"{best['rows']:.0%} rows, {best['network']:.0%} exchange and {best['peers']:.0%} overhead "
        f"of peers (fitted); rows then reach {best['gather_efficiency']:.0%} of HBM's bandwidth.",
        "Each reading with its own fit.",
        _readings(results["readings"]),
        "What follows from the published figures alone.",
        markdown_table(
            ("check", "value"), [(r["what"], f"{r['value']:.3g}") for r in results["checks"]]
        ),
        "All-to-all of TPU v4 over that of v3, a chip.",
        _numbers(results["bisections"]),
        "Times as fast on the twisted slice, by ids a sample of each table; best plan on both.",
        _twists(results),
        "Tables by rows: time pooled at the owner over time pooled at the requester, on "
        "4x4x8, by ids a sample.",
        _pooling(results),
    ]
    if results["dlrm_v2"]:
        rows = [
            (r["slice"], f"{r['step_seconds'] * 1e3:.3f} ms", f"{100 * r['gap']:.2f} %")
            for r in results["dlrm_v2"]
        ]
        sections += [
            "DLRM-v2, planned.",
            markdown_table(("slice", "step", "at most from the best"), rows),
        ]
    return "\n\n".join(sections) + "\n"


def _figures(results: dict[str, Any]) -> str:
    rows = []
    for k, figure in enumerate(results["best"]["figures"]):
        all_of = [row["figures"][k]["computed"] for row in results["readings"]]
        low, high = figure["low"], figure["high"]
        rows.append(
            (
                figure["name"],
                f"{low:g}" if low == high else f"{low:g} .. {high:g}",
                f"{figure['computed']:.2f}",
                f"{100 * math.expm1(figure['residual']):+.0f} %",
                f"{min(all_of):.2f} .. {max(all_of):.2f}",
            )
        )
    return markdown_table(("figure", "published", "computed", "residual", "all readings"), rows)


def _said(reading: dict[str, Any]) -> str:
    return ", ".join(
        (
            f"v3 {'torus' if reading['v3_wraps'] else 'mesh'}",
            f"v4 {'twisted' if reading['v4_twists'] else 'regular'}",
            "rows by HBM" if reading["rows_by"] == "hbm" else "rows by SparseCores",
            "overlapping" if reading["overlaps"] else "in turn",
        )
    )


def _readings(rows: list[dict[str, Any]]) -> str:
    heads = ("reading", "rows", "exchange", "peers", "v4/v3", "host", "gains", "residual")
    cells = []
    for row in sorted(rows, key=lambda row: row["residual"]):
        figures = [figure["computed"] for figure in row["figures"]]
        cells.append(
            (
                _said(row["reading"]),
                f"{row['rows']:.2f}",
                f"{row['network']:.2f}",
                f"{row['peers']:.2f}",
                f"{figures[0]:.2f}",
                f"{figures[2]:.2f}",
                f"{figures[3]:.2f} .. {figures[4]:.2f}",
                f"{row['residual']:.3f}",
            )
        )
    return markdown_table(heads, cells)


def _numbers(rows: list[dict[str, Any]]) -> str:
    heads = tuple(rows[0])
    cells = [[f"{row[h]}" if h == "chips" else f"{row[h]:.2f}" for h in heads] for row in rows]
    return markdown_table(heads, cells)


def _twists(results: dict[str, Any]) -> str:
    heads = ("shape", "skew", "samples a chip", *map(str, results["hotness"]))
    cells = [
        (r["shape"], f"{r['skew']:g}", f"{r['samples']}", *(f"{g:.2f}" for g in r["gains"]))
        for r in results["twists"]
    ]
    return markdown_table(heads, cells)


def _pooling(results: dict[str, Any]) -> str:
    heads = ("skew", *map(str, results["hotness"]))
    cells = [
        (f"{r['skew']:g}", *(f"{v:.2f}" for v in r["owner_over_requester"]))
        for r in results["pooling"]
    ]
    return markdown_table(heads, cells)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws published beside computed figures, the gain of twists, and where pooling should sit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    _draw_figures(left, results)
    hotness = results["hotness"]
    colours = ("#9ecae1", "#4292c6", "#08519c")
    shape = results["twists"][0]["shape"]
    rows = [row for row in results["twists"] if row["shape"] == shape]
    samples = sorted({row["samples"] for row in rows})
    for row in rows:
        style = "-" if row["skew"] == 0 else "--"
        colour = colours[samples.index(row["samples"]) % 3]
        label = f"{row['samples']} samples a chip, skew {row['skew']:g}"
        middle.plot(hotness, row["gains"], style, color=colour, marker=".", label=label)
    middle.set(xscale="log", xlabel="ids a sample of each table", ylabel="times as fast")
    middle.set_title(f"{shape}_twisted over {shape}, best plans", fontsize=10)
    middle.legend(fontsize=8)
    skews = [row["skew"] for row in results["pooling"]]
    values = np.array([row["owner_over_requester"] for row in results["pooling"]])
    mesh = right.imshow(
        np.log2(values), aspect="auto", origin="lower", cmap="RdBu", vmin=-2, vmax=2
    )
    right.set_xticks(range(len(hotness)), hotness)
    right.set_yticks(range(len(skews)), [f"{skew:g}" for skew in skews])
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if abs(math.log2(value)) > 1.4 else "black"
        right.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=shade)
    right.set(xlabel="ids a sample", ylabel="skew of the rows' popularity")
    right.set_title("time pooled at the owner / at the requester, by row", fontsize=10)
    bar = figure.colorbar(mesh, ax=right, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    figure.savefig(path, dpi=110, format="png")


def _draw_figures(axes: Any, results: dict[str, Any]) -> None:
    best = results["best"]["figures"]
    for k, figure in enumerate(best):
        of_all = [row["figures"][k]["computed"] for row in results["readings"]]
        axes.plot([min(of_all), max(of_all)], [k, k], color="#c6dbef", linewidth=9, zorder=1)
        axes.plot([figure["low"], figure["high"]], [k, k], color="black", linewidth=2, zorder=2)
        axes.plot([figure["low"], figure["high"]], [k, k], "k|", markersize=12, zorder=2)
        axes.plot(figure["computed"], k, "o", color="#d62728", zorder=3)
    axes.set_yticks(range(len(best)), [_wrapped(figure["name"]) for figure in best], fontsize=8)
    axes.set(xscale="log", xlabel="ratio of speeds")
    ticks = (1, 1.5, 2, 3, 5, 7, 10, 14)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.invert_yaxis()
    handles = [
        axes.plot([], [], "k-", linewidth=2)[0],
        axes.plot([], [], "o", color="#d62728")[0],
        axes.plot([], [], color="#c6dbef", linewidth=9)[0],
    ]
    axes.legend(handles, ("published", "computed, best reading", "all readings"), fontsize=8)
    axes.set_title("the TPU v4 paper's figures", fontsize=10)


def _wrapped(name: str) -> str:
    words, half = name.split(), len(name) / 2
    for k in range(len(words)):
        if len(" ".join(words[: k + 1])) >= half:
            return " ".join(words[: k + 1]) + "\n" + " ".join(words[k + 1 :])
    return name
