"""Attempt at training: who has failed, what the trainers tell, what is made to fail."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ray

from launch.pod import events
from launch.pod.agent import Report
from launch.pod.faults import Fault, Repair
from launch.pod.hosts import Hosts, check_mesh, traffic_of
from launch.pod.manager import Impact
from launch.pod.manager_actor import ManagerActor
from launch.pod.orders import Orders, RunningOrder
from launch.pod.plan import Plan
from launch.pod.record import Record
from launch.pod.staff import Host, Staff
from launch.pod.waits import Waits
from launch.process import proxy_note
from pjit_train.errors import TrainingError, UserError
from topology import Part, Slice, lay_mesh, traffic_seconds

_POLL = 0.1  # seconds between two questions to every agent
_ANSWER = 5.0  # seconds in which an agent must answer
_SAVING = 5  # limit for saving or validating between steps, in times the limit of a step


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of an attempt.

    Attributes:
      failure: why it failed, in a line; None where the run is over or goes on on a larger slice.
      outgrown: the larger slice on which the run goes on, in a line.
      lost: hosts whose agents are dead, or have to be.
      parts: of the pod, that fail.
      notice: the part that is to be taken out of use.
      slow: what going around failed switches adds to a step from now on, as a part of it; None
        where that is as before.
    """

    failure: str | None = None
    outgrown: str | None = None
    lost: tuple[Host, ...] = ()
    parts: tuple[Part, ...] = ()
    notice: Part | None = None
    slow: float | None = None


