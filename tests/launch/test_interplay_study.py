"""`torsion study interplay`: its runs, what is measured of them, their bytes, and its tables."""

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gin_files import tiny
from helpers.markdown import cells

from launch import interplay_study as command_of
from launch.cli import main
from launch.configure import build_run
from launch.study import read_study
from pjit_train import interplay_study as core
from pjit_train import interplay_table
from pjit_train.errors import UserError
from pjit_train.evaluate import evaluate
from pjit_train.interplay_study import InterplayStudy, Loss
from pjit_train.metrics import read_rows
from sparsity.numbers.encoding import encode
from sparsity.numbers.quantized import Quantization

TINY = tiny(
    {
        "interplay_study.InterplayStudy.patterns": ("2:4",),
        "interplay_study.InterplayStudy.formats": ("int4",),
        "interplay_study.InterplayStudy.seeds": 1,
        "interplay_study.InterplayStudy.finetune_steps": 2,
        "interplay_study.InterplayStudy.finetune_learning_rate": 1e-2,
        "run.Run.steps": 3,
        "run.Run.log_every": 5,
        "run.Run.eval_batches": 2,
        "sharding.MeshShape.data": 1,
        "transformer.TransformerConfig.max_len": 16,
        "transformer.TransformerConfig.d_model": 64,
        "transformer.TransformerConfig.d_ff": 96,
        "transformer.TransformerConfig.layers": "unroll",
    },
    imports=("pjit_train.interplay_study",),
)
S_FIRST, Q_FIRST = core.ORDERS
LAYERS = core.KERNELS


@pytest.fixture
def here(here):
    Path("tiny.gin").write_text(TINY)
    return here


def command(*options: str) -> int:
    return main(["study", "interplay", "--size", "tiny.gin", "--out", "out", *options])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_a_study_cut_off_goes_on_and_its_figures_are_those_of_its_runs(here, monkeypatch, capsys):
    measured = core.Measures.losses

    def fail_once(self, run, directory):
        if directory.name.startswith("sparse"):
            raise UserError("cut off")
        return measured(self, run, directory)

    Path("out").mkdir()
    missing = ["small-2:4-seed0", f"both-2:4-int4-{S_FIRST}-seed0"]
    for name in missing:
        Path("out", name).write_text("in the way")
    with monkeypatch.context() as patch:
        patch.setattr(core.Measures, "losses", fail_once)
        assert command() == 1
    assert "sparse-2:4-seed0: cut off" in capsys.readouterr().out
    table = cells(Path("out", "table.md").read_text())
    assert next(row for row in table if row[0] == "int4")[3] == "-"

    assert command() == 1
    said = capsys.readouterr().out
    assert "run 1 " not in said  # what is done is not trained again
    assert all(re.search(f"torsion: {name}: .* is a file", said) for name in missing)
    assert "2 of 6 runs are missing" in said
    document = json.loads(Path("out", "results.json").read_text())
    found = {(x["kind"], x["format"], x["order"]): x["loss"] for x in document["losses"]}

    # What is quantized after training is what a run of that quantization makes of the weights.
    directory = Path("out", "sparse-2:4-seed0")
    bindings = [
        "run.Run.quantization = @quantized.Quantization()",
        f"quantized.Quantization.layers = {{{LAYERS!r}: 'int4'}}",
        f"quantized.Quantization.order = {Q_FIRST!r}",
    ]
    run, _ = build_run([str(directory / "config.gin")], bindings)
    figures = evaluate(run, directory)
    assert figures["sparse"]
    assert found["sparse", "int4", Q_FIRST] == pytest.approx(figures["val_loss"], rel=1e-5)
    assert found["sparse", "int4", Q_FIRST] != found["sparse", "int4", S_FIRST]
    directory = Path("out", f"both-2:4-int4-{Q_FIRST}-seed0")
    run, _ = build_run([str(directory / "config.gin")])
    assert run.quantization == Quantization(layers={LAYERS: "int4"}, order=Q_FIRST)
    assert found["both", "int4", Q_FIRST] == read_rows(directory / "metrics.jsonl")[-1]["val_loss"]

    # Fine-tuning starts from the weights of the dense run.
    start = build_run([str(Path("out", "dense-seed0", "config.gin"))])[0].initial_weights
    assert start == str(here / "out/pretrained-seed0/huggingface")

    ppl = {key: math.exp(loss) for key, loss in found.items()}
    bound = ppl["sparse", None, None] + ppl["dense", "int4", S_FIRST] - ppl["dense", None, None]
    row = next(r for r in cells(Path("out", "table.md").read_text()) if r[0] == "int4")
    excess = ppl["sparse", "int4", Q_FIRST] - bound
    assert row[2] == f"{bound:.3f}"
    assert row[4] == f"{ppl['sparse', 'int4', Q_FIRST]:.3f} ({excess:+.3f})"
    assert row[6].startswith(f"{ppl['both', 'int4', Q_FIRST]:.3f} (")
    assert Path("out", "interplay.png").read_bytes().startswith(b"\x89PNG")

    errors = document["errors"]["2:4"]
    assert len(errors) == 7
    for row in errors:  # Theorem 3.5, whose premise holds: blocks are whole groups of 4
        assert row["lost"] == 0
        assert row[S_FIRST] <= row["bound"] * (1 + 1e-5)
        assert row["sparsity"] > row["quantization"] > 0

    Path("out", "table.md").unlink()
    assert command("--table") == 0
    assert Path("out", "table.md").exists()


