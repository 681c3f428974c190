"""`torsion study plan`: predictions beside published step times, a record at a time."""

import concurrent.futures
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pjit_train.compiler.compile import Compiled, DoesNotFit, Job, compile_job
from pjit_train.compiler.records import NotModelled, Published, Record, read
from pjit_train.compiler.target import target_of
from pjit_train.errors import UserError
from pjit_train.files import write_whole
from topology.hardware import PODS
from topology.plan.machine import machine_of
from topology.plan.predict import Prediction, across_slices, predict
from topology.torus.slices import Slice

STEP = "pjit_train.compiler.published_step:lowered"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A record and what is predicted for it.

    Attributes:
      predicted, low, high: seconds; None where the status says why there are none.
      published: seconds; None where the record has none.
      roofline: seconds of the record's FLOPs at the chip's peak; cycles: of computing alone.
    """

    status: str
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    published: float | None = None
    roofline: float | None = None
    cycles: float | None = None
    chip: str = ""
    slices: int = 1
    mesh: str = ""
    name: str = ""
    memory_bytes: int | None = None

    @property
    def error(self) -> float | None:
        """Relative, of the prediction; None without one, or without a published time."""
        if self.predicted is None or self.published is None:
            return None
        return self.predicted / self.published - 1

    def shown(self) -> dict[str, Any]:
        return {
            "predicted_seconds": self.predicted,
            "low": self.low,
            "high": self.high,
            "status": self.status,
            "published_seconds": self.published,
            "roofline_seconds": self.roofline,
            "cycles_seconds": self.cycles,
            "memory_bytes": self.memory_bytes,
        }


def records_of(path: Path) -> list[Any]:
    """The records of a file. UserError where it is no list of them."""
    try:
        found = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: no JSON ({str(error)[:100]})") from error
    if not isinstance(found, list):
        raise UserError(f"{path}: want a list of records, and it holds a {type(found).__name__}")
    return found


def predicted(
    records: list[Any],
    *,
    seconds: float,
    workers: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for each record, in their order; records of one program share its compilation.

    Args:
      seconds: the time limit of a compilation; workers: how many run at once.
    """
    readings: list[Published | Row] = []
    for record in records:
        try:
            readings.append(read(record))
        except NotModelled as error:
            readings.append(Row(status=f"not modelled: {error}", published=_seconds(record)))
    wanted = {_key(p): p for p in readings if isinstance(p, Published)}
    say(f"{len(wanted)} programs of {len(records)} records")

    def one(p: Published) -> tuple[Prediction, Compiled, str] | str:
        try:
            found = _compiled(p, seconds)
            slice = _slice(p)
            made = predict(found[0].text, slice, partitions=found[0].partitions)
        except DoesNotFit as error:
            return f"does not fit: {error}"
        except UserError as error:
            return f"not compiled: {error}"
        except ValueError as error:
            return f"not priced: {error}"
        say(f"{p.pod} {p.shape} {_mesh(p.step)}: {made.low:.3f} to {made.high:.3f} s")
        return made, *found

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = dict(zip(wanted, pool.map(one, wanted.values()), strict=True))
    return [p if isinstance(p, Row) else _row(p, results[_key(p)]) for p in readings]


def _compiled(p: Published, seconds: float) -> tuple[Compiled, str]:
    """The program of a record, and what was assumed on the way.

    Where the record leaves attention open and its logits do not fit, a kernel that holds none is
    taken.
    """
    target = target_of(_slice(p))

    def job(step: Record) -> Job:
        arguments = {"record": dataclasses.asdict(step)}
        return Job(target=target, function=STEP, arguments=arguments, options=p.options)

    try:
        return compile_job(job(p.step), seconds=seconds), ""
    except DoesNotFit:
        assumed = any(text.startswith("attention") for text in p.assumed)
        if p.step.flash or not assumed or p.step.T % 128:
            raise
        step = dataclasses.replace(p.step, flash=True)
        return compile_job(job(step), seconds=seconds), "attention by a kernel, or it does not fit"


def _row(p: Published, result: tuple[Prediction, Compiled, str] | str) -> Row:
    machine = machine_of(PODS[f"TPU {p.pod}"])
    chips = _slice(p).num_chips * p.slices
    common: dict[str, Any] = {
        "published": p.seconds,
        "roofline": None if p.flops is None else p.flops / machine.peak,
        "chip": p.pod,
        "slices": p.slices,
        "mesh": _mesh(p.step),
        "name": f"{p.step.parameters / 1e9:.3g}B on {chips} {p.pod}",
    }
    if isinstance(result, str):
        return Row(status=result, **common)
    made, compiled, more = result
    shard = 4 * p.step.parameters * p.slices / chips  # summed in the slice before
    low, high = across_slices(made, p.slices, gradient_bytes=shard, machine=machine)
    assumed = [text for text in (*p.assumed, more) if text]
    status = "predicted" + (f", assumed: {'; '.join(assumed)}" if assumed else "")
    if made.not_understood:
        status += f"; not understood: {', '.join(made.not_understood)}"
    return Row(
        status=status,
        predicted=(low + high) / 2,
        low=low,
        high=high,
        cycles=made.interval.low.computing,
        memory_bytes=compiled.peak_bytes,
        **common,
    )