class Attempt:
    """An attempt that runs.

    Args:
      layout: the hosts of each process.
      orders: that the processes have, but for the number of each.
      stopping: tells whether the run was asked to save and end.

    Attributes:
      begun: whether it has come to a step, which can be saved.
    """

    def __init__(
        self,
        plan: Plan,
        record: Record,
        staff: Staff,
        manager: ManagerActor,
        *,
        layout: Hosts,
        orders: Orders,
        stopping: Callable[[], bool],
    ):
        self._plan, self._record, self._staff, self._manager = plan, record, staff, manager
        self._layout, self._slice, self._stopping = layout, layout.slice, stopping
        self._hosts, self._number = staff.hosts, orders.attempt
        self.begun = False
        self._last: events.Told | None = None  # what process 0 told last
        self._step = 0
        self._raised: dict[int, events.Raised] = {}
        self._progress = time.monotonic()
        where = f" at {orders.coordinator}{proxy_note()}"
        self._waits = Waits(len(self._hosts), plan.hang_seconds, where)
        self._exits: dict[int, int] = {}
        self._warming: Host | None = None
        self._notice: Part | None = None
        self._asked = False  # to save and end
        self._outgrown: str | None = None
        self._failing: list[Part] = []  # that were made to fail
        self._struck: float | None = None  # when the last failure was made that is not yet found
        self._slow: float | None = None

    def run(self) -> Outcome:
        """Follows the attempt until it ends.

        Raises:
          UserError, TrainingError: as a trainer raised it.
        """
        return replace(self._followed(), slow=self._slow)

    def _followed(self) -> Outcome:
        while True:
            asked = time.monotonic()
            reports = self._poll()
            lost = [i for i, report in enumerate(reports) if report is None]
            for process, report in enumerate(reports):
                for event in report.events if report else ():
                    self._on_event(process, event)
                if report and report.exit is not None:
                    self._exits[process] = report.exit
            if outcome := self._failed(lost, reports):
                return outcome
            if len(self._exits) == len(self._hosts):
                return self._ended()
            if self._stopping():
                self._save_and_end()
            self._warm_one(reports)
            time.sleep(max(0.0, _POLL - (time.monotonic() - asked)))

    def _poll(self) -> list[Report | None]:
        refs = [host.agent.poll.remote(self._number) for host in self._hosts]
        ray.wait(refs, num_returns=len(refs), timeout=_ANSWER)
        reports: list[Report | None] = []
        for ref in refs:
            try:
                reports.append(ray.get(ref, timeout=0))
            except ray.exceptions.RayError:
                reports.append(None)
        return reports

    def _on_event(self, process: int, event: events.Told) -> None:
        self._progress = time.monotonic()
        self._waits.on_event(process, event)
        if isinstance(event, events.Raised):
            self._raised[process] = event
        elif isinstance(event, events.Copied):
            self._staff.pass_on(process, event.step)
        elif process != 0:
            return
        elif isinstance(event, events.Paused):
            self._strike(event.step)
            self._take_back(event.step)
            self._order(RunningOrder(go_on=True))
        else:
            self._last = event
            if isinstance(event, events.Step):
                self._step, self.begun = event.step, True
            self._record(event)

    def _save_and_end(self) -> None:
        if not self._asked:
            self._asked = True
            self._hosts[0].agent.signal.remote(self._number, "SIGTERM")

    def _order(self, order: RunningOrder) -> None:
        """Gives an order to the trainer of process 0."""
        self._hosts[0].agent.tell.remote(self._number, order)

    def _failed(self, lost: list[int], reports: Sequence[Report | None]) -> Outcome | None:
        """Finds what has failed by now, if anything."""
        after = ""
        if self._struck is not None:
            after = f", found {time.monotonic() - self._struck:.1f} s after it was made"
        if lost:
            text = " and ".join(self._name(i) for i in lost)
            placement = self._manager.placement()
            parts = self._failing or [  # what failed is known only where it was asked for
                self._layout.part(placement, host)
                for i in lost
                for host in self._layout.hosts_of(i)
            ]
            return Outcome(
                failure=f"lost {text}{after}",
                lost=tuple(self._hosts[i] for i in lost),
                parts=tuple(parts),
            )
        # Who was killed outright is the cause; the others end because it is gone, maybe told first.
        ends = sorted(self._exits.items(), key=lambda item: item[1] != -signal.SIGKILL)
        for process, code in ends:
            if code == 0:
                continue
            raised = self._raised.get(process)
            if raised and raised.kind == "user":
                raise UserError(raised.text)
            if raised and raised.kind == "training":
                raise TrainingError(raised.text)
            if self._stopping():
                return Outcome(failure="it was asked to stop")
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
            why = f" ({raised.text})" if raised else ""
            return Outcome(failure=f"{self._name(process)} {how}{why}{after}")
        if not self.begun:
            return self._waited_in_vain()
        silent = time.monotonic() - self._progress
        if silent > patience(self._plan, self._last):
            quiet = [i for i, report in enumerate(reports) if report.silent > 3]
            who = " and ".join(self._name(i) for i in quiet)
            where = f"; {who} gave no sign of life" if who else ""
            return Outcome(
                failure=f"no step came back for {silent:.1f} s, the last was {self._step}{where}"
            )
        return None

    def _waited_in_vain(self) -> Outcome | None:
        """Reports waits before the first step from time to time; gives up after the limit."""
        waits = self._waits
        behind, what = waits.behind()
        who = " and ".join(self._name(i) for i in behind)
        if waits.seconds() > waits.limit():
            return Outcome(failure=f"waited {waits.limit():.0f} s in vain for {who} {what}")
        if waits.due():
            text = f"waiting for {who} {what}, {waits.seconds():.0f} s so far"
            self._record(events.Waiting(attempt=self._number, text=text))
        return None

    def _ended(self) -> Outcome:
        """Returns how the run goes on where trainers all ended well: not, but after a notice."""
        if self._stopping() or self._step >= self._plan.run.steps or not self.begun:
            return Outcome()
        if self._outgrown is not None:
            return Outcome(outgrown=self._outgrown)
        text = "a host was given notice: saved and stopped"
        return Outcome(failure=text, notice=self._notice)

    def _warm_one(self, reports: Sequence[Report | None]) -> None:
        """Starts, one by one, a waiting process on each host and a spare host, after the first
        step."""
        if not self.begun:
            return
        for host, report in zip(self._hosts, reports, strict=True):
            if report.exit is None and not report.warm:
                if self._warming is not host:
                    self._warming = host
                    host.agent.warm.remote()
                return
        self._staff.keep_spare()

    # Failures that are asked for.

    def _strike(self, step: int) -> None:
        for fault in self._plan.faults_to_make(self._record):
            if fault.step <= step:
                text = f"made to fail: {fault}"
                self._record(events.FaultMade(attempt=self._number, fault=str(fault), text=text))
                getattr(self, f"_fail_{fault.kind}")(fault)
                self._struck = time.monotonic()

    def _fail_process(self, fault: Fault) -> None:
        self._signal(fault, "SIGKILL")

    def _fail_hang(self, fault: Fault) -> None:
        self._signal(fault, "SIGSTOP")

    def _fail_sigterm(self, fault: Fault) -> None:
        process = int(fault.what) % len(self._hosts)
        host = self._layout.hosts_of(process)[0]
        self._notice = self._layout.part(self._manager.placement(), host)
        self._signal(fault, "SIGTERM")

    def _signal(self, fault: Fault, name: str) -> None:
        host = self._hosts[int(fault.what) % len(self._hosts)]
        ray.get(host.agent.signal.remote(self._number, name), timeout=60)

    def _fail_host(self, fault: Fault) -> None:
        host = int(fault.what) % self._slice.num_hosts
        self._failing = [self._layout.part(self._manager.placement(), host)]
        self._hosts[host // self._layout.hosts_per_process].agent.die.remote()

    def _fail_node(self, fault: Fault) -> None:
        self._hosts[int(fault.what) % len(self._hosts)].agent.die.remote(node=True)

    def _fail_block(self, fault: Fault) -> None:
        """Kills all hosts of a block."""
        placement = self._manager.placement()
        part = Part("block", (placement.blocks[int(fault.what) % len(placement.blocks)],))
        self._failing = [part]
        for process in self._layout.processes_on(placement, part):
            self._hosts[process].agent.die.remote()

    def _fail_ocs(self, fault: Fault) -> None:
        switch = Part.parse(f"ocs:{fault.what}", self._slice.pod)
        impact = self._manager.fail(switch)
        if not impact.hit:
            self._record(events.PartChanged(text=f"{switch}: the slice does not pass it"))
            return
        if not impact.kept:
            raise TrainingError(
                f"{switch}: the switches that have failed cut the slice {self._slice} in "
                "two, and no routing goes around them; let fewer switches of a dimension fail, or "
                "take a slice that goes without it"
            )
        self._record(events.PartChanged(text=f"{switch}: rerouted, {self._slowed(impact)}"))

    def _slowed(self, impact: Impact) -> str:
        """Has steps take as long as around failed switches; returns that in a line."""
        slow = slowdown(self._plan, self._slice, impact.links)
        self._slow = slow
        self._order(RunningOrder(slow=slow))
        return f"{impact.kept:.1%} of the all-to-all kept; a step takes at most {slow:.2%} longer"

    def _fail_manager(self, fault: Fault) -> None:
        self._manager.kill()
        state = self._manager.state()
        held = state.placement
        text = f"the pod manager died and is back: slice {held.slice} on blocks "
        text += f"{shown(held.blocks)}, {len(state.failed)} parts failed"
        self._record(events.PartChanged(text=text))

    def _fail_driver(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    # Repairs.

    def _take_back(self, step: int) -> None:
        """Notes what is back by now, and has the run saved where that gives it a larger slice."""
        due = [one for one in self._plan.repairs_to_make(self._record) if one.step <= step]
        for repair in due:
            impact = make_repair(repair, self._manager, self._record, self._number)
            if impact and impact.hit and repair.part.kind == "ocs":
                text = f"{repair.part}: {self._slowed(impact)}"
                self._record(events.PartChanged(text=text))
        if not due:
            return
        try:
            best = self._manager.would_place(self._plan.slice, self._plan.smaller())
        except ray.exceptions.RayTaskError:  # blocks fail at this very step
            return
        if best.num_chips > self._slice.num_chips:
            self._outgrown = f"room for {best}, in place of {self._slice}: saved, and goes on there"
            self._save_and_end()

    def _name(self, process: int) -> str:
        hosts = self._layout.hosts_of(process)
        which = f"host {hosts[0]}" if len(hosts) == 1 else f"hosts {hosts[0]}-{hosts[-1]}"
        return f"process {process} ({which})"


def make_repair(
    repair: Repair, manager: ManagerActor, record: Record, attempt: int
) -> Impact | None:
    """Has a part brought back and records it; returns what that gives, None where it was there."""
    impact = None
    try:
        impact = manager.repair(repair.part)
        text = f"{repair.part} is back: {impact.free} blocks are free"
    except ray.exceptions.RayTaskError as error:
        text = f"nothing to repair: {error.cause}"
    record(events.RepairMade(attempt=attempt, repair=str(repair), text=text))
    return impact


def patience(plan: Plan, last: events.Event | None) -> float:
    """Seconds in which something has to come after what process 0 told last.

    After a step the next comes, but where a validation does; other events are of a save.
    """
    if not isinstance(last, events.Step):
        return plan.hang_seconds * _SAVING
    every, step = plan.run.eval_every, last.step
    validating = every and (step % every == 0 or step == plan.run.steps)
    return plan.hang_seconds * (_SAVING if validating else 1)


def slowdown(plan: Plan, slice: Slice, failed_links: Sequence[int]) -> float:
    """Part of a step that going around failed links adds, if nothing is hidden.

    The step's collectives around the links, less those of the whole slice, over the latter and the
    step's arithmetic at the chips' peak.
    """
    sizes = check_mesh(plan.run, slice)
    traffic = traffic_of(plan.run, sizes)
    layout = lay_mesh(slice, sizes, traffic)
    around = traffic_seconds(slice, sizes, layout.devices, traffic, failed_links=failed_links)
    computing = plan.run.flops_per_step / (slice.num_chips * slice.pod.chip.peak_bf16)
    return (sum(around) - layout.seconds) / (layout.seconds + computing)


def shown(items: Sequence, most: int = 8) -> str:
    """The first of a list, and how many more there are."""
    text = ", ".join(map(str, items[:most]))
    return text + (f" and {len(items) - most} more" if len(items) > most else "")
