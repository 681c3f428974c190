"""The agents of a pod: one for each process of an attempt, spares, and the copies they keep."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import tpu
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.pod.agent import Agent, Where
from launch.pod.orders import StandingOrders
from launch.process import proxy_note
from topology import Slice
from topology.torus.shapes import times

_ANSWER = 5.0  # seconds that an agent has for an answer
_START = 300.0  # seconds that an agent has to start
_TRIES = 3  # to have agents made
_SAY = 10.0  # seconds between two lines that they are waited for
_END = 10.0  # seconds that a process has to be gone


@dataclass(eq=False)
class Host:
    """An agent and where it is; `pid` is that of its trainer in the attempt."""

    agent: Any
    where: Where
    pid: int | None = None

    def ask(self, method: str, *args):
        """The agent's answer; None if it is dead or gives none in time."""
        try:
            return ray.get(getattr(self.agent, method).remote(*args), timeout=_ANSWER)
        except ray.exceptions.RayError:
            return None


class Staff:
    """Pool of the agents, one for each process of a run and a spare one.

    Args:
      standing: orders that hold for every agent in every attempt.
      chips: number of the cluster's chips that an agent takes, by Ray's name of the resource
        ("TPU" or "GPU"); empty where devices are emulated.
      slice: slice of TPU chips, on whose hosts the agents have to be.
      say: called with a line on what is waited for.
    """

    def __init__(
        self,
        standing: StandingOrders,
        chips: dict[str, int],
        slice: Slice,
        say: Callable[[str], None],
    ):
        self._standing, self._chips, self._say = standing, chips, say
        self._wanted = slice if "TPU" in chips else None
        self._slice: Any = None  # Ray's reservation of it
        self._places: list[Host | None] = []  # of the processes, in their order
        self._spares: list[Host] = []
        self._coming: list[Any] = []  # agents that are being made

    @property
    def hosts(self) -> list[Host]:
        """Hosts of the processes, in their order, but for those that are gone."""
        return [host for host in self._places if host is not None]

    def fill(self, processes: int) -> list[Host]:
        """An agent for each process: who has a place keeps it, spares take the others.

        Raises:
          RayError: the cluster gives no more.
        """
        self._spares += [host for host in self._places[processes:] if host is not None]
        self._places = (self._places + [None] * processes)[:processes]
        self._arrive(wait=0.0)
        for _ in range(_TRIES):  # one may be made on a node that is not yet known to be dead
            for _ in range(self._places.count(None) - len(self._spares) - len(self._coming)):
                self._coming.append(self._make())
            if self._places.count(None) <= len(self._spares):
                break
            end = time.monotonic() + _START
            while self._coming and (left := end - time.monotonic()) > 0:
                self._arrive(wait=min(left, _SAY))
                if self._coming and left > _SAY:
                    self._say(
                        f"waiting for {len(self._coming)} agents that Ray starts, "
                        f"{_START - left + _SAY:.0f} s of {_START:.0f}{proxy_note()}"
                    )
        if self._slice is not None:  # JAX numbers the processes of a TPU slice as its hosts are
            self._spares.sort(key=lambda host: host.where.worker)
        for place, host in enumerate(self._places):
            if host is None:
                if not self._spares:
                    raise ray.exceptions.GetTimeoutError("the cluster starts no agents")
                self._places[place] = self._spares.pop(0)
        return self.hosts

    def keep_spare(self) -> None:
        """Sees, without waiting, that another agent is ready or coming."""
        self._arrive(wait=0.0)
        if not self._spares and not self._coming and self._wanted is None:
            self._coming.append(self._make())

    def release(self, lost: Sequence[Host], attempt: int) -> None:
        """Ends an attempt on all hosts and lets those go that are lost; returns when it is over."""
        lost = list(lost)
        for host in lost:
            ray.kill(host.agent)
        ends = {h.agent.end.remote(attempt): h for h in self.hosts if h not in lost}
        if ends:
            ray.wait(list(ends), num_returns=len(ends), timeout=_END)
        for ref, host in ends.items():
            try:
                ray.get(ref, timeout=0)
            except ray.exceptions.RayError:
                lost.append(host)
        for host in lost:
            ray.kill(host.agent)
            _await_end(host)
        self._places = [None if host in lost else host for host in self._places]
        if lost and self._slice is not None:  # all hosts have to be of one slice: of another
            self.close()
            self._places, self._spares, self._coming = [], [], []

    def close(self) -> None:
        """Ends all agents and their processes; returns when they are gone."""
        hosts = [*self.hosts, *self._spares]
        closed = [host.agent.close.remote() for host in hosts]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=_END)
        for agent in [*(host.agent for host in hosts), *self._coming]:
            ray.kill(agent)
        if self._slice is not None:
            self._slice.shutdown()
            self._slice = None

    # Copies of checkpoints in memory.

    def pass_on(self, process: int, step: int) -> None:
        """Has the copy of a process's shards kept by the host of the next process too."""
        hosts = self._places
        owner, keeper = hosts[process], hosts[(process + 1) % len(hosts)]
        if owner and keeper and owner is not keeper:
            keeper.agent.keep.remote(process, step, owner.agent.copy.remote())

    def gather(self, newest: int | None) -> int | None:
        """Sees to it that each host has its process's shards of step `newest` in memory.

        Returns:
          The step; None, and nothing is done, where a host has them not and the next one neither.
        """
        if newest is None or len(self._places) < 2:
            return None
        answers = [host.ask("copies") for host in self._places]
        if None in answers:
            return None
        moves = []
        for process, answer in enumerate(answers):
            if answer.own == newest:
                continue
            keeper = (process + 1) % len(self._places)
            if answers[keeper].kept.get(process) != newest:
                return None
            moves.append((self._places[process], self._places[keeper], process))
        loads = [
            host.agent.load.remote(keeper.agent.kept.remote(process))
            for host, keeper, process in moves
        ]
        try:
            ray.get(loads, timeout=60)
        except ray.exceptions.RayError:
            return None
        return newest

    def _make(self) -> Any:
        """Starts an agent: on the slice, or where Ray finds room, on another node if there is one.

        Returns:
          Its handle, before it is known to be alive.
        """
        where: Any = "SPREAD"
        if self._wanted is not None:
            if self._slice is None:
                self._slice = tpu.slice_placement_group(
                    topology=times(self._wanted.sizes),
                    accelerator_version=self._wanted.pod.version,
                )
            where = PlacementGroupSchedulingStrategy(self._slice.placement_group)
        take = {name: n for name, n in self._chips.items() if name != "GPU"}
        agent = ray.remote(num_cpus=0, num_gpus=self._chips.get("GPU", 0))(Agent)
        return agent.options(scheduling_strategy=where, resources=take).remote(self._standing)

    def _arrive(self, wait: float) -> None:
        """Makes spares of the agents that are there by now; waits for all where told to."""
        refs = {agent.where.remote(): agent for agent in self._coming}
        if not refs:
            return
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=wait or 0.05)
        for ref in ready:
            self._coming.remove(refs[ref])
            with contextlib.suppress(ray.exceptions.RayError):  # it died on the way
                self._spares.append(Host(refs[ref], ray.get(ref)))


def _await_end(host: Host) -> None:
    """Returns when the trainer of a host that is gone is gone too; on this machine it is killed.

    On another machine it dies with its parent; should it be cut off and alive, the fence keeps it
    from writing.
    """
    if host.pid is None or host.where.machine != socket.gethostname():
        return
    end = time.monotonic() + _END
    while time.monotonic() < end:
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.pid, signal.SIGKILL)
        try:
            with open(f"/proc/{host.pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] in "ZX":
                    return
        except OSError:
            return
        time.sleep(0.01)
