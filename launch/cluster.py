"""Processes that a cluster starts: their number, this one's index and where they meet.

By SLURM's variables of a job step, and by those of several TPU slices (`MEGASCALE_*`).
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from pjit_train.errors import UserError

_PORTS = range(61440, 65536)  # of which a job takes one by its number
_TPU_PORT = 8482  # libtpu's own coordinator listens at another


class Processes(NamedTuple):
    """Processes of a run.

    Attributes:
      coordinator: HOST:PORT where process 0 listens.
      process_id: of this process.
      number: of all.
      said: variables that say so, by the field.
    """

    coordinator: str | None = None
    process_id: int | None = None
    number: int | None = None
    said: Mapping[str, str] = {}


def processes_of(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    process_id: int | None = None,
    number: int | None = None,
) -> tuple[str | None, int | None, int | None]:
    """(coordinator, process_id, number) of a process, by its options and its environment.

    The coordinator is that of the option, where there is one; the others are what they are.

    Raises:
      UserError: variables that cannot be read, or that options contradict.
    """
    found = _of_slurm(environ) or _of_slices(environ)
    if found is None:
        return coordinator, process_id, number
    options = {"process_id": ("--process-id", process_id), "number": ("--num-processes", number)}
    for name, (option, asked) in options.items():
        there = getattr(found, name)
        if asked is not None and asked != there:
            raise UserError(
                f"{option} {asked} contradicts {found.said[name]}, by which it is {there}; leave "
                "the option out, or unset the variable"
            )
    return coordinator or found.coordinator, found.process_id, found.number


def _of_slurm(environ: Mapping[str, str]) -> Processes | None:
    """The tasks of a job step; None outside of one, or where it has one task.

    A batch script is outside: it is one process, whatever the job has asked for.
    """
    if int_of(environ, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return None
    number = int_of(environ, "SLURM_STEP_NUM_TASKS")
    index = int_of(environ, "SLURM_PROCID")
    nodes = _needed(environ, "SLURM_STEP_NODELIST")
    job = int_of(environ, "SLURM_JOB_ID") + int_of(environ, "SLURM_STEP_ID", 0)
    _check(index, number, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return Processes(
        coordinator=f"{first_host(nodes)}:{_PORTS[job % len(_PORTS)]}",
        process_id=index,
        number=number,
        said={"process_id": "SLURM_PROCID", "number": "SLURM_STEP_NUM_TASKS"},
    )


def _of_slices(environ: Mapping[str, str]) -> Processes | None:
    """The hosts of several TPU slices; None where they are fewer than two."""
    if int_of(environ, "MEGASCALE_NUM_SLICES", 1) < 2:
        return None
    slices, this = int_of(environ, "MEGASCALE_NUM_SLICES"), int_of(environ, "MEGASCALE_SLICE_ID")
    _check(this, slices, "MEGASCALE_SLICE_ID", "MEGASCALE_NUM_SLICES")
    hosts = _needed(environ, "TPU_WORKER_HOSTNAMES").split(",")
    worker = int_of(environ, "TPU_WORKER_ID")
    _check(worker, len(hosts), "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
    host = _needed(environ, "MEGASCALE_COORDINATOR_ADDRESS").partition(":")[0]
    return Processes(
        coordinator=f"{host}:{_TPU_PORT}",
        process_id=this * len(hosts) + worker,
        number=slices * len(hosts),
        said={
            "process_id": "MEGASCALE_SLICE_ID and TPU_WORKER_ID",
            "number": "MEGASCALE_NUM_SLICES and TPU_WORKER_HOSTNAMES",
        },
    )


def first_host(nodes: str) -> str:
    """The first host of a list of SLURM, such as "tpu[03-07,9]-a,login"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def int_of(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The number of a variable; `default` where it is not set, if that is not None.

    Raises:
      UserError: it is none, or needed and not set.
    """
    if default is not None and not environ.get(name):
        return default
    text = _needed(environ, name)
    if not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name}={text}: is no number; start the process as the cluster does")
    return int(text)


def _needed(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(
            f"{name} is not set, and other variables of the cluster are; set it, or unset them and "
            "give --coordinator, --process-id and --num-processes"
        )
    return environ[name]


def _check(index: int, number: int, name: str, of: str) -> None:
    if index >= number:
        raise UserError(f"{name}={index} of {number}, by {of}: want 0 to {number - 1}")
