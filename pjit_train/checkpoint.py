"""Checkpoints that are whole or known not to be.

Orbax writes the state in the background and commits it by a rename; a plain orbax restores it. With
it goes, as the JSON item `digests`, the digest of every array, since orbax alone restores most
flipped bits without a word. `<directory>/<step>/` holds `state/` and `digests/`; what a killed save
left is `<step>.orbax-checkpoint-tmp/`; a checkpoint that was in the way of a new one of its step
was moved to `<step>.broken/`, or to `<step>.replaced/` if nobody knows it to be broken.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pjit_train import orbax_internals
from pjit_train.digest import digests
from pjit_train.errors import UserError
from pjit_train.files import json_sha256, sync_tree
from pjit_train.signals import unfinished
from sparsity.ranges import Count, Positive, Whole, check_fields

log = logging.getLogger("torsion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Choice of when checkpoints are written, and which are kept.

    Attributes:
      every_steps: one at every multiple of so many steps, or None.
      every_minutes: one when the last is so many minutes old, or None.
      keep_last: the newest so many are kept, 1 or more.
      keep_best: and so many with the least metric `loss`, 0 or more.

    Raises UserError for a number out of its range.
    """

    every_steps: Count | None = 500
    every_minutes: Positive | None = None
    keep_last: Count = 3
    keep_best: Whole = 1

    def __post_init__(self):
        check_fields(self, UserError)


