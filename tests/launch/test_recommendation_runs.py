"""Runs that learn clicks, by the command: on any devices, killed and resumed, of bad input."""

import json
import re
import shutil

import numpy as np
import pytest

from launch.cli import main
from pjit_train.tasks.recommendation import area

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

# configs/dlrm.gin with fewer and smaller tables.
SMALL = [
    "rows = (4000, 30, 5, 700)",
    "hotness = (4, 2, 1, 3)",
    "clicks.ClickData.batch_size = 64",
    "click_sources.SyntheticClicks.validation = 256",
    "dlrm.DLRMConfig.replicate_rows = 10",
    "dlrm.DLRMConfig.bottom = (16,)",
    "dlrm.DLRMConfig.top = (16,)",
    "run.Run.log_every = 1",
    "run.Run.eval_every = 6",
    "checkpoint.CheckpointConfig.every_steps = 3",
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.setattr("launch.process.prepare", lambda devices=None: None)


def train(out, *options, steps=6, bindings=()):
    given = {binding.split(" = ")[0]: binding for binding in (*SMALL, *bindings)}
    more = [x for binding in given.values() for x in ("--gin", binding)]
    options = [*more, "--steps", str(steps), "--out", str(out), *options]
    return main(["train", "configs/dlrm.gin", *options])


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eight(tmp_path_factory, quick_compiles):
    """A run on eight devices."""
    out = tmp_path_factory.mktemp("clicks") / "eight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.process.prepare", lambda devices=None: None)
        assert train(out) == 0
    return out


def test_the_losses_of_one_device_are_those_of_eight(eight, tmp_path):
    assert train(tmp_path / "one", "--mesh", "data=1") == 0
    one, all_of_them = rows(tmp_path / "one"), rows(eight)
    assert [row["step"] for row in one] == list(range(1, 7))
    for row, other in zip(one, all_of_them, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for name in ("val_loss", "val_auc", "val_accuracy"):
        assert one[-1][name] == pytest.approx(all_of_them[-1][name], abs=1e-5)


@pytest.mark.parametrize(
    ("mesh", "bindings"),
    [
        ("data=8", ()),  # as before
        ("data=2,fsdp=2", ["dlrm.DLRMConfig.sharding = 'table'"]),
        ("data=1,tensor=2", ["dlrm.DLRMConfig.hot_rows = 16", "dlrm.DLRMConfig.capacity = 3"]),
        ("data=8", ["dlrm.DLRMConfig.sharding = 'column'"]),
    ],
)
def test_a_run_goes_on_with_other_devices_and_shardings(eight, tmp_path, mesh, bindings):
    out = tmp_path / "run"
    shutil.copytree(eight, out)
    shutil.rmtree(out / "checkpoints" / "6")  # as if it had been killed after the one of step 3
    assert train(out, "--mesh", mesh, bindings=bindings) == 0
    again, whole = rows(out), rows(eight)
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    for row, other in zip(again[3:], whole[3:], strict=True):
        if (mesh, bindings) == ("data=8", ()):
            assert row["loss"] == other["loss"]
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_eval_says_log_loss_and_auc_of_the_checkpoint(eight, capsys):
    assert main(["eval", str(eight), "--json", "--mesh", "data=2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    last = rows(eight)[-1]
    assert figures["val_auc"] == pytest.approx(last["val_auc"], abs=1e-5)
    assert figures["val_loss"] == pytest.approx(last["val_loss"], abs=1e-5)
    assert figures["samples"] == 256


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (
            ["dlrm.DLRMConfig.rows = (4000, 20, 5, 700)"],
            r"data: feature feature_01: id \d+ of sample \d+ is out of range; use 0 to 19",
        ),
        (["dlrm.DLRMConfig.combiner = 'max'"], "combiner = 'max'"),
        (["dlrm.DLRMConfig.hotness = (4, 2, 1, 2)"], "use the same for both"),
        (["dlrm.DLRMConfig.num_dense = 3"], "samples have 13 dense features"),
        (["dlrm.DLRMConfig.width = 24"], "must end with width=24"),
        (["clicks.ClickData.batch_size = 60"], "batch_size / accumulate = 60 is not divisible by"),
        (
            [
                "dlrm.DLRMConfig.sharding = 'column'",
                "dlrm.DLRMConfig.width = 4",
                "dlrm.DLRMConfig.bottom = (4,)",
            ],
            "width=4 with sharding='column' is not divisible by 8 devices",
        ),
        (["dlrm.DLRMConfig.capacity = 0"], "capacity=0"),
        (["dlrm.DLRMConfig.rows = (1000000000, 30, 5, 700)"], "GB; use at least "),
        (["row_optimizers.Adagrad.learning_rate = -1.0"], "learning_rate=-1.0"),
    ],
)
def test_a_mistake_is_said_in_one_line(tmp_path, capsys, bindings, words):
    assert train(tmp_path / "run", bindings=bindings) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(words, said), said
    assert said.startswith("torsion: ")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_parts_of_a_batch_give_the_update_of_all_of_it(eight, tmp_path):
    bindings = ["run.Run.accumulate = 2"]
    assert train(tmp_path / "parts", "--mesh", "data=4", bindings=bindings) == 0
    for row, other in zip(rows(tmp_path / "parts"), rows(eight), strict=False):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_criteos_files_train(tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(300):
        numbers = [str(n) if n < 50 else "" for n in rng.integers(-1, 60, 13)]
        ids = [f"{n:08x}" if n % 7 else "" for n in rng.integers(0, 2**32, 26)]
        lines.append("\t".join([str(i % 2), *numbers, *ids]))
    (tmp_path / "day_0").write_text("\n".join(lines[:200]) + "\n")
    (tmp_path / "day_1").write_text("\n".join(lines[200:]))  # without an end of the last line
    bindings = [
        "clicks.ClickData.source = @click_sources.CriteoFiles()",
        f"click_sources.CriteoFiles.train = ['{tmp_path}/day_0']",
        f"click_sources.CriteoFiles.validation = ['{tmp_path}/day_1']",
        f"click_sources.CriteoFiles.rows = {(50,) * 26}",
        f"dlrm.DLRMConfig.rows = {(50,) * 26}",
        f"dlrm.DLRMConfig.hotness = {(1,) * 26}",
    ]
    names = "SyntheticClicks|^rows|^hotness"
    kept = [b for b in SMALL if not re.search(names, b)]
    options = [x for b in (*kept, *bindings) for x in ("--gin", b)]
    command = ["train", "configs/dlrm.gin", *options, "--steps", "6", "--mesh", "data=2"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert np.isfinite(rows(tmp_path / "run")[-1]["val_auc"])
    (tmp_path / "day_0").write_text("\n".join([*lines[:100], "1\t2\tx"]))
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "day_0: line 101: 3 fields" in capsys.readouterr().err


def test_the_area_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    clicks, others = rng.integers(0, 5, 20), rng.integers(0, 5, 20)
    pairs = [
        (c * o, 1.0 if i > j else 0.5 if i == j else 0.0)
        for i, c in enumerate(clicks)
        for j, o in enumerate(others)
    ]
    weights, above = np.array(pairs).T
    assert area(clicks, others) == pytest.approx((weights * above).sum() / weights.sum())
    assert np.isnan(area(np.zeros(3), np.ones(3)))
