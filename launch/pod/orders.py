"""Orders to a trainer: lines of JSON at its standard input, in the order of these classes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class _Order:
    def write(self) -> str:
        """The line of the order, without its end."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, line: str) -> Self:
        """The order of a line that `write` made."""
        return cls(**json.loads(line))


@dataclass(frozen=True, kw_only=True)
class StandingOrders(_Order):
    """Orders that hold in every attempt and for every trainer.

    Attributes:
      config: a file with the run's operative configuration.
      directory: the run directory.
      devices: emulated ones of a process; None where hosts have devices.
      log: path of a trainer's log; {} is the process, or "spare".
      cwd, env: the working directory of trainers, and what their environment has besides.
    """

    config: str
    directory: str
    devices: int | None
    log: str
    cwd: str
    env: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Orders(_Order):
    """Orders for an attempt, to one of its processes.

    Attributes:
      attempt: its number.
      coordinator: HOST:PORT at which processes meet.
      process, processes: the number of this one, and how many there are.
      devices: emulated ones of a process; None where hosts have devices.
      axes: names of the mesh's axes.
      order: in the mesh's shape, the devices as JAX counts them.
      coordinates: [N, 3], the chip that each device is.
      pauses: steps after which process 0 waits until it is told to go on.
      steps_before: the `run.steps` that the directory was trained with last.
      slow: what going around failed switches adds to a step, as a part of it.
      memory: the step whose shards are in the hosts' memory, where all of them are.
    """

    attempt: int
    coordinator: str
    process: int = 0
    processes: int
    devices: int | None
    axes: Sequence[str]
    order: Sequence[Any]
    coordinates: Sequence[Sequence[int]]
    pauses: Sequence[int]
    steps_before: int | None
    slow: float
    memory: int | None


@dataclass(frozen=True, kw_only=True)
class RunningOrder(_Order):
    """Order to a trainer that trains: to go on after a pause, or to be slower, as `Orders.slow`."""

    go_on: bool = False
    slow: float | None = None
