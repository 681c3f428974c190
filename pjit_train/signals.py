"""A request to stop that a run obeys between two steps."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns SIGTERM and SIGINT into a request; a second SIGINT interrupts at once.

    With several processes the request of any one, and the step at which all obey, is agreed on by
    jax's preemption service, which listens to SIGTERM itself.
    """

    def __enter__(self) -> "StopRequest":
        self._requested = False
        self._several = jax.process_count() > 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._on_interrupt)}
        if not self._several:
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_terminate)
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_terminate(self, number, frame) -> None:
        self._requested = True

    def _on_interrupt(self, number, frame) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> bool:
        """Whether the run stops after `step`; the same on all processes."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
