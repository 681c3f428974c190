"""Waits of an attempt before its first step: reported from time to time, and limited."""

import time

from launch.pod import events

# By the last thing that a process told: what it does next, and how long it may take, as a multiple
# of --hang-after.
_WAITS: dict[type[events.Event] | None, tuple[str, int]] = {
    None: ("to start, with the tokens", 10),
    events.Ready: ("to meet the others{where}", 2),
    events.Joined: ("to restore the checkpoint", 5),
    events.Begin: ("to compile the step", 5),
    events.Compiled: ("to compute the first step", 5),
}
_LEAST = 120.0  # seconds that each of them has: a busy machine takes as long to import everything
_SAY = 10.0  # seconds after which a wait is told, and then each time twice as many


class Waits:
    """The processes of an attempt, until each has computed a step.

    Args:
      processes: how many.
      hang_seconds: of --hang-after.
      where: they meet, in words, such as " at 10.0.0.1:1234".
    """

    def __init__(self, processes: int, hang_seconds: float, where: str = ""):
        self._at: list[type[events.Event] | None] = [None] * processes
        self._hang, self._where = hang_seconds, where
        self._since, self._say = time.monotonic(), _SAY

    def on_event(self, process: int, event: events.Event) -> None:
        """Notes what a process told; what says nothing of its start is let pass."""
        kind = type(event)
        if kind in (*_WAITS, events.Step) and kind != self._at[process]:
            self._at[process] = kind
            self._since, self._say = time.monotonic(), _SAY

    def behind(self) -> tuple[list[int], str]:
        """The processes that are waited for, and what they have to do; ([], "") where all train."""
        for kind, (what, _) in _WAITS.items():
            if waited := [process for process, at in enumerate(self._at) if at == kind]:
                return waited, what.format(where=self._where)
        return [], ""

    def limit(self) -> float:
        """Seconds that may pass without a sign of progress."""
        times = next((times for kind, (_, times) in _WAITS.items() if kind in self._at), 1)
        return max(_LEAST, times * self._hang)

    def seconds(self) -> float:
        """Seconds since the last sign of progress."""
        return time.monotonic() - self._since

    def due(self) -> bool:
        """Tells whether it is time to say what is waited for."""
        if self.seconds() < self._say:
            return False
        self._say *= 2
        return True
