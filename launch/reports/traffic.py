"""`torsion traffic`: loads of links under a traffic matrix, beside bounds for every routing."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from launch.reports.documents import read_text
from launch.reports.failures import WHOLE, Lost, around_text
from launch.reports.pictures import save, written
from pjit_train.errors import UserError
from topology import Slice
from topology.arrays import Floats
from topology.collectives.degraded import LoadRound, around
from topology.hardware import Pod
from topology.routing.loads import least_load, link_loads, lower_bounds
from topology.routing.patterns import HOT, PATTERNS, traffic_of
from topology.routing.routing import dimension_order

_FILE = "a CSV file of N x N amounts, or of rows source,destination,bytes"
_HEAD = ["source", "destination", "bytes"]
_MOST_BYTES = 2**30  # of a file: a matrix of 4096 x 4096 in 60 characters an entry
_MOST_AMOUNT = 2.0**80
_MOST_CHIPS = 256  # for which the best routing is looked for
_TOLERANCE = 1e-4
_DIRECTIONS = ("+x", "-x", "+y", "-y", "+z", "-z")
_FIRST = "dimension_order"
_NAMES = {_FIRST: "dimension order", "best": "best found"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Demands:
    """Traffic between the chips of a slice.

    Attributes:
      name: of the pattern or file.
      matrix: float [N, N], from each chip to each; one unit of each chip, or bytes of a file.
      of_file: whether it is bytes.
    """

    name: str
    slice: Slice
    matrix: Floats
    of_file: bool


def read_demands(pattern: str, shape: str, pod: Pod, hot: float | None = None) -> Demands:
    """The traffic of a pattern or a file.

    Raises:
      UserError: there is no such slice, pattern or file, the pattern is not defined for the shape,
        or the file is wrong; names the line.
    """
    if pattern in PATTERNS or not (Path(pattern).suffix or Path(pattern).exists()):
        return read_pattern(pattern, shape, pod, hot, f", or {_FILE}")
    if hot is not None:
        raise UserError(f"--hot is of --pattern hotspot, not of {pattern}")
    slice = _slice(shape, pod)
    matrix = _read(pattern, slice)
    if not matrix.any():
        raise UserError(f"{pattern}: nothing is sent; give an amount that is more than 0")
    return Demands(name=pattern, slice=slice, matrix=matrix, of_file=True)


def read_pattern(
    pattern: str, shape: str, pod: Pod, hot: float | None = None, otherwise: str = ""
) -> Demands:
    """The traffic of a pattern.

    Args:
      otherwise: what else could have been given, for the message.

    Raises:
      UserError: there is no such slice or pattern, or it is not defined for the shape.
    """
    if pattern not in PATTERNS:
        raise UserError(f"--pattern {pattern}: is no pattern; use {', '.join(PATTERNS)}{otherwise}")
    if hot is not None and pattern != "hotspot":
        raise UserError(f"--hot is of --pattern hotspot, not of {pattern}")
    slice = _slice(shape, pod)
    try:
        matrix = traffic_of(slice, pattern, hot=HOT if hot is None else hot)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Demands(name=pattern, slice=slice, matrix=matrix, of_file=False)


def _slice(shape: str, pod: Pod) -> Slice:
    try:
        return Slice.parse(shape, pod)
    except ValueError as error:
        raise UserError(str(error)) from error


def _read(name: str, slice: Slice) -> Floats:
    N, text = slice.num_chips, read_text(name, _FILE, most=_MOST_BYTES)
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise UserError(f"{name}: is empty; want {_FILE}")
    first = [cell.strip().lower() for cell in lines[0][1].split(",")]
    if first == _HEAD or (len(first) == 3 and N != 3):
        return _read_rows(name, lines[first == _HEAD :], N)
    if len(lines) != N:
        raise UserError(
            f"{name}: {len(lines)} rows of {len(first)}; {slice} has {N} chips, so the matrix is "
            f"{N} x {N}, or rows are source,destination,bytes"
        )
    matrix = np.empty((N, N))
    for row, (number, line) in enumerate(lines):
        cells = line.split(",")
        if len(cells) != N:
            raise UserError(f"{name}: line {number}: {len(cells)} amounts; want {N}, one a chip")
        try:
            matrix[row] = np.array(cells, float)
        except ValueError:
            matrix[row] = math.nan
        if not ((matrix[row] >= 0) & (matrix[row] <= _MOST_AMOUNT)).all():
            for cell in cells:
                _amount(f"{name}: line {number}", cell)
    return matrix


def _read_rows(name: str, lines: list[tuple[int, str]], N: int) -> Floats:
    matrix = np.zeros((N, N))
    for number, line in lines:
        where, cells = f"{name}: line {number}", [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            raise UserError(f"{where}: {len(cells)} columns; want {','.join(_HEAD)}")
        chips = []
        for what, cell in zip(_HEAD, cells[:2], strict=False):
            if not cell.isascii() or not cell.isdecimal() or len(cell) > 9 or int(cell) >= N:
                raise UserError(f"{where}: {what} {_cut(cell)}: want a chip, 0 .. {N - 1}")
            chips.append(int(cell))
        matrix[tuple(chips)] += _amount(where, cells[2])
    return matrix


def _amount(where: str, cell: str) -> float:
    try:
        amount = float(cell)
    except ValueError:
        amount = math.nan
    if not 0 <= amount <= _MOST_AMOUNT:
        raise UserError(f"{where}: {_cut(cell)}: want bytes, a number from 0 to 2^80")
    return amount


def _cut(cell: str) -> str:
    cell = cell.strip()
    return repr(cell if len(cell) < 40 else cell[:36] + "...")


def title(demands: Demands) -> str:
    """Says what is looked for, before it is found."""
    slice = demands.slice
    return f"{demands.name} on {slice} of {slice.pod.name}, {slice.num_chips} chips"


def report(
    demands: Demands, time_limit: float = 20.0, lost: Lost = WHOLE
) -> tuple[dict[str, Any], dict[str, Floats]]:
    """The figures of a traffic matrix, as `torsion traffic --json` prints them, and link loads.

    Args:
      time_limit: seconds of the search for the best routing.
      lost: links that carry nothing; what dimension order would send over them takes detours, in
        the parts that load the fullest link least (`topology.collectives.degraded`).

    Returns:
      `routings`: of "dimension_order" and, where it was looked for, "best": `max_load`, `mean_load`
      over all links, and `of_bound`, bound / max_load. `bound`: no routing's largest load is less,
      the largest of `bounds`. Loads are in units of which each chip sends one, or bytes of a file.
      Of a pattern, `saturation` = 1 / max_load is the units that each chip can send while a link
      carries one, and `bytes_per_second_per_chip` that at the links' bandwidth; of a file `seconds`
      is what the fullest link takes. Both are None of the other kind, or where nothing is sent.
      With failures as of `torsion layout`. The loads are float [N, 6] by routing. Where links have
      different bandwidths, a load is in
      parts of its link's, the fastest being 1, and the best routing is not looked for.
    """
    slice, matrix = demands.slice, demands.matrix
    ordered: Floats = link_loads(slice, dimension_order(slice), matrix) / slice.link_rates
    if lost.links:
        [detoured] = around(slice, [LoadRound(slice.diameter, ordered)], lost.links)
        ordered = detoured.loads
    loads = {_FIRST: ordered}
    bounds = lower_bounds(slice, matrix, failed_links=lost.links)
    if ordered.max() <= max(bounds.values()) * (1 + _TOLERANCE):
        loads["best"] = ordered
    elif slice.num_chips <= _MOST_CHIPS and time_limit and (slice.link_rates == 1).all():
        flow = least_load(
            slice,
            matrix,
            failed_links=lost.links,
            tolerance=_TOLERANCE,
            time_limit=time_limit,
        )
        bounds["flow"] = flow.lower_bound
        loads["best"] = flow.loads if flow.max_link_load < ordered.max() else ordered
    bound, links = max(bounds.values()), slice.neighbours >= 0
    found = {
        "pod": slice.pod.name,
        "slice": str(slice),
        "chips": slice.num_chips,
        "pattern": demands.name,
        "sent": float(matrix.sum() - np.trace(matrix)),
        "bytes": demands.of_file,
        "bound": bound,
        "bounds": bounds,
        "routings": {name: _figures(load[links], bound, demands) for name, load in loads.items()},
        **{f"bound_{key}": value for key, value in _rates(bound, demands).items()},
        **lost.said(),
    }
    return found, loads


def _figures(loads: Floats, bound: float, demands: Demands) -> dict[str, Any]:
    largest = float(loads.max(initial=0))
    return {
        "max_load": largest,
        "mean_load": float(loads.mean()) if loads.size else 0.0,
        "of_bound": min(1.0, bound / largest) if largest else 1.0,
        **_rates(largest, demands),
    }


def _rates(load: float, demands: Demands) -> dict[str, float | None]:
    pattern = load > 0 and not demands.of_file
    bandwidth = demands.slice.pod.chip.link_bandwidth
    return {
        "saturation": 1 / load if pattern else None,
        "bytes_per_second_per_chip": bandwidth / load if pattern else None,
        "seconds": load / bandwidth if demands.of_file else None,
    }


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    if not found["sent"]:
        return "no chip sends anything to another"
    unit = "bytes" if found["bytes"] else "units"
    lines = [around_text(found)] if "lost_links" in found else []
    lines += ["", f"{'':<17}{'largest load':>18}{'mean load':>18}{_head(found):>18}{'bound':>9}"]
    for name, row in found["routings"].items():
        lines.append(
            f"{_NAMES[name]:<17}{_amount_text(row['max_load']):>18}"
            f"{_amount_text(row['mean_load']):>18}{_rate(row):>18}{row['of_bound']:>9.1%}"
        )
    bound = {key.removeprefix("bound_"): v for key, v in found.items() if key.startswith("bound_")}
    least = _amount_text(found["bound"])
    lines.append(f"{'bound':<17}{least:>18}{'':>18}{_rate(bound):>18}")
    proof = max(found["bounds"], key=lambda name: found["bounds"][name])
    lines += [
        "",
        f"loads in {unit} on a link, one way; no routing has a largest load below the bound "
        f"(proved by {proof})",
    ]
    if not found["bytes"]:
        lines.append("each chip sends one unit; as many a chip at once as fill the fullest link")
    if "best" not in found["routings"]:
        lines.append(f"best routing: looked for up to {_MOST_CHIPS} chips, with --time-limit")
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> str:
    return "time" if found["bytes"] else "a chip sends"


def _rate(row: dict[str, Any]) -> str:
    if row["seconds"] is not None:
        return f"{row['seconds'] * 1e6:,.2f} us"
    rate = row["bytes_per_second_per_chip"]
    return "" if rate is None else f"{rate / 1e9:,.2f} GB/s"


def _amount_text(load: float) -> str:
    return f"{load:,.4f}" if load < 1e6 else f"{load:.6g}"


def write_loads(slice: Slice, loads: dict[str, Floats], path: Path) -> None:
    """Writes a row for each link: chip, its coordinates, direction, the chip there, loads."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["chip", "x", "y", "z", "direction", "to", *loads])
    tables = [load.tolist() for load in loads.values()]
    for chip, (x, y, z) in enumerate(slice.coordinates.tolist()):
        for d, to in enumerate(slice.neighbours[chip].tolist()):
            if to >= 0:
                sent = [f"{table[chip][d]:.9g}" for table in tables]
                rows.writerow([chip, x, y, z, _DIRECTIONS[d], to, *sent])
    with written(path, "--csv") as new:
        new.write_text(text.getvalue())


