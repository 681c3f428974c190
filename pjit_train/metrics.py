"""Writers of a run's metrics: metrics.jsonl, TensorBoard, and the terminal."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from pjit_train.errors import UserError
from pjit_train.files import write_whole
from pjit_train.tasks.task import Task

log = logging.getLogger("torsion")
Row = dict[str, Any]

# Peak dense bfloat16 FLOP/s of a device as jax names it, from the makers' data sheets. Kinds that
# are not here, CPUs among them, get no utilisation.
PEAK_FLOPS = {
    "TPU v3": 123e12 / 2,  # a device is one of a chip's two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def utilisation(flops_per_second: float, mesh: jax.sharding.Mesh) -> float | None:
    """Share of the peak of a mesh's devices, or None where the peak of their kind is not known."""
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return None if peak is None else flops_per_second / (peak * mesh.size)


class Metrics:
    """Writes records of metrics, one a step, to `metrics.jsonl` and TensorBoard events.

    Rows of steps after `start` are dropped when a run resumes from that step, so that a step stands
    once however often the run was resumed. Only process 0 writes.

    Args:
      directory: of the run.
      start: the step that the run resumes after.
      written: `digest` when the checkpoint of that step was saved, if it is known: rows that are
        not those of then, or are not there, are named in a warning.
    """

    def __init__(self, directory: Path, start: int, written: str | None = None):
        self._file, self._digest = None, hashlib.sha256()
        if jax.process_index() != 0:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        path = directory / "metrics.jsonl"
        if path.exists():
            self._digest.update(_keep_until(path, start, written))
        elif written not in (None, self.digest):
            log.warning(
                "%s is missing: its rows up to step %d are lost, later ones follow", path, start
            )
        self._file = path.open("a", buffering=1)
        # Written by this thread: tensorboardX's own one would hang the run when the disk is full.
        (directory / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(directory / "tensorboard" / "events"))
        purge = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=purge))

    def write(self, row: Row) -> None:
        """Writes the metrics of `row["step"]`; those that are not finite as null."""
        if self._file is None:
            return
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()
        }
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        scalars = [
            scalar(name, value)
            for name, value in finite.items()
            if name != "step" and value is not None
        ]
        try:
            line = json.dumps(finite, allow_nan=False) + "\n"
            self._digest.update(line.encode())
            self._file.write(line)
            for summary in scalars:
                event = Event(wall_time=time.time(), step=row["step"], summary=summary)
                self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            raise _not_written(f"metrics of step {row['step']}", error) from error

    def sync(self) -> None:
        """Waits until the rows up to now are on the disk itself."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise _not_written("metrics", error) from error

    @property
    def digest(self) -> str:
        """The sha256 of the rows up to now."""
        return self._digest.hexdigest()

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # of what could not be written before either
                self._file.close()
                self._events.close()


def _not_written(what: str, error: OSError) -> UserError:
    return UserError(
        f"{what} cannot be written: {error.strerror}; make room and run the same command again, it "
        "resumes from the last checkpoint"
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises:
      UserError: another line is not a row.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        if (row := _parse(line)) is None:
            raise UserError(f"{path}:{number}: is not a row of metrics; the file is damaged")
        rows.append(row)
    return rows


def _keep_until(path: Path, step: int, written: str | None) -> bytes:
    """Drops the rows after a step, and lines that are no rows, of which a copy is kept aside.

    Returns the rows that are left, as bytes of the file.
    """
    lines = _whole_lines(path)
    rows = [_parse(line) for line in lines]
    pairs = zip(lines, rows, strict=True)
    kept = b"".join(line for line, row in pairs if row is not None and row["step"] <= step)
    changed = written is not None and hashlib.sha256(kept).hexdigest() != written
    if changed or None in rows:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        numbers = [str(number) for number, row in enumerate(rows, 1) if row is None]
        what = (
            f"line {', '.join(numbers)} is no row and is left out"
            if numbers
            else f"its rows up to step {step} are not those that were written; they stay"
        )
        log.warning("%s is damaged: %s; %s is a copy of it as it was", path, what, aside.name)
    write_whole(path, kept.decode())
    return kept


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parse(line: bytes) -> Row | None:
    """The row of a line; None where it is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class Display:
    """The progress of a run, as a bar on a terminal and as a line a row elsewhere."""

    def __init__(self, start: int, steps: int, task: Task):
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True, emoji=False)
        self.shown = jax.process_index() == 0
        self._bar, self._task = None, task
        self._steps = steps
        if self.shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(f"loss {{task.fields[loss]}}  {{task.fields[speed]}} {task.unit}/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._shown = self._bar.add_task(
                "training", total=steps, completed=start, loss="-", speed="-"
            )
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints text above the progress bar."""
        if self.shown:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._shown, completed=step)

    def row(self, row: Row) -> None:
        """Shows the metrics of a row."""
        step, loss = row["step"], f"{row['loss']:.4f}"
        unit = self._task.unit
        speed = f"{row[name]:,.0f}" if (name := f"{unit}_per_second") in row else "-"
        if self._bar:
            self._bar.update(self._shown, completed=step, loss=loss, speed=speed)
        else:
            left = (self._steps - step) * row.get("step_seconds", 0.0)
            self.say(
                f"step {step}/{self._steps}  loss {loss}  grad norm {row['grad_norm']:.3f}  "
                f"lr {row['learning_rate']:.2e}  {speed} {unit}/s  {_duration(left)} left"
            )
        if "val_loss" in row:
            self.say(f"validation after step {step}: {self._task.summary(row)}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
