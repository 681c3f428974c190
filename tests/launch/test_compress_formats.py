"""`torsion compress` and number formats: of runs trained in them, zero points, activations."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.compressed_runs import (
    ATTENTION,
    BINDINGS,
    FEED_FORWARD,
    figures,
    kernels,
    scaled,
)
from helpers.gin_files import tiny
from helpers.run_directories import files
from safetensors import deserialize, safe_open

from launch.cli import main
from launch.commands.compress import _bindings
from launch.configure import build_run
from pjit_train.compression.compress import Compression, save_params
from pjit_train.errors import UserError
from pjit_train.evaluate import restore_weights
from pjit_train.huggingface import compressed_tensors
from pjit_train.program import Program
from pjit_train.sharding import make_mesh
from sparsity.numbers import quantized
from sparsity.numbers.quantization import quantize

pytestmark = pytest.mark.usefixtures("quick_compiles", "dense_run")
FORMATS = ("sparsity.numbers.quantized",)


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
from sparsity.numbers import quantized
include 'run.gin'
include 'configs/recipes/sr_ste.gin'
run.Run.quantization = @quantized.Quantization()
quantized.Quantization.layers = {
    'attention/.*kernel': 'int8', 'down/kernel': @quantized.MatmulFormats()
}
quantized.MatmulFormats.weights = 'int4'
"""


@pytest.mark.slow
def test_a_run_trained_in_formats_is_exported_in_them(capsys):
    Path("trained.gin").write_text(QUANTIZED)
    Path("trained").mkdir()  # what training by the recipe and in the formats begins from
    run, text = build_run(["trained.gin"], ["run.Run.mesh = @sharding.MeshShape()"])
    Path("trained/config.gin").write_text(text)
    dense, _ = build_run(["dense/config.gin"])
    mesh = make_mesh(dense.mesh)
    params = restore_weights(Program(dense, mesh), Path("dense"))[1]
    save_params(Program(dataclasses.replace(run, mesh=dense.mesh), mesh), params, Path("trained"))
    capsys.readouterr()
    run, _ = build_run(["trained/config.gin"])
    quantization = dataclasses.replace(run.quantization, order="quantize_then_sparsify")
    reverse = dataclasses.replace(run, quantization=quantization)
    assert main(["export", "trained", "forward"]) == 0
    assert capsys.readouterr().out.startswith("forward: the parameters after step 0, ")
    assert compressed_tensors.export("reverse", reverse, Path("trained"))["step"] == 0
    for order, ordered in (("forward", run), ("reverse", reverse)):
        config = json.loads(Path(order, "config.json").read_text())["quantization_config"]
        assert {g["format"] for g in config["config_groups"].values()} == {
            "int-quantized",
            "pack-quantized",
        }
        with safe_open(f"{order}/model.safetensors", "numpy") as file:
            prefix = "model.layers.1.self_attn.o_proj.weight"
            found = file.get_tensor(prefix) * file.get_tensor(f"{prefix}_scale")
        np.testing.assert_array_equal(found, kernels("trained", run=ordered)[ATTENTION[3]][1].T)
        assert (np.count_nonzero(found.reshape(16, 4, 4), axis=2) == 2).all()


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


@pytest.mark.slow
def test_a_run_trained_in_formats_is_compressed_from_what_it_trains(capsys):
    text = tiny(BINDINGS, FORMATS) + "run.Run.quantization = @quantized.Quantization()\n"
    layers = "{'(attention)/.*kernel': @quantized.MatmulFormats(), 'up/kernel': 'int4'}"
    text += f"quantized.Quantization.layers = {layers}\nquantized.MatmulFormats.weights = 'int4'\n"
    text += "quantized.MatmulFormats.gradient_rounding = 'stochastic'\n"
    Path("int4.gin").write_text(text)
    shutil.copytree("dense", "int4")  # what training in these formats holds looks like that
    Path("int4/config.gin").write_text(build_run(["int4.gin"])[1])
    Path("int4/checkpoints/run.json").unlink()  # which says that it was trained without
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

    # Pruned, the formats of the run go on; and pruning nothing changes nothing.
    command = ["compress", "int4", "--method", "magnitude", "--sequences", "1", "--out", "sparse4"]
    report = figures(capsys, *command, "--pattern", "0.0", "--format-layers", "gate=int8")
    assert report["between"]["sparsify"] == report["before"]
    held = masters("sparse4")
    for name in {*ATTENTION, *FEED_FORWARD} - {FEED_FORWARD[1]}:
        np.testing.assert_array_equal(held[name], trained[name])
    assert build_run(["sparse4/config.gin"])[0].quantization.layers["up/kernel"] == "int4"


