"""The process that trains on a group of hosts. An agent starts it, and it waits warm for its turn.

`python -m launch.pod.trainer FD PARENT [MEMORY]`: reads one JSON line of standing orders and then,
when an attempt begins, one of that attempt from standard input; tells what happens as JSON lines on
FD. It ends when standard input ends, and with its parent, whatever it is doing.
"""

import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from launch.pod import events
from launch.pod.orders import Orders, RunningOrder, StandingOrders
from pjit_train import signals
from pjit_train.files import write_whole
from pjit_train.watch import Watch

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BEAT = 1.0  # seconds between signs of life
_DAY = 86400  # seconds


class StaleAttemptError(Exception):
    """Error of an attempt after which another has begun: nothing of it may be written any more."""


class Fence:
    """The number of the attempt that may write in a run directory; the driver alone raises it."""

    def __init__(self, file: Path):
        self._file = file

    def raise_to(self, attempt: int) -> None:
        write_whole(self._file, json.dumps({"attempt": attempt}))

    def current(self) -> int:
        """Number of the attempt that may write; 0 before the first."""
        try:
            return json.loads(self._file.read_text())["attempt"]
        except FileNotFoundError:
            return 0

    def check(self, attempt: int) -> None:
        """Raises a StaleAttemptError where another attempt than this may write."""
        current = self.current()
        if current != attempt:
            raise StaleAttemptError(f"attempt {attempt} is over, {current} runs")


def end_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent dies, or now if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Teller:
    """Writes events of an attempt, each a line with its time, from any thread."""

    def __init__(self, fd: int):
        self._fd, self._lock, self.attempt = fd, threading.Lock(), 0

    def __call__(self, event: events.Told) -> None:
        now, cpu = time.time(), time.process_time()
        event = dataclasses.replace(event, attempt=self.attempt, at=now, cpu=cpu)
        with self._lock:
            os.write(self._fd, f"{events.write(event)}\n".encode())


class _Pace:
    """Pace of the training, as the agent orders it."""

    def __init__(self, slow: float):
        self.slow = slow  # as `Orders.slow`
        self._go_on = threading.Event()

    def take(self, order: RunningOrder) -> None:
        if order.slow is not None:
            self.slow = order.slow
        if order.go_on:
            self._go_on.set()

    def pause(self) -> None:
        """Waits for the order to go on."""
        self._go_on.wait()
        self._go_on.clear()


class _Watch(Watch):
    """Tells the agent what the training loop does, and keeps it to its attempt and pace."""

    def __init__(
        self, orders: Orders, fence: Fence, tell: _Teller, pace: _Pace, memory: int | None
    ):
        self._orders, self._fence, self._tell, self._pace = orders, fence, tell, pace
        self._memory = memory if orders.processes > 1 else None
        self._writes = orders.process == 0
        self._pauses, self._last = set(orders.pauses), time.monotonic()

    def begin(self, step: int) -> None:
        self._check()
        self._tell(events.Begin(step=step))

    def compiled(self, seconds: float) -> None:
        self._tell(events.Compiled(seconds=seconds))

    def step(self, step: int, loss: float) -> None:
        self._tell(events.Step(step=step, loss=loss))
        if not self._writes:
            return
        if self._pace.slow:
            time.sleep(self._pace.slow * (time.monotonic() - self._last))
        if due := {pause for pause in self._pauses if pause <= step}:
            self._pauses -= due
            self._tell(events.Paused(step=step))
            self._pace.pause()
        self._last = time.monotonic()

    def write(self, step: int) -> None:
        self._check()

    def save(self, step: int) -> None:
        self._check()
        self._tell(events.Save(step=step))

    def saved(self, step: int, state: Any) -> None:
        if self._memory is not None:
            from launch.pod import memory_copy

            size = memory_copy.write(self._memory, step, state)
            self._tell(events.Copied(step=step, bytes=size))
        self._tell(events.Saved(step=step))

    def _check(self) -> None:
        if self._writes:
            self._fence.check(self._orders.attempt)


def main() -> None:
    with signals.taken(signals.end):
        _main()


