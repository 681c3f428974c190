"""The parts of gin that are used and are no part of its interface, each with what it is for.

`tests/launch/test_internals.py` fails by name where a version of gin has changed one of them.
"""

import functools
import os
import pprint
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO

import gin


def keep_the_order_of_dictionaries() -> None:
    """Keeps gin from sorting what it writes: of patterns the first that matches counts."""
    pformat = functools.partial(pprint.pformat, sort_dicts=False)
    gin.config.pprint = SimpleNamespace(pformat=pformat)


def read_files_by(reader: Callable[[str], IO[str]]) -> None:
    """Lets gin open files by a function of their path.

    Gin's own second reader looks in Python packages, which it imports, and logs what it misses.
    """
    gin.config._FILE_READERS[:] = [(reader, os.path.isfile)]
