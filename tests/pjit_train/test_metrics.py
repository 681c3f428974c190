"""Rows of figures on disk: once a step, whole or not at all, and readable by TensorBoard."""

import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from pjit_train.errors import UserError
from pjit_train.metrics import Display, Metrics, read_rows
from pjit_train.tasks.language_modelling import LanguageModelling


def write(directory, start, steps, **figures):
    metrics = Metrics(directory, start)
    for step in steps:
        metrics.write({"step": step, "loss": 1.0 / step, **figures})
    metrics.close()


def events(directory):
    """The events of a run, by TFRecord's framing: length, its checksum, data, its checksum."""
    found = []
    for path in sorted((directory / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_rows_are_objects_a_line_in_order(tmp_path):
    write(tmp_path, 0, [1, 2, 3], learning_rate=1e-4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "loss": 1.0 / step, "learning_rate": 1e-4} for step in (1, 2, 3)
    ]
    assert read_rows(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]


def test_a_row_is_on_disk_once_it_is_written(tmp_path):
    """A run that is killed loses no row that it wrote."""
    metrics = Metrics(tmp_path, 0)
    metrics.write({"step": 1, "loss": 2.0})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    metrics.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 0, range(1, 16))
    write(tmp_path, 10, range(11, 21), again=1)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if "again" in row] == list(range(11, 21))
    assert [row["loss"] for row in rows] == [1.0 / step for step in range(1, 21)]
    write(tmp_path, 0, [1])  # nothing was saved: the run begins again
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_rows_that_are_not_those_of_the_save_are_named_and_stay(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1.0 / step})
        if step == 2:
            digest = metrics.digest
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    Metrics(tmp_path, 2, digest).close()
    assert not caplog.records
    changed = whole.replace("0.5", "0.6")
    path.write_text(changed)
    Metrics(tmp_path, 2, digest).close()
    (said,) = caplog.records
    assert "its rows up to step 2 are not those that were written" in said.getMessage()
    assert [row["loss"] for row in read_rows(path)] == [1.0, 0.6]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == changed


def test_rows_that_are_not_there_any_more_are_said_to_be_lost(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    none = metrics.digest
    metrics.write({"step": 1, "loss": 2.0})
    written = metrics.digest
    metrics.close()
    (tmp_path / "metrics.jsonl").unlink()
    Metrics(tmp_path, 1, written).close()
    [said] = caplog.records
    assert "metrics.jsonl is missing: its rows up to step 1 are lost" in said.getMessage()
    (tmp_path / "metrics.jsonl").unlink()
    Metrics(tmp_path, 1, none).close()  # none had been written
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "line", [b"{", b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff", b"[" * 9999]
)
def test_a_line_that_is_no_row_is_named_left_out_and_kept_aside(tmp_path, caplog, line):
    write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([rows[0], line + b"\n", rows[2]])
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is not a row of metrics"):
        read_rows(path)
    write(tmp_path, 3, [4])
    assert "line 2 is no row and is left out" in caplog.records[0].getMessage()
    assert [row["step"] for row in read_rows(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 200))
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path_factory, cut):
    directory = tmp_path_factory.mktemp("run")
    write(directory, 0, range(1, 6))
    path = directory / "metrics.jsonl"
    whole = path.read_bytes()
    cut = min(cut, len(whole) - 1)
    path.write_bytes(whole[:-cut])
    left = whole[:-cut].count(b"\n")
    assert [row["step"] for row in read_rows(path)] == list(range(1, left + 1))
    write(directory, left, [left + 1])
    assert [row["step"] for row in read_rows(path)] == list(range(1, left + 2))


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; a reader in another language would refuse the line."""
    write(tmp_path, 0, [1], grad_norm=math.nan, val_loss=math.inf, skipped=1)
    text = (tmp_path / "metrics.jsonl").read_text()
    refuse = pytest.fail  # called for NaN and Infinity alone
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "loss": 1.0,
        "grad_norm": None,
        "val_loss": None,
        "skipped": 1,
    }


def test_tensorboard_has_every_figure_and_forgets_steps_that_come_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3], grad_norm=math.nan)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0"))  # names tell seconds apart, not less
    write(tmp_path, 2, [3, 4])
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 3]  # TensorBoard drops the events from these steps on, written before
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path)
        for value in event.summary.value
    ]
    steps = [1, 2, 3, 3, 4]
    assert [(step, tag) for step, tag, _ in scalars] == [(step, "loss") for step in steps]
    assert [value for *_, value in scalars] == pytest.approx([1 / step for step in steps])


def test_display_without_a_terminal_prints_a_line_a_row(capsys):
    display = Display(0, 100, LanguageModelling())
    display.row(
        {"step": 10, "loss": 2.5, "grad_norm": 0.125, "learning_rate": 3e-4}
        | {"tokens_per_second": 12345.6, "step_seconds": 2.0}
        | {"val_loss": 2.25, "val_perplexity": 9.4877, "val_bits_per_byte": 3.246}
    )
    display.row({"step": 100, "loss": math.nan, "grad_norm": 0.1, "learning_rate": 0.0})
    display.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 10/100  loss 2.5000  grad norm 0.125  lr 3.00e-04  12,346 tokens/s  3:00 left",
        "validation after step 10: loss 2.2500  perplexity 9.488  bits per byte 3.2460",
        "step 100/100  loss nan  grad norm 0.100  lr 0.00e+00  - tokens/s  0:00 left",
    ]