def _main() -> None:
    end_with_parent(int(sys.argv[2]))
    tell = _Teller(int(sys.argv[1]))
    if not (line := sys.stdin.readline()):
        return
    standing, failure = StandingOrders.read(line), None
    try:
        run = _warm(standing)
    except Exception as error:  # told when there is somebody to tell it to
        failure = error
    tell(events.Warm())
    if not (line := sys.stdin.readline()):
        return
    orders = Orders.read(line)
    tell.attempt = orders.attempt
    memory = int(sys.argv[3]) if len(sys.argv) > 3 else None
    threading.Thread(target=_beat, args=(tell,), daemon=True).start()
    pace = _Pace(orders.slow)
    threading.Thread(target=_listen, args=(pace,), daemon=True).start()
    try:
        if failure is not None:
            raise failure
        _train(run, standing, orders, tell, pace, memory)
    except Exception as error:
        from pjit_train.errors import TrainingError, UserError

        kinds = {UserError: "user", TrainingError: "training", StaleAttemptError: "stale"}
        kind = next((name for of, name in kinds.items() if isinstance(error, of)), "crash")
        if kind == "crash":
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        text = lines[0] if kind != "crash" else f"{type(error).__name__}: {lines[0][:300]}"
        tell(events.Raised(kind=kind, text=text))
        sys.stdout.flush()
        os._exit(1)  # JAX would wait for the others, who wait for this one
    sys.stdout.flush()


def _warm(standing: StandingOrders):
    """Prepares all that needs no other process: imports, configuration, tokens."""
    # One that waits in vain is ended by the driver, and before that by nobody else. The flags are
    # part of the compilation cache's keys, so that they are the same in all runs.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_timeout_seconds={_DAY} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={_DAY}"
    )
    from launch import jax_internals, process

    process.prepare(standing.devices)
    import jax

    if standing.devices is not None:
        jax_internals.every_process_caches()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

    import pjit_train.loop  # noqa: F401
    from launch.configure import build_run
    from pjit_train.record import to_train

    run, _ = build_run([standing.config])
    run = dataclasses.replace(run, data=to_train(run.data, Path(standing.directory)))
    run.data.prepare(run.seed)
    return run


def _train(
    run, standing: StandingOrders, orders: Orders, tell: _Teller, pace: _Pace, memory: int | None
) -> None:
    directory = Path(standing.directory)
    fence = Fence(directory / "pod" / "attempt.json")
    fence.check(orders.attempt)
    log = os.open(standing.log.format(orders.process), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"attempt {orders.attempt}", flush=True)
    tell(events.Ready())
    _join(orders)
    tell(events.Joined())

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from launch.pod import memory_copy
    from pjit_train.loop import train

    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices[0].platform == "tpu":
        at = {tuple(device.coords): device for device in devices}
        devices = [at[tuple(place)] for place in orders.coordinates]
    order = np.array(orders.order)
    mesh = Mesh(
        np.array(devices, dtype=object)[order],
        tuple(orders.axes),
        axis_types=(AxisType.Explicit,) * order.ndim,
    )
    text, copy = Path(standing.config).read_text(), None
    if orders.memory is not None:
        copy = orders.memory, lambda wanted: memory_copy.read(memory, wanted)
    train(
        run,
        directory,
        config_text=text,
        steps_before=orders.steps_before,
        mesh=mesh,
        watch=_Watch(orders, fence, tell, pace, memory),
        memory=copy,
    )
    tell(events.Ended())


def _join(orders: Orders) -> None:
    """Joins the other processes of the attempt; on one machine over the loopback interface only."""
    import jax

    from launch.jax_internals import gloo_listens_on
    from launch.process import past_proxies

    if orders.devices is not None:
        jax.config.update("jax_num_cpu_devices", orders.devices)
    if orders.processes == 1:
        return
    coordinator, listen = orders.coordinator, None
    past_proxies(coordinator.rpartition(":")[0])
    if coordinator.startswith("127.0.0.1:"):
        listen = coordinator
        gloo_listens_on("127.0.0.1")
    jax.distributed.initialize(
        coordinator,
        num_processes=orders.processes,
        process_id=orders.process,
        coordinator_bind_address=listen,
    )


def _beat(tell: _Teller) -> None:
    while True:
        tell(events.Beat())
        time.sleep(_BEAT)


def _listen(pace: _Pace) -> None:
    """Obeys the agent's lines; ends this process when there will be no more."""
    for line in sys.stdin:
        pace.take(RunningOrder.read(line))
    os._exit(1)


if __name__ == "__main__":
    main()
