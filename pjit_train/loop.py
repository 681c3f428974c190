"""The training loop: batch, step, metrics, validation, checkpoint."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pjit_train import record
from pjit_train.checkpoint import Checkpoints
from pjit_train.data.data import Batches
from pjit_train.data.prefetch import Prefetcher
from pjit_train.errors import TrainingError, UserError
from pjit_train.evaluate import validation_sums
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.sources import folder_of
from pjit_train.lock import held
from pjit_train.loggers import Loggers
from pjit_train.metrics import Display, Metrics, utilisation
from pjit_train.models.roles import param_roles
from pjit_train.models.transformer import count_params
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh
from pjit_train.signals import StopRequest
from pjit_train.waiting import told
from pjit_train.watch import Watch

log = logging.getLogger("torsion")
_UNWATCHED = Watch()


def train(
    run: Run,
    directory: Path,
    *,
    config_text: str,
    steps_before: int | None = None,
    began: float | None = None,
    mesh: jax.sharding.Mesh | None = None,
    watch: Watch = _UNWATCHED,
    memory: tuple[int, Callable[[Any], Any]] | None = None,
) -> None:
    """Trains to `run.steps`, from the newest good checkpoint in `directory` if there is one.

    Args:
      run: what to train.
      directory: gets `config.gin`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`, and what
        `record` keeps.
      config_text: the operative configuration that `run` was built from.
      steps_before: the `run.steps` that `directory` was trained with last, None if it was not.
      began: `time.monotonic()` when the command began, for the time to the first step.
      mesh: to train on; by default that of `run.mesh` over all devices in their order.
      watch: is told what happens, and may end the run.
      memory: a copy of a checkpoint in memory, as `Checkpoints.restore` takes it.

    Returns when the run is done, or was asked to stop (SIGTERM, SIGINT, SIGHUP) and is saved; asked
    before its first step it ends the process.

    Raises:
      UserError: the parts of the run do not fit each other or the machine.
      TrainingError: a loss or gradient was not finite, and the run stops at that.
    """
    began = time.monotonic() if began is None else began
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        for logger in run.loggers:
            logger.check()
        program = Program(run, make_mesh(run.mesh) if mesh is None else mesh)
        if run.initial_weights is not None and not (directory / "checkpoints").exists():
            huggingface.check(folder_of(run.initial_weights), run.blocks)
        shower = run.task.shower(run)
        with told("the data of the run"):
            batches = run.data.prepare(run.seed)
        run.task.check_batches(run, batches)
        _check_corpus(directory, batches.digest)
        if jax.process_index() == 0:
            new = not directory.exists()
            stack.enter_context(held(directory, ".lock", "another process"))
            if new:
                stack.callback(_remove_if_never_begun, directory)
        checkpoints = Checkpoints(directory / "checkpoints", run.checkpoints)
        stack.enter_context(checkpoints)
        if program.packs and steps_before not in (None, run.steps) and checkpoints.steps():
            raise UserError(
                f"{directory} was trained with steps={steps_before} and a packed recipe, whose "
                f"masks are fixed by then; use --steps {steps_before}, or another --out"
            )
        with told("the newest checkpoint to be restored"):
            restored = checkpoints.restore(program.abstract_saved_after, memory=memory)

        def keep(text: str, folder: str | None = None) -> None:
            corpus = batches.digest
            record.write(directory, run.data, config_text=text, corpus=corpus, folder=folder)

        if restored is not None and restored[0] >= run.steps:
            if jax.process_index() == 0 and not (directory / "config.gin").exists():
                kept = record.read(directory)
                keep(*((kept.config, kept.folder) if kept else (config_text,)))
            log.info("%s is at step %d; a larger --steps goes on", directory, restored[0])
            return
        watch.begin(0 if restored is None else restored[0])
        start, state = 0, None
        if restored is not None:
            start, state = restored[0], program.loaded(restored[1])
            del restored  # tables that are laid out otherwise would be kept twice
        else:
            state = program.new_state()
        if jax.process_index() == 0:  # now that nothing of what the run is made from was refused
            keep(config_text)
        written = checkpoints.rows(start) if start else None
        metrics = stack.enter_context(contextlib.closing(Metrics(directory, start, written)))
        loggers = stack.enter_context(Loggers(run.loggers, directory, config_text))
        display = stack.enter_context(contextlib.closing(Display(start, run.steps, run.task)))
        display.say(
            f"{count_params(state['params']):,} parameters, "
            f"{run.task.describe(batches)}, {program.describe_mesh()}; "
            f"run directory {directory}"
        )
        if program.adapters is not None:
            display.say(program.adapters.describe())
        if program.embeddings is not None:
            display.say(program.embeddings.describe())
        if program.updater is not None:
            display.say(program.updater.describe())
        if program.quantizer is not None:
            roles = param_roles(run.model).items()
            tied = {name: f"the head ({name})" for name, role in roles if role.kind == "embedding"}
            display.say(program.quantizer.describe(tied))
        if notice := run.optimizer.schedule.notice(run.steps):
            display.say(notice)
        if start:
            display.say(f"resuming after step {start}")
            if steps_before not in (None, run.steps):
                display.say(f"the schedule now spans {run.steps} steps instead of {steps_before}")
        loop = _Loop(
            program=program,
            batches=batches,
            directory=directory,
            checkpoints=checkpoints,
            metrics=metrics,
            loggers=loggers,
            display=display,
            shower=shower,
            start=start,
            began=began,
            watch=watch,
        )
        loop.steps(state, stop)


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """The steps of a run from one start to its end, and what they report to."""

    program: Program
    batches: Batches
    directory: Path
    checkpoints: Checkpoints
    metrics: Metrics
    loggers: Loggers
    display: Display
    shower: Callable | None  # see `Task.shower`
    start: int
    began: float
    watch: Watch

    def __post_init__(self):
        self.run = self.program.run
        self.profiling = False
        self.step_ended = self.began
        self.step_seconds: list[float] = []  # of the steps since the last row
        self.extra: dict[str, float] = {}  # other metrics for the next row

    def steps(self, state, stop: StopRequest) -> None:
        """Trains to the end, or until asked to stop."""
        last, eval_every = self.run.steps, self.run.eval_every
        unread = None  # (step, metrics) of the step that is being computed
        masks = self.program.masks(state)
        with Prefetcher(self._batch, self.start) as self.prefetcher:
            for step, batch in enumerate(self.prefetcher, self.start + 1):
                if packing := self.program.packs_after(step - 1):
                    if unread:
                        self._report(*unread)
                        unread = None
                    state = self.program.pack(state)
                if packing or step == self.start + 1:
                    compiling = time.monotonic()
                    with told("the step to compile"):
                        train_step = self.program.compile_step(batch, step)
                    self.step_ended = time.monotonic()
                    self.extra["compile_seconds"] = self.step_ended - compiling
                    self.watch.compiled(self.extra["compile_seconds"])
                self._profile(step, unread)
                observing = self.program.observes and step % self.run.log_every == 0
                state, figures = train_step(state, batch)
                if observing:
                    figures |= self.program.observe(masks, state, batch)
                    masks = self.program.masks(state)
                if unread:
                    self._report(*unread)
                unread = step, figures
                stopping = step < last and stop.at(step)
                saving = self.checkpoints.due(step) or stopping or step == last
                validating = eval_every > 0 and (step % eval_every == 0 or step == last)
                if saving or validating:
                    self._pause(*unread, state, validating, saving)
                    unread = None
                if stopping or step == last:
                    break
        self._profile(None, unread)
        self.checkpoints.wait()
        if stopping:
            self.display.say(f"stopped after step {step}; the same command resumes from there")
        else:
            self._show(state, step)
            self.display.say(f"done: {step} steps, in {self.directory}")

    def _batch(self, index: int):
        return self.program.global_batch(lambda rows: self.batches.train_batch(index, rows))

    def _report(self, step: int, figures) -> None:
        row = self._read(step, figures)
        if step % self.run.log_every == 0 or not row["finite"]:
            self._write_row(row)

    def _pause(self, step: int, figures, state, validating: bool, saving: bool) -> None:
        """Waits for a step, then validates and saves after it; its row always stands before."""
        row, validation, remarks = self._read(step, figures), {}, None
        if validating:
            task, weights = self.run.task, self.program.weights(state)
            sums = validation_sums(self.program, weights, self.batches)
            validation = task.figures(sums, self.batches)
            remarks = task.remarks(task.details(sums, self.batches))
        due = step % self.run.log_every == 0 or step == self.run.steps
        if validating or due or not row["finite"]:
            self._write_row(row | validation)
        if remarks is not None:
            self.display.say(remarks)
        if saving:
            began = time.monotonic()
            metrics = {"loss": validation["val_loss"]} if validation else None
            self.watch.save(step)
            self.metrics.sync()  # no checkpoint outlives rows that are before it
            saved = self.program.saved(state)
            self.checkpoints.save(step, saved, metrics=metrics, rows=self.metrics.digest)
            self.watch.saved(step, saved)
            seconds = time.monotonic() - began
            self.extra["save_seconds"] = self.extra.get("save_seconds", 0.0) + seconds
        if validating and step < self.run.steps:
            self._show(state, step)
        self.step_ended = time.monotonic()

    def _read(self, step: int, figures) -> dict:
        """The metrics of a step, once it is computed."""
        row = {"step": step, **{name: np.asarray(x).item() for name, x in figures.items()}}
        now = time.monotonic()
        if step == self.start + 1:
            self.extra["first_step_seconds"] = now - self.began
            self.display.say(f"first step {now - self.began:.1f} s after the start")
        else:
            self.step_seconds.append(now - self.step_ended)
        self.step_ended = now
        self.display.advance(step)
        self.watch.step(step, row["loss"])
        if not row["finite"]:
            what = f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}"
            if self.run.on_nonfinite == "stop":
                self._write_row(row)
                saved = self.checkpoints.steps()
                raise TrainingError(
                    f"{what}; stopped, the update was not applied; "
                    + (f"the last checkpoint is step {saved[-1]}" if saved else "no checkpoint yet")
                    + "; lower the learning rate, or on_nonfinite = 'skip'"
                )
            log.warning("%s; the update was not applied, going on", what)
        return row

    def _write_row(self, row: dict) -> None:
        finite = row.pop("finite")
        if not finite:
            row["skipped"] = 1
        if self.step_seconds:
            run, seconds = self.run, float(np.mean(self.step_seconds))
            speed = run.units_per_step / seconds
            row |= {"step_seconds": seconds, f"{run.task.unit}_per_second": speed}
            share = utilisation(run.flops_per_step / seconds, self.program.mesh)
            if share is not None:
                row["model_flops_utilisation"] = share
        row |= {"data_wait_seconds": self.prefetcher.wait_seconds, **self.extra}
        self.step_seconds, self.extra = [], {}
        self.watch.write(row["step"])
        self.metrics.write(row)
        self.loggers.write(row)
        self.display.row(row)

    def _show(self, state, step: int) -> None:
        if self.shower is not None:
            weights = self.program.weights(state)
            with jax.set_mesh(self.program.mesh):
                self.shower(weights, self.display.say, f"after step {step}")

    def _profile(self, step: int | None, unread) -> None:
        """Begins and ends the trace that `run.profile` asks for; None ends it in any case."""
        first, last = self.run.profile or (0, -1)
        asked = step is not None and first <= step <= last
        if asked == self.profiling:
            return
        jax.block_until_ready(unread)  # the step before is still being computed
        if asked:
            jax.profiler.start_trace(str(self.directory / "profile"))
        else:
            jax.profiler.stop_trace()
            self.display.say(f"profile of steps {first} to {last} in {self.directory / 'profile'}")
        self.profiling = asked


def _remove_if_never_begun(directory: Path) -> None:
    """Removes a new directory in which no record was written: its lock and empty folders."""
    if not (directory / record.FILE).exists():
        (directory / ".lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something else
            (directory / "checkpoints").rmdir()
            directory.rmdir()


def _check_corpus(directory: Path, digest: str) -> None:
    """Raises a UserError where the tokens are not those that the run began with, or differ by host.

    A batch is a function of (seed, step) and the tokens: with others no resumed run is the same.
    """
    record.read(directory)  # a damaged one is not passed over
    if (other := record.other_corpus(directory, digest)) is not None:
        raise UserError(f"{other}; restore them, or use another --out")
    if jax.process_count() > 1:
        try:
            multihost_utils.assert_equal(np.frombuffer(bytes.fromhex(digest), np.uint8))
        except AssertionError as error:
            raise UserError(
                "data: the processes read different text (their files or Pythons differ); "
                "give all of them the same"
            ) from error