def draw(found: dict[str, Any], slice: Slice, loads: dict[str, Floats], path: Path) -> None:
    """Draws the load of every link, a picture for each direction and routing: planes of z side by
    side, x from left to right in each, y upwards."""
    from matplotlib.figure import Figure

    shown = {
        name: load for name, load in loads.items() if name == _FIRST or load is not loads[_FIRST]
    }
    directions = [d for d in range(6) if (slice.neighbours[:, d] >= 0).any()] or [0]
    X, Y, Z = slice.shape
    rows, columns = len(directions), len(shown)
    figure = Figure(figsize=(1 + 6 * columns, 1 + rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    largest = max(float(load.max()) for load in shown.values()) or 1.0
    image = None
    for place, panel in enumerate(panels.ravel()):
        row, name = place // columns, list(shown)[place % columns]
        d = directions[row]
        there = np.where(slice.neighbours[:, d] >= 0, shown[name][:, d], np.nan)
        planes = there.reshape(X, Y, Z).transpose(1, 2, 0)
        gap = np.full((Y, Z, 1), np.nan)
        flat = np.concatenate([planes, gap], axis=2).reshape(Y, Z * (X + 1))
        image = panel.imshow(
            flat, origin="lower", aspect="auto", vmin=0, vmax=largest, interpolation="nearest"
        )
        panel.set_title("" if row else _NAMES[name], fontsize=9)
        panel.set_ylabel(_DIRECTIONS[d], fontsize=8)
        middles = [z * (X + 1) + (X - 1) / 2 for z in range(Z)] if row == rows - 1 else []
        panel.set_xticks(middles, [f"z={z}" for z in range(len(middles))], fontsize=7)
        panel.set_yticks([])
    unit = "bytes" if found["bytes"] else "units"
    figure.colorbar(image, ax=panels, label=f"load of a link, {unit}")
    figure.suptitle(
        f"{found['pattern']} on {found['slice']}: a cell is a chip, x to the right", size=10
    )
    save(figure, path)
