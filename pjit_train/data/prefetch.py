"""A thread that makes the values of the next steps while this step is computed."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Prefetcher:
    """Iterates over make(start), make(start + 1), ..., made ahead of time by one thread.

    Args:
      make: called with each step in order, from the one thread.
      start: the first step.
      depth: how many values are made ahead of the consumer, at least 1.

    Iterating raises what `make` raised, in its place in the order. `close` (or leaving a `with`
    block) ends the thread; after it, iteration stops.
    """

    def __init__(self, make: Callable[[int], Any], start: int, *, depth: int = 2):
        self._make = make
        self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of (value, error)
        self._free = threading.Semaphore(depth)
        self._closed = False
        self._waited = 0.0
        # Daemonic, so that a consumer that dies without `close` does not keep the process alive.
        self._thread = threading.Thread(
            target=self._work, args=(start,), name="prefetch", daemon=True
        )
        self._thread.start()

    def _work(self, step: int) -> None:
        while True:
            self._free.acquire()
            if self._closed:
                return
            try:
                self._made.put((self._make(step), None))
            except BaseException as error:
                self._made.put((None, error))
                return
            step += 1

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        began = time.perf_counter()
        value, error = self._made.get()
        self._waited += time.perf_counter() - began
        if error is not None:
            self.close()
            raise error
        self._free.release()
        return value

    @property
    def wait_seconds(self) -> float:
        """Seconds the consumer has waited for a value since this was last read; reading resets."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the thread, after the value it is making, and drops what it made. Idempotent."""
        self._closed = True
        self._free.release()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()
