"""Training that is stopped, killed or poisoned, and goes on as if nothing had been."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers.run_directories import rows
from helpers.tiny_models import BYTES_MODEL

from pjit_train import record
from pjit_train.checkpoint import CheckpointConfig
from pjit_train.data.text import Batches
from pjit_train.errors import TrainingError, UserError
from pjit_train.evaluate import evaluate
from pjit_train.huggingface import weights as huggingface
from pjit_train.lock import held
from pjit_train.loop import train
from pjit_train.metrics import Metrics, read_rows
from pjit_train.program import Program
from pjit_train.run import Samples
from pjit_train.sharding import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")
STEPS = 30  # of `run`


def saved(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory, quick_compiles):
    directory = tmp_path_factory.mktemp("whole")
    train(run, directory, config_text="# all of it\n")
    return directory


def test_a_run_leaves_rows_checkpoints_and_its_configuration(uninterrupted, run):
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "val_loss" in row] == [12, 24, 30]
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    for row in found:
        assert set(row) >= {"loss", "grad_norm", "learning_rate"}
        assert "finite" not in row
        assert "skipped" not in row
    last = found[-1]
    assert last["val_perplexity"] == pytest.approx(np.exp(last["val_loss"]))
    assert saved(uninterrupted) == [10, 20, 30]
    assert (uninterrupted / "config.gin").read_text() == "# all of it\n"
    timed = read_rows(uninterrupted / "metrics.jsonl")
    assert timed[0].keys() >= {"compile_seconds", "first_step_seconds"}
    for row in timed[1:]:
        tokens = run.data.batch_size * run.data.seq_len
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])


def test_evaluation_after_the_run_is_the_runs_own(uninterrupted, run):
    got = evaluate(run, uninterrupted)
    last = rows(uninterrupted)[-1]
    assert got == {name: last[name] for name in got}
    assert set(got) == {"step", "val_loss", "val_perplexity", "val_bits_per_byte"}
    assert evaluate(run, uninterrupted, step=10)["val_loss"] > got["val_loss"]


def test_a_run_that_is_done_says_so_and_changes_nothing(uninterrupted, run, caplog):
    before = {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()}
    with caplog.at_level("INFO", logger="torsion"):
        train(run, uninterrupted, config_text="# another\n")
    assert f"is at step {STEPS}; a larger --steps goes on" in caplog.text
    assert {p: p.read_bytes() for p in uninterrupted.rglob("*") if p.is_file()} == before


def test_other_text_than_the_run_began_with_is_refused(uninterrupted, run):
    known = uninterrupted / record.FILE
    whole = known.read_text()
    record.write(uninterrupted, run.data, config_text="# all of it\n", corpus="0" * 64)
    with pytest.raises(UserError, match=r"was trained on other data .* 0{16}\.\.\. then"):
        train(run, uninterrupted, config_text="# all of it\n")
    known.write_text(whole.replace("sha256", "sha255"))
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        train(run, uninterrupted, config_text="# all of it\n")
    known.unlink()
    (uninterrupted / "corpus.sha256").write_text("1" * 64 + "\n")  # as runs had it before
    with pytest.raises(UserError, match=r"was trained on other data .* 1{16}\.\.\. then"):
        train(run, uninterrupted, config_text="# all of it\n")
    (uninterrupted / "corpus.sha256").unlink()
    known.write_text(whole)


@pytest.fixture
def at_14(monkeypatch):
    """Calls what a test puts here when the row of step 14 is written."""
    write, actions = Metrics.write, []

    def written(self, row):
        write(self, row)
        for action in actions if row["step"] == 14 else ():
            action()

    monkeypatch.setattr(Metrics, "write", written)
    return actions


def test_a_stopped_run_resumes_bit_for_bit(uninterrupted, run, tmp_path, at_14, capsys):
    at_14.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(run, tmp_path, config_text="")
    stopped = saved(tmp_path)[-1]
    assert stopped in (14, 15)  # a row is written while the next step is computed
    assert f"stopped after step {stopped}; the same command resumes" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, stopped + 1))
    at_14.clear()
    train(run, tmp_path, config_text="")
    assert f"resuming after step {stopped}" in capsys.readouterr().out
    assert rows(tmp_path) == rows(uninterrupted)


def test_an_interrupt_from_the_keyboard_stops_after_the_step(run, tmp_path, at_14, capsys):
    """And the directory was held for the run alone while it trained."""
    refused = []

    def second():
        with pytest.raises(UserError) as error, held(tmp_path, ".lock", "another process"):
            pass
        refused.append(str(error.value))

    at_14.extend([second, lambda: os.kill(os.getpid(), signal.SIGINT)])
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(run, tmp_path, config_text="")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert "stopped after step 1" in capsys.readouterr().out
    assert saved(tmp_path)[-1] in (14, 15)
    assert len(refused) == 1
    assert "is being trained in by another process" in refused[0]


def test_a_run_that_lost_its_newest_checkpoint_resumes_from_the_one_before(
    uninterrupted, run, tmp_path
):
    """Rows past the checkpoint are made again, to the same bits."""
    directory = tmp_path / "copy"
    shutil.copytree(uninterrupted, directory)
    shutil.rmtree(directory / "checkpoints" / "30")
    train(run, directory, config_text="")
    assert rows(directory) == rows(uninterrupted)
    assert [row["step"] for row in rows(directory)] == list(range(1, STEPS + 1))
    assert saved(directory) == [10, 20, 30]


def test_a_killed_run_without_a_checkpoint_begins_again(uninterrupted, run, tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    short = dataclasses.replace(run, eval_every=0)
    train(dataclasses.replace(short, steps=3), tmp_path, config_text="")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[0]["loss"] == rows(uninterrupted)[0]["loss"]


@pytest.fixture
def poisoned(monkeypatch):
    """The fifth batch of every run has a weight that is no number."""
    plain = Batches.train_batch

    def train_batch(self, step, rows=slice(None)):
        batch = plain(self, step, rows)
        weights = np.ones(batch["inputs"].shape, np.float32)
        if step == 4:
            weights[0, 3] = np.nan
        return batch | {"weights": weights}

    monkeypatch.setattr(Batches, "train_batch", train_batch)


@pytest.mark.parametrize(
    ("every", "kept", "says"),
    [(2, [2, 4], "the last checkpoint is step 4"), (100, [], "no checkpoint yet")],
)
def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, poisoned, every, kept, says):
    checkpoints = CheckpointConfig(every_steps=every, keep_last=9)
    run = dataclasses.replace(run, checkpoints=checkpoints, log_every=3, eval_every=0)
    with pytest.raises(TrainingError) as error:
        train(run, tmp_path, config_text="")
    assert str(error.value) == (
        "step 5: loss nan, gradient norm nan; stopped, the update was not applied; "
        f"{says}; lower the learning rate, or on_nonfinite = 'skip'"
    )
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3, 5]
    assert found[-1]["loss"] is None
    assert found[-1]["skipped"] == 1
    assert saved(tmp_path) == kept


def test_a_loss_that_is_not_finite_is_skipped_on_demand(run, tmp_path, poisoned, caplog):
    """Its row says so though none is due, and training goes on; a checkpoint falls on it too."""
    caplog.set_level(logging.WARNING, logger="torsion")
    run = dataclasses.replace(
        run,
        steps=8,
        on_nonfinite="skip",
        log_every=3,
        eval_every=0,
        checkpoints=CheckpointConfig(every_steps=5, keep_last=9),
    )
    train(run, tmp_path, config_text="")
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [3, 5, 6, 8]
    assert [row["loss"] is None for row in found] == [False, True, False, False]
    assert [row["step"] for row in found if "skipped" in row] == [5]
    said = [r.getMessage() for r in caplog.records]
    assert said == ["step 5: loss nan, gradient norm nan; the update was not applied, going on"]
    assert saved(tmp_path) == [5, 8]


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_in_a_directory_is_one_line(uninterrupted, run):
    before = json.dumps(sorted(map(str, uninterrupted.rglob("*"))))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(uninterrupted / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error:
            train(run, uninterrupted, config_text="# another\n")
        other.communicate()
    assert str(error.value) == (
        f"run directory {uninterrupted} is being trained in by another process; "
        "wait for it, or use another --out"
    )
    assert json.dumps(sorted(map(str, uninterrupted.rglob("*")))) == before
    assert (uninterrupted / "config.gin").read_text() != "# another\n"
    train(run, uninterrupted, config_text="# all of it\n")  # it is free again


def test_a_directory_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        train(run, tmp_path / "file" / "out", config_text="")
    assert str(error.value) == (
        f"run directory {tmp_path / 'file' / 'out'}: Not a directory; "
        "give one that can be written with --out"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"samples": Samples(tokens=31, prompts=("a",))},
            "samples: a prompt of 2 tokens, the separator one of them, and tokens=31 exceed the "
            "model's max_len=32; use at most 32 together, or tokens=0 for no samples",
        ),
        (
            {"model": dataclasses.replace(BYTES_MODEL, vocab_size=255)},
            "data: token ids go up to 255 and the model has vocab_size=255; use vocab_size >= 256",
        ),
        (
            {"mesh": MeshShape(data=3)},
            "mesh: batch_size / accumulate = 4 is not divisible by data=3 * fsdp=1 = 3; "
            "use a multiple of 3, or a smaller mesh",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(run, tmp_path, change, says):
    with pytest.raises(UserError) as error:
        train(dataclasses.replace(run, **change), tmp_path / "out", config_text="")
    assert str(error.value) == says
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("holds", [(), ("notes.txt",)])
def test_nothing_is_left_of_a_start_whose_weights_are_refused(run, tmp_path, holds):
    """What a weight file holds is known when it is read, which is after the run has its place."""
    state = Program(run, make_mesh(run.mesh)).new_state()
    params = jax.tree.map(np.array, state["params"])
    params["embedding"][7, 3] = np.nan
    huggingface.save(tmp_path / "folder", BYTES_MODEL, params)
    out = tmp_path / "out"
    for name in holds:  # what was there before stays
        out.mkdir()
        (out / name).write_text("mine")
    again = dataclasses.replace(run, initial_weights=str(tmp_path / "folder"))
    with pytest.raises(UserError, match=r"holds nan at \[7, 3\]"):
        train(again, out, config_text="")
    assert not (out / "config.gin").exists()
    assert not (out / record.FILE).exists()
    assert out.exists() == bool(holds)


def test_samples_come_after_validations_and_at_the_end(run, tmp_path, capsys):
    run = dataclasses.replace(
        run,
        steps=3,
        eval_every=2,
        samples=Samples(prompts=("2 times", "1 times"), tokens=5, temperature=0.0),
        profile=(2, 2),
    )
    train(run, tmp_path, config_text="")
    said = capsys.readouterr().out
    places = [said.index(f"sample after step {step}:\n2 times") for step in (2, 3)]
    assert places[0] < said.index("step 3/3") < places[1]
    assert said.count("sample after step 3:") == 2
    assert f"profile of steps 2 to 2 in {tmp_path / 'profile'}" in said
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
