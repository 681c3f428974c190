"""The figures of `torsion study pod`, drawn from its results."""

from pathlib import Path
from typing import Any

import numpy as np

from topology.fleet.availability import ocs_goodput, static_goodput

_COLOURS = {"switches": "#1f77b4", "static": "#d62728"}
_SHARES = {  # of a pod's time: name and colour
    "kept": ("work kept", "#2a7f4f"),
    "saving": ("checkpoints", "#7fbf9a"),
    "lost": ("work lost", "#d62728"),
    "slowed": ("slowed by rerouting", "#ff9896"),
    "paused": ("starts, moves, restores", "#ff7f0e"),
    "stalled": ("waiting for a switch", "#8c564b"),
    "out": ("out of order", "#7f7f7f"),
    "idle": ("idle", "#dddddd"),
}


def draw_gains(results: dict[str, Any], path: Path) -> None:
    """The all-to-all of each shape, regular and with its best twist."""
    figure, axes = _figure(8.5, 6.5)
    rows = sorted(results["twists"], key=lambda row: (-row["chips"], row["gain"]))
    for place, row in enumerate(rows):
        colour = "#1f77b4" if row["shipped_gain"] else "#9ecae1"
        rate = row["bytes_per_second_per_chip"] / 1e9
        axes.barh(place, rate, color=colour)
        regular = row["regular_bytes_per_second_per_chip"] / 1e9
        axes.barh(place, regular, color="#666666", height=0.35)
        axes.text(rate + 0.5, place, f"× {row['gain']:.2f}", va="center", fontsize=8)
    names = [f"{row['shape']}  ({row['chips']} chips)" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    handles = [axes.barh([0], [0], color=c) for c in ("#1f77b4", "#9ecae1", "#666666")]
    labels = ["best twist, as it ships", "best twist that the wiring makes", "regular"]
    axes.legend(handles, labels, loc="lower right")
    axes.set_xlabel("all-to-all, GB/s that each chip sends (links of 50 GB/s, exact optima)")
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlim(right=1.12 * max(row["bytes_per_second_per_chip"] for row in rows) / 1e9)
    _save(figure, path)


def draw_goodput(results: dict[str, Any], path: Path) -> None:
    """Goodput against host availability; lines are closed forms, points are samples."""
    figure, axes = _figure(7.5, 4.6)
    hosts = np.linspace(0.985, 1, 121)
    boxes = {1024: ((2, 2, 4), "-"), 2048: ((2, 4, 4), "--"), 3072: ((3, 4, 4), ":")}
    for chips, (box, style) in boxes.items():
        for wiring, of in (
            ("switches", lambda a, chips=chips: ocs_goodput(a, chips // 64)),
            ("static", lambda a, box=box: static_goodput(a, box)),
        ):
            axes.plot(
                100 * hosts,
                [100 * of(a) for a in hosts],
                style,
                color=_COLOURS[wiring],
                label=f"{chips} chips, {wiring}",
            )
    for row in results["goodput"]:
        axes.plot(
            100 * row["host_availability"],
            100 * row["sampled"],
            ".",
            color=_COLOURS[row["wiring"]],
            markersize=7,
        )
    axes.set(xlabel="availability of a host, %", ylabel="goodput of the pod, %", xlim=(98.5, 100))
    axes.grid(alpha=0.3)
    axes.legend(title="slices of", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_kept(results: dict[str, Any], path: Path) -> None:
    """Draws what is kept of all-to-all without one switch."""
    figure, axes = _figure(8.5, 4.6)
    rows = results["failed_switch"]
    places = np.arange(len(rows))
    published = next(r for r in results["comparisons"] if "kept without" in r["what"])
    low, high = published["published"]
    axes.axvspan(100 * low, 100 * high, color="#ffcc80", alpha=0.4, linewidth=0)
    axes.text(100 * low, len(rows) - 0.45, " published range", fontsize=8, va="bottom")
    kept = [100 * row["optimum"] for row in rows]
    axes.plot(kept, places, "o", markersize=9, markerfacecolor="none", label="exact optimum")
    wild = [(100 * row["wild_first"], p) for p, row in enumerate(rows) if "wild_first" in row]
    axes.plot(*zip(*wild, strict=True), ".", color="#d62728", label="wild-first reroute")
    names = [f"{row['slice']}, a switch of {row['dimension']}" for row in rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlim=(91, 103), ylim=(-0.6, len(rows) + 0.3))
    axes.set_xlabel("all-to-all kept without one switch, %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_year(results: dict[str, Any], path: Path) -> None:
    """Draws the shares of a pod's time under each policy."""
    policies = results["year"]["policies"][::-1]
    figure, axes = _figure(8, 2 + 0.4 * len(policies))
    left = np.zeros(len(policies))
    for share, (label, colour) in _SHARES.items():
        parts = np.array([100 * row["shares"].get(share, 0) for row in policies])
        axes.barh(range(len(policies)), parts, left=left, label=label, color=colour)
        left += parts
    for place, row in enumerate(policies):
        text = f"{row['goodput']:.1%} kept"
        axes.text(50 * row["goodput"], place, text, ha="center", va="center", color="white")
    axes.set_yticks(range(len(policies)), [row["policy"] for row in policies])
    axes.set(xlim=(0, 100), xlabel="the pod's blocks times the time, %")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=4)
    _save(figure, path)


def draw_checkpoints(results: dict[str, Any], path: Path) -> None:
    """Draws the work kept against the checkpoint interval, with the rules of Young and Daly."""
    figure, axes = _figure(7, 4.2)
    found = results["checkpoints"]
    minutes = [row["interval"] / 60 for row in found["intervals"]]
    for key, style in (("closed_form", "-"), ("simulated", "o")):
        values = [100 * row[key] for row in found["intervals"]]
        axes.plot(minutes, values, style, label=key.replace("_", " "))
    for rule, style in (("young", "k--"), ("daly", "r:")):
        minutes = found[rule] / 60
        label = f"{rule.capitalize()}: {minutes:.1f}"
        axes.plot([minutes] * 2, axes.get_ylim(), style, label=label, scaley=False)
    axes.set_xscale("log")
    ticks = [15, 30, 60, 120, 240]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set(xlabel="minutes between checkpoints", ylabel="time that is work kept, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


FIGURES = {
    "pod-twists.png": draw_gains,
    "pod-goodput.png": draw_goodput,
    "pod-switches.png": draw_kept,
    "pod-year.png": draw_year,
    "pod-checkpoints.png": draw_checkpoints,
}
"""{file name: what draws it from (results, path)}."""


def _figure(width, height):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
