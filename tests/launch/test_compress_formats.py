"""`torsion compress` and number formats: of runs trained in them, zero points, activations."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from test_compress_command import (  # noqa: F401
    ATTENTION,
    FEED_FORWARD,
    TINY,
    figures,
    files,
    here,
    kernels,
    scaled,
)

from launch.cli import main
from launch.commands.compress import _bindings
from launch.configure import build_run
from pjit_train import compressed_tensors
from pjit_train.compress import Compression
from pjit_train.evaluate import restore_weights
from pjit_train.program import Program
from pjit_train.sharding import make_mesh
from sparsity import quantized
from sparsity.formats import Int

pytestmark = pytest.mark.usefixtures("here")


def test_zero_points_are_kept_with_the_run(capsys):
    command = ["compress", "dense", "--method", "none", "--format", "int4:8:asymmetric"]
    command += ["--sequences", "8", "--out", "zero", "--export", "hf-zero"]
    report = figures(capsys, *command)
    assert report["kernels"][ATTENTION[0]]["format"] == "int4:8:asymmetric"
    assert main(["export", "zero", "hf-zero-again"]) == 0
    assert files(Path("hf-zero")) == files(Path("hf-zero-again"))
    with safe_open("zero/scales.safetensors", "numpy") as file:
        zero = file.get_tensor(f"{ATTENTION[0]}/zero_point")
    codes = scaled("zero", ATTENTION[0], kernels("zero")[ATTENTION[0]]) + np.repeat(zero, 8, axis=1)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert (codes.min() > -8.01, codes.max() < 7.01) == (True, True)
    assert len(np.unique(zero)) > 1


def test_activations_in_nvfp4_get_a_scale_from_the_training_text(capsys):
    command = ["compress", "dense", "--method", "none", "--format", "nvfp4", "--quantizer", "rtn"]
    command += ["--activations", "nvfp4", "--sequences", "8", "--out", "nvfp4"]
    report = figures(capsys, *command, "--export", "hf-nvfp4")
    assert report["after"] != report["between"]["quantize"]
    run, _ = build_run(["dense/config.gin"])
    batches = run.data.prepare(run.seed)
    steps = 128 // run.data.batch_size
    tokens = np.concatenate([batches.train_batch(i, slice(None))["inputs"] for i in range(steps)])
    weights = restore_weights(Program(run, make_mesh(run.mesh)), Path("dense"))[1]
    x = np.asarray(weights["embedding"], np.float32)[tokens]
    x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + run.model.norm_epsilon)
    x *= np.asarray(weights["blocks"]["attention_norm"]["scale"][0])
    with safe_open("hf-nvfp4/model.safetensors", "numpy") as file:
        stored = [name for name in list(file.keys()) if "global_scale" in name]
        found = {name: file.get_tensor(name) for name in stored}
    for name in "qkv":
        scale = found[f"model.layers.0.self_attn.{name}_proj.input_global_scale"]
        np.testing.assert_allclose(scale, 448 * 6 / np.abs(x).max(), rtol=1e-3)
    assert len(found) == 2 * 2 * 7


QUANTIZED = """
from __gin__ import dynamic_registration
from pjit_train import run
from sparsity import quantized
include 'run.gin'
include 'configs/recipes/sr_ste.gin'
run.Run.quantization = @quantized.Quantization()
quantized.Quantization.layers = {'attention/.*kernel': 'int8', 'down/kernel': 'int4'}
"""


@pytest.mark.parametrize("order", ["sparsify_then_quantize", "quantize_then_sparsify"])
def test_a_run_trained_in_formats_is_exported_in_them(order, capsys):
    Path(f"{order}.gin").write_text(QUANTIZED + f"quantized.Quantization.order = '{order}'\n")
    out = f"trained-{order}"
    assert main(["train", f"{order}.gin", "--out", out, "--mesh", "data=1", "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["export", out, f"{out}-hf"]) == 2  # down has no activations in int4
    assert "no activations in int4" in capsys.readouterr().err
    gin = Path(f"{out}/config.gin")
    run, _ = build_run([str(gin)])
    layers = {"attention/.*kernel": "int8", "down/kernel": quantized.MatmulFormats(weights="int4")}
    run = dataclasses.replace(
        run, quantization=dataclasses.replace(run.quantization, layers=layers)
    )
    report = compressed_tensors.export(f"{out}-hf", run, Path(out))
    assert report["step"] == 2
    config = json.loads(Path(f"{out}-hf/config.json").read_text())["quantization_config"]
    assert {g["format"] for g in config["config_groups"].values()} == {
        "int-quantized",
        "pack-quantized",
    }
    with safe_open(f"{out}-hf/model.safetensors", "numpy") as file:
        prefix = "model.layers.1.self_attn.o_proj.weight"
        found = file.get_tensor(prefix) * file.get_tensor(f"{prefix}_scale")
    np.testing.assert_array_equal(found, kernels(out)[ATTENTION[3]][1].T)


def masters(directory: str) -> dict[str, np.ndarray]:
    """The kernels that a run's checkpoint holds, whatever its matmuls read, as `kernels` has them.

    Read by orbax alone.
    """
    [step] = Path(directory, "checkpoints").glob("[0-9]*")
    with ocp.PyTreeCheckpointer() as checkpointer:
        blocks = checkpointer.restore(step.resolve() / "state")["params"]["blocks"]
    found = {}
    for name in [*ATTENTION, *FEED_FORWARD]:
        _, part, layer, _ = name.split("/")
        kernel = np.asarray(blocks[part][layer]["kernel"])
        found[name] = kernel.reshape(2, 32 if layer == "down" else 16, -1)
    return found


def test_a_run_trained_in_formats_is_compressed_from_what_it_trains(capsys):
    text = TINY + "run.Run.quantization = @quantized.Quantization()\n"
    text = text.replace(
        "from pjit_train.data", "from sparsity import quantized\nfrom pjit_train.data", 1
    )
    layers = "{'(attention)/.*kernel': @quantized.MatmulFormats(), 'up/kernel': 'int4'}"
    text += f"quantized.Quantization.layers = {layers}\nquantized.MatmulFormats.weights = 'int4'\n"
    text += "quantized.MatmulFormats.gradient_rounding = 'stochastic'\n"
    Path("int4.gin").write_text(text)
    assert main(["train", "int4.gin", "--out", "int4", "--mesh", "data=1", "--steps", "3"]) == 0
    trained, read = masters("int4"), kernels("int4")
    names = ATTENTION[0], FEED_FORWARD[0], FEED_FORWARD[1]
    assert [np.array_equal(trained[n], read[n]) for n in names] == [False, False, True]

    command = ["compress", "int4", "--method", "none", "--quantizer", "rtn", "--sequences", "1"]
    layers = ["--format-layers", "attention=int8:tensor", "gate=int8:tensor"]
    report = figures(capsys, *command, *layers, "--out", "int8-of-int4", "--activations", "int8")
    assert report["before"]["val_loss"] != report["between"]["quantize"]["val_loss"]
    found, held = kernels("int8-of-int4"), masters("int8-of-int4")
    for name in (*ATTENTION, FEED_FORWARD[1]):
        for layer in range(2):
            largest = np.abs(trained[name][layer]).max()
            scale = largest / np.float32(127.5)
            expected = np.clip(np.rint(trained[name][layer] / scale), -128, 127) * scale
            np.testing.assert_allclose(found[name][layer], expected, atol=1e-5 * largest)
        np.testing.assert_array_equal(found[name], held[name])
    # What is not named stays what it was, trained and read.
    np.testing.assert_array_equal(held[FEED_FORWARD[0]], trained[FEED_FORWARD[0]])
    np.testing.assert_array_equal(found[FEED_FORWARD[0]], read[FEED_FORWARD[0]])
    run, _ = build_run(["int8-of-int4/config.gin"])
    layers = run.quantization.layers
    inputs = quantized.MatmulFormats(activations="int8")
    assert {layers[f"^{n}$"] for n in (*ATTENTION, FEED_FORWARD[1])} == {inputs}
    assert layers["up/kernel"] == "int4"

    # Once more: what was bound for the first time holds, under a scope of its own.
    again = Compression(formats={FEED_FORWARD[0]: "int8"}, activations="int8:asymmetric")
    bindings = _bindings(run, Path("int8-of-int4/config.gin"), again)
    layers = build_run(["int8-of-int4/config.gin"], bindings)[0].quantization.layers
    zero_points = quantized.MatmulFormats(activations=Int(symmetric=False))
    assert layers[f"^{FEED_FORWARD[0]}$"] == zero_points
    assert layers[f"^{ATTENTION[0]}$"] == inputs

    # Only pruned, the formats of the run go on.
    command = ["compress", "int4", "--method", "magnitude", "--sequences", "1", "--out", "sparse4"]
    figures(capsys, *command)
    for name, kernel in masters("sparse4").items():
        np.testing.assert_array_equal(kernel[kernel != 0], trained[name][kernel != 0])
    assert build_run(["sparse4/config.gin"])[0].quantization.layers["up/kernel"] == "int4"
