"""`torsion dataflow`: attention on an accelerator, by four dataflows."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from launch.reports.accelerator_files import Workload, read_accelerator, read_workload
from launch.reports.pictures import written
from launch.reports.sizes import parse_size
from pjit_train.errors import UserError
from topology.accelerator import accelerator as accelerators
from topology.accelerator import dataflow_curves as curves
from topology.accelerator import workloads
from topology.accelerator.accelerator import Accelerator
from topology.accelerator.dataflow import (
    best_tile,
    block_cost,
    dataflows_of,
    lower_bound,
    rows_against_tiles,
)
from topology.accelerator.dataflow_flash import search_flash

SEQUENCE = 4096
_ROWS_SEQUENCES = [512 * 4**i for i in range(6)]
_ROWS_BUFFERS = [2 ** (14 + i) for i in range(15)]  # 16 KiB .. 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A workload on an accelerator; softmax: of `topology.accelerator.dataflow_cost.SOFTMAX`."""

    workload: Workload
    accelerator: Accelerator
    softmax: str


def asked(
    model: str | None = None,
    *,
    workload: str | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    causal: bool = False,
    backward: bool = False,
    platform: str | None = None,
    accelerator: str | None = None,
    buffer: str | None = None,
    softmax: str = "free",
) -> Asked:
    """Workload and accelerator that the options ask for.

    Args:
      workload, accelerator: files, in place of model, sequence, batch, causal and backward, and of
        platform.
      buffer: such as "512KiB"; None: the accelerator's.

    Raises:
      UserError: a name is unknown, a number is out of its range, a file is wrong, or two options
        say the same.
    """
    if accelerator is not None and platform is not None:
        raise UserError("--platform and --accelerator: give one of them")
    of_model = {"MODEL": model, "--sequence": sequence, "--batch": batch}
    of_model |= {"--causal": causal or None, "--backward": backward or None}
    said = [option for option, value in of_model.items() if value is not None]
    if workload is not None and said:
        raise UserError(f"{said[0]} and --workload: the file says it; give one of them")
    for name, value in (("--sequence", sequence), ("--batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: it must be at least 1")
    try:
        if accelerator is None:
            machine = accelerators.accelerator(platform or "cloud")
        else:
            machine = read_accelerator(accelerator)
        if buffer is not None:
            machine = machine.replace(buffer=parse_size(buffer))
        if workload is not None:
            work = read_workload(workload)
        else:
            sizes = workloads.model(model or "BERT")
            shape = (sequence or SEQUENCE, batch or workloads.BATCH)
            attention = sizes.attention(*shape, causal=causal, backward=backward)
            matmuls = () if backward else sizes.matmuls(*shape)
            work = Workload(name=sizes.name, attention=attention, matmuls=matmuls)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"dataflow: {error}") from error
    return Asked(workload=work, accelerator=machine, softmax=softmax)


def report(wanted: Asked, *, steps: int = 1) -> dict[str, Any]:
    """Reports the cost of each dataflow, as `torsion dataflow --json` prints it.

    Args:
      steps: points of the curves for each factor of four in the buffer.

    Returns:
      Sizes in bytes, time in seconds, energy in joules. `attention` and `layer`: the cost by each
      dataflow that covers the workload; `layer` only where it has other matmuls. `lower_bound`: of
      the attention. `mapping`: of flash, as data. `rows_against_tiles`: seconds of the best tiles
      of whole rows, and of fewer columns, null where none fits. `curves`: utilisation by buffer,
      null where the buffer is too small. `tile`: for a kernel on this platform, null where none
      fits.

    Raises:
      UserError: the buffer is too small.
    """
    machine, softmax = wanted.accelerator, wanted.softmax
    work, matmuls = wanted.workload.attention, wanted.workload.matmuls
    dataflows = dataflows_of(machine, work)
    scopes = {"attention": ()} | ({"layer": matmuls} if matmuls else {})

    def cost(scope: str, on: Accelerator, dataflow: str):
        return block_cost(on, work, scopes[scope], dataflow, softmax=softmax)

    try:
        costs = {
            scope: {x: dataclasses.asdict(cost(scope, machine, x)) for x in dataflows}
            for scope in scopes
        }
        mapping = search_flash(machine, work, softmax=softmax)[0]
    except ValueError as error:
        raise UserError(f"dataflow: {error}") from error
    buffers = [int(2 ** (14 + 2 * i / steps)) for i in range(9 * steps + 1)]  # 16 KiB .. 4 GiB
    if machine.levels:  # a buffer is no larger than what is outside of it
        buffers = [size for size in buffers if size <= machine.levels[0].size]
    both = rows_against_tiles(machine, work, softmax=softmax)
    return {
        "model": wanted.workload.name,
        "sequence": work.rows,
        "keys": work.columns,
        "batch": work.batch,
        "heads": work.heads,
        "kv_heads": work.kv_heads,
        "head_dim": work.head_dim,
        "causal": work.causal,
        "backward": work.backward,
        "platform": machine.name,
        "buffer": machine.buffer,
        "levels": [dataclasses.asdict(level) for level in machine.levels],
        "softmax": softmax,
        "lower_bound": dataclasses.asdict(lower_bound(machine, work, softmax)),
        **costs,
        "mapping": dataclasses.asdict(mapping),
        "rows_against_tiles": [None if x is None else x.seconds for x in both],
        "buffers": buffers,
        "curves": curves.utilisation_curves(
            machine, {scope: functools.partial(cost, scope) for scope in scopes}, buffers, dataflows
        ),
        "tile": None if work.backward or machine.levels else _tile(machine, work),
    }