def study_and_run(**changed):
    study, run = read_study("tiny.gin", kind=InterplayStudy)
    return dataclasses.replace(study, **changed), run


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4_e2m1", "nvfp4"])
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "0.5"])
def test_bytes_are_those_of_the_codes(here, format, pattern):
    _, run = study_and_run()
    # Kernels as [inputs, outputs] of one layer; embedding, head and three norms, float32.
    shapes = [(64, 64)] * 4 + [(64, 96)] * 2 + [(96, 64)]
    expected = 4 * (2 * 256 * 64 + 3 * 64)
    for shape in shapes:
        encoded = encode(jnp.ones(shape), format, axis=0)
        kept = {None: 1, "2:4": 0.5, "1:4": 0.25, "0.5": 0.5}[pattern]
        # Two bits a kept weight say where it is in its group; one a weight whether it is kept.
        places = {None: 0, "0.5": 1}.get(pattern, 2 * kept) * math.prod(shape) / 8
        expected += encoded.codes.nbytes * kept + places
        expected += sum(x.nbytes for x in (encoded.scales, encoded.tensor_scale) if x is not None)
    assert core.stored_bytes(run.model, format, pattern) == expected


def test_smaller_models_have_no_more_bytes_and_no_room_for_more(here):
    _, run = study_and_run()
    for pattern in ("2:4", "1:4"):
        small = core.model_of_equal_bytes(run.model, pattern)
        budget = core.stored_bytes(run.model, "int8", pattern)
        assert core.stored_bytes(small, "int8", None) <= budget
        assert small.num_heads * small.head_dim == small.d_model < run.model.d_model
        assert (small.num_layers, small.vocab_size) == (1, 256)
        larger = dataclasses.replace(small, d_ff=small.d_ff + 32)
        assert small.d_ff == 96 or core.stored_bytes(larger, "int8", None) > budget


def made_up(seeds=2) -> list[Loss]:
    """Losses whose perplexities are whole numbers, one more in the second seed."""
    rows = []

    def add(kind, pattern, format, order, value, size):
        for seed in range(seeds):
            loss = math.log(value + seed)
            rows.append(Loss(kind, pattern, format, order, seed, loss, size))

    add("dense", None, None, None, 10, 4000)
    add("dense", None, "int8", S_FIRST, 11, 1000)
    add("dense", None, "int4", S_FIRST, 15, 600)
    add("small", "2:4", "int8", S_FIRST, 13, 620)
    add("sparse", "2:4", None, None, 12, 2200)
    add("sparse", "2:4", "int8", S_FIRST, 14, 630)
    add("sparse", "2:4", "int8", Q_FIRST, 12, 630)
    add("sparse", "2:4", "int4", S_FIRST, 20, 400)
    add("both", "2:4", "int8", Q_FIRST, 16, 630)
    return rows


