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

from pjit_train import signals
from pjit_train.files import write_whole

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
    """Writes events, each a JSON line with its time, from any thread."""

    def __init__(self, fd: int):
        self._fd, self._lock = fd, threading.Lock()

    def __call__(self, event: str, **figures) -> None:
        body = {"event": event, "time": time.time(), "cpu": time.process_time(), **figures}
        line = json.dumps(body) + "\n"
        with self._lock:
            os.write(self._fd, line.encode())


def main() -> None:
    with signals.taken(signals.end):
        _main()


def _main() -> None:
    end_with_parent(int(sys.argv[2]))
    tell = _Teller(int(sys.argv[1]))
    standing = json.loads(sys.stdin.readline() or "null")
    if standing is None:
        return
    failure = None
    try:
        run = _warm(standing)
    except Exception as error:  # told when there is somebody to tell it to
        failure = error
    tell("warm")
    orders = json.loads(sys.stdin.readline() or "null")
    if orders is None:
        return
    memory = int(sys.argv[3]) if len(sys.argv) > 3 else None
    threading.Thread(target=_beat, args=(tell,), daemon=True).start()
    go_on = threading.Event()
    slow = [orders["slow"]]
    threading.Thread(target=_listen, args=(go_on, slow), daemon=True).start()
    try:
        if failure is not None:
            raise failure
        _train(run, standing, orders, tell, go_on, slow, memory)
    except Exception as error:
        from pjit_train.errors import TrainingError, UserError

        kinds = {UserError: "user", TrainingError: "training", StaleAttemptError: "stale"}
        kind = next((name for of, name in kinds.items() if isinstance(error, of)), "crash")
        if kind == "crash":
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        text = lines[0] if kind != "crash" else f"{type(error).__name__}: {lines[0][:300]}"
        tell("failed", kind=kind, text=text)
        sys.stdout.flush()
        os._exit(1)  # JAX would wait for the others, who wait for this one
    sys.stdout.flush()


def _warm(standing: dict[str, Any]):
    """Prepares all that needs no other process: imports, configuration, tokens."""
    # One that waits in vain is ended by the driver, and before that by nobody else. The flags are
    # part of the compilation cache's keys, so that they are the same in all runs.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_timeout_seconds={_DAY} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={_DAY}"
    )
    from launch import jax_internals, process

    process.prepare(standing["devices"])
    import jax

    if standing["devices"] is not None:
        jax_internals.every_process_caches()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

    import pjit_train.loop  # noqa: F401
    from launch.configure import build_run
    from pjit_train.record import to_train

    run, _ = build_run([standing["config"]])
    run = dataclasses.replace(run, data=to_train(run.data, Path(standing["directory"])))
    run.data.prepare(run.seed)
    return run


def _train(run, standing, orders, tell, go_on, slow, memory) -> None:
    directory, attempt = Path(standing["directory"]), orders["attempt"]
    fence = Fence(directory / "pod" / "attempt.json")
    fence.check(attempt)
    log = os.open(standing["log"].format(orders["process"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"attempt {attempt}", flush=True)
    tell("ready")
    _join(orders)
    tell("joined")

    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from launch.pod import memory_copy
    from pjit_train.loop import train

    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if devices[0].platform == "tpu":
        at = {tuple(device.coords): device for device in devices}
        devices = [at[tuple(place)] for place in orders["coordinates"]]
    order = np.array(orders["order"])
    mesh = Mesh(
        np.array(devices, dtype=object)[order],
        tuple(orders["axes"]),
        axis_types=(AxisType.Explicit,) * order.ndim,
    )
    pauses, last = set(orders["pauses"]), [time.monotonic()]
    writes = orders["process"] == 0

    def watch(event, figures):
        if event in ("begin", "write", "save") and writes:
            fence.check(attempt)
        state = figures.pop("state", None)
        if state is not None and memory is not None and orders["processes"] > 1:
            size = memory_copy.write(memory, figures["step"], state)
            tell("copied", step=figures["step"], bytes=size)
        if event != "write":
            tell(event, **figures)
        if event == "step" and writes:
            seconds = time.monotonic() - last[0]
            if slow[0]:
                time.sleep(slow[0] * seconds)
            due = {step for step in pauses if step <= figures["step"]}
            if due:
                pauses.difference_update(due)
                tell("paused", step=figures["step"])
                go_on.wait()
                go_on.clear()
            last[0] = time.monotonic()

    text, copy = Path(standing["config"]).read_text(), None
    if orders["memory"] is not None:
        copy = orders["memory"], lambda wanted: memory_copy.read(memory, wanted)
    train(
        run,
        directory,
        config_text=text,
        steps_before=orders["steps_before"],
        mesh=mesh,
        watch=watch,
        memory=copy,
    )
    tell("ended")


def _join(orders) -> None:
    """Joins the other processes of the attempt; on one machine over the loopback interface only."""
    import jax

    from launch.jax_internals import gloo_listens_on
    from launch.process import past_proxies

    if orders["devices"] is not None:
        jax.config.update("jax_num_cpu_devices", orders["devices"])
    if orders["processes"] == 1:
        return
    coordinator, listen = orders["coordinator"], None
    past_proxies(coordinator.rpartition(":")[0])
    if coordinator.startswith("127.0.0.1:"):
        listen = coordinator
        gloo_listens_on("127.0.0.1")
    jax.distributed.initialize(
        coordinator,
        num_processes=orders["processes"],
        process_id=orders["process"],
        coordinator_bind_address=listen,
    )


def _beat(tell) -> None:
    while True:
        tell("beat")
        time.sleep(_BEAT)


def _listen(go_on, slow) -> None:
    """Obeys the agent's lines; ends this process when there will be no more."""
    for line in sys.stdin:
        order = json.loads(line)
        if "slow" in order:
            slow[0] = order["slow"]
        else:
            go_on.set()
    os._exit(1)


if __name__ == "__main__":
    main()
