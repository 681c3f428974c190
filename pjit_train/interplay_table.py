"""The tables and the figure of a study of sparsity with quantization."""

import collections
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.interplay_study import (
    BOTH,
    DENSE,
    ORDERS,
    QUANTIZE_FIRST,
    SMALL,
    SPARSE,
    SPARSIFY_FIRST,
    InterplayStudy,
    Loss,
)
from pjit_train.markdown import markdown_table

SHOWN = {
    (SPARSE, SPARSIFY_FIRST): "S→Q after training",
    (SPARSE, QUANTIZE_FIRST): "Q→S after training",
    (BOTH, SPARSIFY_FIRST): "S→Q in training",
    (BOTH, QUANTIZE_FIRST): "Q→S in training",
}
"""Ways of doing both, by (kind of the run, order), and what tables call them."""


_ERRORS = ("S", "Q", "SQ", "QS", "over", "dot S", "dot Q", "dot SQ", "dot QS", "over", "lost")


class Perplexities:
    """Perplexities of a study's models, by seed.

    Attributes:
      by_way: by (kind, pattern, format, order), by seed.
    """

    def __init__(self, losses: Sequence[Loss]):
        self.by_way: dict[Any, dict[Any, Any]] = collections.defaultdict(dict)
        for x in losses:
            self.by_way[x.kind, x.pattern, x.format, x.order][x.seed] = math.exp(x.loss)
        self.dense = self.by_way[DENSE, None, None, None]

    def quantized(self, format: str) -> dict[int, float]:
        """Perplexities, by seed, of the dense model in a format."""
        return self.by_way[DENSE, None, format, SPARSIFY_FIRST]

    def sparse(self, pattern: str) -> dict[int, float]:
        """Perplexities, by seed, of the sparse model in full precision."""
        return self.by_way[SPARSE, pattern, None, None]

    def bound(self, pattern: str, format: str) -> dict[int, float]:
        """Perplexities, by seed, if the harms of both add up (equation 12): dense + (S - dense) +
        (Q - dense)."""
        parts = self.sparse(pattern), self.quantized(format), self.dense
        return {
            seed: parts[0][seed] + parts[1][seed] - parts[2][seed]
            for seed in sorted(set.intersection(*map(set, parts)))
        }

    def excess(self, way: tuple[str, str], pattern: str, format: str) -> dict[int, float]:
        """Excess, by seed, of the perplexity of one of `SHOWN` over the bound; may be negative."""
        bound, kind, order = self.bound(pattern, format), *way
        both = self.by_way[kind, pattern, format, order]
        return {seed: both[seed] - bound[seed] for seed in sorted(set(both) & set(bound))}


def make_table(
    study: InterplayStudy,
    losses: Sequence[Loss],
    errors: Mapping[str, Sequence[Mapping[str, Any]]],
    notes: Sequence[str] = (),
) -> str:
    """The tables of a study, in Markdown; what has not been trained is a dash.

    Args:
      errors: by pattern, what `interplay_study.Measures.errors` gave.
    """
    found = Perplexities(losses)
    sections = [
        "Validation perplexity, mean and standard deviation over seeds. S is the sparse model in "
        "full precision, Q the dense one in a format, the bound what both would have if their "
        "harms added up (dense + (S - dense) + (Q - dense)); in brackets by how much it is passed. "
        "After training: the sparse model of full precision, whose master weights are then "
        "pruned and quantized in either order. In training: fine-tuned with both in every forward "
        "pass.",
        f"Dense: {_mean(found.dense)}.",
    ]
    for pattern in study.patterns:
        sections += [
            f"**{_called(pattern)}**, S: {_mean(found.sparse(pattern))}.",
            markdown_table(
                ["format", "Q", "bound", *SHOWN.values()],
                [
                    [
                        format,
                        _mean(found.quantized(format)),
                        _mean(found.bound(pattern, format)),
                        *(_with_excess(found, way, pattern, format) for way in SHOWN),
                    ]
                    for format in study.formats
                ],
            ),
        ]
    for pattern, rows in errors.items():
        sections += [
            f"**{_called(pattern)}**: errors of the kernels and of their dot products with the "
            "activations of a sequence of text, relative, root mean square over the "
            f"{len({(r['kernel'], r['layer']) for r in rows})} kernels of seed 0. S sparsity, Q "
            "quantization, SQ and QS both; 'over': kernels, and dot products, whose error "
            "passes the sum of those of S and Q, SQ / QS; 'lost': blocks that keep something but "
            "not their greatest element, for which Theorem 3.5 says nothing.",
            markdown_table(
                ["format", *_ERRORS],
                [_error_row(format, rows) for format in study.formats],
            ),
            *_warnings(pattern, rows),
        ]
    sections += [
        "At equal bytes: all parameters as they are stored, with scales and with the places of "
        "kept weights; sparse ones are pruned in training and quantized after it (S→Q). Beside "
        "each, the best dense model that has no more bytes, in any format, smaller or not, "
        "quantized after training as well.",
        markdown_table(
            ["sparse", "bytes", "perplexity", "best dense", "bytes", "perplexity", "difference"],
            _equal_bytes(losses),
        ),
        *notes,
    ]
    return "\n\n".join(sections) + "\n"


