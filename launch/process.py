"""The process that a command computes in: devices, other processes, compilation cache, quiet."""

import logging
import os
import socket
import sys
import time
import warnings

from launch.jax_internals import write_compilations_whole
from pjit_train.errors import UserError
from pjit_train.signals import hold_back

log = logging.getLogger("torsion")

# Emulated devices, above which collectives have to come one after another: with several at once
# there are never threads enough for all devices to meet in one, and XLA stops for good.
_MANY = 128
_PROXIES = [
    name
    for scheme in ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy")
    for name in (scheme, scheme.upper())
]
_ONE_COLLECTIVE_AT_A_TIME = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def use_huge_pages() -> None:
    """Starts this command anew, once, with glibc told to ask for huge pages.

    XLA:CPU takes the temporary memory of a step from the system at each step; on pages of 4 KiB the
    faults of it were 13 % of the processor time of a step (docs/speed.md).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        hold_back()  # until the command anew can take them
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class _Stderr(logging.Handler):
    """Writes to what stderr is at the time."""

    def emit(self, record):
        print(self.format(record), file=sys.stderr, flush=True)


def prepare(devices: int | None = None) -> None:
    """Sets JAX up; call it before anything else of JAX.

    Args:
      devices: emulate so many CPU devices, instead of using what the machine has.
    """
    # Read when the libraries of these names are loaded: errors only, our own lines stand out.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import absl.logging
    import jax

    from pjit_train.data.cache import default_cache_dir

    absl.logging.set_verbosity(absl.logging.ERROR)
    # Where a save fails for several arrays at once, one of the errors is raised and said; asyncio
    # would print the tracebacks of the others when their tasks are collected.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(handler := _Stderr())
        handler.setFormatter(logging.Formatter("torsion: %(message)s"))
        log.propagate = False
    # A cache that cannot be read or written costs a compilation, and is no more to say.
    warnings.filterwarnings(
        "ignore", message="Error (reading|writing) persistent compilation cache"
    )
    write_compilations_whole()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own; who sets it means it
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
    if devices is not None:
        if devices < 1:
            raise UserError(f"--devices {devices}: use a positive number")
        # A thread that waits in a collective is missing to the other devices: XLA stops for good
        # when each of its threads waits, and takes one thread a core or device otherwise.
        if devices > 1:
            os.environ.setdefault("PJRT_NPROC", str(min(8 * devices, 4096)))
        if devices > _MANY:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} {_ONE_COLLECTIVE_AT_A_TIME}".strip()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def check_processes(coordinator: str | None, process_id: int | None, num: int | None) -> None:
    """Raises UserError where the options that join processes do not make sense together."""
    given = [value is not None for value in (coordinator, process_id, num)]
    if not any(given):
        return
    if not all(given):
        raise UserError("--coordinator, --process-id and --num-processes: give all three, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator}: want HOST:PORT, such as 10.0.0.1:1234")
    if num < 1 or not 0 <= process_id < num:
        raise UserError(
            f"--process-id {process_id} of --num-processes {num}: want 0 to {max(num, 1) - 1}"
        )


def join(
    coordinator: str | None, process_id: int | None, num: int | None, *, patience: float = 300.0
) -> None:
    """Joins the other processes of the run and waits for them; none where no coordinator is given.

    Process 0 listens at the coordinator's address.

    Raises:
      UserError: process 0 cannot listen there, or the others do not find it within `patience`
        seconds. (Where process 0 listens and others are missing, JAX ends it after 5 minutes.)
    """
    if coordinator is None:
        return
    import jax

    # JAX aborts the process where this would fail, so it is tried first.
    host, _, port = coordinator.rpartition(":")
    try:
        if process_id == 0:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
                probe.listen()
        else:
            _await_listener(host, int(port), patience)
    except OSError as error:
        verb = "listen" if process_id == 0 else "reach process 0"
        raise UserError(
            f"--coordinator {coordinator}: process {process_id} cannot {verb} there: "
            f"{error.strerror or error}; give a free port of process 0's host, the same to all"
        ) from error
    past_proxies(host)
    text = "process %d of %d meets the others at %s, which may take 5 minutes%s"
    log.info(text, process_id, num, coordinator, proxy_note())
    jax.distributed.initialize(coordinator, num_processes=num, process_id=process_id)


def past_proxies(*hosts: str) -> None:
    """Has addresses of the run's own reached without a proxy, by this process and its children.

    gRPC, which JAX's processes meet by, honours the variables of a proxy for any address, and would
    wait for good. Where none is set there is nothing to do, and JAX would warn of `no_proxy`.
    """
    if not any(os.environ.get(name) for name in _PROXIES):
        return
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        before = [host for host in os.environ.get(name, "").split(",") if host]
        if name != "no_grpc_proxy" or before:  # it hides no_proxy
            new = [host for host in dict.fromkeys(hosts) if host and host not in before]
            os.environ[name] = ",".join(before + new)


def proxy_note() -> str:
    """Names the variables of a proxy that are set, where that may be why a wait is long."""
    found = [name for name in _PROXIES if os.environ.get(name)]
    return f" ({', '.join(found)} set: own addresses go past that)" if found else ""


def _await_listener(host: str, port: int, patience: float) -> None:
    """Returns when somebody listens there. OSError after `patience` s, or for an unknown host."""
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((host, port), timeout=10).close()
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