@pytest.mark.slow
def test_compressed_again_it_keeps_the_formats_that_it_had(capsys):
    quick = ["--quantizer", "rtn", "--sequences", "1"]
    command = ["compress", "dense", "--method", "none", "--format-layers", "attention=int8", *quick]
    first = figures(capsys, *command, "--activations", "int8", "--out", "first")
    again = ["compress", "first", "--format-layers", "up=int8:8", *quick]
    for options, says in (
        (["--pattern", "2:4"], "key/kernel was compressed to int8 before, and sparsegpt moves"),
        (["--smooth", "0.5"], "smoothing moves its weights out of that"),
        (["--method", "magnitude", "--finetune", "3"], "fine-tuning moves"),
    ):
        capsys.readouterr()
        assert main([*again, *options, "--out", "none/of/it"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert says in line
        assert not Path("none").exists()

    again += ["--method", "magnitude", "--layers", "query=2:4", ".*=dense"]
    again += ["--activations", "int8:asymmetric", "--out", "second", "--export", "hf-second"]
    second = figures(capsys, *again)
    before, found = kernels("first"), kernels("second")
    expected = before[ATTENTION[0]].copy()
    groups = expected.reshape(2, 4, 4, 16)
    order = (-np.abs(groups)).argsort(2, kind="stable")  # of equals the first is kept
    np.put_along_axis(groups, order[:, :, 2:], 0, axis=2)
    np.testing.assert_array_equal(found[ATTENTION[0]], expected)
    for name in (*ATTENTION[1:], *FEED_FORWARD[1:]):
        np.testing.assert_array_equal(found[name], before[name])
    assert (before[FEED_FORWARD[0]] != found[FEED_FORWARD[0]]).any()

    rows = {name: (row["format"], row["activations"]) for name, row in second["kernels"].items()}
    wanted = dict.fromkeys(ATTENTION, ("int8", "int8"))
    assert rows == {**wanted, FEED_FORWARD[0]: ("int8:8", "int8:asymmetric")}
    assert second["kernels"][ATTENTION[1]] == first["kernels"][ATTENTION[1]]
    assert second["before"] == first["after"]
    assert second["after"].items() <= figures(capsys, "eval", "second").items()
    layers = build_run(["second/config.gin"])[0].quantization.layers
    inputs = quantized.MatmulFormats(activations="int8")
    assert [layers[f"^{name}$"] for name in ATTENTION] == [inputs] * 4
    inputs = quantized.MatmulFormats(activations="int8:asymmetric")
    assert layers[f"^{FEED_FORWARD[0]}$"] == inputs

    config = json.loads(Path("hf-second/config.json").read_text())["quantization_config"]
    layer = r"re:^model\.layers\.\d+\."
    stored = {
        target: group["input_activations"]["symmetric"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    attention = {rf"{layer}self_attn\.{x}_proj$": True for x in "qkvo"}
    assert stored == {**attention, rf"{layer}mlp\.up_proj$": False}
    dense = {rf"{layer}mlp\.{x}_proj$" for x in ("gate", "down")}
    assert set(config["ignore"]) == {*dense, "lm_head"}
    with safe_open("hf-second/model.safetensors", "numpy") as file:
        for name, theirs in zip(ATTENTION, "qkvo", strict=True):
            prefix = f"model.layers.1.self_attn.{theirs}_proj.weight"
            values = file.get_tensor(prefix) * file.get_tensor(f"{prefix}_scale")
            np.testing.assert_array_equal(values, found[name][1].T)

    # Zeros of both compressions are kept.
    third = Compression(patterns={FEED_FORWARD[0]: "0.5"})
    bindings = _bindings(build_run(["second/config.gin"])[0], Path("second/config.gin"), third)
    kept = build_run(["second/config.gin"], bindings)[0].sparsity.layers
    assert kept == {f"^{ATTENTION[0]}$": "2:4", f"^{FEED_FORWARD[0]}$": "0.5"}


def bound(quantization: str, name: str) -> tuple[Path, list[str]]:
    """A configuration of that quantization, and what compressing its query to int8 binds."""
    text = tiny(BINDINGS | {"transformer.TransformerConfig.d_model": 32}, FORMATS)
    Path(f"{name}.gin").write_text(text + quantization)
    run, text = build_run([f"{name}.gin"])
    Path(f"{name}-config.gin").write_text(text)
    compression = Compression(formats={ATTENTION[0]: "int8"}, activations="int8")
    return Path(f"{name}-config.gin"), _bindings(run, text, compression)


def test_a_run_with_the_default_formats_goes_on_in_them():
    text = "run.Run.quantization = @quantized.Quantization()\n"
    config, bindings = bound(text + "quantized.Quantization.attention = 'int8'\n", "default")
    run, _ = build_run([str(config)], bindings)
    assert run.quantization == quantized.Quantization(
        layers={
            f"^{ATTENTION[0]}$": quantized.MatmulFormats(activations="int8"),
            **quantized.DEFAULT_LAYERS,
        },
        attention="int8",
    )


def test_a_quantization_that_cannot_be_bound_anew_is_one_line():
    text = "run.Run.quantization = @q/gin.singleton()\n"
    text += "q/gin.singleton.constructor = @quantized.Quantization\n"
    with pytest.raises(UserError, match=r"bind it to @quantized\.Quantization") as raised:
        bound(text, "singleton")
    assert "\n" not in str(raised.value)


def test_a_tied_head_in_a_format_is_no_linear_layer_of_theirs():
    run, _ = build_run(["dense/config.gin"])
    formats = quantized.Quantization(layers={"embedding|attention/.*kernel": "nvfp4"})
    run = dataclasses.replace(run, quantization=formats)
    with pytest.raises(UserError, match="embedding is no linear layer of LlamaForCausalLM"):
        compressed_tensors.export("hf-tied", run, Path("dense"))
    assert not Path("hf-tied").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize(("format", "bits"), [("nf4:16", 6), ("fp8_e4m3:16x24", 8 + 32 / 256)])
def test_formats_of_one_file_each_are_compressed_to(format, bits, quantizer, capsys):
    out = f"{format.replace(':', '_')}-{quantizer}"
    command = ["compress", "dense", "--format", format, "--quantizer", quantizer]
    report = figures(capsys, *command, "--sequences", "8", "--out", out)
    found, dense = kernels(out), kernels("dense")
    for name in (ATTENTION[0], FEED_FORWARD[0], FEED_FORWARD[2]):
        row = report["kernels"][name]
        assert row["format"] == format
        size = dense[name].size  # outputs of 16, of 32: tiles of 24 leave a rest
        tiles = 2 * (dense[name].shape[1] // 16) * -(-dense[name].shape[2] // 24)
        stored = size * bits / 8 if format.startswith("nf4") else size + 4 * tiles
        assert row["bytes"]["zeros"] == stored
        assert 0 < row["errors"]["quantization"] < 0.2
        if quantizer == "rtn":
            for layer in range(2):
                want = quantize(dense[name][layer], format, axis=0)
                np.testing.assert_array_equal(found[name][layer], want)
    assert report["after"].items() <= figures(capsys, "eval", out).items()
    stored = Path(f"{out}-hf")
    code = main(["export", out, str(stored)])
    err = capsys.readouterr().err
    if format.startswith("nf4"):
        assert code == 2
        assert err.startswith("torsion: export: compressed-tensors has no name for nf4:16; it has")
        assert err.count("\n") == 1
        assert not stored.exists()
        return
    assert code == 0
    config = json.loads((stored / "config.json").read_text())["quantization_config"]
    [group] = config["config_groups"].values()
    assert group["weights"]["strategy"] == "block"
    assert group["weights"]["block_structure"] == [24, 16]  # outputs, inputs
    [file] = stored.glob("*.safetensors")
    tensors = dict(deserialize(file.read_bytes()))
    codes, scale = (
        np.frombuffer(tensors[name]["data"], dtype).reshape(tensors[name]["shape"])
        for name, dtype in (
            ("model.layers.1.mlp.down_proj.weight", ml_dtypes.float8_e4m3fn),
            ("model.layers.1.mlp.down_proj.weight_scale", np.float32),
        )
    )
    assert scale.shape == (1, 2)
    scale = scale.repeat(24, 0)[:16].repeat(16, 1)
    got = codes.astype(np.float32) * scale
    np.testing.assert_array_equal(got, found[FEED_FORWARD[2]][1].T)


def test_a_run_trains_in_nf4_by_its_recipe(capsys):
    bindings = ["--gin", "quantized.MatmulFormats.weights = 'nf4:16'", "--mesh", "data=1"]
    command = ["train", "run.gin", "configs/recipes/nf4.gin", "--out", "nf4", "--steps", "6"]
    command += ["--log-every", "1"]
    assert main([*command, *bindings]) == 0
    trained, read = masters("nf4"), kernels("nf4")
    for name in (*ATTENTION, *FEED_FORWARD):
        for layer in range(2):
            assert (trained[name][layer] != read[name][layer]).any()
            want = quantize(trained[name][layer], "nf4:16", axis=0)
            np.testing.assert_array_equal(read[name][layer], want)
    rows = [json.loads(line) for line in Path("nf4/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