def _called(pattern: str) -> str:
    return pattern if ":" in pattern else f"{100 * float(pattern):g} % unstructured"


def _mean(values: Mapping[int, float], sign: str = "") -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values.values()):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values.values()):.3f}"


def _with_excess(found: Perplexities, way, pattern: str, format: str) -> str:
    values = found.by_way[way[0], pattern, format, way[1]]
    if not values:
        return "-"
    excess = found.excess(way, pattern, format)
    return f"{statistics.fmean(values.values()):.3f} ({_mean(excess, sign='+')})"


def _error_row(format: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    mine = [row for row in rows if row["format"] == format]
    if not mine:
        return [format, *["-"] * len(_ERRORS)]

    def rms(name: str) -> str:
        return f"{math.sqrt(statistics.fmean(row[name] ** 2 for row in mine)):.4f}"

    def percent(name: str) -> str:
        return f"{100 * statistics.fmean(row[name] for row in mine):.1f}"

    # Float32 sums: a bound that is attained may seem to be passed by 1e-6 of it.
    over = [sum(row[order] > row["bound"] * (1 + 1e-5) for row in mine) for order in ORDERS]
    terms = ("sparsity", "quantization", *ORDERS)
    return [
        format,
        *(rms(name) for name in terms),
        " / ".join(map(str, over)),
        *(rms(f"dot_{name}") for name in terms),
        " / ".join(percent(f"violations_{order}") for order in ORDERS) + " %",
        f"{percent('lost')} %",
    ]


def _warnings(pattern: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line where the premise of Theorem 3.5 does not hold."""
    lost = {row["format"]: row["lost"] for row in sorted(rows, key=lambda r: r["lost"])}
    named = [f"{format} (up to {100 * x:.2g} % of blocks)" for format, x in lost.items() if x > 0]
    if not named:
        return []
    return [
        f"Warning: at {_called(pattern)} the premise of Theorem 3.5 does not hold, masks take the "
        f"greatest element of blocks of {', '.join(named)}."
    ]


def _stored(losses: Sequence[Loss]) -> dict[tuple, tuple[int, dict[int, float]]]:
    """Returns (bytes, perplexities) by (kind, pattern, format) of what is quantized after
    training."""
    found: dict[tuple, tuple[int, dict[int, float]]] = {}
    for x in losses:
        if x.kind != BOTH and x.format is not None and x.order == SPARSIFY_FIRST:
            key = x.kind, x.pattern, x.format
            found.setdefault(key, (x.bytes, {}))[1][x.seed] = math.exp(x.loss)
    return found


def _equal_bytes(losses: Sequence[Loss]) -> list[list[str]]:
    rows, found = [], _stored(losses)
    dense = [key for key in found if key[0] in (DENSE, SMALL)]
    for key, (size, values) in sorted(found.items(), key=lambda item: item[1][0]):
        if key[0] != SPARSE:
            continue
        row = [f"{_called(key[1])}, {key[2]}", f"{size:,}", _mean(values)]
        mean = lambda k: statistics.fmean(found[k][1].values())
        small_enough = [k for k in dense if found[k][0] <= size]
        if not small_enough:
            rows.append([*row, "-", "-", "-", "-"])
            continue
        best = min(small_enough, key=mean)
        other = found[best][1]
        shown = f"{best[2]}" if best[0] == DENSE else f"{best[2]}, smaller for {best[1]}"
        difference = {s: values[s] - other[s] for s in sorted(set(values) & set(other))}
        rows.append([*row, shown, f"{found[best][0]:,}", _mean(other), _mean(difference, "+")])
    return rows


def draw(study: InterplayStudy, losses: Sequence[Loss], path: Path) -> None:
    """Draws the excess over the bound of each way to combine both, and perplexity against bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = Perplexities(losses)
    count = len(study.patterns)
    figure = pyplot.figure(figsize=(3.4 * max(count, 2), 8.5), layout="constrained")
    grid = figure.add_gridspec(2, count)
    shared = None
    for column, pattern in enumerate(study.patterns):
        axes = shared = figure.add_subplot(grid[0, column], sharey=shared)
        _draw_excess(axes, study, found, pattern)
        axes.set_title(_called(pattern))
        if column == 0:
            axes.set_ylabel("perplexity above the additive bound")
            axes.legend(fontsize=8)
        else:
            axes.tick_params(labelleft=False)
    _draw_bytes(figure.add_subplot(grid[1, :]), study, losses)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_excess(axes, study: InterplayStudy, found: Perplexities, pattern: str) -> None:
    axes.axhline(0, color="black", linewidth=1)
    shifts = np.linspace(-0.24, 0.24, len(SHOWN))
    for (way, name), shift, marker, color in zip(
        SHOWN.items(), shifts, "osD^", ("C0", "C3", "C9", "C1"), strict=True
    ):
        values = [(x, found.excess(way, pattern, f)) for x, f in enumerate(study.formats)]
        points = [(x + shift, list(v.values())) for x, v in values if v]
        axes.errorbar(
            [x for x, _ in points],
            [statistics.fmean(v) for _, v in points],
            [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points],
            fmt=marker,
            color=color,
            markersize=4.5,
            capsize=2,
            linewidth=1.2,
            label=name,
        )
    axes.set_xticks(range(len(study.formats)), study.formats, rotation=90, fontsize=8)
    axes.set_yscale("symlog", linthresh=0.05)
    axes.grid(axis="y", alpha=0.3)


def _draw_bytes(axes, study: InterplayStudy, losses: Sequence[Loss]) -> None:
    """Perplexity against bytes: a marker for what is done to the model, a colour for its format."""
    found = {
        key: (size, statistics.fmean(v.values())) for key, (size, v) in _stored(losses).items()
    }
    series = [(DENSE, None, "dense", "o")]
    series += [(SMALL, p, f"dense, smaller for {p}", m) for p, m in _marked(study, "xP+1")]
    series += [(SPARSE, p, f"{_called(p)}, S→Q", m) for p, m in _marked(study, "sD^v")]
    colors = {format: f"C{index}" for index, format in enumerate(study.formats)}
    for kind, pattern, name, marker in series:
        points = sorted((*found[key], key[2]) for key in found if key[:2] == (kind, pattern))
        if not points:
            continue
        x, y = [size / 1e3 for size, _, _ in points], [mean for _, mean, _ in points]
        axes.plot(x, y, color="0.8", linewidth=0.8, zorder=1)
        axes.scatter(x, y, c=[colors[f] for _, _, f in points], marker=marker, s=28, zorder=2)
        axes.plot([], [], color="black", marker=marker, linestyle="", label=name)
    for format, color in colors.items():
        axes.plot([], [], color=color, linewidth=3, label=format)
    means = [mean for _, mean in found.values()]
    if means and max(means) > 2 * min(means):
        axes.set_ylim(top=2 * min(means))
    axes.set_xlabel("kilobytes of all parameters, scales and places of kept weights included")
    axes.set_ylabel("validation perplexity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _marked(study: InterplayStudy, markers: str):
    return zip(study.patterns, itertools.cycle(markers), strict=False)
