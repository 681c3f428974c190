"""Loggers: services that are told a run's metrics, beside metrics.jsonl and TensorBoard.

Gin binds them, as `run.Run.loggers = [@loggers.Wandb()]`. A logger has one method, `open`, and what
that gives has two, `log` and `close`. Process 0 calls them, each logger in a thread of its own: a
service that is slow keeps no step waiting, and one that fails is left out with a line.
"""

import abc
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax

from pjit_train.errors import UserError
from pjit_train.files import write_whole
from sparsity.ranges import check_choice

log = logging.getLogger("torsion")
IDENTITIES = "loggers.json"  # in a run directory: {class of a logger: identity of the run in it}
PATIENCE = 60.0  # seconds that the end of a run waits for what is not sent
_NOTE = 5000  # characters of a configuration, of the 8,000 that MLflow takes


class Session(Protocol):
    """A run in a logger's service.

    Attributes:
      identity: by which the run is found there when it is resumed.
    """

    identity: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step, which are finite; steps go up."""
        ...

    def close(self, *, failed: bool) -> None:
        """Sends what is left; failed: whether the run ended in an error."""
        ...


class About(NamedTuple):
    """A run, as a logger is told of it.

    Attributes:
      directory: of the run.
      config: the operative configuration, as in `config.gin`.
      identity: of an earlier session of the run; None for its first.
    """

    directory: Path
    config: str
    identity: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logger(abc.ABC):
    """Base of all loggers.

    Attributes:
      library: the module that it needs, which is also the extra of torsion that brings it.
    """

    library: ClassVar[str]

    @abc.abstractmethod
    def open(self, about: About) -> Session:
        """Begins a session, or goes on with that of `about.identity`; raises anything."""

    def check(self) -> None:
        """Raises a UserError where the library is not installed."""
        if importlib.util.find_spec(self.library) is None:
            raise UserError(
                f"run.Run.loggers: {type(self).__name__} needs {self.library}: "
                f"pip install 'torsion[{self.library}]'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wandb(Logger):
    """Weights & Biases.

    Attributes:
      project, entity, group: where the run stands there.
      name: of the run; by default that of its directory.
      mode: "online", or "offline", which writes into `wandb/` of the run directory, for
        `wandb sync` to send.
    """

    library: ClassVar[str] = "wandb"
    project: str = "torsion"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    mode: Literal["online", "offline"] = "online"

    def __post_init__(self):
        check_choice("loggers.Wandb: mode", self.mode, ("online", "offline"), UserError)

    def open(self, about: About) -> Session:
        import wandb

        run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or about.directory.absolute().name,
            id=about.identity or uuid.uuid4().hex[:8],
            resume="allow",
            mode=self.mode,
            dir=str(about.directory),
            config={"gin": about.config},
            settings=wandb.Settings(console="off"),
        )
        return _WandbSession(run)


class _WandbSession:
    def __init__(self, run: Any):
        self._run, self.identity = run, run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLflow(Logger):
    """MLflow.

    Attributes:
      tracking_uri: of a server or a database; by default $MLFLOW_TRACKING_URI, or else `mlflow.db`
        in the run directory, which needs no network.
      experiment: made where it is not there.
      name: of the run; by default that of its directory.
    """

    library: ClassVar[str] = "mlflow"
    tracking_uri: str | None = None
    experiment: str = "torsion"
    name: str | None = None

    def open(self, about: About) -> Session:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        directory = about.directory.absolute()
        own = f"sqlite:///{directory / 'mlflow.db'}"
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        client = MlflowClient(tracking_uri=uri)
        if about.identity is not None:
            client.update_run(about.identity, status="RUNNING")
            return _MLflowSession(client, about.identity)
        found = client.get_experiment_by_name(self.experiment)
        place = str(directory / "mlflow") if uri == own else None
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(self.experiment, artifact_location=place)
        )
        tags = {"mlflow.note.content": f"```\n{about.config[:_NOTE]}\n```"}
        run = client.create_run(experiment, run_name=self.name or directory.name, tags=tags)
        return _MLflowSession(client, run.info.run_id)


class _MLflowSession:
    def __init__(self, client: Any, identity: str):
        self._client, self.identity = client, identity

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        points = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.identity, metrics=points)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.identity, "FAILED" if failed else "FINISHED")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trackio(Logger):
    """Trackio, which keeps metrics on this machine, or in a Space of Hugging Face.

    Attributes:
      project: that the run is of.
      name: of the run; by default that of its directory, and some letters that tell it from others.
      space: OWNER/NAME of a Space; None for this machine ($TRACKIO_DIR).
    """

    library: ClassVar[str] = "trackio"
    project: str = "torsion"
    name: str | None = None
    space: str | None = None

    def open(self, about: About) -> Session:
        import trackio

        chosen = f"{about.directory.absolute().name}-{uuid.uuid4().hex[:6]}"
        name = about.identity or self.name or chosen
        run = trackio.init(
            project=self.project,
            name=name,
            space_id=self.space,
            config={"gin": about.config},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return _TrackioSession(run, name)


class _TrackioSession:
    def __init__(self, run: Any, identity: str):
        self._run, self.identity = run, identity

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()


class Loggers:
    """The loggers of a run while it is trained: a context manager.

    Args:
      loggers: none of them is opened by another process than 0.
      directory: of the run, where identities are kept.
      config: the operative configuration.
    """

    def __init__(self, loggers: Sequence[Logger], directory: Path, config: str):
        lock, mine = threading.Lock(), loggers if jax.process_index() == 0 else ()
        self._senders = [_Sender(logger, directory, config, lock) for logger in mine]

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands on the metrics of `row["step"]`, those that are finite numbers."""
        metrics = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for sender in self._senders:
            sender.rows.put((row["step"], metrics))

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind, *_) -> None:
        for sender in self._senders:
            sender.failed = kind is not None
            sender.rows.put(None)
        end = time.monotonic() + PATIENCE
        for sender in self._senders:
            sender.thread.join(max(end - time.monotonic(), 0.0))
            if sender.thread.is_alive():
                log.warning("%s has not taken all metrics after %.0f s", sender.what, PATIENCE)


class _Sender:
    """The thread of one logger."""

    def __init__(self, logger: Logger, directory: Path, config: str, lock: threading.Lock):
        self.what, self.failed = f"logger {type(logger).__name__}", False
        self.rows: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._logger, self._directory, self._config = logger, directory, config
        self._lock = lock  # of the file of identities
        # Daemonic: a service that hangs does not keep the process.
        self.thread = threading.Thread(target=self._work, name=self.what, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            session = self._open()
            while (row := self.rows.get()) is not None:
                session.log(*row)
            session.close(failed=self.failed)
        except (Exception, SystemExit) as error:  # a library may raise whatever it likes
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("%s fails, and the run goes on without it: %s", self.what, said[:300])

    def _open(self) -> Session:
        name, path = type(self._logger).__name__, self._directory / IDENTITIES
        with self._lock:
            identity = _identities(path).get(name)
        session = self._logger.open(About(self._directory, self._config, identity))
        if session.identity != identity:
            with self._lock:
                kept = _identities(path) | {name: session.identity}
                write_whole(path, json.dumps(kept, indent=1) + "\n")
        return session


def _identities(path: Path) -> dict[str, str]:
    """The identities of a run in its loggers; none where the file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(found := json.loads(path.read_text()), dict):
            return found
    return {}
