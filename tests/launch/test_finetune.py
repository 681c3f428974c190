"""A run that starts from a pretrained folder has its model and tokenizer without saying them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.cli import main
from launch.configure import build_run
from launch.trained import read_run
from pjit_train.data.tokenizers import train_tokenizer
from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.conventions import read_conventions
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from pjit_train.step import new_params

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEXT = "the cat sat on a mat and the dog ran to the man in the van. " * 200
CONFIG = TransformerConfig(
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    vocab_size=272,
    max_len=64,
    norm_epsilon=9.999999747378752e-06,
    rope_theta=5e5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parent = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], vocab_size=270, path=str(parent / "tokenizer.json"))
    params = jax.device_get(new_params(CONFIG, Rules(), 0))
    huggingface.save(parent / "hf", CONFIG, params, tokenizer=tokenizer)
    (parent / "text.txt").write_text(TEXT)
    (parent / "hf" / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    settings = json.loads((parent / "hf" / "tokenizer_config.json").read_text())
    (parent / "hf" / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "c"}))
    (parent / "hf" / "SHA256SUMS").unlink()
    return parent / "hf"


def bindings(folder, *more):
    return [
        f"run.Run.initial_weights = '{folder}'",
        "text.TextData.sources = [@sources.TextFiles()]",
        f"sources.TextFiles.train = '{folder.parent / 'text.txt'}'",
        "text.TextData.seq_len = 32",
        "run.Samples.tokens = 4",
        "run.Run.eval_batches = 1",
        *more,
    ]


def test_model_and_tokenizer_are_those_of_the_folder(folder):
    run, text = build_run(["configs/finetune.gin"], bindings(folder))
    assert run.model == CONFIG
    assert run.data.tokenizer.path == str(folder / "tokenizer.json")
    assert run.data.tokenizer.separator_token == "<|endoftext|>"
    again, same = build_run([], text=text)
    assert (again, same) == (run, text)


def test_what_is_bound_holds_and_another_model_is_refused_as_before(folder, tmp_path):
    run, _ = build_run(
        ["configs/finetune.gin"],
        bindings(
            folder,
            "transformer.TransformerConfig.remat = 'full'",
            "tokenizers.TokenizerJson.path = 'mine.json'",
        ),
    )
    assert run.model == dataclasses.replace(CONFIG, remat="full")
    assert run.data.tokenizer.path == "mine.json"
    argv = ["train", "configs/finetune.gin", "--out", str(tmp_path / "run")]
    for binding in bindings(folder, "transformer.TransformerConfig.d_ff = 32"):
        argv += ["--gin", binding]
    assert main(argv) == 2


def test_a_folder_that_is_none_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json: cannot be read"):
        build_run(["configs/finetune.gin"], bindings(folder.parent / "nowhere"))
    with pytest.raises(UserError, match=r"initial_weights is missing; bind it"):
        build_run(["configs/finetune.gin"])


@pytest.mark.slow
def test_a_sparse_run_from_a_folder_trains_resumes_and_is_exported(folder, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "configs/finetune.gin", "configs/recipes/sr_ste.gin", "--out", str(out)]
    argv += ["--mesh", "data=1"]
    for binding in bindings(folder):
        argv += ["--gin", binding]
    assert main([*argv, "--steps", "2"]) == 0
    assert main([*argv, "--steps", "3"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3
    run, _ = read_run(out)
    assert run.model == CONFIG
    assert main(["export", str(out), str(tmp_path / "out")]) == 0
    assert huggingface.load(tmp_path / "out")[0] == dataclasses.replace(CONFIG, max_len=64)
    tokenizer, kept = read_conventions(tmp_path / "out")
    assert (kept.begin, kept.chat([{"content": "hi"}])) == (tokenizer.token_id("c"), "chi")
    capsys.readouterr()
    argv = ["eval", str(tmp_path / "out"), "--perplexity", str(folder.parent / "text.txt")]
    assert main([*argv, "--sequence", "32", "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 2


def test_without_the_folder_that_it_began_from_a_run_is_exported_with_its_tokenizer(
    folder, tmp_path, caplog
):
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    more = bindings(folder, f"run.Run.initial_weights = '{there}'")[1:]
    argv = ["train", "configs/finetune.gin", "--mesh", "data=1", "--steps", "1"]
    for binding in more:
        argv += ["--gin", binding]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    shutil.rmtree(there)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    tokenizer, kept = read_conventions(tmp_path / "out")
    assert kept.chat_template is None
    assert tokenizer.text == (folder / "tokenizer.json").read_text()


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_exported_without_the_weights_beside_them(
    folder, tmp_path, capsys
):
    argv = ["train", "configs/finetune.gin", "--mesh", "data=1"]
    for binding in bindings(folder, "run.Run.adapters = @adapters.Lora()"):
        argv += ["--gin", binding]
    argv += ["--gin", "optimizers.Schedule.shape = 'constant'"]
    argv += ["--gin", "optimizers.Schedule.warmup_steps = 0"]
    assert main([*argv, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    assert main([*argv, "--steps", "2", "--out", str(tmp_path / "parts")]) == 0
    assert main([*argv, "--steps", "4", "--out", str(tmp_path / "parts")]) == 0
    merged = []
    for name in ("whole", "parts"):
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-hf")]) == 0
        merged.append(huggingface.load(tmp_path / f"{name}-hf")[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), *merged)
    start = huggingface.load(folder)[1]
    assert np.array_equal(merged[0]["embedding"], start["embedding"])
    _check_peft(argv, tmp_path, merged[0], start, capsys)
    query = [x["blocks"]["attention"]["query"]["kernel"] for x in (merged[0], start)]
    assert np.abs(query[0] - query[1]).max() > 1e-5
    leaves = json.loads((tmp_path / "parts/checkpoints/4/digests/metadata").read_text())["leaves"]
    assert not any(name.startswith("params") for name in leaves)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "parts"), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["val_loss"]
    rows = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["val_loss"] == pytest.approx(evaluated, rel=1e-6)


def test_adapters_beside_other_weights_are_refused(folder, tmp_path, capsys):
    other, out = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(folder, other)
    argv = ["train", "configs/finetune.gin", "--mesh", "data=1", "--steps", "1", "--out", str(out)]
    for binding in bindings(folder, "run.Run.adapters = @adapters.Lora()"):
        argv += ["--gin", binding.replace(f"'{folder}'", f"'{other}'")]
    assert main(argv) == 0
    shutil.rmtree(other)
    params = jax.device_get(new_params(CONFIG, Rules(), 1))
    huggingface.save(other, CONFIG, params)
    shutil.copy(folder / "tokenizer.json", other)
    capsys.readouterr()
    assert main(["eval", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not the weights that the run began with" in said


def test_a_pruned_model_is_recovered_under_its_dense_self_and_stays_2_4(folder, tmp_path):
    params = huggingface.load(folder)[1]

    def prune(path, x):
        """Zeros the first two of every four weights along the inputs of a kernel."""
        if path[-1].key != "kernel":
            return x
        axis = 2 if path[-2].key == "out" else 1  # of [layers, heads, head_dim, d_model]
        places = np.arange(x.shape[axis]).reshape([-1] + [1] * (x.ndim - 1 - axis))
        return np.where(places % 4 < 2, 0, x)

    pruned = jax.tree.map_with_path(prune, params)
    tokenizer, _ = read_conventions(folder)
    huggingface.save(tmp_path / "pruned", CONFIG, pruned, tokenizer=tokenizer)
    shutil.copy(folder / "tokenizer.json", tmp_path / "pruned")
    (tmp_path / "pruned" / "SHA256SUMS").unlink()
    argv = ["train", "configs/finetune_sparse.gin", "--mesh", "data=1"]
    for binding in bindings(folder, f"distillation.Distillation.teacher = '{folder}'"):
        argv += [
            "--gin",
            binding.replace(f"weights = '{folder}'", f"weights = '{tmp_path}/pruned'"),
        ]
    for binding in ("shape = 'constant'", "warmup_steps = 0"):
        argv += ["--gin", f"optimizers.Schedule.{binding}"]
    assert main([*argv, "--steps", "6", "--out", str(tmp_path / "whole"), "--log-every", "1"]) == 0
    assert main([*argv, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert main([*argv, "--steps", "6", "--out", str(tmp_path / "parts")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    merged = []
    for name in ("whole", "parts"):
        assert main(["export", str(tmp_path / name), str(tmp_path / f"{name}-hf")]) == 0
        merged.append(huggingface.load(tmp_path / f"{name}-hf")[1])
    jax.tree.map(np.testing.assert_array_equal, *merged)
    kernels = 0
    for (path, before), after in zip(
        jax.tree.leaves_with_path(pruned), jax.tree.leaves(merged[0]), strict=True
    ):
        if path[-1].key == "kernel":
            kernels += 1
            assert np.array_equal(after == 0, before == 0)
            assert not np.array_equal(after, before)
            assert np.mean(after == 0) == 0.5
        else:
            assert np.array_equal(after, before)
    assert kernels == 7


def _check_peft(argv, tmp_path, merged, start, capsys):
    """Checks adapters as PEFT reads them, W + alpha / r * B @ A, and a run that begins there."""
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "peft"), "--adapter"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16.0)
    assert {"q_proj", "o_proj", "down_proj"} <= set(config["target_modules"])
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for module, ours in (
        ("self_attn.q_proj", ("attention", "query")),
        ("mlp.up_proj", ("feed_forward", "up")),
    ):
        a, b = (stored[f"base_model.model.model.layers.1.{module}.lora_{x}.weight"] for x in "AB")
        before, after = (x["blocks"][ours[0]][ours[1]]["kernel"][1] for x in (start, merged))
        want = before.reshape(16, -1) + 2 * (b @ a).T
        np.testing.assert_allclose(after.reshape(16, -1), want, atol=1e-6)
    more = ["--gin", f"adapters.Lora.initial = '{tmp_path / 'peft'}'"]
    assert main([*argv, *more, "--steps", "1", "--out", str(tmp_path / "on")]) == 0
    rows = [
        json.loads((tmp_path / x / "metrics.jsonl").read_text().splitlines()[-1])
        for x in ("whole", "on")
    ]
    assert rows[1]["val_loss"] == pytest.approx(rows[0]["val_loss"], abs=1e-2)
    other = [*argv, *more, "--gin", "adapters.Lora.rank = 4", "--out", str(tmp_path / "no")]
    capsys.readouterr()
    assert main(other) == 2
    assert "has rank 8 and the run 4" in capsys.readouterr().err
    del stored["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    save_file(stored, tmp_path / "peft" / "adapter_model.safetensors")
    assert main([*argv, *more, "--out", str(tmp_path / "no")]) == 2
    assert "is of another model" in capsys.readouterr().err