def _slice(p: Published) -> Slice:
    return Slice.parse(p.shape, PODS[f"TPU {p.pod}"])


def _key(p: Published) -> str:
    return json.dumps([dataclasses.asdict(p.step), p.pod, p.shape, p.options], sort_keys=True)


def _mesh(step: Record) -> str:
    return ",".join(f"{axis}={n}" for axis, n in step.mesh.items() if n > 1) or "data=1"


def _seconds(record: Any) -> float | None:
    found = record.get("step_s_published") if isinstance(record, dict) else None
    return float(found) if isinstance(found, int | float) else None


def figures(rows: list[Row], of: Callable[[Row], float | None] = lambda r: r.error) -> dict:
    """Median, 90th percentile and largest of the absolute relative errors, and how many."""
    errors = sorted(abs(e) for r in rows if (e := of(r)) is not None)
    if not errors:
        return {"count": 0, "median": None, "p90": None, "worst": None}
    place = 0.9 * (len(errors) - 1)
    low = int(place)
    above = errors[min(low + 1, len(errors) - 1)]
    return {
        "count": len(errors),
        "median": statistics.median(errors),
        "p90": errors[low] + (place - low) * (above - errors[low]),
        "worst": errors[-1],
    }


def _beside(name: str) -> Callable[[Row], float | None]:
    def error(row: Row) -> float | None:
        value = getattr(row, name)
        if row.predicted is None or value is None or row.published is None:
            return None
        return value / row.published - 1

    return error


def table(rows: list[Row]) -> str:
    """The study as Markdown."""
    lines = [
        "| run | slices | mesh | published s | predicted s | interval | error | status |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        number = lambda x: "" if x is None else f"{x:.4g}"
        between = "" if r.low is None else f"{r.low:.4g} .. {r.high:.4g}"
        error = "" if r.error is None else f"{100 * r.error:+.1f} %"
        lines.append(
            f"| {r.name or '?'} | {r.slices} | {r.mesh} | {number(r.published)} | "
            f"{number(r.predicted)} | {between} | {error} | {r.status} |"
        )
    lines += [
        "",
        "| of | runs | median | 90th percentile | worst |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, some, of in _groups(rows):
        f = figures(some, of)
        if f["count"]:
            cells = " | ".join(f"{100 * f[k]:.1f} %" for k in ("median", "p90", "worst"))
            lines.append(f"| {what} | {f['count']} | {cells} |")
    return "\n".join(lines) + "\n"


def _groups(rows: list[Row]):
    error = lambda r: r.error
    yield "all", rows, error
    for chip in dict.fromkeys(r.chip for r in rows if r.chip):
        yield chip, [r for r in rows if r.chip == chip], error
    yield "one slice", [r for r in rows if r.slices == 1], error
    yield "several slices", [r for r in rows if r.slices > 1], error
    yield "fsdp alone", [r for r in rows if r.mesh and "tensor" not in r.mesh], error
    yield "fsdp and tensor", [r for r in rows if "tensor" in r.mesh], error
    yield "nothing assumed", [r for r in rows if "assumed" not in r.status], error
    yield "a roofline", rows, _beside("roofline")
    yield "the compiler's cycles alone", rows, _beside("cycles")


def draw(rows: list[Row], path: Path) -> None:
    """Draws predicted against published seconds, a point with its interval for each run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    shown = [r for r in rows if r.error is not None]
    if shown:
        ends = [min(r.published for r in shown) / 1.3, max(r.published for r in shown) * 1.3]
        axes.fill_between(
            ends, [0.9 * x for x in ends], [1.1 * x for x in ends], color="0.92", lw=0,
            label="within 10 %",
        )  # fmt: skip
        axes.plot(ends, ends, color="0.6", lw=1)
    for chip, marker in (("v4", "o"), ("v5p", "s"), ("v5e", "^"), ("v6e", "D")):
        some = [r for r in shown if r.chip == chip]
        if some:
            axes.errorbar(
                [r.published for r in some],
                [r.predicted for r in some],
                yerr=[[r.predicted - r.low for r in some], [r.high - r.predicted for r in some]],
                fmt=marker, ms=5, lw=1, alpha=0.8, label=f"TPU {chip}",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="published seconds a step")
    axes.set(ylabel="predicted seconds a step")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def study_plan(runs: Path, out: Path | None, *, seconds: float, workers: int, as_json: bool) -> int:
    """Predicts every record of a file; writes table.md, results.json and plan.png to `out`."""
    records = records_of(runs)
    rows = predicted(
        records,
        seconds=seconds,
        workers=workers,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    shown = [row.shown() for row in rows]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "table.md", table(rows))
        write_whole(out / "results.json", json.dumps(shown, indent=1))
        draw(rows, out / "plan.png")
    print(json.dumps(shown) if as_json else table(rows))
    return 0
