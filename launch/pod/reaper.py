"""The process that clears up after a watchdog that was killed: `python -m launch.pod.reaper DIR`.

Drivers, trainers and Ray's servers die with their parents; some of Ray's helpers take a minute to.
This process waits at its standard input for the watchdog's end. Then it kills all processes of the
Ray of that directory, and removes it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launch.pod.cluster import private_directory

_QUIET = 1.0  # seconds in which none is found, after which all are gone


@contextlib.contextmanager
def cleared_directory() -> Iterator[Path]:
    """A new directory for a Ray; it is removed at the end, by a reaper if this process is killed.

    What runs there has to be ended before, but where this process is killed. A reaper that dies
    does no harm: there is none until the next directory is made.
    """
    directory, process = private_directory(), None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.pod.reaper", str(directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it
        )
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()


def main() -> None:
    directory = sys.argv[1]
    sys.stdin.read()
    import psutil

    seen = time.monotonic()
    while time.monotonic() - seen < _QUIET:
        for process in psutil.process_iter():
            try:
                if _is_of_ray(process, directory):
                    process.kill()
                    seen = time.monotonic()
            except (psutil.Error, OSError):  # another user's, or gone
                pass
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)


def _is_of_ray(process, directory: str) -> bool:
    """Tells whether a process belongs to the Ray of a directory, and does not only read its logs.

    All of Ray's processes have RAY_TMPDIR, as `cluster.local` sets it, and a log that they write
    there. Some have written their title over their environment, which is empty then.
    """
    environment = process.environ()
    if environment and environment.get("RAY_TMPDIR") != directory:
        return False
    inside = os.path.realpath(directory) + os.sep
    return any(
        file.path.startswith(inside) and getattr(file, "mode", "") != "r"
        for file in process.open_files()
    )


if __name__ == "__main__":
    main()
