"""Watchdog, the process that a user starts: it keeps a driver alive, and leaves nothing behind.

Ray ends the process that it is connected from when its head dies, so that is another process than
this one, which starts it again. The run then goes on from its newest checkpoint.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.pod.events import Step
from launch.pod.reaper import cleared_directory
from launch.pod.record import read_events
from pjit_train import signals

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
ENDED = 100  # plus an exit code of this command: of a driver that ended by itself
RAY_LOST = 1  # of a driver where Ray's head is gone; of any where an exception is not caught
_FRUITLESS = 3  # drivers in a row that die without a new step


def keep(options: dict) -> int:
    """Runs drivers until one ends by itself; returns its exit code.

    A signal is passed on as a request to save and end, another SIGINT ends all at once.
    """
    adopt_orphans()
    driver, asked = None, signals.Asked()

    def on_signal(number: int) -> None:
        first, at_once = asked.number is None, asked.add(number)
        if driver is not None and (first or at_once):
            driver.send_signal(signal.SIGKILL if at_once else signal.SIGINT)

    fruitless = 0
    with signals.taken(on_signal):
        while True:
            steps = _best_step(options)
            with cleared_directory() as private:
                others = _children()
                try:
                    signals.hold_back()  # until the driver can take them
                    driver = subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "launch.pod.driver",
                            json.dumps(options | {"keeper": os.getpid(), "private": str(private)}),
                        ],
                        start_new_session=True,
                    )
                    signals.let_through()
                    if asked.number is not None:
                        driver.send_signal(signal.SIGINT)
                    code = driver.wait()
                finally:
                    end_all_but(others)
            if asked.number is not None:
                if code != ENDED:  # there was nothing to save, or no time
                    signals.end(asked.number)
                return 0
            if code in (ENDED, ENDED + 1, ENDED + 2):
                return code - ENDED
            fruitless = 0 if _best_step(options) > steps else fruitless + 1
            how = (
                f"left with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
            )
            if code == RAY_LOST:
                how += " (Ray's head may be gone)"
            if fruitless >= _FRUITLESS:
                logs = Path(options["out"]) / "pod"
                print(
                    f"torsion: the driver {how}, the last of {fruitless} times without a new step"
                    + (f"; see {logs}" if logs.exists() else ""),
                    file=sys.stderr,
                )
                return 1
            print(f"{time.strftime('%H:%M:%S')} the driver {how}; another goes on", flush=True)


def adopt_orphans() -> None:
    """Makes descendants of this process its children when they lose their parents."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _children() -> set:
    import psutil

    return set(psutil.Process().children(recursive=True))


def end_all_but(before: set) -> None:
    """Kills all descendants of this process but those given, and returns when they are gone."""
    import psutil

    end = time.monotonic() + 20
    while (found := _children() - before) and time.monotonic() < end:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # one that was left to this process
        time.sleep(0.01)


def _best_step(options: dict) -> int:
    file = Path(options["out"]) / "pod" / "events.jsonl"
    events = read_events(file) if file.exists() else []
    return max((event.step for event in events if isinstance(event, Step)), default=0)
