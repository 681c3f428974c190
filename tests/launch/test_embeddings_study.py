"""`torsion study embeddings`: published figures of SparseCores beside ours, twists and pooling."""

import json

import pytest

from launch.cli import main
from launch.reports import embeddings_study
from launch.reports.embeddings_study import EmbeddingsStudy, checks, make_table

SMALL = EmbeddingsStudy(
    hotness=(1, 64),
    samples=(32, 256),
    skews=(0.0,),
    pooling_skews=(0.0, 1.0),
    shapes=("4x4x8",),
    planned=False,
)


@pytest.fixture(scope="module")
def results():
    return embeddings_study.find(SMALL)


# Derived from the figures of the TPU v4 paper by hand.
DERIVED = (135, 44, 4.3, 6.0, 1.14, 6.7, 9.3, 18.75, 0.36, 0.50, 2.23, 1.33, 2.24, 0.67, 0.18)


def test_what_follows_from_the_published_figures():
    values = [row["value"] for row in checks()][: len(DERIVED)]
    assert values == pytest.approx(DERIVED, rel=0.02)


def test_the_table_has_published_and_computed_figures(results):
    text = make_table(results)
    assert "| v4 over v3, DLRM0 on 128 chips " in text
    for published in ("3.1", "9.8", "5 .. 7", "1.1 .. 2", "3 .. 3.5"):
        assert f" {published} |" in text
    assert "Best reading: v3 mesh, v4 twisted, rows by SparseCores, in turn." in text
    assert len(results["readings"]) == 16
    assert results["best"]["residual"] == min(row["residual"] for row in results["readings"])
    [low, high] = [row["gains"] for row in results["twists"]]
    assert low[0] < high[0]
    assert low[1] < low[0]


def test_the_command_writes_all(tmp_path, capsys, results, monkeypatch):
    monkeypatch.setattr(embeddings_study, "find", lambda study, tell: results)
    out = tmp_path / "study"
    assert main(["study", "embeddings", "--out", str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"table.md", "results.json", "embeddings.png"}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "embeddings.png").read_bytes().startswith(b"\x89PNG")
