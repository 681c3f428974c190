"""A run that `torsion compress` takes, and what it writes."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from helpers.gin_files import tiny
from launch.cli import main
from launch.configure import build_run
from pjit_train.evaluate import restore_weights
from pjit_train.program import Program
from pjit_train.sharding import make_mesh
from sparsity.recipes.kernels import dense

BINDINGS = {
    "run.Run.steps": 40,
    "run.Run.eval_every": 0,
    "run.Run.eval_batches": 3,
    "run.Run.log_every": 10,
    "optimizers.AdamW.learning_rate": 1e-2,
    "optimizers.Schedule.warmup_steps": 5,
    "transformer.TransformerConfig.num_layers": 2,
    "transformer.TransformerConfig.tie_head": True,
}
CONFIG = tiny(BINDINGS)
ATTENTION = [f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "out")]
FEED_FORWARD = [f"blocks/feed_forward/{name}/kernel" for name in ("up", "gate", "down")]


def kernels(directory: str, step: int | None = None, run=None) -> dict[str, np.ndarray]:
    """The kernels of a run's checkpoint as matrices [layers, inputs, outputs]."""
    run = run or build_run([f"{directory}/config.gin"])[0]
    weights = restore_weights(Program(run, make_mesh(run.mesh)), Path(directory), step)[1]
    inputs = dict.fromkeys([*ATTENTION, *FEED_FORWARD], 16) | {FEED_FORWARD[2]: 32}
    found = {}
    for name, size in inputs.items():
        _, part, layer, _ = name.split("/")
        kernel = np.asarray(dense(weights["blocks"][part][layer]["kernel"]))
        found[name] = kernel.reshape(2, size, -1)
    return found


def figures(capsys, *command: str) -> dict:
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def scaled(directory: str, name: str, kernel: np.ndarray) -> np.ndarray:
    """A kernel [layers, inputs, outputs] divided by the scales that were stored with it."""
    with safe_open(f"{directory}/scales.safetensors", "numpy") as file:
        scales = file.get_tensor(name)
    return kernel / np.repeat(scales, kernel.shape[1] // scales.shape[1], axis=1)
