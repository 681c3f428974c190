"""The small runs of the campaign: how they are started, and what must be equal in the end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 120
CONFIG = f"""
from __gin__ import dynamic_registration
from pjit_train import checkpoint
from pjit_train import optimizers
from pjit_train import run
from pjit_train.models import transformer
from pjit_train.data import sources
from pjit_train.data import text
include 'configs/base.gin'

run.Run:
  model = @transformer.TransformerConfig()
  steps = {STEPS}
  log_every = 1
  eval_every = 40
  eval_batches = 2
transformer.TransformerConfig:
  vocab_size = 256
  max_len = 64
  d_model = 32
  num_layers = 2
  num_heads = 4
  num_kv_heads = 2
  d_ff = 64
run.Samples.tokens = 4
checkpoint.CheckpointConfig.every_steps = 3
optimizers.AdamW.learning_rate = 1e-2
optimizers.Schedule.warmup_steps = 4
text.TextData:
  sources = [@sources.TextFiles()]
  seq_len = 32
  batch_size = 8
sources.TextFiles.train = 'corpus.txt'
"""
# What else each kind of run is given.
KINDS = {
    "dense": [],
    "sparse": ["configs/recipes/mdgf_linear.gin"],
    "packed": ["configs/recipes/asp.gin", "--gin", "recipes.Recipe.packed = True"],
}
COMPUTED = ("loss", "grad_norm", "learning_rate", "mask_flips", "val_loss")  # the rest are times


def make_folder(folder: Path) -> None:
    """Writes the corpus and the configuration that all runs in a folder share."""
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=8000)
    (folder / "corpus.txt").write_text(" ".join(words))
    (folder / "run.gin").write_text(CONFIG)


def command(kind: str, out: str | Path, *options: str) -> list[str]:
    code = "import sys; from launch.cli import main; sys.exit(main())"
    return [
        sys.executable, "-c", code, "train", "run.gin", *KINDS[kind], "--out", str(out), *options
    ]  # fmt: skip


def start(folder: Path, kind: str, out: str | Path, **environment: str) -> subprocess.Popen:
    """`torsion train` of a kind of run as a process of its own."""
    own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command(kind, out),
        cwd=folder,
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def computed(out: Path, *, complete: bool = True) -> dict:
    """What a finished run computed: the figures of each step, and the digests of its last state.

    AssertionError where a step stands twice or is missing, if the rows are to be `complete`.
    """
    lines = (out / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    if complete:
        assert [row["step"] for row in read] == list(range(1, STEPS + 1)), "steps lost or twice"
    body = json.loads((out / "checkpoints" / str(STEPS) / "digests" / "metadata").read_text())
    rows = [{k: row[k] for k in COMPUTED if k in row} for row in read]
    return {"rows": rows, "state": body["leaves"]}


def saved(out: Path) -> list[int]:
    """The steps of the checkpoints that are there, whole or not."""
    folder = out / "checkpoints"
    return (
        sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.exists() else []
    )
