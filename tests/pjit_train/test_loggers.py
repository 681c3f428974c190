"""Loggers: told every row once, never in the way of a run; the services themselves offline."""

import dataclasses
import json
import sqlite3
import threading
import time
from typing import ClassVar

import pytest

from pjit_train import loggers, loop
from pjit_train.errors import TrainingError, UserError
from pjit_train.loggers import About, Logger, Loggers, MLflow, Trackio, Wandb

CONFIG = "run.Run.steps = 3\n"


class Noted:
    """A service in memory."""

    def __init__(self, about: About):
        self.about, self.rows, self.closed = about, [], None
        self.identity = about.identity or "first"
        self.threads = set()

    def log(self, step, metrics):
        self.rows.append((step, dict(metrics)))
        self.threads.add(threading.current_thread())

    def close(self, *, failed):
        self.closed = failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fake(Logger):
    """Opens sessions of `Noted`, or another kind of them, and keeps these."""

    library: ClassVar[str] = "json"
    kind: type = Noted
    sessions: list = dataclasses.field(default_factory=list)

    def open(self, about):
        self.sessions.append(self.kind(about))
        return self.sessions[-1]


def test_a_logger_is_told_what_is_a_finite_number_and_how_the_run_ended(tmp_path):
    logger = Fake()
    with Loggers([logger], tmp_path, CONFIG) as told:
        told.write({"step": 1, "loss": 2.0, "seen": 3, "grad_norm": float("nan"), "note": "x"})
        told.write({"step": 5, "val_loss": 1.0})
    (session,) = logger.sessions
    assert session.rows == [(1, {"loss": 2.0, "seen": 3.0}), (5, {"val_loss": 1.0})]
    assert session.about == About(tmp_path, CONFIG, None)
    assert session.closed is False
    assert threading.main_thread() not in session.threads
    # The run again, resumed.
    with pytest.raises(TrainingError), Loggers([logger], tmp_path, CONFIG):
        raise TrainingError("not finite")
    assert logger.sessions[1].about.identity == "first"
    assert logger.sessions[1].closed is True
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"Fake": "first"}


def failing(at):
    class Failing(Noted):
        def __init__(self, about):
            super().__init__(about)
            if at == "open":
                raise SystemExit("no key\nset one")

        def log(self, step, metrics):
            if at == "log":
                raise ConnectionError("no route\nto host")

        def close(self, *, failed):
            if at == "close":
                raise RuntimeError("too late")

    return Failing


@pytest.mark.parametrize(
    ("at", "says"), [("open", "no key"), ("log", "no route"), ("close", "too late")]
)
def test_a_failure_is_one_line_and_the_others_go_on(at, says, tmp_path, caplog):
    good = Fake()
    with Loggers([Fake(kind=failing(at)), good], tmp_path, CONFIG) as told:
        for step in range(1, 4):
            told.write({"step": step, "loss": 1.0})
    assert [r.getMessage() for r in caplog.records] == [
        f"logger Fake fails, and the run goes on without it: {says}"
    ]
    assert len(good.sessions[0].rows) == 3


def test_a_service_that_hangs_keeps_neither_steps_nor_the_end(tmp_path, caplog, monkeypatch):
    class Hangs(Noted):
        def log(self, step, metrics):
            time.sleep(30)

    monkeypatch.setattr(loggers, "PATIENCE", 0.2)
    began = time.monotonic()
    with Loggers([Fake(kind=Hangs)], tmp_path, CONFIG) as told:
        for step in range(100):
            told.write({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 5
    assert "logger Fake has not taken all metrics" in caplog.text


def test_a_run_tells_its_loggers_what_stands_in_metrics_jsonl(run, tmp_path):
    logger = Fake()
    run = dataclasses.replace(run, loggers=[logger])
    half = dataclasses.replace(run, steps=15)
    loop.train(half, tmp_path / "run", config_text=CONFIG)
    loop.train(run, tmp_path / "run", config_text=CONFIG, steps_before=15)
    told = [row for session in logger.sessions for row in session.rows]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    numbers = [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in rows]
    assert told == numbers
    assert [s.about.identity for s in logger.sessions] == [None, "first"]


def test_only_process_0_opens_them(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    logger = Fake()
    with Loggers([logger], tmp_path, CONFIG) as told:
        told.write({"step": 1, "loss": 1.0})
    assert not logger.sessions


def test_mistakes_are_one_line(run, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"loggers=\['Fake', 'Fake'\]; give one of a kind"):
        dataclasses.replace(run, loggers=[Fake(), Fake()])
    with pytest.raises(UserError, match="mode"):
        Wandb(mode="of")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Wandb needs wandb: pip install 'torsion\[wandb\]'"):
        loop.train(dataclasses.replace(run, loggers=[Wandb()]), tmp_path / "x", config_text=CONFIG)
    assert not (tmp_path / "x").exists()


def log_twice(logger, folder):
    """A run of two steps, and two more when it is resumed."""
    for first in (1, 3):
        with Loggers([logger], folder, CONFIG) as told:
            for step in (first, first + 1):
                told.write({"step": step, "loss": 1.0 / step})
        time.sleep(1.1)  # wandb names an offline session by its second
    return json.loads((folder / "loggers.json").read_text())[type(logger).__name__]


def wandb_records(data: bytes):
    """Records of a .wandb file, in the format of LevelDB's log after a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline(tmp_path, caplog):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    identity = log_twice(Wandb(mode="offline", project="p"), tmp_path)
    found = []
    for path in tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss" in items:
                found.append((json.loads(items["_step"]), json.loads(items["loss"])))
    assert sorted(found) == [(s, pytest.approx(1 / s)) for s in range(1, 5)]
    assert not caplog.records


def test_wandb_without_a_server_is_one_line(tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    with Loggers([Wandb()], tmp_path, CONFIG) as told:
        told.write({"step": 1, "loss": 1.0})
    (record,) = [r for r in caplog.records if r.name == "torsion"]
    assert record.getMessage().startswith("logger Wandb fails, and the run goes on without it: ")


def test_mlflow_in_a_database_of_the_run(tmp_path, caplog, monkeypatch):
    pytest.importorskip("mlflow", minversion="3")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    identity = log_twice(MLflow(name="n"), tmp_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history(identity, "loss")
    assert sorted((m.step, m.value) for m in history) == [(s, 1 / s) for s in range(1, 5)]
    run = client.get_run(identity)
    assert (run.info.run_name, run.info.status) == ("n", "FINISHED")
    assert CONFIG in run.data.tags["mlflow.note.content"]
    assert not caplog.records


def test_mlflow_without_a_server_is_one_line(tmp_path, caplog, monkeypatch):
    pytest.importorskip("mlflow", minversion="3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Loggers([MLflow(tracking_uri="http://127.0.0.1:1")], tmp_path, CONFIG) as told:
        told.write({"step": 1, "loss": 1.0})
    (record,) = [r for r in caplog.records if r.name == "torsion"]
    assert "logger MLflow fails, and the run goes on without it: " in record.getMessage()


def test_trackio_on_this_machine(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    identity = log_twice(Trackio(project="p"), tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    found = [(name, step, json.loads(m)["loss"]) for name, step, m in rows if b"loss" in m]
    assert sorted(found) == [(identity, s, pytest.approx(1 / s)) for s in range(1, 5)]
    assert not caplog.records