class Checkpoints:
    """The checkpoints in a directory: a context manager around orbax's CheckpointManager.

    With several processes, all make the same calls, on one file system that they share.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig, *, read_only: bool = False):
        """Makes the directory if need be, unless it is only read.

        Raises:
          UserError: it cannot be written.
        """
        orbax_internals.say_less()
        self.directory = Path(directory).absolute()
        self.config = config
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as error:
            raise UserError(
                f"checkpoint directory {self.directory}: {error.strerror}; "
                "it must be a directory that can be written"
            ) from error
        self._good: set[int] = set()  # written or restored by this object
        self._broken: set[int] = set()
        self._losses: dict[int, float | None] = {}
        self._saving: int | None = None
        self._half_written = contextlib.ExitStack()  # what of that is removed if it does not end
        self._last_save = time.monotonic()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else _Retention(self),
                read_only=read_only,
                # It is called before the checkpoint gets its name, and older ones are removed.
                async_options=None
                if read_only
                else ocp.AsyncOptions(post_finalization_callback=self._sync),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            _warn(str(failure))  # and let the first error through

    def steps(self) -> list[int]:
        """The steps of all checkpoints, broken ones too, ascending."""
        return sorted(self._manager.all_steps())

    def due(self, step: int) -> bool:
        """Tells whether a checkpoint is due after a step. Process 0's clock decides for all."""
        every = self.config.every_steps
        if every is not None and step > 0 and step % every == 0:
            return True
        if self.config.every_minutes is None:
            return False
        several = jax.process_count() > 1
        if several and step % 10:  # to agree costs the loop a wait for the step
            return False
        late = time.monotonic() - self._last_save >= 60 * self.config.every_minutes
        if several:
            late = multihost_utils.broadcast_one_to_all(np.asarray(late))
        return bool(late)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: dict[str, float] | None = None,
        rows: str | None = None,
    ) -> None:
        """Starts to write the checkpoint of `step`, and returns while it is being written.

        Args:
          step: its number. If this object wrote or restored it before, nothing is done; one that
            stands there otherwise, such as a broken one, is moved aside.
          state: a pytree of global jax.Arrays; they may be donated once this returns.
          metrics: stored with it; the least finite `loss` is the best.
          rows: the digest of the rows of metrics until then, stored with it.

        Raises:
          UserError: the save before this one failed, or this one already; those before are whole.
        """
        self.wait()
        if step in self._manager.all_steps():
            if step in self._good:
                return
            self._move_aside(step)
        # Waited for: orbax waits for the same step to copy the state, and two programs with
        # collectives at once could deadlock on emulated devices.
        leaves = jax.block_until_ready(digests(state))
        body: dict[str, Any] = {
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "rows": rows,
            "leaves": _describe(state, jax.device_get(leaves)),
        }
        self._saving = step
        if jax.process_index() == 0:
            self._half_written.enter_context(unfinished(self._half(step)))
        self._losses[step] = body["metrics"].get("loss")
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    digests=ocp.args.JsonSave({"sha256": json_sha256(body), **body}),
                ),
                force=True,
            )
        except Exception as error:
            raise self._save_failed(error) from error
        self._good.add(step)
        self._last_save = time.monotonic()

    def rows(self, step: int) -> str | None:
        """The digest of the rows of metrics that was stored with a checkpoint that is restored."""
        return _read_digests(self.directory / str(step)).get("rows")

    def wait(self) -> None:
        """Waits until the last save is on disk. UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        self._half_written.close()
        self._saving = None

    def close(self) -> None:
        """Waits, and lets go of threads and files. UserError if the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(
        self,
        abstract_state: dict[str, Any] | Callable[[int], dict[str, Any]],
        *,
        step: int | None = None,
        only: Collection[str] | None = None,
        being_written: bool = False,
        memory: tuple[int, Callable[[Any], Any]] | None = None,
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest good checkpoint, on the mesh and shardings that are asked for.

        A broken one is named, with what is wrong, in one warning of the logger `torsion`, and is
        left as it is; then the next older one is tried.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with a `.sharding`; or a function that
            gives that of a step, where it is not the same for all.
          step: the one wanted, instead of the newest good one.
          only: entries at the top of the state; the others are neither read nor checked, and are
            not in what is returned. None for all.
          being_written: another process is saving here, whose half-written checkpoint is no defect.
          memory: (step, function of the abstract state that gives the state of that step), read in
            place of the disk, and checked like it; the same step on all processes.

        Returns:
          (step, state), or None if there is no checkpoint at all.

        Raises:
          UserError: the checkpoint is of a different model, `step` is missing or broken, or there
            are checkpoints and all are broken.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"{self.directory} has no checkpoint {step}; it has {steps or 'none'}")
        if not being_written:
            for half in sorted(self.directory.glob(f"*{orbax_internals.HALF_WRITTEN}")):
                _warn(f"checkpoint {half} is half-written: its save was cut off; ignored")
        for candidate in reversed(steps) if step is None else [step]:
            wanted = abstract_state(candidate) if callable(abstract_state) else abstract_state
            wanted = {n: x for n, x in wanted.items() if only is None or n in only}
            try:
                if memory is None or memory[0] != candidate:
                    state = self._load(candidate, wanted, whole=only is None)
                else:
                    state = self._load_copy(candidate, wanted, memory[1])
            except _BrokenError as broken:
                self._broken.add(candidate)
                _warn(f"checkpoint {self.directory / str(candidate)} is broken: {broken}")
            else:
                if only is None:  # otherwise the rest of it may be broken
                    self._broken.discard(candidate)
                    self._good.add(candidate)
                return candidate, state
        if not steps:
            return None
        which = "all checkpoints" if step is None else f"checkpoint {step}"
        raise UserError(
            f"{self.directory}: {which} broken ({len(steps)} there, see the warnings); "
            "move them away to start anew, or put back a copy"
        )

    def _load_copy(self, step: int, wanted: dict[str, Any], read: Callable) -> dict[str, Any]:
        """Loads the whole state from a copy in memory; from disk where that is of no use."""
        try:
            return self._load(step, wanted, whole=True, read=read)
        except _BrokenError as broken:
            _warn(f"the copy of checkpoint {step} in memory is of no use: {broken}")
            return self._load(step, wanted, whole=True)

    def _load(
        self, step: int, wanted: dict[str, Any], whole: bool, read: Callable | None = None
    ) -> dict[str, Any]:
        """The checked state of one checkpoint, or a part of it; _BrokenError or UserError."""
        path = self.directory / str(step)
        leaves = _agreed(lambda: _read_digests(path))["leaves"]
        stored = {n: leaf for n, leaf in leaves.items() if whole or n.split("/")[0] in wanted}
        _check_same_model(path, _describe(wanted), stored)
        # The handler itself, not the manager: that has barriers that an error on one process skips.
        # It is what StandardCheckpointHandler calls, which cannot restore a part.
        restore = ocp.PyTreeCheckpointHandler().restore
        args = ocp.args.PyTreeRestore(
            wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=not whole
        )
        if read is None:
            state = _agreed(lambda: restore(path / "state", args=args))
        else:
            state = _agreed(lambda: read(wanted))
        found = _describe(state, jax.device_get(digests(state)))
        wrong = [name for name in stored if found.get(name) != stored[name]]
        if wrong:
            raise _BrokenError(f"{_some(wrong)} differ from the digests taken when it was written")
        return state

    def _sync(self) -> None:
        """Sees to it that the checkpoint outlives a loss of power before it gets its name."""
        sync_tree(self._half(self._saving))

    def _half(self, step: int) -> Path:
        return self.directory / f"{step}{orbax_internals.HALF_WRITTEN}"

    def _move_aside(self, step: int) -> None:
        """Renames the checkpoint of `step`, byte for byte, so that its place is free."""
        if jax.process_index() == 0:
            path = self.directory / str(step)
            name = f"{step}.{'broken' if step in self._broken else 'replaced'}"
            aside, n = self.directory / name, 1
            while aside.exists():
                aside, n = self.directory / f"{name}.{n}", n + 1
            path.rename(aside)
            _warn(f"moved {path} to {aside}, to write a new checkpoint of this step")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint moved aside")
        self._broken.discard(step)
        self._manager.reload()

    def _save_failed(self, error: Exception) -> UserError:
        step, self._saving = self._saving, None
        self._good.discard(step)
        self._losses.pop(step, None)
        path = self.directory / str(step)
        self._half_written.close()  # of no use to anybody, and the disk may be full
        self._manager.reload()
        return UserError(
            f"checkpoint {path} could not be written: {_first_line(error)}; "
            f"the ones before it are whole ({self.steps() or 'none'})"
        )

    def _loss(self, step: int) -> float:
        if step not in self._losses:
            try:
                loss = _read_digests(self.directory / str(step))["metrics"].get("loss")
            except _BrokenError:
                loss = None
            self._losses[step] = loss
        loss = self._losses[step]
        return loss if loss is not None and math.isfinite(loss) else math.inf


