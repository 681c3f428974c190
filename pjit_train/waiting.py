"""Lines that say what a run is waiting for, where that takes long."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger("torsion")
_SAY = 10.0  # seconds after which a wait is told, and then each time twice as many


@contextlib.contextmanager
def told(
    what: str,
    *,
    say: Callable[[str], None] = log.info,
    limit: float | None = None,
    in_vain: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Says from time to time what is waited for.

    Args:
      what: for example "the step to compile".
      say: is told each line, in another thread; by default the logger `torsion`.
      limit: seconds after which `in_vain` is called, in that thread, unless the wait is over.
    """
    over = threading.Event()
    of = "so far" if limit is None else f"of {limit:.0f} s at most"

    def tell() -> None:
        waited, at = 0.0, _SAY
        while limit is None or at < limit:
            if over.wait(at - waited):
                return
            say(f"waiting for {what}, {at:.0f} s {of}")
            waited, at = at, 2 * at
        if not over.wait(limit - waited):
            in_vain()

    threading.Thread(target=tell, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
