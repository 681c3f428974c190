"""SIGINT, SIGTERM and SIGHUP: who takes them, and how a process ends by one at any moment.

Python runs a handler in the main thread alone, between two bytecodes: not while XLA compiles. What
it raises is lost where it interrupts a callback of another library. So no handler raises here: each
signal is handed once to whoever has `taken` them last, by the main thread, or where that is busy by
a thread that waits for them. This module imports nothing slow: it is needed first.
"""

import contextlib
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAYS: dict[int, str] = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}
_SAME = 0.5  # seconds in which a second SIGINT is the first one, passed on by another process too

Take = Callable[[int], None]
_takers: list[Take] = []
_handing = threading.RLock()
_unfinished: list["Path"] = []  # what `end` removes
_ending = False
_obeyed: int | None = None


class taken:
    """A context manager in which SIGINT, SIGTERM and SIGHUP go to `take`, and to nobody else.

    Args:
      take: is called with the number, in the main thread or another one, at any moment of the
        program; it must be quick.
      numbers: the signals, where nobody has taken any before. SIGHUP stays ignored where it was, as
        nohup asks for.

    The first one has to be in the main thread; it lets signals through that were held back.
    """

    def __init__(self, take: Take, numbers: tuple[int, ...] = NUMBERS):
        self._take, self._numbers = take, numbers

    def __enter__(self) -> None:
        self._first = not _takers
        _takers.append(self._take)
        if self._first:
            hold_back()
            self._read, self._write = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)
            self._watched: set[int] = set()  # handed over, and the main thread has still to hear it
            # For it they stay held back: what it alone has got would be lost in an exec.
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
            self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            taking = set(self._numbers) - ({signal.SIGHUP} if ignored else set())
            self._before = {n: signal.signal(n, self._on_signal) for n in taking}
            let_through()

    def __exit__(self, *exc_info) -> None:
        if self._first:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd)
            os.close(self._write)
        _takers.pop()

    def _on_signal(self, number: int, frame) -> None:
        """Handles a signal, called by Python in the main thread."""
        with _handing:
            come = self._hand_over()
            if number not in come and number not in self._watched:
                _takers[-1](number)  # an event loop that runs here has got what was written
            self._watched.discard(number)

    def _watch(self) -> None:
        while True:
            select.select([self._read], [], [])
            with _handing:
                come = self._hand_over()
                self._watched.update(come)
            if come == b"":
                return os.close(self._read)

    def _hand_over(self) -> bytes:
        """Hands over what the system has written, and returns it; b"" when no more can come."""
        try:
            come = os.read(self._read, 64)
        except BlockingIOError:
            return b"\0"
        for number in come:
            if number in self._numbers and _takers:
                _takers[-1](number)
        return come


def hold_back() -> None:
    """Keeps the signals pending for this thread and what it starts or becomes (exec)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def let_through() -> None:
    """Lets the signals come, those first that were held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def ignore() -> None:
    """Ignores the signals, in the last moments of a process that ends by itself.

    Python gives up its handlers there, and any would kill the process that is as good as gone.
    """
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def end(number: int) -> None:
    """Ends this process at once, with a line and 128 + number; what is unfinished is removed."""
    global _ending
    if _ending:
        return
    _ending = True
    for path in reversed(_unfinished):
        _remove(path)
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # the cursor, which a progress bar hides
        os.write(2, f"torsion: {_SAYS[number]}\n".encode())
    os._exit(128 + number)


def end_unless_saved(number: int) -> None:
    """Ends the process as `end`; after a save for a signal it ends by itself, unless by SIGINT.

    A scheduler repeats SIGTERM, and that would be 143 for a run that was saved.
    """
    if _obeyed is None or number == signal.SIGINT:
        end(number)


@contextlib.contextmanager
def unfinished(path: "Path") -> Iterator[None]:
    """A file or folder that is being written under a name of its own; gone when this ends.

    What is done goes to another name before. Also gone when a signal ends the process meanwhile.
    """
    _unfinished.append(path)
    try:
        yield
    finally:
        _remove(path)
        _unfinished.remove(path)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Holds off signals for a moment in which something is written that has to be whole."""
    if not _takers or threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    try:
        with taken(late.append):
            yield
    finally:
        for number in late:
            _takers[-1](number)


class Asked:
    """Requests of signals: to save and end, and then perhaps to end at once.

    Attributes:
      number: of the first signal, None before it.
    """

    def __init__(self):
        self.number: int | None = None
        self._since = 0.0

    def add(self, number: int) -> bool:
        """Notes a signal. True where it asks for the end at once, which another SIGINT does.

        A dropped connection or a scheduler may well repeat SIGHUP and SIGTERM, and `timeout` passes
        on the SIGINT that a terminal sends to all: those are one.
        """
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            return False
        return number == signal.SIGINT and time.monotonic() - self._since > _SAME


class StopRequest:
    """A request to stop that a run obeys between two steps; SIGINT, SIGTERM or SIGHUP makes it.

    They end the process at once before the first step, when there is nothing to save, and another
    SIGINT does so later. With several processes the request of any one, and the step at which all
    obey, is agreed on by jax's preemption service, which takes SIGTERM itself.
    """

    def __enter__(self) -> "StopRequest":
        import jax

        self._asked, self._begun = Asked(), False
        self._several = jax.process_count() > 1
        numbers = tuple(n for n in NUMBERS if n != signal.SIGTERM or not self._several)
        self._taken = taken(self._take, numbers)
        self._taken.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        global _obeyed
        _obeyed = self._asked.number
        self._taken.__exit__(*exc_info)

    def _take(self, number: int) -> None:
        first = self._asked.number is None
        if self._asked.add(number) or not (self._begun or self._several):
            end(number)
        if number == signal.SIGHUP:
            _leave_terminal()
        if self._several and first:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Tells whether the run stops after `step`; the same on all processes."""
        self._begun = True
        if self._several:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.number is not None


def obeyed() -> int | None:
    """The signal that came while the last run trained, for which it stopped unless it was done."""
    return _obeyed


def _leave_terminal() -> None:
    """Sends to nowhere what goes to a terminal that has gone, where to write would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            os.dup2(nowhere, fd)
    os.close(nowhere)


def _remove(path: "Path") -> None:
    """Removes what is there; first from its name, for another thread may be about to commit it."""
    import shutil

    gone = path.with_name(f"{path.name}.gone")
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        gone.unlink()
