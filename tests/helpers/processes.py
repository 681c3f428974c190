"""Processes that tests start: their command, their environment, their addresses."""

import os
import socket
import sys

TORSION = [sys.executable, "-c", "import sys; from launch.cli import main; sys.exit(main())"]


def environment(**more: str) -> dict[str, str]:
    """This process's, with the modules that are found here, and JAX on the CPU."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"} | more


def free_address() -> str:
    """An address on the loopback interface where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
