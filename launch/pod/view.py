"""View of a pod while it runs: lines, and on a terminal a table that stays below them."""

import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.pod.events import AttemptBegun, Begin, Event, Step, text_of
from launch.pod.goodput import account
from launch.pod.plan import Plan
from launch.pod.record import Record

_ACCOUNT = 5.0  # seconds between two times that all events are gone through


class View:
    """View of a run's events, printed as they come.

    Args:
      out: the stream to show them on; the table only where it is a terminal.
    """

    def __init__(self, plan: Plan, record: Record, out):
        self._plan, self._record = plan, record
        self._console = Console(file=out, highlight=False, soft_wrap=True, emoji=False)
        self._attempt: AttemptBegun | None = None
        self._step: Step | None = None
        self._times: deque[float] = deque(maxlen=20)  # of the newest steps
        self._drawn = self._accounted = 0.0
        self._goodput = 0.0
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        record.listeners.append(self._show)

    def say(self, text: str) -> None:
        """Prints a line with the time of day."""
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _show(self, event: Event) -> None:
        steps, every = self._plan.run.steps, self._plan.run.log_every
        match event:
            case AttemptBegun():
                self._attempt = event
                self._times.clear()
                self.say(f"attempt {event.attempt}: slice {event.slice}")
            case Begin() if event.step:
                self.say(f"resuming after step {event.step}")
            case Step():
                self._step = event
                self._times.append(event.moment)
                if not self._live and (event.step % every == 0 or event.step == steps):
                    self.say(f"step {event.step}/{steps}  loss {event.loss:.4f}")
            case _ if (text := text_of(event)) is not None:
                self.say(text)
        if self._live and time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        """The state of the run, from the newest events."""
        run, attempt = self._plan.run, self._attempt
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        if self._step:
            table.add_row("step", f"{self._step.step} of {run.steps}")
            table.add_row("loss", f"{self._step.loss:.4f}")
        if len(self._times) > 1:
            seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
            speed = run.units_per_step / max(seconds, 1e-9)
            table.add_row(f"{run.task.unit}/s", f"{speed:,.0f}")
        if attempt:
            hosts = f"{self._plan.slice.num_hosts} in {attempt.processes} processes"
            table.add_row("attempt", str(attempt.attempt))
            table.add_row("slice", f"{attempt.slice}, blocks {list(attempt.blocks)}")
            table.add_row("hosts", hosts)
            table.add_row("failed", ", ".join(attempt.failed[-4:]) or "none")
        if time.monotonic() - self._accounted > _ACCOUNT:
            self._accounted = time.monotonic()
            self._goodput = account(self._record.events).goodput
        table.add_row("goodput", f"{self._goodput:.1%}")
        return table