def test_the_tables_set_both_beside_the_bound_and_the_best_dense_model_of_no_more_bytes(tmp_path):
    study = InterplayStudy(patterns=("2:4",), formats=("int8", "int4"), seeds=2)
    losses = made_up()
    rows = cells(interplay_table.make_table(study, losses, {}))
    table = {row[0]: row[1:] for row in rows}
    # Q 11 and 12, S 12 and 13, dense 10 and 11: bounds 13 and 14.
    assert table["int8"] == [
        "11.500 ± 0.707",
        "13.500 ± 0.707",
        "14.500 (+1.000 ± 0.000)",
        "12.500 (-1.000 ± 0.000)",
        "-",
        "16.500 (+3.000 ± 0.000)",
    ]
    assert table["int4"][2:] == ["20.500 (+3.000 ± 0.000)", "-", "-", "-"]
    # Within 630 bytes: dense int4 at 15.5 and the smaller model at 13.5; within 400 nothing.
    assert table["2:4, int8"][2:] == [
        "int8, smaller for 2:4",
        "620",
        "13.500 ± 0.707",
        "+1.000 ± 0.000",
    ]
    assert table["2:4, int4"] == ["400", "20.500 ± 0.707", "-", "-", "-", "-"]
    interplay_table.draw(study, losses, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_root_mean_squares_over_kernels():
    study = InterplayStudy(patterns=("2:4",), formats=("int8",), seeds=1)
    terms = ("sparsity", "quantization", *core.ORDERS, "bound")
    rows = [
        {"kernel": name, "layer": 0, "format": "int8", "lost": 0.25}
        | dict.fromkeys(terms, value)
        | {f"dot_{term}": 2 * value for term in terms}
        | {S_FIRST: over, f"violations_{S_FIRST}": 0.2, f"violations_{Q_FIRST}": 0.4}
        for name, value, over in (("a", 0.1, 0.2), ("b", 0.7, 0.6))
    ]
    table = interplay_table.make_table(study, made_up(1), {"2:4": rows})
    row = [row for row in cells(table) if row[0] == "int8"][1]
    expected = math.sqrt(statistics.fmean([0.1**2, 0.7**2]))
    assert row[1:3] == [f"{expected:.4f}"] * 2
    assert row[5] == "1 / 0"
    assert row[6] == f"{2 * expected:.4f}"
    assert row[10:] == ["20.0 / 40.0 %", "25.0 %"]
    assert "premise of Theorem 3.5 does not hold" in table
    assert "int8 (up to 25 % of blocks)" in table
    kept = [row | {"lost": 0.0} for row in rows]
    assert "premise" not in interplay_table.make_table(study, made_up(1), {"2:4": kept})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": ("3:2",)}, "cannot keep 3 of every 2"),
        ({"formats": ("int9",)}, "unknown format 'int9'"),
        ({"formats": ()}, r"formats=\(\) is empty"),
        ({"trained_formats": ("nvfp4",), "formats": ("int8",)}, "nvfp4 is not one of formats"),
        ({"seeds": 0}, "InterplayStudy.seeds=0; use a whole number from 1"),
    ],
    ids=str,
)
def test_a_wrong_study_is_told_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        InterplayStudy(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": ("2:5",)}, "5"),
        ({"formats": ("hbfp8",)}, "hbfp8: 96 entries are not cut into blocks of 64"),
        ({"layers": "no_such"}, "'no_such' match"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_told_before_anything_is_trained(here, change, message):
    study, run = study_and_run(trained_formats=None, **change)
    with pytest.raises(UserError, match=message) as caught:
        command_of.plan("tiny.gin", study, run, Path("out"))
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_file_without_a_study_is_told_in_one_line(here, capsys):
    Path("tiny.gin").write_text(re.sub(r"interplay_study\.InterplayStudy.*\n", "", TINY))
    assert command() == 2
    assert "binds nothing of interplay_study.InterplayStudy" in capsys.readouterr().err


def test_the_errors_of_a_kernel_are_those_of_a_plain_computation():
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 8), (8, 3)))
    row = core._errors(jnp.asarray(x), jnp.asarray(w), "2:4", "int8")
    mask = np.zeros_like(w, bool)
    for o in range(3):
        for g in (0, 4):
            mask[g + np.argsort(-np.abs(w[g : g + 4, o]), kind="stable")[:2], o] = True
    sparse = w * mask

    def int8(a, axis):
        scale = np.abs(a).max(axis=axis, keepdims=True) / np.float32(127.5)
        return np.clip(np.round(a / scale), -128, 127) * scale

    q, both = int8(w, 0), int8(sparse, 0)
    norm = np.linalg.norm(w)
    assert row["sparsity"] == pytest.approx(np.linalg.norm(sparse - w) / norm, rel=1e-4)
    assert row["quantization"] == pytest.approx(np.linalg.norm(q - w) / norm, rel=1e-4)
    assert row[S_FIRST] == pytest.approx(np.linalg.norm(both - w) / norm, rel=1e-4)
    error = int8(x, -1) @ both - x @ w
    size = np.sqrt(np.mean((x @ w) ** 2))
    assert row[f"dot_{S_FIRST}"] == pytest.approx(np.sqrt(np.mean(error**2)) / size, rel=1e-3)
