"""`torsion study flat`: the published figures of FLAT beside ours."""

import json
import math

import pytest

from launch.cli import main
from launch.reports import flat_study
from launch.reports.flat_study import FlatStudy, both, make_table, study_flat
from pjit_train.errors import UserError
from topology.accelerator import dataflow_curves as curves
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


def test_charges_are_what_they_say():
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
        if (row["platform"], row["scope"]) == ("cloud", "attention"):
            logits = {"M": 64 * 12, "H": 1}[row["granularity"]] * 512 * 512 * 2
            assert 0.8 * logits < row["flex"] < 2 * logits
            assert row["flat"] <= 2**20


def test_a_least_buffer_is_enough_and_half_of_it_is_not(results):
    """By the utilisation of attention with it, for FLAT on the cloud platform."""
    [row] = [
        row
        for row in results["buffers"]
        if (row["platform"], row["scope"], row["granularity"]) == ("cloud", "attention", "M")
    ]

    def utilisation(size):
        machine = CLOUD.replace(buffer=int(size))
        return curves.cost(machine, MODELS["BERT"], 512, "flat", "attention").utilisation

    enough = 0.95 * utilisation(2**34)
    assert utilisation(row["flat"]) >= enough > utilisation(row["flat"] / 2)


# Of FLAT (Kao et al., 2023): the abstract, and the text of section 6.
PUBLISHED = {
    ("edge", "paper, abstract"): ("1.94", "49%"),
    ("edge", "paper, published body"): ("1.75", "44%"),
    ("cloud", "paper, abstract"): ("1.76", "42%"),
    ("cloud", "paper, published body"): ("1.65", "55%"),
}


def test_the_table_has_what_was_published_beside_what_was_found(results):
    lines = [line for line in make_table(results).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = {(c[0], c[1]): c for c in reversed(cells)}  # of the first table
    for key, (speed, saved) in PUBLISHED.items():
        assert rows[key][2:4] == [speed, saved]
    for row in results["gains"]:
        if row["scope"] == "layer":
            found = rows[row["platform"], row["softmax"]]
            assert float(found[2]) == pytest.approx(row["speed"], abs=0.005)


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
