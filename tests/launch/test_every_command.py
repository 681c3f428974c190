"""Every command that takes a run, on shapes of run: each ends with 0."""

import contextlib
import functools
import io
import json
import shutil
from pathlib import Path

import pytest
from helpers.compressed_runs import ATTENTION, FEED_FORWARD

from launch.cli import main

TRAINED = {  # what is added to the run of `dense_run`
    "dense": [],
    "sparse": ["configs/recipes/sr_ste.gin"],
}
SHAPES = [*TRAINED]
COMMANDS = [
    "eval RUN",
    "eval RUN --json",
    "sample RUN --tokens 2",
    "export RUN hf",
    "export RUN hf --dense",
    "train RUN/config.gin --out RUN",
    "compress RUN --pattern 2:4 --method magnitude --export hf",
    "compress RUN --pattern 2:4 --finetune 2 --export hf --json",
    "compress RUN --format W8A8 --smooth 0.5 --quantizer rtn --export hf",
    "compress RUN --method wanda --format fp8_e4m3 --order quantize_then_sparsify --json",
]
DTYPES = ("float32", "bfloat16")
# In one dtype or the other in turn: every command meets every shape, and both dtypes.
CELLS = [
    (shape, command, DTYPES[(row + column) % 2])
    for row, shape in enumerate(SHAPES)
    for column, command in enumerate(COMMANDS)
]


@pytest.fixture(scope="module")
def named(dense_run):
    """(shape, dtype) -> the name of that run, made when it is first asked for."""

    @functools.cache
    def make(shape: str, dtype: str) -> str:
        name = f"{shape.replace(' ', '-')}-{dtype}"
        arguments = ["train", "run.gin", *(x for x in TRAINED[shape] if x.endswith(".gin"))]
        bindings = [x for x in TRAINED[shape] if not x.endswith(".gin")]
        bindings += [f"transformer.TransformerConfig.{x}dtype = '{dtype}'" for x in ("", "param_")]
        for binding in bindings:
            arguments += ["--gin", binding]
        arguments += ["--out", name, "--mesh", "data=1", "--steps", "4"]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(arguments) == 0
        sparse = [
            line for line in out.getvalue().splitlines() if line.startswith("sparse: 2:4 of ")
        ]
        assert len(sparse) == (shape != "dense")
        assert all("attention/out, attention/query" in line for line in sparse)
        return name

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "command", "dtype"), CELLS)
def test_it_ends_with_0(named, shape, command, dtype):
    run = named(shape, dtype)
    folders = [Path("hf"), Path("made")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    if command.startswith("train"):  # in a copy: the other commands want the run as it is
        shutil.rmtree("resumed", ignore_errors=True)
        run = shutil.copytree(run, "resumed")
    argv = [part.replace("RUN", run) for part in command.split()]
    if "compress" in argv:
        argv += ["--sequences", "8", "--out", "made"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    said = [line for line in err.getvalue().splitlines() if "made the model worse" not in line]
    assert code == 0, said
    figures = json.loads(out.getvalue()) if "--json" in argv else None
    if "hf" in argv:
        size = sum(file.stat().st_size for file in Path("hf").glob("*.safetensors"))
        exported = figures["export"] if figures else None
        assert (
            f"{size:,} bytes" in out.getvalue() if exported is None else exported["bytes"] == size
        )
        if "2:4" in argv and exported is not None:
            assert exported["violations"] == dict.fromkeys([*ATTENTION, *FEED_FORWARD], 0)
    if argv[0] == "compress":
        assert json.loads(Path("made/compress.json").read_text())["after"]["val_loss"] > 0
        assert "with N:M packed" not in out.getvalue()