def _tile(machine: Accelerator, work: workloads.Attention) -> dict[str, Any] | None:
    try:
        tile = best_tile(
            machine,
            batch=work.batch,
            heads=work.heads,
            kv_heads=work.kv_heads,
            rows=work.rows,
            columns=work.columns,
            head_dim=work.head_dim,
        )
    except ValueError:  # K, V and a few rows do not fit
        return None
    return dataclasses.asdict(tile)


def describe(found: dict[str, Any]) -> str:
    """Formats a report as text for people."""
    shared = f" ({found['kv_heads']} of keys)" if found["kv_heads"] != found["heads"] else ""
    keys = f" of {found['keys']} keys" if found["keys"] != found["sequence"] else ""
    marks = [name for name in ("causal", "backward") if found[name]]
    lines = [
        f"{found['model']}, {found['heads']} heads of {found['head_dim']}{shared}, sequence "
        f"{found['sequence']}{keys}, batch {found['batch']}{''.join(f', {x}' for x in marks)}, on "
        f"{found['platform']} with a buffer of {curves.size_text(found['buffer'])}"
        + "".join(f", {x['name']} of {curves.size_text(x['size'])}" for x in found["levels"])
        + f"; softmax {found['softmax']}",
    ]
    scopes = [scope for scope in curves.SCOPES if scope in found]
    for scope in scopes:
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
    lines += ["", _rows_text(*found["rows_against_tiles"])]
    names = [(scope, name) for scope in scopes for name in found["attention"]]
    width = 7 * len(found["attention"])
    lines += [
        "",
        f"{'used by buffer':<15}{'attention':>{width - 9}}"
        + (f"{'layer':>{width}}" if "layer" in scopes else ""),
        " " * 12 + "".join(f"{name:>7}" for _, name in names),
    ]
    for i, size in enumerate(found["buffers"]):
        values = [found["curves"][scope][name][i] for scope, name in names]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{curves.size_text(size):>12}" + "".join(f"{cell:>7}" for cell in cells))
    if found["backward"] or found["levels"]:
        return "\n".join(lines)
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


def _rows_text(rows: float | None, tiles: float | None) -> str:
    """The sentence that compares the best whole rows with the best tiles of fewer columns."""
    if rows is None:
        return "whole rows do not fit; tiles of fewer columns do"
    if tiles is None:
        return "there are no tiles of fewer columns that fit"
    return (
        f"tiles of whole rows take {_seconds(rows)}, of fewer columns {_seconds(tiles)}: "
        f"{tiles / rows:.3g} times as long"
    )


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


def draw_rows(wanted: Asked, path: Path) -> None:
    """Draws where tiles of whole rows win, by buffer and sequence; the file is written whole or not
    at all."""
    work, machine = wanted.workload.attention, wanted.accelerator
    works = [
        dataclasses.replace(work, rows=sequence, columns=sequence) for sequence in _ROWS_SEQUENCES
    ]
    buffers = _ROWS_BUFFERS
    if machine.levels:
        buffers = [size for size in buffers if size <= machine.levels[0].size]
    found = curves.rows_map(machine, works, buffers, softmax=wanted.softmax)
    title = f"{wanted.workload.name} on {machine.name}, softmax {wanted.softmax}"
    with written(path, "--draw-rows") as new:
        curves.draw_rows_map(found, _ROWS_SEQUENCES, buffers, title, new)


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
