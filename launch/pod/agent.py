"""The agent of a group of hosts: a Ray actor that starts, watches and ends the process that trains.

Training is in a process of its own: it can be killed whatever it does, JAX meets no other library's
signal handlers and threads, and another, that has imported everything, waits for its turn.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from launch.pod import events, memory_copy, ray_internals
from launch.pod.orders import Orders, RunningOrder, StandingOrders


@dataclass(frozen=True, kw_only=True)
class Where:
    """Place of an agent: its process, its node of Ray, its address for other hosts, its machine,
    and its number among the hosts of a TPU slice."""

    pid: int
    node: str
    address: str
    machine: str
    worker: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report of an agent on the trainer of an attempt.

    Attributes:
      exit: its exit code, None while it runs.
      events: new ones.
      silent: seconds without a sign of life.
      warm: whether another process waits for its turn.
    """

    exit: int | None
    events: tuple[events.Told, ...]
    silent: float
    warm: bool


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies of checkpoints in a host's memory, by their steps.

    Attributes:
      own: of its own process's shards; None where they are not there.
      kept: of others', by process.
    """

    own: int | None
    kept: dict[int, int]


class _Child:
    """Trainer process of an agent, with the events that it sends and the orders that it gets."""

    def __init__(self, standing: StandingOrders, memory: int | None):
        read, write = os.pipe()
        fds = [write] if memory is None else [write, memory]
        spare_log = open(standing.log.format("spare"), "ab")  # noqa: SIM115
        with spare_log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launch.pod.trainer"]
                + [str(n) for n in (write, os.getpid(), *fds[1:])],
                stdin=subprocess.PIPE,
                stdout=spare_log,
                stderr=spare_log,
                pass_fds=fds,
                cwd=standing.cwd,
                env=os.environ | standing.env,
                start_new_session=True,
                text=True,
            )
        os.close(write)
        self._events: queue.SimpleQueue[events.Told] = queue.SimpleQueue()
        self.warm, self.beat = False, time.monotonic()
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()
        self.tell(standing)

    def _read(self, fd: int) -> None:
        with open(fd) as lines:
            for line in lines:
                event = events.read(line)
                self.beat = time.monotonic()
                if isinstance(event, events.Warm):
                    self.warm = True
                elif isinstance(event, events.Told) and not isinstance(event, events.Beat):
                    self._events.put(event)

    def tell(self, order: StandingOrders | Orders | RunningOrder) -> None:
        try:
            self.process.stdin.write(order.write() + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is dead, which is found when it is asked for

    def taken(self) -> tuple[events.Told, ...]:
        """The events since the last call; all of them, once it is dead."""
        if self.process.poll() is not None:
            self._reader.join(timeout=1)
        return tuple(self._events.get() for _ in range(self._events.qsize()))

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Agent:
    """The actor of a group of hosts, whose trainers get the standing orders."""

    def __init__(self, standing: StandingOrders):
        self._standing = standing
        self._memory = memory_copy.new_memory()  # of the trainer's shards
        self._kept: dict[int, tuple[int, bytes]] = {}  # {process: (step, its memory)} of others
        self._attempt = 0
        self._child: _Child | None = None
        self._spare: _Child | None = _Child(standing, self._memory)

    def where(self) -> Where:
        import ray

        context = ray.get_runtime_context()
        return Where(
            pid=os.getpid(),
            node=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            machine=socket.gethostname(),
            worker=int(os.environ.get("TPU_WORKER_ID", 0)),
        )

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def start(self, orders: Orders) -> int:
        """Begins an attempt in the spare process; returns its pid.

        Raises:
          RuntimeError: the attempt is not newer than the last, or that is not over.
        """
        attempt = orders.attempt
        if attempt <= self._attempt or (self._child and self._child.process.poll() is None):
            raise RuntimeError(f"attempt {attempt} cannot start: {self._attempt} did")
        if self._spare is None or self._spare.process.poll() is not None:
            self._spare = _Child(self._standing, self._memory)
        self._attempt, self._child, self._spare = attempt, self._spare, None
        self._child.tell(orders)
        return self._child.process.pid

    def poll(self, attempt: int) -> Report:
        """Reports on an attempt; nothing is new of one that is not the trainer's."""
        spare = self._spare
        warm = spare is not None and spare.warm and spare.process.poll() is None
        if attempt != self._attempt or self._child is None:
            return Report(exit=None, events=(), silent=0.0, warm=warm)
        code = self._child.process.poll()
        return Report(
            exit=code,
            events=self._child.taken(),
            silent=time.monotonic() - self._child.beat,
            warm=warm,
        )

    def tell(self, attempt: int, order: RunningOrder) -> None:
        """Passes an order on to the process of an attempt, if that still runs."""
        if attempt == self._attempt and self._child is not None:
            self._child.tell(order)

    def signal(self, attempt: int, name: str) -> None:
        """Sends a signal, such as SIGTERM, to the process of an attempt."""
        if attempt == self._attempt and self._child and self._child.process.poll() is None:
            os.kill(self._child.process.pid, getattr(signal, name))

    def end(self, attempt: int) -> None:
        """Kills the process of an attempt, and returns when it is gone."""
        if attempt == self._attempt and self._child is not None:
            self._child.kill()

    def warm(self) -> None:
        """Starts a process that waits for its turn, if there is none."""
        if self._spare is None or self._spare.process.poll() is not None:
            self._spare = _Child(self._standing, self._memory)

    # Copies of checkpoints in memory.

    def copy(self) -> bytes:
        """Returns all of the memory that the trainer wrote its shards to."""
        return os.pread(self._memory, os.fstat(self._memory).st_size, 0)

    def keep(self, process: int, step: int, copy: bytes) -> None:
        """Keeps the copy of another process's shards; the one before is let go."""
        self._kept = {process: (step, copy)}

    def kept(self, process: int) -> bytes:
        return self._kept[process][1]

    def load(self, copy: bytes) -> None:
        """Loads the copy of this process's shards that another host kept."""
        os.ftruncate(self._memory, len(copy))
        os.pwrite(self._memory, copy, 0)

    def copies(self) -> Copies:
        own = None if self._memory is None else memory_copy.step_in(self._memory)
        kept = {process: step for process, (step, _) in self._kept.items()}
        return Copies(own=own, kept=kept)

    def close(self) -> None:
        """Kills its processes, and returns when they are gone."""
        for child in (self._child, self._spare):
            if child is not None:
                child.kill()

    def die(self, node: bool = False) -> None:
        """A failed host: its processes are gone, this one too; or with them the node of Ray."""
        for child in (self._child, self._spare):
            if child is not None and child.process.poll() is None:
                child.process.kill()
        if node:
            os.kill(ray_internals.raylet(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def log_file(directory: Path) -> str:
    """Path of trainers' logs; {} is the process, or "spare"."""
    return str(directory / "pod" / "process-{}.log")
