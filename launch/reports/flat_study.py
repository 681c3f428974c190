"""`torsion study flat`: published figures of FLAT beside those that `topology` computes.

Nothing is fitted to the published figures. What they leave open is varied, one thing at a time.
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
from topology.accelerator import dataflow_curves as curves
from topology.accelerator.accelerator import CLOUD, EDGE, Accelerator, MatrixArray
from topology.accelerator.dataflow import Cost, least_full_buffer
from topology.accelerator.workloads import BATCH, MODELS, SEQUENCES, Model

PLATFORMS = {"edge": EDGE, "cloud": CLOUD}
ABSTRACT, BODY = "abstract", "published body"
# FLAT over FLEX, of the models: times as fast, part of the energy saved.
PUBLISHED = {
    "edge": {ABSTRACT: (1.94, 0.49), BODY: (1.75, 0.44)},
    "cloud": {ABSTRACT: (1.76, 0.42), BODY: (1.65, 0.55)},
}
# How many times FLAT's buffer FLEX needs for full utilisation, at 512 and beyond 4K.
PUBLISHED_BUFFERS = {"attention": (10, 10_000), "layer": (10, 100)}
# Utilisation of logit and attend, read off slide 20: {sequence: {buffer: (naive, flex, flat)}}.
PUBLISHED_USE = {
    512: {
        20e3: (0.2, 0.25, 0.55),
        200e3: (0.2, 0.58, 1),
        20e6: (0.3, 0.97, 1),
        2e9: (0.6, 0.97, 1),
    },
    4096: {
        20e3: (0.2, 0.25, 0.58),
        200e3: (0.2, 0.35, 1),
        20e6: (0.2, 0.6, 1),
        2e9: (0.6, 0.97, 1),
    },
}
LANES = 2**30  # that the paper's model is said to give the softmax
CHARGES = {  # of the softmax: how it is charged, and with how many lanes (None: the platform's)
    "free": ("free", None),
    "its bytes": ("overlapped", LANES),
    "overlapped": ("overlapped", None),
    "in turn": ("in-turn", None),
}


@dataclass(frozen=True, kw_only=True)
class FlatStudy:
    """Extent of the study: models, sequences and buffers.

    Attributes:
      models, sequences: over which means are taken.
      buffer_sequences: for which the least buffers are searched, with BERT.
      points: of a curve, from 16 KiB to 4 GiB.
    """

    models: tuple[str, ...] = tuple(MODELS)
    sequences: tuple[int, ...] = SEQUENCES
    buffer_sequences: tuple[int, ...] = (512, 4096, 16384, 65536)
    points: int = 37


def study_flat(out: Path, *, as_json: bool = False, study: FlatStudy | None = None) -> int:
    """Runs `torsion study flat`; see `study_files.compute_and_write`."""
    return compute_and_write(
        out,
        lambda tell: find(study or FlatStudy(), tell),
        make_table,
        {"flat-utilisation.png": draw_use, "flat-gains.png": draw_gains},
        as_json=as_json,
    )


def find(study: FlatStudy, tell: Callable[[str], None] = lambda part: None) -> dict[str, Any]:
    """Computes all results, as they stand in results.json. `tell` hears the name of each part."""
    tell("gains")
    gains = [
        {
            "platform": name,
            "softmax": charge,
            "scope": scope,
            **gain(platform, study, charge=charge, scope=scope),
        }
        for name, platform in PLATFORMS.items()
        for charge in CHARGES
        for scope in curves.SCOPES
    ]
    tell("what the public facts leave open")
    open_points = [row for name in PLATFORMS for row in sensitivity(name, study)]
    tell("least buffers")
    buffers = [
        least_buffers(name, sequence, charge, scope, granularity)
        for name, charge in (("edge", "its bytes"), ("cloud", "free"))
        for sequence in study.buffer_sequences
        for scope in curves.SCOPES
        for granularity in ("M", "H")
    ]
    tell("utilisation by buffer")
    return {
        "models": list(study.models),
        "sequences": list(study.sequences),
        "gains": gains,
        "open": open_points,
        "buffers": buffers,
        "use": [
            use(name, sequence, study.points) for name in PLATFORMS for sequence in PUBLISHED_USE
        ],
    }


def both(
    platform: Accelerator,
    model: Model,
    sequence: int,
    *,
    charge: str = "free",
    scope: str = "layer",
    granularity: str = "M",
    batch: int = BATCH,
) -> tuple[Cost, Cost]:
    """(FLEX, FLAT): FLAT's search may also leave the operators unfused, where that is faster."""
    softmax, lanes = CHARGES[charge]
    if lanes is not None:
        platform = platform.replace(vector_lanes=lanes)

    def cost(dataflow):
        return curves.cost(
            platform,
            model,
            sequence,
            dataflow,
            scope,
            batch=batch,
            softmax=softmax,
            granularity=granularity,
        )

    flex = cost("flex")
    try:
        fused = cost("flat")
    except ValueError:  # the buffer does not hold a row of logits
        return flex, flex
    # Rounding must not decide between equals.
    key = [(float(np.float32(found.seconds)), found.energy) for found in (flex, fused)]
    return flex, fused if key[1] < key[0] else flex


