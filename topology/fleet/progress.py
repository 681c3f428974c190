"""Progress of a job: the work done, saved and lost, where the time it held went, and the pauses
that moving, saving and restoring cost."""

import math
from dataclasses import dataclass

from topology.numbers import number


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Pauses of a job, in seconds; none is published, so these are assumptions.

    Attributes:
      save: to save a checkpoint.
      restore: to load one and reach the step again.
      reconfigure: to switch the fabric, bring the links up and check the machines.
      reroute: to load other routing tables.
    """

    save: float = 30.0
    restore: float = 300.0
    reconfigure: float = 120.0
    reroute: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number(f"costs: {name}", value, unit="seconds")


ASSUMED_COSTS = Costs()


@dataclass
class Progress:
    """A job that computes, and saves a checkpoint each `interval` seconds of work.

    All times are seconds; work is in seconds at full speed. No checkpoint is saved at the end. All
    time in which the job holds blocks is in one of

      kept = saved + fresh     work that is done
      lost                     work that a failure undid
      slowed                   what the same work took longer, rerouted
      saving                   checkpoints, also those that were cut short
      paused                   starting, moving, restoring, rerouting
      stalled_for              waiting for a switch, its blocks held
    """

    work: float
    interval: float
    save: float

    saved: float = 0.0
    fresh: float = 0.0  # done since the last checkpoint
    lost: float = 0.0
    slowed: float = 0.0
    saving: float = 0.0
    paused: float = 0.0
    stalled_for: float = 0.0

    speed: float = 1.0
    stalled: bool = False
    pause: float = 0.0  # seconds until it computes
    into_save: float | None = None  # seconds, while it saves

    @property
    def kept(self) -> float:
        return self.saved + self.fresh

    @property
    def left(self) -> float:
        return self.work - self.saved - self.fresh

    @property
    def held(self) -> float:
        """Seconds that the job held its blocks, all accounted for."""
        overhead = self.lost + self.slowed + self.saving + self.paused + self.stalled_for
        return self.kept + overhead

    def time_left(self) -> float:
        """Seconds until the work is done, if nothing happens; infinite while stalled."""
        if self.stalled:
            return math.inf
        seconds = self.pause + self.left / self.speed
        if self.into_save is not None:
            return seconds + self.save - self.into_save + self.save * self._saves(self.left)
        return seconds + self.save * self._saves(self.left + self.fresh)

    def advance(self, seconds: float) -> None:
        """Lets time pass, at most until the work is done."""
        if self.stalled:
            self.stalled_for += seconds
            return
        rest = min(seconds, self.pause)
        self.pause, self.paused, seconds = self.pause - rest, self.paused + rest, seconds - rest
        while seconds > 0:
            if self.into_save is not None:
                rest = self.save - self.into_save
                if seconds < rest:
                    self.into_save, self.saving = self.into_save + seconds, self.saving + seconds
                    return
                self.saving, seconds = self.saving + rest, seconds - rest
                self.keep()
            cycle = self.interval / self.speed + self.save
            cycles = min(seconds // cycle, self._saves(self.left)) if self.fresh == 0 else 0
            if cycles:
                self.saved += cycles * self.interval
                self.saving += cycles * self.save
                self.slowed += cycles * (cycle - self.save - self.interval)
                seconds -= cycles * cycle
            due = min(self.interval - self.fresh, self.left)
            rest = due / self.speed
            if seconds < rest:
                self.fresh += seconds * self.speed
                self.slowed += seconds * (1 - self.speed)
                return
            self.fresh, self.slowed, seconds = (
                self.fresh + due,
                self.slowed + rest - due,
                seconds - rest,
            )
            if self.left <= _ROUNDING * self.work:
                return
            self.into_save = 0.0

    def keep(self) -> None:
        """The work done so far is in a checkpoint."""
        self.saved, self.fresh, self.into_save = self.saved + self.fresh, 0.0, None

    def lose(self) -> None:
        """A failure: the job is back at its last checkpoint."""
        self.lost, self.fresh, self.into_save = self.lost + self.fresh, 0.0, None

    def _saves(self, work: float) -> int:
        """Checkpoints on the way through so much work, none at its end."""
        return max(0, math.ceil(work / self.interval - _ROUNDING) - 1)


_ROUNDING = 1e-9
