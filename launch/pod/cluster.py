"""The Ray under a pod: one of its own on this machine, or a cluster that runs already."""

import contextlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.pod import ray_internals
from launch.process import past_proxies
from pjit_train.errors import UserError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def private_directory() -> Path:
    """A new directory that only this user can read, of a short name: sockets will be in it."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="torsion-", dir=folder if len(folder) < 24 else "/tmp"))


@contextlib.contextmanager
def local(directory: Path, *, dashboard: bool) -> Iterator[str | None]:
    """A Ray that is started here and ends with this process; gives HOST:PORT of its dashboard.

    It listens on the loopback interface only, and answers who knows its token, which is in
    `directory`.
    """
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(directory),
        **ray_internals.LOOPBACK,
    }
    os.environ.pop("RAY_ADDRESS", None)
    past_proxies(*_LOOPBACK)
    ray = ray_internals.import_ray()
    with _quiet():
        context = ray.init(
            address="local",
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            num_cpus=1,
            object_store_memory=128 * 2**20,
            log_to_driver=False,
            configure_logging=False,
            **ray_internals.own(directory),
        )
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


@contextlib.contextmanager
def joined(address: str) -> Iterator[str | None]:
    """A cluster that runs already; gives HOST:PORT of its dashboard, None where it has none.

    What this process made there goes when it leaves.

    Raises:
      UserError: nobody answers there, or a Ray of another version.
    """
    if address == "auto":  # a job that was submitted has it in its environment
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--address {address}: want HOST:PORT of a Ray head, or auto")
        if (problem := _unreachable(host, int(port))) is not None:
            raise UserError(
                f"--address {address}: nobody answers there ({problem}); start a head there with "
                "`ray start --head`, or leave --address out to emulate a pod here"
            )
        if host in _LOOPBACK and _unreachable(_own_address(), int(port)) is not None:
            os.environ |= ray_internals.LOOPBACK  # else Ray takes that address
    past_proxies(*_LOOPBACK, _own_address(), address.rpartition(":")[0])
    ray = ray_internals.import_ray()
    try:
        with _quiet():
            context = ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"--address {address}: Ray {ray.__version__} cannot join ({line}); the cluster needs "
            "the same Ray and Python, and the token of RAY_AUTH_TOKEN_PATH"
        ) from error
    try:
        yield context.dashboard_url or None
    finally:
        ray.shutdown()


def chips(hosts_per_process: int, chips_per_host: int) -> dict[str, int]:
    """Resources of the cluster's real chips that a process takes; none where the cluster has none.

    Raises:
      UserError: a process would have several TPU hosts.
    """
    import ray

    there = ray.cluster_resources()
    if there.get("TPU"):
        if hosts_per_process != 1:
            raise UserError(
                f"--hosts-per-process {hosts_per_process}: each host of a real TPU slice has a "
                "process of its own; use 1"
            )
        return {"TPU": chips_per_host}
    return {"GPU": chips_per_host * hosts_per_process} if there.get("GPU") else {}


def _unreachable(host: str, port: int) -> str | None:
    """Says why nobody answers at an address; None if somebody does."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _own_address() -> str:
    """The address of this machine for others; the loopback one where it has none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; an address for examples (RFC 5737)
        return probe.getsockname()[0]
    return "127.0.0.1"


@contextlib.contextmanager
def _quiet():
    """Silences what Ray says while it starts."""
    logger = logging.getLogger("ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
