"""The process that clears up after a keeper that was killed: `python -m launch.pod.reaper`.

Drivers, trainers and Ray's servers die with their parents; some of Ray's helpers take a minute to.
This process reads the directories that the keeper has made for Ray from standard input, a line
each, until the keeper's end. Then it kills all that has files open there, as every process of Ray
has its log, and removes them. Of a keeper that ends by itself nothing is left to clear up.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

_QUIET = 1.0  # seconds in which none is found, after which all are gone


class Reaper:
    """The reaper of this process."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.pod.reaper"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def made(self, directory: Path) -> None:
        """Has a directory cleared, and what is in it ended, when this process is killed."""
        print(directory, file=self._process.stdin, flush=True)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def main() -> None:
    directories = tuple(sys.stdin.read().splitlines())
    import psutil

    seen = time.monotonic()
    while time.monotonic() - seen < _QUIET:
        for process in psutil.process_iter():
            try:
                if any(file.path.startswith(directories) for file in process.open_files()):
                    process.kill()
                    seen = time.monotonic()
            except (psutil.Error, OSError):  # another user's, or gone
                pass
        time.sleep(0.05)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
