"""The parts of Ray that are used and are no part of its interface, each with what it is for.

`tests/launch/test_internals.py` fails by name where a version of Ray has changed one of them.
"""

import os
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError

RELEASE = "2.60"
"""The release of Ray that this is known of; in pyproject.toml, too."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment in which Ray takes the loopback address for its own, on every system: that is what it
does without clusters. The name is historical."""


def import_ray():
    """The module `ray`. UserError where it is of another release than these internals are."""
    import ray

    if not ray.__version__.startswith(f"{RELEASE}."):
        raise UserError(
            f"Ray {ray.__version__} is installed and pods are made for Ray {RELEASE}; "
            f"pip install 'ray[default]=={RELEASE}.*'"
        )
    return ray


def own(directory: Path) -> dict[str, Any]:
    """Arguments of `ray.init` for a Ray that listens on loopback and keeps its files there."""
    return {"_node_ip_address": "127.0.0.1", "_temp_dir": str(directory)}


def raylet() -> int:
    """The process id of the node of Ray that an actor runs on, called in the actor's process."""
    return os.getppid()  # the node starts its workers itself
