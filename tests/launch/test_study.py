"""`torsion study recipes`: its runs, what they cost, and the table that is made of them."""

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from helpers.gin_files import tiny
from helpers.markdown import cells

from launch import study
from launch.cli import main
from launch.configure import build_run
from pjit_train import study as core
from pjit_train.evaluate import evaluate
from pjit_train.metrics import read_rows
from pjit_train.signals import StopRequest
from pjit_train.study import RecipeStudy, Result
from sparsity import recipes
from sparsity.recipes.autoswitch import AutoSwitch

TINY = tiny(
    {
        "study.RecipeStudy.recipes": ("sr_ste", "step"),
        "study.RecipeStudy.patterns": ("1:4",),
        "study.RecipeStudy.seeds": 1,
        "run.Run.steps": 4,
        "run.Run.log_every": 5,
        "run.Run.eval_batches": 2,
        "sharding.MeshShape.data": 1,
        "transformer.TransformerConfig.max_len": 16,
        "transformer.TransformerConfig.layers": "unroll",
    },
    imports=("pjit_train.study",),
)
NAMES = [
    "dense-seed0",
    "dense_equal_flops-1:4-seed0",
    "dense_equal_bytes-1:4-seed0",
    "sr_ste-1:4-seed0",
    "step-1:4-seed0",
]
# Of the tiny model: kernels 4 x 16 x 16 and 3 x 16 x 32, attention over half of 16 columns and the
# diagonal, and the head; three passes of two operations for each.
KERNELS = 1024 + 1536
DENSE_FLOPS = 6 * (KERNELS + 16 * 17 + 16 * 256)  # a token
TOKENS = 8 * 16  # a step


@pytest.fixture
def here(here):
    Path("tiny.gin").write_text(TINY)
    return here


def command(*options: str) -> int:
    size = [] if "--size" in options else ["--size", "tiny.gin"]
    return main(["study", "recipes", *size, "--out", "out", *options])


def tiny_run(recipe=None, steps: int = 10):
    """The tiny run, with a recipe at 1:4."""
    run, _ = build_run(["tiny.gin"])
    return dataclasses.replace(run, steps=steps, sparsity=recipe)


LAYERS = {"(attention|feed_forward)/.*kernel": "1:4"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_study_cut_off_goes_on_and_its_table_is_that_of_its_runs(here, monkeypatch, capsys):
    calls = []

    def stop_in_the_third_run(self, step):
        calls.append(step)
        return calls == [1, 2, 3, 1, 2, 1, 2]  # of 4, 3 and 4 steps

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "at", stop_in_the_third_run)
        assert command() == 1
    assert "the same command goes on" in capsys.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(NAMES[:3])
    rows = [read_rows(Path("out", name, "metrics.jsonl")) for name in NAMES[:3]]
    assert [[row["step"] for row in each] for each in rows] == [[4], [3], []]

    Path("out", NAMES[3]).write_text("in the way")
    assert command() == 1
    said = capsys.readouterr().out
    assert said.count("resuming after step 2") == said.count("resuming") == 1
    assert re.search(r"torsion: sr_ste-1:4-seed0: .*is a file", said)
    assert "1 of 5 runs are missing" in said
    table = cells(Path("out", "table.md").read_text())
    assert ["SR-STE", "-"] in table

    Path("out", NAMES[3]).unlink()
    assert command() == 0
    for name, before in zip(NAMES[:2], rows, strict=False):  # what was done is left as it is
        assert read_rows(Path("out", name, "metrics.jsonl")) == before

    document = json.loads(Path("out", "results.json").read_text())
    found = {(run["recipe"], run["steps"]): run["loss"] for run in document["runs"]}
    table = cells(Path("out", "table.md").read_text())
    run, _ = build_run([str(Path("out", NAMES[4], "config.gin"))])
    figures = evaluate(run, Path("out", NAMES[4]))
    assert figures["step"] == 4
    assert figures["sparse"]
    assert found["step", 4] == pytest.approx(figures["val_loss"], rel=1e-5)
    assert ["STEP", f"{figures['val_loss']:.4f}"] in table
    assert found["dense_equal_flops", 3] == rows[1][-1]["val_loss"]
    assert ["dense loss", f"{rows[1][-1]['val_loss']:.4f}"] in table
    assert ["dense d_model, d_ff", "12, 60"] in table
    assert Path("out", "recipes.png").read_bytes().startswith(b"\x89PNG")

    for path in ("table.md", "recipes.png"):
        Path("out", path).unlink()
    assert command("--table") == 0
    assert cells(Path("out", "table.md").read_text()) == table
    assert Path("out", "recipes.png").exists()


@pytest.mark.parametrize(
    ("recipe", "saved"),
    [
        # The sum over 10 steps of 1 - density where pruned weights are read as zeros. The phases:
        # 1 dense step, 7 of decay, 2 of fine-tuning.
        (recipes.sr_ste(LAYERS), 10 * 0.75),
        (recipes.mdgf_linear(LAYERS), 2 * 0.75),
        (recipes.mdgf_exponential(LAYERS), 2 * 0.75),
        (recipes.sdgf_stepwise(LAYERS), 3 * 0.25 + 2 * 0.5 + 4 * 0.75),  # 3:4, 2:4, 1:4
        (recipes.sdgf_geometric(LAYERS, k=4), 9 * 0.75),
        (recipes.structure_decay(LAYERS), 3 * 0.25 + 3 * 0.5 + 3 * 0.75),  # 9 steps of decay
        (recipes.mask_decay(LAYERS), 0),
    ],
    ids=lambda value: "",
)
def test_flops_are_those_of_the_phases(here, recipe, saved):
    flops = core.training_flops(tiny_run(recipe))
    assert flops == TOKENS * (10 * DENSE_FLOPS - 4 * KERNELS * saved)


