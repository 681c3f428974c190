"""`torsion compress` of a tiny trained run: what it writes, says, and leaves alone."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.compressed_runs import ATTENTION, FEED_FORWARD, figures, kernels, scaled
from helpers.processes import TORSION
from helpers.run_directories import files

import pjit_train.compression.compress
from launch.cli import main
from pjit_train.evaluate import restore_weights
from sparsity.numbers.formats import E2M1, MX
from sparsity.numbers.quantization import quantize

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.mark.slow
def test_a_compressed_run_is_a_run(dense_run, capsys):
    command = ["compress", "dense", "--layers", "up=1:8", "value=dense", "down=0.75"]
    before = files(dense_run)
    report = figures(capsys, *command, "--method", "wanda", "--out", "new/sparse")
    assert {n: f for n, f in files(dense_run).items() if not n.startswith("new/")} == before

    found = kernels("new/sparse")
    patterns = {name: "2:4" for name in [*ATTENTION, *FEED_FORWARD]}
    patterns |= {FEED_FORWARD[0]: "1:8", FEED_FORWARD[2]: "0.75"}
    del patterns[ATTENTION[2]]
    assert {n: row["pattern"] for n, row in report["kernels"].items()} == patterns
    for name, pattern in patterns.items():
        row, kept = report["kernels"][name], found[name] != 0
        assert row["sparsity"] == np.mean(~kept)
        assert set(row["errors"]) == {"sparsity", "together"}
        assert 0 < row["errors"]["sparsity"] == row["errors"]["together"] < 1
        assert row["format"] is None
        if pattern == "0.75":
            assert row["violations"] is None
            assert (kept.sum(1) == 8).all()  # of 32 inputs, for every output
        else:
            n, m = map(int, pattern.split(":"))
            assert row["violations"] == 0
            assert (kept.reshape(2, -1, m, kept.shape[-1]).sum(2) == n).all()
    dense = kernels("dense")
    np.testing.assert_array_equal(found[ATTENTION[2]], dense[ATTENTION[2]])
    for name in patterns:  # Wanda prunes and moves nothing
        kept = found[name] != 0
        np.testing.assert_array_equal(found[name][kept], dense[name][kept])

    written = json.loads(Path("new/sparse/compress.json").read_text())
    assert report == {"out": "new/sparse", **written}
    assert (report["run"], report["step"], report["sequences"]) == ("dense", 40, 128)
    assert report["between"] == {}
    assert report["before"].items() <= figures(capsys, "eval", "dense").items()
    assert report["after"].items() <= figures(capsys, "eval", "new/sparse").items()
    assert report["before"]["val_loss"] < report["after"]["val_loss"]
    assert main(["sample", "new/sparse", "--tokens", "3"]) == 0

    assert main(["train", "new/sparse/config.gin", "--out", "new/sparse", "--steps", "8"]) == 0
    tuned = kernels("new/sparse", 8)
    for name in patterns:
        np.testing.assert_array_equal(tuned[name] == 0, found[name] == 0)
        assert (tuned[name] != found[name]).any()
    assert figures(capsys, "eval", "new/sparse")["val_loss"] < report["after"]["val_loss"]


@pytest.mark.slow
def test_sparsegpt_by_default_and_a_table(dense_run, capsys):
    assert main(["compress", "dense", "--pattern", "2:4", "--transposable"]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("dense-compressed-sparsegpt/compress.json").read_text())
    assert report["method"] == "sparsegpt"
    for name, kernel in kernels("dense-compressed-sparsegpt").items():
        [line] = [line.split() for line in out.splitlines() if line.startswith(name)]
        error = f"{report['kernels'][name]['errors']['together']:.4f}"
        assert line == [name, "2:4", "50.00%", "0", "-", error, "-", error]
        kept = kernel != 0
        assert (kept.reshape(2, -1, 4, kept.shape[-1]).sum(2) == 2).all()
        assert (kept.reshape(2, kept.shape[1], -1, 4).sum(3) == 2).all()
    before, after = (report[when]["val_perplexity"] for when in ("before", "after"))
    assert [["val_perplexity", f"{before:.5g}", f"{after:.5g}"]] == [
        line.split() for line in out.splitlines() if line.startswith("val_perplexity")
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--method", "wander"],
            "--method wander is unknown; use magnitude, wanda, sparsegpt, none",
        ),
        (["--method", "none"], "nothing is pruned or quantized"),
        (["--method", "none", "--layers", "up=1:4"], "--layers: --method none prunes nothing"),
        (["--method", "none", "--pattern", "1:4"], "--pattern: --method none prunes nothing"),
        ([], "nothing is pruned or quantized; give a pattern"),
        (["--format", "int9"], "unknown format 'int9'; use one of int4"),
        (["--format", "int4:2:asym:3"], "int4:2:asym:3: gives two of its block"),
        (["--format", "nvfp4:asym"], "a zero point is of integers"),
        (["--format", "W4A16"], "16 entries are not cut into blocks of 128; use a block"),
        (["--format", "W9A16"], "unknown format 'W9A16'; "),
        (["--format", "FP8"], "FP8 has one scale for all activations, taken from calibration"),
        (["--format", "fp8_block"], "16 entries are not cut into blocks of 128; use a block"),
        (["--format", "W8A8", "--activations", "fp8_e4m3"], "W8A8 has int8; use one"),
        (["--format", "W8A8", "--format-layers", "up=W8A16"], "W8A16 has none, W8A8 has int8"),
        (["--format", "int8", "--activations", "W8A8"], "that is a scheme, which has int8"),
        (["--format", "mxfp8_e4m3"], "16 entries are not cut into blocks of 32; use a block that"),
        (["--format-layers", "up"], "--format-layers up: want REGEX=NAME"),
        (["--format-layers", "quary=int4"], "'quary' matches no parameter"),
        (["--activations", "int8"], "--activations without --format"),
        (["--quantizer", "rtn", "--pattern", "2:4"], "--quantizer without --format"),
        (["--format", "int8", "--transposable"], "--transposable without --pattern"),
        (["--format", "int8", "--finetune", "3"], "--finetune without --pattern"),
        (["--pattern", "2:4", "--order", "quantize_then_sparsify"], "is of both; give a --pat"),
        (["--pattern", "2:4", "--format", "int4", "--order", "none"], "order='none' is unknown"),
        (["--format", "int4", "--activations", "int9"], "--activations int9: unknown format"),
        (["--format", "int4", "--activations", "mxfp8_e4m3"], "are not cut into blocks of 32"),
        (["--format", "int4", "--quantizer", "awq"], "quantizer='awq' is unknown; use rtn or gptq"),
        (
            ["--pattern", "2:4", "--format", "int4", "--order", "quantize_then_sparsify"],
            "sparsegpt moves weights",
        ),
        (
            ["--format", "hbfp6:16", "--export", "none/hf"],
            "compressed-tensors has no name for hbfp6:16",
        ),
        (
            ["--format", "int4", "--activations", "mxint8", "--export", "hf"],
            "no activations in mxint8",
        ),
        (["--format", "int4", "--export", "dense"], "dense: there is something already"),
        (["--pattern", "2;4"], "'2;4' is unknown; use N:M"),
        (["--pattern", "4:2"], "4:2: cannot keep 4 of every 2"),
        (["--pattern", "2:5"], "use an M that divides 16"),
        (["--pattern", "0.5", "--transposable"], "only N:M is kept along both axes"),
        (["--layers", "quary=1:4"], "'quary' matches no parameter"),
        (["--layers", "embedding=1:4"], "'embedding' matches no parameter"),
        (["--layers", "query"], "--layers query: want REGEX=PATTERN"),
        (["--pattern", "2:4", "--out", "dense"], "dense exists; remove it, or use another --out"),
        (
            ["--pattern", "2:4", "--sequences", "100000"],
            "sequences of 16 tokens, not 100000; use at most",
        ),
        (["--pattern", "2:4", "--step", "7"], "has no checkpoint 7"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(dense_run, capsys, options, says):
    before = files(dense_run)
    capsys.readouterr()
    command = ["compress", "dense", *options]
    assert main(command if "--out" in options else [*command, "--out", "none/of/it"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("torsion: ")
    assert says in line
    assert files(dense_run) == before
    assert not Path("none").exists()


@pytest.mark.slow
def test_pruned_smoothed_quantized_and_exported(dense_run, capsys):
    command = [
        "compress",
        "dense",
        "--method",
        "magnitude",
        "--format",
        "int4:8",
        "--smooth",
        "0.5",
    ]
    command += ["--activations", "int8", "--format-layers", "down=int8", "query=dense"]
    report = figures(capsys, *command, "--sequences", "8", "--out", "small", "--export", "hf")
    assert set(report["between"]) == {"smooth", "sparsify", "quantize"}
    np.testing.assert_allclose(
        report["between"]["smooth"]["val_loss"], report["before"]["val_loss"], rtol=1e-5
    )
    assert report["after"] != report["between"]["quantize"]  # activations are quantized as well
    assert report["after"].items() <= figures(capsys, "eval", "small").items()
    for name, kernel in kernels("small").items():
        row, kept = report["kernels"][name], kernel != 0
        assert (kept.reshape(2, -1, 4, kept.shape[-1]).sum(2) <= 2).all()
        assert (row["pattern"], row["violations"]) == ("2:4", 0)
        if name == ATTENTION[0]:
            assert (row["format"], set(row["errors"])) == (None, {"sparsity", "together"})
            continue
        elements = scaled("small", name, kernel)
        np.testing.assert_allclose(elements, np.rint(elements), atol=1e-4)
        assert row["format"] == ("int8" if name == FEED_FORWARD[2] else "int4:8")
        if row["format"] == "int4:8":
            assert np.abs(elements + 0.5).max() < 7.51
            size = kernel.size
            scales = 4 * size // 8
            assert row["bytes"]["zeros"] == size // 2 + scales
            assert row["bytes"]["packed"] == size // 4 + size // 8 + scales
        errors = row["errors"]
        assert 0 < errors["quantization"] < errors["together"] < 1
        assert 0 < 0.9 * errors["sparsity"] < errors["together"]
    total = report["bytes"]
    assert total["before"] - total["zeros"] == sum(
        row["bytes"]["before"] - row["bytes"]["zeros"] for row in report["kernels"].values()
    )
    config = json.loads(Path("hf/config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    assert report["export"]["violations"] == dict.fromkeys([*ATTENTION, *FEED_FORWARD], 0)
    assert main(["export", "small", "hf2"]) == 0
    assert files(Path("hf")) == files(Path("hf2"))
    assert main(["export", "small", "plain", "--dense"]) == 0
    assert "quantization_config" not in json.loads(Path("plain/config.json").read_text())


@pytest.mark.slow
def test_fine_tuned_in_between(dense_run, capsys):
    command = ["compress", "dense", "--pattern", "2:4", "--format", "int8", "--sequences", "8"]
    report = figures(capsys, *command, "--finetune", "8", "--out", "tuned")
    losses = [report[when]["val_loss"] for when in ("before", "after")]
    assert list(report["between"]) == ["sparsify", "finetune"]
    pruned, trained = (figures["val_loss"] for figures in report["between"].values())
    assert trained < pruned
    assert abs(losses[1] - trained) < abs(pruned - trained)
    for name, kernel in kernels("tuned").items():
        assert report["kernels"][name]["violations"] == 0
        elements = scaled("tuned", name, kernel)
        np.testing.assert_allclose(elements, np.rint(elements), atol=1e-3)
        assert 0 < report["kernels"][name]["errors"]["together"] < 0.05  # by int8 alone
    assert not Path("tuned/finetune").exists()
    assert "worse" not in capsys.readouterr().err
    # Trained on, its weights are no longer numbers of the format.
    assert main(["train", "tuned/config.gin", "--out", "tuned", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["export", "tuned", "hf-tuned"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "has values that its format and scales do not give" in line
    assert not list(Path().glob("*hf-tuned*"))
    again = ["compress", "tuned", "--method", "none", "--format-layers", "up=int8"]
    assert main([*again, "--out", "none/of/it"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "key/kernel was compressed to int8 before, and training to step 2 moves its" in line
    assert not Path("none").exists()


@pytest.mark.parametrize(("factor", "worse"), [(4.0, True), (1.0, False)])
def test_fine_tuning_that_makes_the_model_worse_is_said(
    dense_run, capsys, monkeypatch, factor, worse
):
    def tuned(work, params):
        return jax.tree.map(lambda x: x * np.float32(factor), params)

    monkeypatch.setattr(pjit_train.compression.compress._Work, "_finetune", tuned)
    out = f"tuned-{worse}"
    command = ["compress", "dense", "--pattern", "2:4", "--method", "magnitude", "--json"]
    assert main([*command, "--finetune", "3", "--sequences", "1", "--out", out]) == 0
    captured = capsys.readouterr()
    between = json.loads(captured.out)["between"]
    losses = [between[what]["val_loss"] for what in ("sparsify", "finetune")]
    assert (losses[0] < losses[1]) == worse
    says = (
        "fine-tuning made the model worse: validation loss {:.4f} when pruned, {:.4f} after 3 steps"
    )
    assert (says.format(*losses) in captured.err) == worse


def test_quantized_then_pruned(dense_run, capsys):
    command = ["compress", "dense", "--method", "wanda", "--format", "mxfp4_e2m1:16"]
    command += ["--order", "quantize_then_sparsify", "--quantizer", "rtn", "--sequences", "8"]
    report = figures(capsys, *command, "--out", "reverse")
    assert list(report["between"]) == ["quantize"]
    dense = kernels("dense")
    for name, kernel in kernels("reverse").items():
        kept = kernel != 0
        expected = np.asarray(quantize(dense[name], MX(element=E2M1, block=16), axis=1))
        np.testing.assert_array_equal(kernel[kept], expected[kept])
        assert (kept.reshape(2, -1, 4, kept.shape[-1]).sum(2) <= 2).all()
        assert report["kernels"][name]["errors"]["together"] > 0


def test_weights_that_are_not_finite_are_named(dense_run, capsys, monkeypatch):
    def broken(*args):
        step, weights = restore_weights(*args)
        weights = jax.tree.map(lambda x: x, weights)
        weights["blocks"]["attention"]["key"]["kernel"] *= np.inf
        return step, weights

    monkeypatch.setattr(pjit_train.compression.compress, "restore_weights", broken)
    capsys.readouterr()
    assert main(["compress", "dense", "--pattern", "2:4", "--out", "none/of/it"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "dense: blocks/attention/key/kernel of step 40 has entries that are not finite" in line
    assert not Path("none").exists()


def test_what_is_no_run_directory_is_said(dense_run, capsys):
    for name in ("empty", "weights", "hub", "broken", "runs/a"):
        Path(name).mkdir(parents=True, exist_ok=True)
    Path("weights/model.safetensors").touch()
    Path("hub/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    Path("broken/config.json").write_text('{"architectures": [')
    shutil.copy("dense/config.gin", "runs/a/config.gin")
    for directory, says in [
        ("nowhere", "nowhere does not exist; give the directory of a run"),
        ("run.gin", "run.gin is a file; give the directory of a run"),
        ("empty", "empty has no config.gin; give the directory of a run"),
        ("weights", "it holds weights (model.safetensors) and no run; give the directory of"),
        ("runs", "it is a folder of runs; give one of them: runs/a"),
        ("dense/checkpoints", "is a part of the run dense; give that"),
        ("dense/config.gin", "is a part of the run dense; give that"),
        ("x" * 300, "File name too long"),
    ]:
        for command in ("compress", "export", "eval", "sample"):
            capsys.readouterr()
            argv = [command, directory, *(["out"] if command == "export" else [])]
            assert main(argv) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert says in line
    for directory, says in [("hub", "model_type=None is unknown"), ("broken", "cannot be read")]:
        for argv in (
            ["compress", directory, "--method", "magnitude"],
            ["export", directory, "out"],
        ):
            assert main(argv) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"{directory}/config.json: {says}" in line
    assert not list(Path().glob("*-compressed-magnitude"))


@pytest.mark.slow
def test_a_killed_one_leaves_nothing_under_its_name_and_can_be_done_again(dense_run, capsys):
    before = files(dense_run)
    command = ["compress", "dense", "--method", "wanda", "--sequences", "8", "--out", "killed"]
    started = subprocess.Popen([*TORSION, *command], stderr=subprocess.PIPE)
    half = Path(".killed.saving")
    while started.poll() is None and not list(half.glob("checkpoints/0*")):
        time.sleep(0.001)
    started.kill()  # SIGKILL: nothing can be tidied up
    said = started.communicate()[1].decode()
    assert started.returncode == -signal.SIGKILL, said
    left = files(half)
    assert "config.gin" in left
    assert "compress.json" not in left
    assert not Path("killed").exists()
    assert {
        n: f for n, f in files(dense_run).items() if not n.startswith(".killed.saving/")
    } == before

    report = figures(capsys, *command)
    assert not half.exists()
    assert json.loads(Path("killed/compress.json").read_text())["after"] == report["after"]
    assert report["after"].items() <= figures(capsys, "eval", "killed").items()
    assert {n: f for n, f in files(dense_run).items() if not n.startswith("killed/")} == before


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(dense_run, capsys, monkeypatch, error):
    def fail(*_):
        names = {path.name for path in Path(".failed.saving").iterdir()}
        assert names == {"config.gin", "checkpoints"}
        raise error

    before = {path.name for path in Path().iterdir()}
    monkeypatch.setattr(pjit_train.compression.compress, "save_params", fail)
    command = ["compress", "dense", "--method", "magnitude", "--sequences", "1", "--out", "failed"]
    assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert {path.name for path in Path().iterdir()} == before
