"""Attempt at training: who has failed, what the trainers tell, what is made to fail."""

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from launch.pod.faults import Fault
from launch.pod.hosts import Hosts, check_mesh, traffic_of
from launch.pod.plan import Plan
from launch.pod.staff import Host
from launch.pod.waits import Waits
from launch.process import proxy_note
from pjit_train.errors import TrainingError, UserError
from topology import Part, Slice, lay_mesh

_POLL = 0.1  # seconds between two questions to every agent
_ANSWER = 5.0  # seconds in which an agent must answer
_SAVING = 5  # limit for saving or validating between steps, in times the limit of a step


@dataclass
class Failure:
    """End of an attempt: why, in a line, and what is lost with it."""

    text: str
    lost: list[Host] = field(default_factory=list)  # their agents are dead, or have to be
    parts: list[str] = field(default_factory=list)  # of the pod, that fail
    notice: str | None = None  # the part to be taken out of use


class Attempt:
    """An attempt that runs; its processes meet at `address`."""

    def __init__(self, owner, number: int, hosts: Hosts, address: str):
        self._owner, self._number, self._layout, self._slice = owner, number, hosts, hosts.slice
        self._plan, self._record, self._hosts = owner.plan, owner.record, owner.staff.hosts
        self._step, self._kind = 0, ""
        self._said: dict[int, dict[str, Any]] = {}
        self._progress = time.monotonic()
        where = f" at {address}{proxy_note()}"
        self._waits = Waits(len(self._hosts), self._plan.hang_seconds, where)
        self._exits: dict[int, int] = {}
        self._warming: Host | None = None
        self._notice: str | None = None
        self._asked = False  # to save and end
        self._failing: list[str] = []  # parts of the pod that were made to fail

    def until_it_ends(self) -> Failure | None:
        while True:
            asked = time.monotonic()
            answers = self._poll()
            lost = [i for i, answer in enumerate(answers) if answer is None]
            for process, answer in enumerate(answers):
                for event in answer["events"] if answer else ():
                    self._on_event(process, event)
                if answer and answer["exit"] is not None:
                    self._exits[process] = answer["exit"]
            if failure := self._failed(lost, answers):
                return failure
            if len(self._exits) == len(self._hosts):
                return self._ended()
            if self._owner.stopping and not self._asked:
                self._asked = True
                self._hosts[0].agent.signal.remote(self._number, "SIGTERM")
            self._warm_one(answers)
            time.sleep(max(0.0, _POLL - (time.monotonic() - asked)))

    def _poll(self) -> list[dict | None]:
        refs = [host.agent.poll.remote(self._number) for host in self._hosts]
        ray.wait(refs, num_returns=len(refs), timeout=_ANSWER)
        answers = []
        for ref in refs:
            try:
                answers.append(ray.get(ref, timeout=0))
            except ray.exceptions.RayError:
                answers.append(None)
        return answers

    def _on_event(self, process: int, event: dict) -> None:
        kind = event["event"]
        self._progress = time.monotonic()
        self._waits.on_event(process, kind)
        if kind == "failed":
            self._said[process] = event
        elif kind == "copied":
            self._owner.staff.pass_on(process, event["step"])
        elif process == 0:
            if kind == "paused":
                self._strike(event["step"])
                self._hosts[0].agent.tell.remote(self._number, {})
                return
            self._kind = kind
            if kind == "step":
                self._step = event["step"]
                self._owner.begun = True
            figures = {k: v for k, v in event.items() if k not in ("event", "time")}
            self._record(kind, attempt=self._number, at=event["time"], **figures)

    def _failed(self, lost: list[int], answers) -> Failure | None:
        """Finds what has failed by now, if anything."""
        struck, self._owner.struck = self._owner.struck, None
        after = f", found {time.monotonic() - struck:.1f} s after it was made" if struck else ""
        if lost:
            text = " and ".join(self._name(i) for i in lost)
            placement = self._owner.ask("placement")
            parts = self._failing or [  # what failed is known only where it was asked for
                str(self._layout.part(placement, host))
                for i in lost
                for host in self._layout.hosts_of(i)
            ]
            return Failure(f"lost {text}{after}", lost=[self._hosts[i] for i in lost], parts=parts)
        for process, code in self._exits.items():
            if code == 0:
                continue
            said = self._said.get(process)
            if said and said["kind"] == "user":
                raise UserError(said["text"])
            if said and said["kind"] == "training":
                raise TrainingError(said["text"])
            if self._owner.stopping:
                return Failure("it was asked to stop")
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with {code}"
            why = f" ({said['text']})" if said else ""
            return Failure(f"{self._name(process)} {how}{why}{after}")
        if not self._owner.begun:
            return self._waited_in_vain()
        silent = time.monotonic() - self._progress
        if silent > patience(self._plan, self._kind, self._step):
            quiet = [i for i, answer in enumerate(answers) if answer["silent"] > 3]
            who = " and ".join(self._name(i) for i in quiet)
            where = f"; {who} gave no sign of life" if who else ""
            return Failure(
                f"no step came back for {silent:.1f} s, the last was {self._step}{where}"
            )
        self._owner.struck = struck
        return None

    def _waited_in_vain(self) -> Failure | None:
        """Reports waits before the first step from time to time; gives up after the limit."""
        waits = self._waits
        behind, what = waits.behind()
        who = " and ".join(self._name(i) for i in behind)
        if waits.seconds() > waits.limit():
            return Failure(f"waited {waits.limit():.0f} s in vain for {who} {what}")
        if waits.due():
            text = f"waiting for {who} {what}, {waits.seconds():.0f} s so far"
            self._record("waiting", attempt=self._number, text=text)
        return None

    def _ended(self) -> Failure | None:
        """Returns a Failure where trainers all ended well, but early, by a notice; else None."""
        if self._owner.stopping or self._step >= self._plan.run.steps or not self._owner.begun:
            return None
        return Failure("a host was given notice: saved and stopped", notice=self._notice)

    def _warm_one(self, answers) -> None:
        """Starts, one by one, a waiting process on each host and a spare host, after the first
        step."""
        if not self._owner.begun:
            return
        for host, answer in zip(self._hosts, answers, strict=True):
            if answer["exit"] is None and not answer["warm"]:
                if self._warming is not host:
                    self._warming = host
                    host.agent.warm.remote()
                return
        self._owner.staff.keep_spare()

    # Failures that are asked for.

    def _strike(self, step: int) -> None:
        owner = self._owner
        due = [f for f in self._plan.faults if f.step <= step and str(f) not in owner.done]
        for fault in due:
            owner.done.add(str(fault))
            self._record(
                "fault", attempt=self._number, fault=str(fault), text=f"made to fail: {fault}"
            )
            getattr(self, f"_fail_{fault.kind}")(fault)
            owner.struck = time.monotonic()

    def _fail_process(self, fault: Fault) -> None:
        self._signal(fault, "SIGKILL")

    def _fail_hang(self, fault: Fault) -> None:
        self._signal(fault, "SIGSTOP")

    def _fail_sigterm(self, fault: Fault) -> None:
        process = int(fault.what) % len(self._hosts)
        placement = self._owner.ask("placement")
        host = self._layout.hosts_of(process)[0]
        self._notice = str(self._layout.part(placement, host))
        self._signal(fault, "SIGTERM")

    def _signal(self, fault: Fault, name: str) -> None:
        host = self._hosts[int(fault.what) % len(self._hosts)]
        ray.get(host.agent.signal.remote(self._number, name), timeout=60)

    def _fail_host(self, fault: Fault) -> None:
        host = int(fault.what) % self._slice.num_hosts
        self._failing = [str(self._layout.part(self._owner.ask("placement"), host))]
        self._hosts[host // self._layout.hosts_per_process].agent.die.remote()

    def _fail_node(self, fault: Fault) -> None:
        self._hosts[int(fault.what) % len(self._hosts)].agent.die.remote(node=True)

    def _fail_block(self, fault: Fault) -> None:
        """Kills all hosts of a block."""
        placement = self._owner.ask("placement")
        part = Part("block", (placement.blocks[int(fault.what) % len(placement.blocks)],))
        self._failing = [str(part)]
        for process in self._layout.processes_on(placement, part):
            self._hosts[process].agent.die.remote()

    def _fail_ocs(self, fault: Fault) -> None:
        state = self._owner.ask("fail", f"ocs:{fault.what}")
        if not state["hit"]:
            self._record("part", text=f"ocs:{fault.what}: the slice does not pass it")
            return
        if not state["kept"]:
            raise TrainingError(
                f"ocs:{fault.what}: the switches that have failed cut the slice {self._slice} in "
                "two, and no routing goes around them; let fewer switches of a dimension fail, or "
                "take a slice that goes without it"
            )
        share = communication_share(self._plan, self._slice)
        self._owner.slow = slow = share * (1 / state["kept"] - 1)
        self._record(
            "part",
            text=f"ocs:{fault.what}: rerouted, {state['kept']:.1%} of the all-to-all kept; a step "
            f"takes at most {slow:.2%} longer",
        )
        self._hosts[0].agent.tell.remote(self._number, {"slow": slow})

    def _fail_manager(self, fault: Fault) -> None:
        ray.kill(self._owner.manager, no_restart=False)
        state = self._owner.ask("state")
        self._record(
            "part",
            text=f"the pod manager died and is back: slice {state['slice']} on blocks "
            f"{shown(state['blocks'])}, {len(state['failed'])} parts failed",
        )

    def _fail_driver(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _name(self, process: int) -> str:
        hosts = self._layout.hosts_of(process)
        which = f"host {hosts[0]}" if len(hosts) == 1 else f"hosts {hosts[0]}-{hosts[-1]}"
        return f"process {process} ({which})"


def patience(plan: Plan, kind: str, step: int) -> float:
    """Seconds in which something has to come after an event of a kind, of process 0 at a step.

    After a step the next comes, but where a validation does; other events are of a save.
    """
    every, steps = plan.run.eval_every, plan.run.steps
    validating = every and (step % every == 0 or step == steps)
    return plan.hang_seconds * (1 if kind == "step" and not validating else _SAVING)


def communication_share(plan: Plan, slice: Slice) -> float:
    """The part of a step on a TPU slice that is communication, if none of it is hidden.

    The traffic at the links' bandwidth against the step's arithmetic at the chips' peak.
    """
    sizes = check_mesh(plan.run, slice)
    links = lay_mesh(slice, sizes, traffic_of(plan.run, sizes)).seconds
    return links / (links + plan.run.flops_per_step / (slice.num_chips * slice.pod.chip.peak_bf16))


def shown(items: list, most: int = 8) -> str:
    """The first of a list, and how many more there are."""
    text = ", ".join(map(str, items[:most]))
    return text + (f" and {len(items) - most} more" if len(items) > most else "")
