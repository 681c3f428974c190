"""The outcome of a simulated pod: its books, its jobs and its log."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from topology.fleet.progress import Progress
from topology.fleet.workload import Job


class Event(NamedTuple):
    """Line of the log of a simulated pod.

    kind, and what blocks and detail are:
      submit; finish;
      start, swap, migrate (all blocks that the job now has);
      leave (none: a migrate follows); requeue, preempt (none: the job is in the queue again);
      reroute, stall (detail: the part, where one hit the job), resume;
      out, back (detail: the part; job None).
    """

    time: float
    kind: str
    job: str | None = None
    blocks: tuple[int, ...] = ()
    detail: str = ""


@dataclass
class JobRecord:
    """Record of a job of a simulation: times in seconds, None for what it did not reach."""

    job: Job
    progress: Progress
    started: float | None = None
    finished: float | None = None
    interruptions: Counter[str] = field(default_factory=Counter)

    @property
    def wait(self) -> float | None:
        """Seconds from the job's arrival to its first start; None if it never started."""
        return None if self.started is None else self.started - self.job.arrival


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of the simulation of a pod.

    Attributes:
      blocks: of the pod.
      block_seconds: all the pod's blocks times the horizon, by what became of it: kept, lost,
        slowed, saving, paused, stalled (see `Progress`), idle (free and healthy), out.
      jobs: a record of every job that arrived.
      log: every event, in order.
    """

    horizon: float
    blocks: int
    block_seconds: dict[str, float]
    jobs: list[JobRecord]
    log: list[Event]

    @property
    def goodput(self) -> float:
        """The part of the machine's time that went into work that was kept."""
        return self.block_seconds["kept"] / (self.horizon * self.blocks)

    @property
    def utilisation(self) -> float:
        """The part of the machine's time in which jobs held it."""
        free = self.block_seconds["idle"] + self.block_seconds["out"]
        return 1 - free / (self.horizon * self.blocks)

    @property
    def waits(self) -> list[float]:
        """Seconds from arrival to first start, of the jobs that started."""
        return [record.wait for record in self.jobs if record.wait is not None]

    @property
    def mean_wait(self) -> float:
        """Mean of `waits`, in seconds; 0 where there are none."""
        return sum(self.waits) / max(1, len(self.waits))

    @property
    def interruptions(self) -> Counter[str]:
        """{swap, reroute, stall, requeue, preempt, migrate: how often}."""
        return sum((record.interruptions for record in self.jobs), Counter[str]())

    @property
    def interrupted_jobs(self) -> int:
        """Number of jobs that were interrupted at least once."""
        return sum(bool(record.interruptions) for record in self.jobs)
