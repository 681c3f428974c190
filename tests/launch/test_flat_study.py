"""`torsion study flat`: the published figures of FLAT beside ours."""

import json
import math

import pytest

from launch.cli import main
from launch.reports import flat_study
from launch.reports.flat_study import FlatStudy, both, make_table, study_flat
from pjit_train.errors import UserError
from topology.accelerator.accelerator import CLOUD
from topology.accelerator.workloads import MODELS

SMALL = FlatStudy(models=("BERT", "T5"), sequences=(512,), buffer_sequences=(512,), points=4)


@pytest.fixture(scope="module")
def results():
    return flat_study.find(SMALL)


def test_gains_are_geometric_means_of_the_ratios(results):
    [row] = [
        row
        for row in results["gains"]
        if (row["platform"], row["softmax"], row["scope"]) == ("cloud", "free", "layer")
    ]
    (a, b), (c, d) = [both(CLOUD, MODELS[name], 512) for name in ("BERT", "T5")]
    assert row["speed"] == pytest.approx(math.sqrt(a.seconds / b.seconds * c.seconds / d.seconds))
    assert row["by_sequence"] == [row["speed"]]
    assert row["energy_saved"] == pytest.approx(
        1 - math.sqrt(b.energy / a.energy * d.energy / c.energy)
    )
    assert row["speed"] > 1.2


def test_flat_is_never_slower_and_charges_are_what_they_say(results):
    for row in results["gains"] + results["open"]:
        assert row["speed"] >= 1
        assert row["energy_saved"] < 1
    platform = CLOUD.replace(vector_lanes=1)
    free, _ = both(platform, MODELS["T5"], 512, charge="free")
    moved, _ = both(platform, MODELS["T5"], 512, charge="its bytes")
    overlapped, _ = both(platform, MODELS["T5"], 512, charge="overlapped")
    assert free.vector_cycles == 0
    assert moved.off_chip_bytes > free.off_chip_bytes
    # 4 operations a logit on the one lane.
    assert overlapped.vector_cycles == 4 * 64 * 8 * 512 * 512
    assert overlapped.seconds > moved.seconds > free.seconds


def test_where_a_row_of_logits_does_not_fit_flat_stays_unfused():
    flex, flat = both(CLOUD.replace(buffer=1000), MODELS["T5"], 512, scope="attention")
    assert flat is flex


def test_buffers_hold_the_logits_for_flex_and_rows_for_flat(results):
    for row in results["buffers"]:
        assert row["ratio"] == row["flex"] / row["flat"]
        if (row["platform"], row["scope"]) == ("cloud", "attention"):
            logits = {"M": 64 * 12, "H": 1}[row["granularity"]] * 512 * 512 * 2
            assert 0.8 * logits < row["flex"] < 2 * logits
            assert row["flat"] <= 2**20


def test_the_table_has_all_that_was_published(results):
    table = make_table(results)
    for figure in ("1.94", "49%", "1.76", "42%", "1.75", "44%", "1.65", "55%", "0.58", "0.97"):
        assert figure in table
    assert "FLEX goes head by head" in table
    body = [line for line in table.splitlines() if line.startswith("|")]
    assert len(body) > 60


def test_the_command_writes_all(tmp_path, capsys, results, monkeypatch):
    monkeypatch.setattr(flat_study, "find", lambda study, tell: results)
    out = tmp_path / "study"
    assert main(["study", "flat", "--out", str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    names = {"table.md", "results.json", "flat-utilisation.png", "flat-gains.png"}
    assert {file.name for file in out.iterdir()} == names
    assert json.loads((out / "results.json").read_text()) == results
    assert all(file.stat().st_size < 300_000 for file in out.iterdir())
    assert main(["study", "flat", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == results


def test_a_directory_that_cannot_be_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="take another directory"):
        study_flat(tmp_path / "file" / "study")
