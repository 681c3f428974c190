"""Goodput: where the time of a run went, by its events, and what the availability model expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from launch.pod import events
from topology.fleet import checkpoint_interval

CAUSES = {
    "kept": "steps that are kept",
    "data": "tokenizing the corpus",
    "redone": "steps that a failure undid",
    "save": "saving checkpoints",
    "start": "starting, and restoring",
    "compile": "compiling",
    "failure": "finding failures, and clearing up",
    "away": "no driver ran",
}


@dataclass(frozen=True)
class Span:
    """A time from start to end (seconds since 1970) with one cause, and the attempt it was in."""

    start: float
    end: float
    cause: str
    attempt: int


@dataclass(frozen=True)
class Account:
    """Account of the whole time of a run, split by cause.

    Attributes:
      spans: without gaps, by time.
      seconds: of each of `CAUSES`.
      steps: that were computed, also those that a failure undid.
      failures: attempts that ended in one.
    """

    spans: tuple[Span, ...]
    seconds: dict[str, float]
    steps: int
    failures: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The part of the time in which steps were computed that are kept."""
        return self.seconds["kept"] / self.total if self.total else 0.0


def account(found: Sequence[events.Event]) -> Account:
    """Splits the time between the first and the last event.

    A step is kept if no later attempt computes it again. The time between two events belongs to
    what the earlier one began: an attempt to starting until it is compiled, of which the compiler's
    seconds are apart; a failure to clearing up, from the last sign of life on.
    """
    marks = [e for e in found if isinstance(e, events.OfAttempt) and type(e) in _NEXT]
    steps = [event for event in marks if isinstance(event, events.Step)]
    last = {event.step: event.attempt for event in steps}  # that computed each step
    spans = []
    for before, after in pairwise(marks):
        attempt, cause, start = before.attempt, _NEXT[type(before)], before.moment
        end = max(start, after.moment)
        if isinstance(after, events.Compiled):
            middle = max(start, end - after.seconds)
            spans += [
                Span(start, middle, "start", attempt),
                Span(middle, end, "compile", attempt),
            ]
            continue
        if isinstance(after, events.Step):
            cause = "kept" if last[after.step] == after.attempt else "redone"
        elif isinstance(after, events.AttemptFailed):
            cause = "failure"
        elif isinstance(after, events.AttemptOutgrown):
            cause = "start"
        elif isinstance(after, _BEGINS) and not isinstance(before, _GOES_ON):
            cause = "away"
        spans.append(Span(start, end, cause, attempt))
    seconds = dict.fromkeys(CAUSES, 0.0)
    for span in spans:
        seconds[span.cause] += span.end - span.start
    failures = sum(isinstance(event, events.AttemptFailed) for event in marks)
    return Account(tuple(spans), seconds, len(steps), failures)


_BEGINS = (events.AttemptBegun, events.Tokenize)  # the first of a driver
_GOES_ON = (
    events.AttemptFailed,
    events.AttemptOutgrown,
    events.Tokenized,
)  # after which the same driver begins
# What the time after an event goes to, where the event that follows does not say it.
_NEXT: dict[type[events.Event], str] = {
    events.Tokenize: "data",
    events.Tokenizing: "data",
    events.Tokenized: "start",
    events.TokenizingStopped: "away",
    events.AttemptBegun: "start",
    events.Joined: "start",
    events.Begin: "start",
    events.Compiled: "start",
    events.Step: "kept",
    events.Save: "save",
    events.Saved: "kept",
    events.Ended: "start",
    events.AttemptFailed: "failure",
    events.AttemptOutgrown: "start",
}


def expected_goodput(found: Account, *, steps_between_saves: int, saves: int) -> float | None:
    """The goodput that a renewal model expects of as many failures, at random moments of computing.

    `topology.fleet.checkpoint_interval.efficiency` of the time in which steps are computed and
    saved, with the measured seconds of a step and a save and the failures' mean distance in that
    time; times the part of all time that this is. None without a failure.
    """
    if not found.failures or not saves:
        return None
    step = (found.seconds["kept"] + found.seconds["redone"]) / max(1, found.steps)
    computing = sum(found.seconds[cause] for cause in ("kept", "redone", "save"))
    efficiency = checkpoint_interval.efficiency(
        work=steps_between_saves * step,
        save=max(1e-9, found.seconds["save"] / saves),
        restore=0.0,
        mtbf=computing / found.failures,
    )
    return efficiency * computing / found.total
