"""Lines that say what a run is waiting for, where that takes long."""

import contextlib
import logging
import threading
from collections.abc import Iterator

log = logging.getLogger("torsion")
_SAY = 10.0  # seconds after which a wait is told, and then each time twice as many


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says from time to time what is waited for, such as "the step to compile"."""
    over = threading.Event()

    def tell() -> None:
        seconds = _SAY
        while not over.wait(seconds if seconds == _SAY else seconds / 2):
            log.info("waiting for %s, %.0f s so far", what, seconds)
            seconds *= 2

    threading.Thread(target=tell, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