def test_flops_of_step_depend_on_its_switch(here):
    run = tiny_run(recipes.step(LAYERS, switch=AutoSwitch(window=2)))
    for switched, masked in ((3, 7), (-1, 0)):
        flops = core.training_flops(run, switched_at=switched)
        assert flops == TOKENS * (10 * DENSE_FLOPS - 4 * KERNELS * 0.75 * masked)


def test_dense_runs_of_equal_flops_and_equal_bytes(here):
    run = tiny_run(recipes.sr_ste(LAYERS))
    # 10 x 33888 / 41568
    assert core.steps_of_equal_flops(run) == 8
    # 640 values of 4 bytes and 2 bits; embedding, head and three norms of 16.
    assert core.parameter_bytes(run) == 640 * 4.25 + 4 * (2 * 256 * 16 + 3 * 16) == 35680
    # In proportion, d_model 12 has 4 x 7620 bytes and 16 has 4 x 10800. With 12, all but the
    # feed-forward kernels are 6756 weights, and each of d_ff adds 36 to come near 8920.
    small = core.model_of_equal_bytes(run)
    assert (small.d_model, small.d_ff, small.head_dim) == (12, 60, 6)
    dense = dataclasses.replace(run, model=small, sparsity=None)
    assert core.parameter_bytes(dense) == 4 * (6756 + 36 * 60)


def test_the_largest_geometric_groups(here):
    # The narrowest input is 16: 16:64 does not fit, nor 8:32, but 4:16.
    assert core.largest_geometric(tiny_run(recipes.sr_ste(LAYERS))) == 4


def test_comparisons_are_paired_by_seed_and_interpolated():
    def result(recipe, pattern, seed, loss, flops):
        return Result(recipe, pattern, seed, 4, loss, flops, 8.0, 16, 32)

    found = []
    for seed, shift in ((0, 0.0), (1, 0.5)):
        found += [
            result("dense", None, seed, 2.0 + shift, 100.0),
            result("dense_equal_flops", "1:4", seed, 2.4 + shift, 25.0),
            result("dense_equal_bytes", "1:4", seed, 2.1 + shift, 50.0),
            # 50 is halfway from 25 to 100 on a logarithmic scale: dense would have 2.2.
            result("step", "1:4", seed, 2.3 + shift + 0.1 * seed, 50.0),
            result("sr_ste", "1:4", seed, 2.4 + shift, 25.0),
        ]
    flops, size = core.against_equal_flops(found), core.against_equal_bytes(found)
    assert flops["step", "1:4"] == pytest.approx([0.1, 0.2])
    assert flops["sr_ste", "1:4"] == pytest.approx([0, 0])
    assert size["step", "1:4"] == pytest.approx([0.2, 0.3])
    compared = RecipeStudy(recipes=("sr_ste", "step"), patterns=("1:4",), seeds=2)
    table = cells(core.make_table(compared, found))
    deviation = 0.6 / math.sqrt(2)  # of 2.3 and 2.9
    assert statistics.stdev([2.3, 2.9]) == pytest.approx(deviation)
    assert ["STEP", f"2.6000 ± {deviation:.4f}"] in table
    assert ["dense", "2.2500 ± 0.3536"] in table
    assert ["STEP", "+0.1500 ± 0.0707 (0.50)"] in table
    assert ["STEP", "+0.2500 ± 0.0707"] in table


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("study.RecipeStudy.recipes = ('srste',)", (), r"recipe='srste' is unknown.*sr_ste"),
        ("study.RecipeStudy.patterns = ('1:5',)", (), r"kernel.* groups of 5; use an M that div"),
        ("study.RecipeStudy.patterns = ('4:2',)", (), r"'4:2' keeps 4 of every 2"),
        ("study.RecipeStudy.patterns = ()", (), r"patterns.*one or more"),
        (
            "study.RecipeStudy.seeds = 0",
            (),
            r"RecipeStudy.seeds=0; use a whole number from 1",
        ),
        ("study.RecipeStudy.layers = 'attn'", (), r"attn"),
        ("study.RecipeStudy.recipe = 'step'", (), r"recipe"),
        ("run.Run.steps = 0", (), r"steps=0"),
        ("", ("--size", "tiny"), r"use small, overnight, or a gin file like configs/"),
        ("", ("--size", "nowhere.gin"), r"nowhere\.gin: no such file"),
        ("", ("--size", "configs/quickstart.gin"), r"nothing of study\.RecipeStudy"),
        ("", ("--table",), r"no finished run"),
    ],
)
def test_mistakes_are_one_line(here, capsys, text, options, says):
    Path("base_of_tiny.gin").write_text(TINY)
    imports = "\n".join(line for line in TINY.splitlines() if line.startswith("from "))
    Path("tiny.gin").write_text(f"{imports}\ninclude 'base_of_tiny.gin'\n{text}\n")
    assert command(*options) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(says, said[0])
    assert not Path("out").exists()


def test_another_length_is_another_study(here, capsys):
    folder = Path("out", NAMES[0])
    folder.mkdir(parents=True)
    _, text = build_run(["tiny.gin"], ["run.Run.steps = 3"])
    (folder / "config.gin").write_text(text)
    members, _ = study.plan("tiny.gin", *study.read_study("tiny.gin"))
    assert study.train_members(members[:1], Path("out"))
    assert "was begun for 3 steps, now it is 4; use another --out" in capsys.readouterr().out
