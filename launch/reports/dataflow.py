"""`torsion dataflow`: attention on an accelerator, by three dataflows."""

import dataclasses
from pathlib import Path
from typing import Any

from launch.reports.pictures import written
from launch.reports.sizes import parse_size
from pjit_train.errors import UserError
from topology.accelerator import accelerator as accelerators
from topology.accelerator import dataflow_curves as curves
from topology.accelerator import workloads
from topology.accelerator.dataflow import DATAFLOWS, best_tile, lower_bound


def report(
    model: str = "BERT",
    *,
    sequence: int = 4096,
    platform: str = "cloud",
    buffer: str | None = None,
    batch: int = workloads.BATCH,
    softmax: str = "free",
    steps: int = 1,
) -> dict[str, Any]:
    """Reports the cost of each dataflow, as `torsion dataflow --json` prints it.

    Args:
      buffer: such as "512KiB"; None: the platform's.
      softmax: of `topology.accelerator.dataflow_cost.SOFTMAX`.
      steps: points of the curves for each factor of four in the buffer.

    Returns:
      Sizes in bytes, time in seconds, energy in joules. `attention` and `layer`: the cost by each
      dataflow. `lower_bound`: of the attention. `curves`: utilisation by buffer, null where the
      buffer is too small. `tile`: for a kernel on this platform, null where none fits.

    Raises:
      UserError: a name is unknown, a number not positive, or the buffer too small.
    """
    for name, value in (("--sequence", sequence), ("--batch", batch)):
        if value < 1:
            raise UserError(f"{name} {value}: it must be at least 1")
    try:
        sizes = workloads.model(model)
        machine = accelerators.accelerator(platform)
        if buffer is not None:
            machine = machine.replace(buffer=parse_size(buffer))
        work = sizes.attention(sequence, batch)
        options: dict[str, Any] = {"batch": batch, "softmax": softmax}
        costs = {
            scope: {
                x: dataclasses.asdict(curves.cost(machine, sizes, sequence, x, scope, **options))
                for x in DATAFLOWS
            }
            for scope in curves.SCOPES
        }
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"dataflow: {error}") from error
    buffers = [int(2 ** (14 + 2 * i / steps)) for i in range(9 * steps + 1)]  # 16 KiB .. 4 GiB
    return {
        "model": sizes.name,
        "sequence": sequence,
        "batch": batch,
        "heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "platform": platform,
        "buffer": machine.buffer,
        "softmax": softmax,
        "lower_bound": dataclasses.asdict(lower_bound(machine, work, softmax)),
        **costs,
        "buffers": buffers,
        "curves": curves.utilisation_curves(machine, sizes, sequence, buffers, **options),
        "tile": _tile(machine, sizes, sequence, batch),
    }


def _tile(machine, sizes, sequence, batch) -> dict[str, Any] | None:
    try:
        tile = best_tile(
            machine, batch=batch, heads=sizes.heads, rows=sequence, head_dim=sizes.head_dim
        )
    except ValueError:  # K, V and a few rows do not fit
        return None
    return dataclasses.asdict(tile)


def describe(found: dict[str, Any]) -> str:
    """Formats a report as text for people."""
    lines = [
        f"{found['model']}, {found['heads']} heads of {found['head_dim']}, sequence "
        f"{found['sequence']}, batch {found['batch']}, on {found['platform']} with a buffer of "
        f"{curves.size_text(found['buffer'])}; softmax {found['softmax']}",
    ]
    for scope in curves.SCOPES:
        lines += [
            "",
            f"{scope:<12}{'time':>12}{'used':>7}{'memory moved':>15}{'live buffer':>14}"
            f"{'energy':>11}",
        ]
        rows = dict(found[scope])
        if scope == "attention":
            rows = {"bound": found["lower_bound"], **rows}
        for name, cost in rows.items():
            live = "" if name == "bound" else curves.size_text(cost["live_buffer"])
            lines.append(
                f"  {name:<10}{_seconds(cost['seconds']):>12}{cost['utilisation']:>7.0%}"
                f"{curves.size_text(cost['off_chip_bytes']):>15}{live:>14}"
                f"{cost['energy']:>9.3g} J"
            )
    lines += ["", "how"]
    lines += [f"  {name:<7}{cost['mapping']}" for name, cost in found["attention"].items()]
    names = [(scope, name) for scope in curves.SCOPES for name in DATAFLOWS]
    lines += [
        "",
        f"{'used by buffer':<15}{'attention':>12}{'layer':>21}",
        " " * 12 + "".join(f"{name:>7}" for _, name in names),
    ]
    for i, size in enumerate(found["buffers"]):
        values = [found["curves"][scope][name][i] for scope, name in names]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{curves.size_text(size):>12}" + "".join(f"{cell:>7}" for cell in cells))
    tile = found["tile"]
    lines.append("")
    if tile is None:
        lines.append("tile of a kernel: none; K and V of a head do not fit with a few rows")
    else:
        lines.append(
            f"tile of a kernel: {tile['rows']} rows of {tile['heads']} "
            f"head{'s' if tile['heads'] > 1 else ''} ({tile['granularity']}), "
            f"{curves.size_text(tile['live_buffer'])} on chip with float32 logits"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws the curves of a report; the file is written whole or not at all."""
    title = f"{found['model']}, sequence {found['sequence']}, {found['platform']}"
    panel: curves.CurvesPanel = {
        "title": f"{title}, softmax {found['softmax']}",
        "buffers": found["buffers"],
        "curves": found["curves"],
        "mark": found["buffer"],
    }
    with written(path) as new:
        curves.draw_curves([panel], new)


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