@dataclasses.dataclass
class _Retention:
    """Orbax's PreservationPolicy: the last and the best, and the broken, which count as neither."""

    checkpoints: Checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        owner = self.checkpoints
        steps = sorted({info.step for info in checkpoints} - owner._broken)
        keep = set(steps[-owner.config.keep_last :])
        scored = [step for step in steps if owner._loss(step) < math.inf]
        keep |= set(sorted(scored, key=owner._loss)[: owner.config.keep_best])
        return [info.step in keep or info.step in owner._broken for info in checkpoints]


class _BrokenError(Exception):
    """A checkpoint that does not hold what was written; its message says what is wrong."""


def _warn(line: str) -> None:
    if jax.process_index() == 0:  # all processes know the same
        log.warning("%s", line)


def _agreed(read):
    """`read()`; _BrokenError on every process if it raises on any of them."""
    result = problem = None
    with orbax_internals.quiet():
        try:
            result = read()
        except _BrokenError as error:
            problem = str(error)
        except Exception as error:
            problem = f"its state cannot be read: {_first_line(error)}"
        if problem is not None:
            gc.collect()  # the complaints come now
    if jax.process_count() > 1:
        text = np.zeros(600, np.uint8)
        raw = (problem or "").encode()[: text.size]
        text[: len(raw)] = list(raw)
        texts = [bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(text)]
        problem = next((text.decode(errors="ignore") for text in texts if text), None)
    if problem is not None:
        raise _BrokenError(problem)
    return result


def _describe(tree: Any, found: Any = None) -> dict[str, dict]:
    """{"a/b": {"shape", "dtype", "digest"}} of every leaf; no digest where none is `found`."""
    described = {}
    sums = jax.tree.leaves(found)
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(tree)):
        entry = {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        if sums:
            entry["digest"] = "".join(f"{int(word):08x}" for word in sums[i])
        described[jax.tree_util.keystr(path, simple=True, separator="/")] = entry
    return described


def _read_digests(path: Path) -> dict:
    """The body of the item `digests` of the checkpoint at `path`; _BrokenError if damaged."""
    file = path / "digests" / "metadata"
    try:
        body = json.loads(file.read_bytes())
        stored = body.pop("sha256")
    except OSError as error:
        raise _BrokenError(f"digests/metadata: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _BrokenError("digests/metadata is not the JSON that was written") from error
    if stored != json_sha256(body):
        raise _BrokenError("digests/metadata does not have the checksum that it holds")
    return body


def _check_same_model(path: Path, wanted: dict, stored: dict) -> None:
    """UserError that says which parameters differ between the run and the checkpoint."""
    differences = []
    if missing := [name for name in wanted if name not in stored]:
        differences.append(f"it lacks {_some(missing)}")
    if unexpected := [name for name in stored if name not in wanted]:
        differences.append(f"it has {_some(unexpected)} that the model lacks")
    changed = [
        f"{name} ({_kind(stored[name])} there, {_kind(wanted[name])} in the model)"
        for name in wanted
        if name in stored and _kind(stored[name]) != _kind(wanted[name])
    ]
    if changed:
        differences.append(f"other shapes or types: {_some(changed)}")
    if differences:
        raise UserError(
            f"checkpoint {path} is of a different model: {'; '.join(differences)}; "
            "use the configuration it was written with, or another directory"
        )


def _kind(entry: dict) -> str:
    return f"{entry['dtype']}{entry['shape']}"


def _some(names: list[str], most: int = 3) -> str:
    names = sorted(names, key=lambda name: name.count("/"))  # a parameter before its moments
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _first_line(error: BaseException) -> str:
    """Says what went wrong, shortly, without the drivers and their settings."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()).split("[tensorstore_spec=")[0].strip()
    text = re.sub(r'Error opening "\w+" driver: ', "", text)
    if system := re.search(r"([^:]+) \[os_error_code=", text):
        return system[1].strip()
    if len(text) > 250:
        text = f"{text[:120]} ... {text[-120:]}"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
