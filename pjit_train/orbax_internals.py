"""The parts of Orbax that are used and are no part of its interface, each with what it is for.

`tests/pjit_train/test_orbax_internals.py` fails by name where a version of Orbax has changed one.
"""

import contextlib
import logging
import sys
import warnings

HALF_WRITTEN = ".orbax-checkpoint-tmp"
"""What the name of a checkpoint's directory ends with until all of it is there."""

_hook_before = sys.unraisablehook


def say_less() -> None:
    """Keeps from the user what Orbax logs, and what its coroutines raise after they are given up.

    Both are whole tracebacks of what is reported in one line where it is caught.
    """
    logging.getLogger("absl").addFilter(_not_orbax)
    sys.unraisablehook = _unraisable


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _unraisable(event) -> None:
    """Reads in flight when another one failed end later, and find the loop of orbax closed."""
    if str(event.exc_value) != "Event loop is closed":
        _hook_before(event)


@contextlib.contextmanager
def quiet():
    """Drops what the coroutines say that a failed read of orbax leaves behind."""
    hook, chatter = sys.unraisablehook, logging.getLogger("asyncio")
    sys.unraisablehook, chatter.disabled = lambda _: None, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook, chatter.disabled = hook, False