def gain(platform: Accelerator, study: FlatStudy, **options) -> dict[str, Any]:
    """FLAT over FLEX, geometric means over models: "speed", "energy_saved", "traffic".

    "by_sequence" has the speed at each sequence; the others are over the sequences, too. Options
    as of `both`; "models" replaces those of the study.
    """
    models = options.pop("models", None) or [MODELS[name] for name in study.models]
    grid = [
        [both(platform, model, sequence, **options) for model in models]
        for sequence in study.sequences
    ]
    pairs = [pair for row in grid for pair in row]
    return {
        "speed": _mean(flex.seconds / flat.seconds for flex, flat in pairs),
        "energy_saved": 1 - _mean(flat.energy / flex.energy for flex, flat in pairs),
        "traffic": _mean(flat.off_chip_bytes / flex.off_chip_bytes for flex, flat in pairs),
        "by_sequence": [_mean(flex.seconds / flat.seconds for flex, flat in row) for row in grid],
    }


def _mean(ratios) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logs) / len(logs))


def sensitivity(name: str, study: FlatStudy) -> list[dict[str, Any]]:
    """Gains of the layer with one assumption changed at a time."""
    base = PLATFORMS[name]
    side = math.isqrt(base.array.elements)
    energy = base.energy
    large = dataclasses.replace(MODELS["BERT"], name="FlauBERT", heads=16, d_model=1024, d_ff=4096)
    models = [large if x == "FlauBERT" else MODELS[x] for x in study.models]
    short = dataclasses.replace(
        study, sequences=tuple(x for x in study.sequences if x <= 4096) or study.sequences[:1]
    )
    cases: dict[str, dict[str, Any]] = {
        "as assumed": {},
        "the array keeps its shape": {"array": MatrixArray(rows=side, columns=side)},
        "FLEX goes sequence by sequence": {"granularity": "B"},
        "FLEX goes head by head": {"granularity": "H"},
        "sequences up to 4K only": {"study": short},
        "one sequence a batch": {"batch": 1},
        "FlauBERT large, not base": {"models": models},
        "half the bandwidth to memory": {"off_chip_bandwidth": base.off_chip_bandwidth / 2},
        "twice the bandwidth to memory": {"off_chip_bandwidth": base.off_chip_bandwidth * 2},
        "half the bandwidth of the buffer": {"on_chip_bandwidth": base.on_chip_bandwidth / 2},
        "half the buffer": {"buffer": base.buffer // 2},
        "four times the buffer": {"buffer": base.buffer * 4},
        "a byte of memory at 162 pJ (DDR)": {
            "energy": dataclasses.replace(energy, off_chip_byte=162e-12)
        },
        "energy of bytes of memory only": {
            "energy": dataclasses.replace(energy, mac=0, vector_operation=0, on_chip_byte=0)
        },
        "a byte of the buffer at four times": {
            "energy": dataclasses.replace(energy, on_chip_byte=4 * energy.on_chip_byte)
        },
    }
    names = {field.name for field in dataclasses.fields(Accelerator)}
    rows = []
    for case, changes in cases.items():
        machine = base.replace(**{x: y for x, y in changes.items() if x in names})
        options = {x: y for x, y in changes.items() if x not in names}
        over = options.pop("study", study)
        for charge in ("free", "its bytes"):
            found = gain(machine, over, charge=charge, **options)
            rows.append({"platform": name, "case": case, "softmax": charge, **found})
    return rows


def least_buffers(name: str, sequence: int, charge: str, scope: str, granularity: str):
    """The least buffers for full utilisation with BERT; "ratio" is FLEX over FLAT."""
    softmax, lanes = CHARGES[charge]
    base = PLATFORMS[name].replace(vector_lanes=lanes or PLATFORMS[name].vector_lanes)

    def least(dataflow):
        return least_full_buffer(
            lambda size: curves.cost(
                base.replace(buffer=size),
                MODELS["BERT"],
                sequence,
                dataflow,
                scope,
                softmax=softmax,
                granularity=granularity,
            )
        )

    flex, flat = least("flex"), least("flat")
    return {
        "platform": name,
        "sequence": sequence,
        "softmax": charge,
        "scope": scope,
        "granularity": granularity,
        "flex": flex,
        "flat": flat,
        "ratio": flex / flat,
    }


def use(name: str, sequence: int, points: int) -> dict[str, Any]:
    """Utilisation by buffer with BERT, the softmax's bytes charged: at the slide's, and curves."""
    platform = PLATFORMS[name].replace(vector_lanes=LANES)

    def curve(sizes):
        costs = {
            scope: lambda machine, dataflow, scope=scope: curves.cost(
                machine, MODELS["BERT"], sequence, dataflow, scope, softmax="overlapped"
            )
            for scope in curves.SCOPES
        }
        return curves.utilisation_curves(platform, costs, sizes, ("naive", "flex", "flat"))

    def by_head(size):
        machine = platform.replace(buffer=size)
        options = {"softmax": "overlapped", "granularity": "H"}
        return curves.cost(
            machine, MODELS["BERT"], sequence, "flex", "attention", **options
        ).utilisation

    sizes = [int(size) for size in PUBLISHED_USE[sequence]]
    buffers = [int(2 ** (14 + 18 * i / (points - 1))) for i in range(points)]
    return {
        "platform": name,
        "sequence": sequence,
        "sizes": sizes,
        "at_sizes": curve(sizes)["attention"],
        "flex_by_head": [by_head(size) for size in sizes],
        "title": f"BERT, sequence {sequence}, {name}",
        "buffers": buffers,
        "curves": curve(buffers),
        "mark": platform.buffer,
    }


def make_table(results: dict[str, Any]) -> str:
    """Writes the report of the study in Markdown."""
    head = ["platform", "softmax", "times as fast", "energy saved", "memory moved"]
    head += [curves.size_text(n).split(" ")[0] if n < 1024 else f"{n // 1024}K"
             for n in results["sequences"]]  # fmt: skip
    sections = ["# FLAT: published and computed"]
    for scope, what in (("layer", "a layer of the models"), ("attention", "attention alone")):
        rows = []
        for name in PLATFORMS:
            if scope == "layer":
                rows += [
                    [name, f"paper, {where}", f"{speed:.2f}", f"{saved:.0%}"]
                    for where, (speed, saved) in PUBLISHED[name].items()
                ]
            rows += [
                [name, row["softmax"], f"{row['speed']:.2f}", f"{row['energy_saved']:.0%}",
                 f"{row['traffic']:.2f}", *(f"{x:.2f}" for x in row["by_sequence"])]
                for row in results["gains"]
                if row["scope"] == scope and row["platform"] == name
            ]  # fmt: skip
        sections.append(
            f"FLAT over FLEX, {what}: geometric means over {', '.join(results['models'])} and the "
            "sequences, then times as fast at each sequence.\n\n" + markdown_table(head, rows)
        )
    rows = [
        [row["platform"], str(row["sequence"]), row["softmax"], row["scope"],
         {"M": "all", "H": "head by head"}[row["granularity"]], curves.size_text(row["flex"]),
         curves.size_text(row["flat"]), f"{row['ratio']:.3g}",
         _published_ratio(row["scope"], row["sequence"])]
        for row in results["buffers"]
    ]  # fmt: skip
    head = ["platform", "sequence", "softmax", "of", "FLEX runs", "FLEX", "FLAT", "ratio", "paper"]
    sections.append(
        "The least buffer with 95 % of the utilisation that any buffer gives, BERT.\n\n"
        + markdown_table(head, rows)
    )
    rows = list[list[str]]()
    for found in results["use"]:
        for i, (size, bars) in enumerate(PUBLISHED_USE[found["sequence"]].items()):
            ours = {name: values[i] for name, values in found["at_sizes"].items()}
            cells = [_pair(bar, ours[x]) for x, bar in zip(ours, bars, strict=True)]
            cells.insert(2, f"{found['flex_by_head'][i]:.2f}")
            size = f"{size / 1e6:g} MB"
            rows.append([found["platform"], str(found["sequence"]), size, *cells])
    head = ["platform", "sequence", "buffer", "naive", "flex", "head by head", "flat"]
    sections.append(
        "Utilisation of logit and attend, BERT, softmax's bytes charged: computed (read off the "
        "paper's slide, which names no platform).\n\n" + markdown_table(head, rows)
    )
    rows = list[list[str]]()
    for name in PLATFORMS:
        cases = dict.fromkeys(row["case"] for row in results["open"])
        for case in cases:
            free, charged = (
                next(
                    row
                    for row in results["open"]
                    if (row["platform"], row["case"], row["softmax"]) == (name, case, charge)
                )
                for charge in ("free", "its bytes")
            )
            rows.append(
                [name, case, *(f"{row['speed']:.2f} / {row['energy_saved']:.0%}"
                               for row in (free, charged))]
            )  # fmt: skip
    sections.append(
        "What the public facts leave open, one thing changed at a time; a layer: times as fast / "
        "energy saved.\n\n"
        + markdown_table(["platform", "changed", "softmax free", "its bytes charged"], rows)
    )
    return "\n\n".join(sections) + "\n"


def _published_ratio(scope: str, sequence: int) -> str:
    short, long = PUBLISHED_BUFFERS[scope]
    return str(short) if sequence == 512 else f"{long}" if sequence >= 4096 else ""


def _pair(published, ours) -> str:
    return f"{'-' if ours is None else format(ours, '.2f')} ({published:.2f})"


def draw_use(results: dict[str, Any], path: Path) -> None:
    """Utilisation against buffer, a panel for each platform and sequence."""
    curves.draw_curves(results["use"], path)


def draw_gains(results: dict[str, Any], path: Path) -> None:
    """Times as fast as FLEX, a layer, by sequence and by what the softmax is charged."""
    panels: list[curves.GainsPanel] = [
        {
            "title": name,
            "lines": {
                f"softmax {row['softmax']}": row["by_sequence"]
                for row in results["gains"]
                if row["platform"] == name and row["scope"] == "layer"
            },
            "levels": {f"paper, {x}": speed for x, (speed, _) in PUBLISHED[name].items()},
        }
        for name in PLATFORMS
    ]
    curves.draw_gains(panels, results["sequences"], path)
