"""`torsion compress` of a tiny trained run: what it writes, says, and leaves alone."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import pjit_train.compress
from launch.cli import main
from launch.configure import build_run
from pjit_train.evaluate import restore_weights
from pjit_train.program import Program
from pjit_train.sharding import make_mesh

TINY = """
from __gin__ import dynamic_registration
from pjit_train import optimizers
from pjit_train import run
from pjit_train import transformer
from pjit_train.data import sources
from pjit_train.data import text
include 'configs/base.gin'

run.Run.model = @transformer.TransformerConfig()
run.Run.steps = 40
run.Run.eval_every = 0
run.Run.eval_batches = 3
run.Samples.tokens = 0
optimizers.AdamW.learning_rate = 1e-2
optimizers.Schedule.warmup_steps = 5
transformer.TransformerConfig:
  vocab_size = 256
  max_len = 32
  d_model = 16
  num_layers = 2
  num_heads = 2
  d_ff = 32
  tie_head = True
text.TextData:
  sources = [@sources.TextFiles()]
  seq_len = 16
  batch_size = 8
sources.TextFiles.train = 'corpus.txt'
"""
ATTENTION = [f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")]
FEED_FORWARD = [f"blocks/feed_forward/{name}/kernel" for name in ("up", "gate", "down")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a run of 40 steps in `dense`; it becomes the current one."""
    folder = tmp_path_factory.mktemp("compress")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TORSION_CACHE", str(folder / "cache"))
        rng = np.random.default_rng(0)
        words = rng.choice(["a cat ", "sat on ", "the mat. ", "it ran ", "home. "], size=1200)
        Path("corpus.txt").write_text("".join(words))
        Path("run.gin").write_text(TINY)
        jax.config.update("jax_disable_most_optimizations", True)
        assert main(["train", "run.gin", "--out", "dense", "--mesh", "data=1"]) == 0
        yield folder
        jax.config.update("jax_disable_most_optimizations", False)


def kernels(directory: str, step: int | None = None) -> dict[str, np.ndarray]:
    """The kernels of a run's checkpoint as matrices [layers, inputs, outputs]."""
    run, _ = build_run([f"{directory}/config.gin"])
    weights = restore_weights(Program(run, make_mesh(run.mesh)), Path(directory), step)[1]
    inputs = dict.fromkeys([*ATTENTION, *FEED_FORWARD], 16) | {FEED_FORWARD[2]: 32}
    found = {}
    for name, size in inputs.items():
        _, part, layer, _ = name.split("/")
        kernel = np.asarray(weights["blocks"][part][layer]["kernel"])
        found[name] = kernel.reshape(2, size, -1)
    return found


def figures(capsys, *command: str) -> dict:
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file() and "cache" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_a_compressed_run_is_a_run(here, capsys):
    command = ["compress", "dense", "--layers", "up=1:8", "value=dense", "down=0.75"]
    before = files(here)
    report = figures(capsys, *command, "--method", "wanda", "--out", "new/sparse")
    assert {n: f for n, f in files(here).items() if not n.startswith("new/")} == before

    found = kernels("new/sparse")
    patterns = {name: "2:4" for name in [*ATTENTION, *FEED_FORWARD]}
    patterns |= {FEED_FORWARD[0]: "1:8", FEED_FORWARD[2]: "0.75"}
    del patterns[ATTENTION[2]]
    assert {n: row["pattern"] for n, row in report["kernels"].items()} == patterns
    for name, pattern in patterns.items():
        row, kept = report["kernels"][name], found[name] != 0
        assert row["sparsity"] == np.mean(~kept)
        assert 0 < row["error"] < 1
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


def test_sparsegpt_by_default_and_a_table(here, capsys):
    assert main(["compress", "dense", "--transposable"]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("dense-compressed-sparsegpt/compress.json").read_text())
    assert report["method"] == "sparsegpt"
    for name, kernel in kernels("dense-compressed-sparsegpt").items():
        [line] = [line.split() for line in out.splitlines() if line.startswith(name)]
        assert line == [name, "2:4", "50.00%", "0", f"{report['kernels'][name]['error']:.4f}"]
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
        (["--method", "wander"], "--method wander is unknown; use magnitude, wanda, sparsegpt"),
        (["--pattern", "2;4"], "'2;4' is unknown; use N:M"),
        (["--pattern", "4:2"], "4:2: cannot keep 4 of every 2"),
        (["--pattern", "2:5"], "use an M that divides 16"),
        (["--pattern", "1:4", "--transposable"], "only 2:4 is kept along both axes"),
        (["--layers", "quary=1:4"], "'quary' matches no parameter"),
        (["--layers", "embedding=1:4"], "'embedding' matches no parameter"),
        (["--layers", "query"], "--layers query: want REGEX=PATTERN"),
        (["--out", "dense"], "dense exists; remove it, or use another --out"),
        (["--sequences", "100000"], "sequences of 16 tokens, not 100000; use at most"),
        (["--sequences", "0"], "0 sequences; use 1 or more"),
        (["--step", "7"], "has no checkpoint 7"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(here, capsys, options, says):
    before = files(here)
    capsys.readouterr()
    command = ["compress", "dense", *options]
    assert main(command if "--out" in options else [*command, "--out", "none/of/it"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("torsion: ")
    assert says in line
    assert files(here) == before
    assert not Path("none").exists()


def test_what_is_no_run_directory_is_said(here, capsys):
    Path("empty").mkdir(exist_ok=True)
    for directory, says in [
        ("nowhere", "nowhere does not exist"),
        ("empty", "empty has no config.gin; give the directory of a run"),
    ]:
        capsys.readouterr()
        assert main(["compress", directory]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert says in line
    assert not list(Path().glob("*-compressed-magnitude"))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(here, capsys, monkeypatch, error):
    def fail(*_):
        assert list(Path().glob(".failed.saving/*")) == [Path(".failed.saving/config.gin")]
        raise error

    before = {path.name for path in Path().iterdir()}
    monkeypatch.setattr(pjit_train.compress, "_save", fail)
    command = ["compress", "dense", "--method", "magnitude", "--sequences", "1", "--out", "failed"]
    assert main(command) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert {path.name for path in Path().iterdir()} == before
