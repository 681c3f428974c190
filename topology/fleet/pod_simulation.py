"""A pod over months, event by event: jobs start, are hit by failures, move, and finish.

Between two events every job only computes and saves checkpoints (`Progress`), so a year takes
seconds. The jobs, the outages and the policy are given; nothing here is random.

When a part goes out:
  - a host, a link or a whole block: the job on the block restarts from its checkpoint on other
    blocks, or, around a link, goes on rerouted and slower until the repair; without blocks to go to
    it returns to the queue;
  - a switch: each job of whole blocks goes on rerouted until the repair, or waits for it.
A job is rerouted around one part at a time. Which way is taken, the policy says. Planned outages
lose no work: the job saves first. The unit is the block: a slice that is a part of one has it all,
and a block with anything out is out.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from topology.fabric.parts import Part
from topology.fleet.checkpoint_interval import daly_interval
from topology.fleet.pod_report import Event, JobRecord, Report
from topology.fleet.policies import DEFAULT_POLICY, Blocks, Policy
from topology.fleet.progress import ASSUMED_COSTS, Costs, Progress
from topology.fleet.workload import PUBLISHED_RATES, FailureRates, Job, Outage
from topology.hardware import TPU_V4, BlockPod, Pod, of_blocks
from topology.numbers import number
from topology.torus.slices import check_same_pod


def simulate(
    jobs: Iterable[Job],
    outages: Iterable[Outage] = (),
    *,
    horizon: float,
    policy: Policy = DEFAULT_POLICY,
    costs: Costs = ASSUMED_COSTS,
    rates: FailureRates = PUBLISHED_RATES,
    pod: Pod = TPU_V4,
) -> Report:
    """A pod from time 0 to the horizon (seconds).

    Args:
      outages: as `generate_outages`, `generate_maintenance`, or both.
      rates: what the policy expects of failures and repairs; not what happens.

    Raises:
      ValueError: a job can never be placed, two jobs have one name, a part is not of the pod, or
        the pod is not made of blocks.
    """
    pod = of_blocks(pod)
    number("horizon", horizon, above=0, unit="seconds")
    simulation = _Simulation(policy, costs, rates, pod)
    seen = set[str]()
    for job in jobs:
        check_same_pod(job.slice, pod)
        if policy.placement.choose(job.slice, range(pod.num_blocks - policy.spares)) is None:
            raise ValueError(
                f"job {job.name!r}: {job.slice} does not fit the pod of {pod.num_blocks} blocks, "
                f"{policy.spares} of them spares, even when it is empty; take a smaller slice"
            )
        if job.name in seen:
            raise ValueError(f"job {job.name!r}: there are two of this name; give each its own")
        seen.add(job.name)
        simulation.post(job.arrival, partial(simulation.submit, job))
    for outage in outages:
        if outage.part.block is not None and outage.part.block >= pod.num_blocks:
            raise ValueError(f"outage of {outage.part}: blocks are 0 .. {pod.num_blocks - 1}")
        simulation.post(outage.start, partial(simulation.out, outage))
        simulation.post(outage.end, partial(simulation.back, outage))
    return simulation.run(horizon)


@dataclass(eq=False)
class _Task:
    """A job in the queue or on blocks."""

    job: Job
    record: JobRecord
    blocks: Blocks = ()
    detour: Outage | None = None  # what it is rerouted around
    updated: float = 0.0  # the time up to which its progress is known
    turn: int = 0  # goes up when its finish is set anew
    owed: float = 0.0  # of the pause at its next start

    @property
    def progress(self) -> Progress:
        return self.record.progress


_SPENT = ("kept", "lost", "slowed", "saving", "paused", "stalled")


class _Due(NamedTuple):
    """Something that happens at a time, if it then still stands; at one time in order."""

    time: float
    order: int
    act: Callable[[], object]
    stands: Callable[[], bool]


class _Simulation:
    def __init__(self, policy: Policy, costs: Costs, rates: FailureRates, pod: BlockPod):
        self.policy, self.costs, self.rates, self.pod = policy, costs, rates, pod
        self.now, self.order = 0.0, itertools.count()
        self.events: list[_Due] = []
        self.waiting: list[_Task] = []
        self.running: dict[str, _Task] = {}
        self.owner: list[_Task | None] = [None] * pod.num_blocks
        self.faults: list[set[Outage]] = [set() for _ in range(pod.num_blocks)]
        self.dark: set[Outage] = set()  # switches that are out
        self.records: list[JobRecord] = []
        self.log: list[Event] = []
        self.idle = self.out_ = 0.0
        self.block_rate = rates.block_failures(pod)

    def post(
        self, time: float, act: Callable[[], object], stands: Callable[[], bool] = lambda: True
    ) -> None:
        heapq.heappush(self.events, _Due(time, next(self.order), act, stands))

    def run(self, horizon: float) -> Report:
        while self.events and self.events[0].time < horizon:
            due = heapq.heappop(self.events)
            if not due.stands():
                continue
            self._pass(due.time)
            due.act()
            self._start_waiting()
        self._pass(horizon)
        for task in self.running.values():
            self._update(task)
        spent = dict.fromkeys(_SPENT, 0.0) | {"idle": self.idle, "out": self.out_}
        for record in self.records:
            p, n = record.progress, record.job.slice.num_blocks
            for name in _SPENT:
                spent[name] += n * (p.stalled_for if name == "stalled" else getattr(p, name))
        return Report(
            horizon=horizon,
            blocks=self.pod.num_blocks,
            block_seconds=spent,
            jobs=self.records,
            log=self.log,
        )

    # What happens.

    def submit(self, job: Job) -> None:
        progress = Progress(work=job.work, interval=self._interval(job), save=self.costs.save)
        record = JobRecord(job, progress)
        self.records.append(record)
        self.waiting.append(_Task(job, record))
        self.waiting.sort(key=lambda task: (-task.job.priority, task.job.arrival))
        self._log("submit", job)

    def finish(self, task: _Task) -> None:
        self._update(task)
        task.record.finished = self.now
        self._log("finish", task.job)
        self._release(task)

    def out(self, outage: Outage) -> None:
        self._log("out", None, part=outage.part)
        block = outage.part.block
        if block is not None:
            self.faults[block].add(outage)
            task = self.owner[block]
            if task is not None:
                self._recover(task, outage)
            return
        self.dark.add(outage)
        for task in list(self.running.values()):
            if task.job.uses_switches and not task.progress.stalled:
                self._recover(task, outage)

    def back(self, outage: Outage) -> None:
        self._log("back", None, part=outage.part)
        if outage.part.block is not None:
            self.faults[outage.part.block].discard(outage)
        self.dark.discard(outage)
        for task in list(self.running.values()):
            if task.detour is not outage and not task.progress.stalled:
                continue
            self._update(task)
            if task.detour is outage:
                self._detour(task, None)
            self._face_switches(task)
            self._expect(task)

    # A part under a job is out.

    def _recover(self, task: _Task, outage: Outage) -> None:
        self._update(task)
        progress, costs, kind = task.progress, self.costs, outage.part.kind
        restart = costs.save if outage.planned else progress.fresh
        restart += costs.reconfigure + costs.restore
        repair = outage.end - self.now if outage.planned else self.rates.repair(kind)
        ways: dict[str, float] = {}
        others: Blocks | None = None
        if kind in ("link", "ocs") and task.detour is None and not progress.stalled:
            ways |= self._reroute(task, repair)
        if kind == "ocs":
            ways["wait"] = restart + repair
        else:
            failed = {block for block in task.blocks if self.faults[block]}
            others = self.policy.placement.replace(
                task.job.slice, task.blocks, failed, self._free()
            )
            ways["requeue" if others is None else "swap"] = restart + repair * (others is None)
        way = self.policy.recovery.choose(kind, ways)
        if way == "reroute":
            task.record.interruptions["reroute"] += 1
            self._log("reroute", task.job, part=outage.part)
            self._detour(task, outage)
            progress.pause += costs.reroute
            self._expect(task)
            return
        self._interrupt(task, planned=outage.planned)
        if others is not None and way == "swap":
            self._move(task, others, "swap")
        elif way == "requeue":
            self._requeue(task, "requeue")
        else:
            task.record.interruptions["stall"] += 1
            self._log("stall", task.job, part=outage.part)
            progress.stalled = True
            progress.pause = task.owed + costs.reconfigure + costs.restore
            task.owed = 0.0
            self._expect(task)

    def _interrupt(self, task: _Task, *, planned: bool) -> None:
        """Stops a job: what it did since its checkpoint is lost, or saved if there is time."""
        if planned:
            task.owed += self.costs.save if task.progress.fresh else 0.0
            task.progress.keep()
        else:
            task.progress.lose()

    def _move(self, task: _Task, blocks: Blocks, kind: str) -> None:
        """Puts a stopped job on other blocks, some of which may be its own."""
        task.record.interruptions[kind] += 1
        for block in task.blocks:
            self.owner[block] = None
        self._put(task, blocks, kind, self.costs.reconfigure + self.costs.restore)

    def _requeue(self, task: _Task, kind: str) -> None:
        task.record.interruptions[kind] += 1
        self._log(kind, task.job)
        self._release(task)
        self.waiting.append(task)
        self.waiting.sort(key=lambda task: (-task.job.priority, task.job.arrival))

    def _put(self, task: _Task, blocks: Blocks, kind: str, pause: float) -> None:
        for block in blocks:
            self.owner[block] = task
        task.blocks = blocks
        self._log(kind, task.job, task.blocks)
        task.progress.pause, task.owed = pause + task.owed, 0.0
        self._detour(task, None)
        self._face_switches(task)
        self._expect(task)

    def _release(self, task: _Task) -> None:
        for block in task.blocks:
            self.owner[block] = None
        task.blocks, task.turn = (), task.turn + 1
        self._detour(task, None)
        task.progress.stalled, task.progress.pause = False, 0.0
        del self.running[task.job.name]

    def _detour(self, task: _Task, outage: Outage | None) -> None:
        task.detour = outage
        slowdown = task.job.slowdown or 0.0  # only a job with one is rerouted
        task.progress.speed = 1.0 if outage is None else 1 / (1 + slowdown)

    def _face_switches(self, task: _Task) -> None:
        """Reroutes a job, or stalls it, because of the switches that are out; or neither."""
        dark = self.dark - {task.detour} if task.job.uses_switches else set[Outage]()
        if len(dark) == 1 and task.detour is None and self._prefers_detour(task):
            outage = dark.pop()
            self._detour(task, outage)
            self._log("reroute", task.job, part=outage.part)
        if task.progress.stalled != bool(dark):
            self._log("stall" if dark else "resume", task.job)
        task.progress.stalled = bool(dark)

    def _prefers_detour(self, task: _Task) -> bool:
        """Tells whether a job would rather route around a broken switch than wait for repair."""
        repair = self.rates.repair("ocs")
        ways = {"wait": repair, **self._reroute(task, repair)}
        return self.policy.recovery.choose("ocs", ways) == "reroute"

    def _reroute(self, task: _Task, repair: float) -> dict[str, float]:
        """{"reroute": its cost in seconds}; nothing where the job did not opt in."""
        if task.job.slowdown is None:
            return {}
        slower = min(repair, task.progress.left) * task.job.slowdown
        return {"reroute": self.costs.reroute + slower}

    # Jobs that wait.

    def _start_waiting(self) -> None:
        while self._start_some():  # jobs that made room may fit elsewhere
            pass

    def _start_some(self) -> bool:
        """Starts jobs of the queue, in its order; whether others were sent back to it for that."""
        for task in list(self.waiting):
            job, queued = task.job, len(self.waiting)
            if self._can_run(task) and (blocks := self._find(job)) is not None:
                preempted = len(self.waiting) > queued
                self.waiting.remove(task)
                self.running[job.name] = task
                task.updated = self.now
                first = task.record.started is None
                if first:
                    task.record.started = self.now
                restore = 0.0 if first else self.costs.restore
                self._put(task, blocks, "start", self.costs.reconfigure + restore)
                if preempted:
                    return True
            elif self.policy.queue.holds_up(job, self.now - job.arrival):
                break
        return False

    def _can_run(self, task: _Task) -> bool:
        if not task.job.uses_switches or not self.dark:
            return True
        return len(self.dark) == 1 and self._prefers_detour(task)

    def _find(self, job: Job) -> Blocks | None:
        """Blocks for a job, freed for it if the policy wants; None if there are none."""
        policy, free = self.policy, self._free()
        if job.slice.num_blocks + policy.spares <= len(free):
            blocks = policy.placement.choose(job.slice, free)
            if blocks is not None:
                return blocks
            if policy.defragment and (blocks := self._defragment(job, free)) is not None:
                return blocks
        return self._preempt(job, free) if policy.preempt else None

    def _defragment(self, job: Job, free: list[int]) -> Blocks | None:
        held = {
            name: (task.job.slice, task.blocks)
            for name, task in self.running.items()
            if not task.progress.stalled and not any(self.faults[b] for b in task.blocks)
        }
        room = self.policy.placement.make_room(job.slice, free, held)
        if room is None:
            return None
        blocks, moves = room
        moving = [self.running[name] for name in moves]
        for task in moving:  # all leave before any arrives: one may take another's place
            self._update(task)
            self._interrupt(task, planned=True)
            self._log("leave", task.job)
            for block in task.blocks:
                self.owner[block] = None
            task.blocks = ()
        for task in moving:
            self._move(task, moves[task.job.name], "migrate")
        return blocks

    def _preempt(self, job: Job, free: list[int]) -> Blocks | None:
        """Takes as few jobs of lower priority off their blocks as it can, the last come first."""
        lower = [task for task in self.running.values() if task.job.priority < job.priority]
        lower.sort(key=lambda task: (task.job.priority, -task.job.arrival))

        def fits(victims: list[_Task]) -> Blocks | None:
            blocks = [b for task in victims for b in task.blocks if not self.faults[b]]
            space = [*free, *blocks]
            if job.slice.num_blocks + self.policy.spares > len(space):
                return None
            return self.policy.placement.choose(job.slice, space)

        victims = list[_Task]()
        while lower and fits(victims) is None:
            victims.append(lower.pop(0))
        blocks = fits(victims)
        if blocks is None:
            return None
        for task in list(victims):
            fewer = [other for other in victims if other is not task]
            if (found := fits(fewer)) is not None:
                victims, blocks = fewer, found
        for task in victims:
            self._update(task)
            self._interrupt(task, planned=True)
            self._requeue(task, "preempt")
        return blocks

    # Time and books.

    def _free(self) -> list[int]:
        return [b for b, task in enumerate(self.owner) if task is None and not self.faults[b]]

    def _pass(self, time: float) -> None:
        seconds, free = time - self.now, len(self._free())
        self.idle += seconds * free
        self.out_ += seconds * (self.owner.count(None) - free)
        self.now = time

    def _update(self, task: _Task) -> None:
        task.progress.advance(self.now - task.updated)
        task.updated = self.now

    def _expect(self, task: _Task) -> None:
        """Posts anew when the job of a task finishes."""
        task.turn = turn = task.turn + 1
        seconds = task.progress.time_left()
        if seconds < float("inf"):
            end = self.now + seconds
            self.post(end, partial(self.finish, task), lambda: task.turn == turn)

    def _interval(self, job: Job) -> float:
        if self.policy.interval is not None:
            return self.policy.interval
        failures = self.block_rate * job.slice.num_blocks
        if failures == 0:
            return float("inf")
        if self.costs.save == 0:
            raise ValueError("costs: save 0 has no best interval; give policy.interval")
        return daly_interval(self.costs.save, 1 / failures)

    def _log(
        self, kind: str, job: Job | None, blocks: Blocks = (), part: Part | None = None
    ) -> None:
        name = None if job is None else job.name
        detail = "" if part is None else str(part)
        self.log.append(Event(self.now, kind, name, blocks, detail))
