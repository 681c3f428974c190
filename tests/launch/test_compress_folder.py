"""`torsion compress` of Hugging Face folders, and `torsion verify`."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.language_folders import (
    BFLOAT16,
    FAMILIES,
    LAYERS,
    make_folder,
    make_text,
    shard,
)
from helpers.processes import TORSION
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from launch.cli import main
from pjit_train.compression import folder as folder_module
from pjit_train.compression.calibrate import change_kernels
from pjit_train.compression.kernels import leaf
from pjit_train.huggingface import weights as huggingface
from pjit_train.sharding import Rules
from pjit_train.step import split_model
from sparsity.post_training.gptq import rtn
from sparsity.post_training.one_shot import magnitude_mask, sparsegpt

TEXT = ["--calibration", "text.txt", "--sequences", "8", "--sequence", "16"]
Q = "model.layers.{}.self_attn.q_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tiny Llama and a text."""
    path = tmp_path_factory.mktemp("folders")
    make_folder(path / "llama")
    make_text(path / "text.txt")
    return path


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def compressed(out: str, *options: str, source: str = "llama") -> Path:
    """A compressed folder, made once."""
    if not Path(out).exists():
        assert main(["compress", source, "--out", out, *options]) == 0
    return Path(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def leftovers() -> list[str]:
    return [path.name for path in Path().iterdir() if path.name.startswith(".")]


def groups(kernel_OI: np.ndarray, m: int) -> np.ndarray:
    """Nonzeros of each group of m inputs."""
    return np.count_nonzero(np.asarray(kernel_OI, np.float32).reshape(-1, m), axis=1)


def test_pruned_blocks_are_fitted_to_the_dense_ones(capsys):
    options = ["--pattern", "2:4", "--method", "magnitude", "--reconstruct", "3", *TEXT]
    out = compressed("fitted", *options, "--format", "int8")
    again = compressed("fitted-again", *options, "--format", "int8")
    assert content(out) == content(again)
    rows = json.loads((out / "torsion.json").read_text())["kernels"].values()
    assert len(rows) == 7 * LAYERS
    for row in rows:
        assert row["errors"]["reconstructed"] < row["errors"]["output"], row["kernel"]
        assert row["errors"]["quantization"] < 0.02
        assert row["violations"] == 0
    assert "reconstructed" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "int8", *TEXT], "--reconstruct without --pattern; it fits what"),
        (["--pattern", "2:4", "--method", "magnitude"], "reconstruct reads calibration text"),
        (
            ["--pattern", "2:4", "--method", "wanda", "--format", "int8", "--order",
             "quantize_then_sparsify", *TEXT],
            "reconstruction fits what pruning left, before it is quantized",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_one_line(options, says, capsys):
    assert main(["compress", "llama", "--out", "none", "--reconstruct", "2", *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_is_pruned_and_quantized(family, capsys):
    source = make_folder(Path(f"of-{family}"), family, seed=1)
    if family in ("qwen3", "opt"):
        shard(source)
    options = ["--pattern", "2:4", "--format", "int4:8", *TEXT]
    out = compressed(f"{family}-out", *options, source=str(source))
    said = capsys.readouterr().err
    assert ("written as float32" in said) == (family == "gpt2")  # whose layers are no linear ones
    _, params = huggingface.load(out)
    before = huggingface.load(source)[1]
    for name, kernel in {
        "attention/query": params["blocks"]["attention"]["query"]["kernel"],
        "attention/value": params["blocks"]["attention"]["value"]["kernel"],
        "attention/out": params["blocks"]["attention"]["out"]["kernel"],
        "feed_forward/up": params["blocks"]["feed_forward"]["up"]["kernel"],
        "feed_forward/down": params["blocks"]["feed_forward"]["down"]["kernel"],
    }.items():
        inputs = WIDTHS[name.split("/")[1]]
        for matrix_IO in kernel.reshape(LAYERS, inputs, -1):
            assert groups(matrix_IO.T, 4).max() == 2, name
            blocks = matrix_IO.T.reshape(-1, 8)
            assert max(len(np.unique(block)) for block in blocks) <= 5  # 4 are kept
            assert not (np.signbit(matrix_IO) & (matrix_IO == 0)).any()
    np.testing.assert_array_equal(params["embedding"], before["embedding"])
    np.testing.assert_array_equal(params["norm"]["scale"], before["norm"]["scale"])
    assert main(["verify", str(out)]) == 0
    assert not leftovers()
    shutil.rmtree(source)
    shutil.rmtree(out)


WIDTHS = {"query": 32, "value": 32, "out": 32, "up": 32, "down": 64}


def test_without_a_format_the_dtype_and_all_other_files_are_kept():
    source = make_folder(Path("half"), "llama", dtype=BFLOAT16)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    shard(source)
    out = compressed("half-out", "--pattern", "2:4", "--method", "wanda", *TEXT, source="half")
    before = {}
    for path in source.glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    pruned = [name for name in after if "proj" in name]
    for name, tensor in after.items():
        assert tensor.dtype == BFLOAT16
        if name in pruned:  # wanda moves no weight
            assert groups(tensor, 4).max() == 2
            kept = tensor != 0
            np.testing.assert_array_equal(tensor[kept], before[name][kept])
        else:
            np.testing.assert_array_equal(tensor, before[name])
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_blocks_are_changed_as_a_whole_model_in_memory_is(place):
    """The same statistics, and so the same weights, as by `change_kernels` of all of it."""
    out = compressed("pruned", "--pattern", "2:4", *TEXT)
    config, params = huggingface.load("llama")
    text = [ord(letter) - 96 for letter in Path("text.txt").read_text()]
    windows = np.array(text[: len(text) // 16 * 16], np.int32).reshape(-1, 16)
    chosen = windows[np.arange(8) * len(windows) // 8]
    names = [f"blocks/attention/{n}/kernel" for n in ("query", "key", "value", "out")]
    names += [f"blocks/feed_forward/{n}/kernel" for n in ("up", "gate", "down")]
    change = lambda name, kernel_IO, products: sparsegpt(kernel_IO, products, pattern="2:4")
    graph = split_model(config, Rules())[0]
    expected = change_kernels(graph, params, [{"inputs": chosen}], names, change)
    _, found = huggingface.load(out)
    for name in names:
        np.testing.assert_allclose(leaf(found, name), leaf(expected, name), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(leaf(found, name) != 0, leaf(expected, name) != 0)


def test_without_calibration_weights_are_those_of_the_single_kernels():
    out = compressed(
        "plain", *["--pattern", "2:4", "--method", "magnitude"], *["--format", "mxfp4_e2m1"],
        *["--quantizer", "rtn"],
    )  # fmt: skip
    before = load_file("llama/model.safetensors")
    _, params = huggingface.load(out)
    for layer in range(LAYERS):
        kernel_IO = jnp.asarray(before[DOWN.format(layer)].T)
        pruned_IO = jnp.where(magnitude_mask(kernel_IO, "2:4"), kernel_IO, 0)
        expected = rtn(pruned_IO, "mxfp4_e2m1").values
        np.testing.assert_array_equal(
            leaf(params, "blocks/feed_forward/down/kernel")[layer], expected
        )
    # No code is that of -0.0, which is 8.
    for name, entry in deserialize((out / "model.safetensors").read_bytes()):
        if name.endswith("weight_packed"):
            packed = np.frombuffer(entry["data"], np.uint8)
            assert not np.isin([*(packed & 15), *(packed >> 4)], 8).any()


def test_it_goes_on_where_it_was_killed_to_the_same_bytes(monkeypatch):
    options = ["--pattern", "2:4", "--format", "int4:8", *TEXT]
    expected = content(compressed("whole", *options))
    for number, (where, at) in enumerate(
        [("_block", 0), ("_block", 2), ("_rest", 3), ("finish", 0)]
    ):
        kind = folder_module.Workplace if where == "finish" else folder_module._Making
        plain = getattr(kind, where)

        def dying(self, *args, plain=plain, at=at):
            if not args or args[-1] == at:
                raise SystemError("killed")
            return plain(self, *args)

        argv = ["compress", "llama", "--out", f"killed{number}", *options]
        with monkeypatch.context() as patched:
            patched.setattr(kind, where, dying)
            with pytest.raises(SystemError):
                main(argv)
        assert not Path(f"killed{number}").exists()
        # In memory the states are made again from what is done.
        more = ["--calibration-in", "memory"] if number % 2 else []
        assert main([*argv, *more]) == 0
        assert content(Path(f"killed{number}")) == expected
        assert not leftovers()


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_is_gone_on_with():
    options = ["--pattern", "2:4", "--format", "int4:8", *TEXT]
    command = [*TORSION, "compress", "llama", *options, "--out"]  # a process has its own XLA flags
    subprocess.run([*command, "alive"], check=True, capture_output=True)
    started = subprocess.Popen([*command, "dead"], stderr=subprocess.PIPE)
    work = Path(".dead.saving/work")
    while started.poll() is None and not list(work.glob("part-00001.json")):
        time.sleep(0.001)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert work.exists()
    assert not Path("dead").exists()
    subprocess.run([*command, "dead"], check=True, capture_output=True)
    assert content(Path("dead")) == content(Path("alive"))
    assert not leftovers()


def test_another_text_begins_anew():
    make_text(Path("other.txt"), seed=1)
    options = ["--pattern", "2:4", "--method", "wanda"]
    expected = content(compressed("anew", *options, *TEXT))
    work = Path(".again.saving/work")
    work.mkdir(parents=True)
    shutil.copytree("anew", ".again.saving", dirs_exist_ok=True)  # of another plan
    other = [*TEXT[:1], "other.txt", *TEXT[2:]]
    assert main(["compress", "llama", "--out", "again", *options, *other]) == 0
    assert content(Path("again"))["model.safetensors"] != expected["model.safetensors"]


def test_a_single_flipped_bit_is_found(capsys):
    out = compressed("whole", "--pattern", "2:4", "--format", "int4:8", *TEXT)
    assert main(["verify", str(out)]) == 0
    rng = np.random.default_rng(0)
    shutil.copytree(out, "flipped")
    for path in sorted(Path("flipped").iterdir()):
        data = path.read_bytes()
        for at in {0, len(data) - 1, *rng.integers(len(data), size=6).tolist()}:
            bit = int(rng.integers(8))
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            capsys.readouterr()
            assert main(["verify", "flipped"]) != 0, (path.name, at, bit)
            [line] = capsys.readouterr().err.splitlines()
            assert path.name in line or "torsion.json" in line or "SHA256SUMS" in line
        path.write_bytes(data)
    assert main(["verify", "flipped"]) == 0
    for path in sorted(Path("flipped").iterdir()):
        data = path.read_bytes()
        path.unlink()
        capsys.readouterr()
        assert main(["verify", "flipped"]) != 0
        assert path.name in capsys.readouterr().err
        path.write_bytes(data)
    shutil.copy("flipped/model.safetensors", "flipped/model-2.safetensors")
    assert main(["verify", "flipped"]) != 0
    assert "model-2.safetensors is no file of this model" in capsys.readouterr().err


def test_the_certificate_says_what_is_in_the_file(capsys):
    out = compressed("whole", "--pattern", "2:4", "--format", "int4:8", *TEXT)
    document = json.loads((out / "torsion.json").read_text())
    assert len(document["kernels"]) == 7 * LAYERS
    row = document["kernels"][Q.format(1)]
    assert (row["pattern"], row["format"], row["shape"]) == ("2:4", "int4:8", [32, 32])
    assert (row["groups"], row["violations"], row["negative_zeros"]) == (256, 0, 0)
    kernel = leaf(huggingface.load(out)[1], "blocks/attention/query/kernel")[1]
    assert row["zeros"] == np.sum(kernel == 0)
    assert 0 < row["errors"]["sparsity"] < row["errors"]["together"] < 1
    assert document["calibration"]["sequences"] == 8
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] is True


def test_what_is_compressed_can_be_evaluated_and_compressed_again(capsys):
    out = compressed("whole", "--pattern", "2:4", "--format", "int4:8", *TEXT)
    capsys.readouterr()
    argv = ["eval", str(out), "--perplexity", "text.txt", "--sequence", "16", "--json"]
    assert main(argv) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["perplexity"])
    again = compressed("again-8", "--format", "int8", "--quantizer", "rtn", source=str(out))
    zeros = lambda folder: leaf(huggingface.load(folder)[1], "blocks/attention/out/kernel") == 0
    assert (zeros(again) >= zeros(out)).all()


def test_what_is_compressed_is_exported_as_plain_numbers():
    out = compressed("whole", "--pattern", "2:4", "--format", "int4:8", *TEXT)
    assert main(["export", str(out), "exported"]) == 0
    assert "quantization_config" not in json.loads(Path("exported/config.json").read_text())
    assert_same(huggingface.load("exported")[1], huggingface.load(out)[1])


def test_poor_statistics_are_said_and_do_no_harm(capsys):
    Path("one.txt").write_text("a" * 500)
    argv = ["--calibration", "one.txt", "--sequences", "4", "--sequence", "16"]
    out = compressed("poor", "--pattern", "2:4", "--format", "int4:8", *argv)
    [line] = [x for x in capsys.readouterr().err.splitlines() if "rank-deficient" in x]
    assert "calibration" in line
    kernel = leaf(huggingface.load(out)[1], "blocks/feed_forward/down/kernel")
    assert np.isfinite(kernel).all()
    assert groups(kernel[0].T, 4).max() <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pattern", "2:4"], "sparsegpt reads calibration text; give --calibration FILE"),
        (["--pattern", "3:7", *TEXT], "32 entries are not cut into groups of 7"),
        (["--format", "int4:512", *TEXT], "32 entries are not cut into blocks of 512"),
        (["--pattern", "2:4", "--calibration", "none.txt"], "none.txt: there is no such file"),
        (["--pattern", "2:4", *TEXT[:2], "--sequences", "999", "--sequence", "16"], "125 sequence"),
        (["--pattern", "2:4", *TEXT[:2], "--sequence", "64"], "use 2 to 32 tokens"),
        (["--pattern", "2:4", *TEXT, "--out", "llama"], "llama exists"),
        (["--pattern", "2:4", *TEXT, "--step", "3"], "--step is of a run, and llama is a folder"),
        (["--pattern", "2:4", *TEXT, "--finetune", "3"], "--finetune is of a run"),
        ([*TEXT], "nothing is pruned or quantized"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(options, says, capsys):
    before = sorted(path.name for path in Path().iterdir())
    out = [] if "--out" in options else ["--out", "bad"]
    assert main(["compress", "llama", *out, *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_full_disk_is_said_first(monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(["compress", "llama", "--out", "full", "--pattern", "2:4", *TEXT]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "full: needs some" in line
    assert "the disk has 1,000" in line
    assert not leftovers()


def test_a_weight_that_is_not_finite_is_named_first(capsys):
    source = make_folder(Path("nan"))
    tensors = load_file(source / "model.safetensors")
    tensors[DOWN.format(2)][3, 5] = np.nan
    save_file(tensors, source / "model.safetensors")
    assert main(["compress", "nan", "--out", "bad", "--pattern", "2:4", *TEXT]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert DOWN.format(2) in line
    assert "[3, 5]" in line
    assert not leftovers()
