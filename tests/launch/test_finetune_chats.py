"""A pretrained model trained on with conversations, by one gin file."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from helpers.language_folders import make_folder, make_text
from safetensors.numpy import load_file, save_file

from launch.cli import main
from launch.trained import read_run
from pjit_train.huggingface import weights as huggingface
from pjit_train.step import split_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}z{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
FILE = """
from __gin__ import dynamic_registration
from pjit_train import optimizers
from pjit_train import run
from pjit_train import sharding
from pjit_train.data import conversations
from pjit_train.data import sources
from pjit_train.data import text
from pjit_train import distillation
include 'configs/finetune_sparse.gin'
run.Run.initial_weights = '{folder}/pruned'
run.Run.eval_batches = 2
run.Samples.tokens = 0
optimizers.Schedule.shape = 'constant'
optimizers.Schedule.warmup_steps = 0
distillation.Distillation.teacher = '{folder}/dense'
text.TextData.sources = [@sources.TextFiles(), @conversations.Conversations()]
text.TextData.seq_len = 32
text.TextData.batch_size = 4
sources.TextFiles.train = '{folder}/text.txt'
conversations.Conversations.train = '{folder}/chats.parquet'
"""


def chats(count=60):
    rng = np.random.default_rng(0)
    word = lambda: "".join(chr(97 + i) for i in rng.integers(0, 20, rng.integers(1, 8)))
    said = lambda: [{"role": role, "content": word()} for role in ("user", "assistant")]
    return [[*said(), *(said() if i % 2 else [])] for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "dense")
    (tmp_path / "dense" / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(tmp_path / "dense", tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    tensors = load_file(file)
    for name, x in tensors.items():
        if "proj" in name:
            tensors[name] = np.where(np.arange(x.shape[1]) % 4 < 2, 0, x)
    save_file(tensors, file, metadata={"format": "pt"})
    make_text(tmp_path / "text.txt")
    pq.write_table(pa.table({"messages": chats()}), tmp_path / "chats.parquet")
    (tmp_path / "run.gin").write_text(FILE.format(folder=tmp_path))
    return tmp_path


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_pruned_model_learns_from_text_and_conversations_by_one_file(folder, capsys):
    argv = ["train", str(folder / "run.gin"), "--log-every", "1"]
    whole, parts = folder / "whole", folder / "parts"
    assert main([*argv, "--steps", "8", "--out", str(whole), "--mesh", "data=1"]) == 0
    assert main([*argv, "--steps", "3", "--out", str(parts), "--mesh", "data=1"]) == 0
    (folder / "pruned" / "chat_template.jinja").unlink()  # the run has its own
    assert (parts / "chat_template.jinja").read_text() == TEMPLATE
    assert main([*argv, "--steps", "8", "--out", str(parts), "--mesh", "data=2,fsdp=2"]) == 0
    losses = [{r["step"]: r["loss"] for r in rows_of(out) if "loss" in r} for out in (whole, parts)]
    assert list(losses[0]) == list(range(1, 9))
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=2e-5)
    capsys.readouterr()
    assert main(["eval", str(parts), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["val_loss"] == pytest.approx(rows_of(parts)[-1]["val_loss"], rel=1e-5)
    assert main(["export", str(parts), str(folder / "out")]) == 0
    dense = huggingface.load(folder / "pruned")[1]["blocks"]["feed_forward"]["up"]["kernel"]
    merged = huggingface.load(folder / "out")[1]["blocks"]["feed_forward"]["up"]["kernel"]
    assert np.array_equal(merged == 0, dense == 0)
    assert not np.array_equal(merged, dense)


def test_validation_is_the_mean_over_the_tokens_of_answers(folder, capsys):
    """Against the logits of each conversation by itself."""
    argv = ["train", "configs/finetune_chats.gin", "--mesh", "data=1", "--steps", "1"]
    for binding in (
        f"run.Run.initial_weights = '{folder}/dense'",
        f"conversations.Conversations.train = '{folder}/chats.parquet'",
        f"conversations.Conversations.validation = '{folder}/chats.parquet'",
        "text.TextData.seq_len = 32",
        "run.Samples.tokens = 0",
        "run.Run.eval_batches = 1000",
        "optimizers.AdamW.learning_rate = 1e-9",
    ):
        argv += ["--gin", binding]
    assert main([*argv, "--out", str(folder / "run")]) == 0
    run, _ = read_run(folder / "run")
    config, params = huggingface.load(folder / "dense")
    apply = jax.jit(nnx.merge(split_model(config, run.rules)[0], params))
    total = count = 0
    for messages in chats():
        text, marks = "", []
        for message in messages:
            before = len(text) + 1
            text += f"{message['role'][0]}{message['content']}z"
            marks += range(before, len(text)) if message["role"] == "assistant" else []
        ids = np.array([ord(c) - 96 if c < "x" else 0 for c in text])[:33]
        padded = np.pad(ids[:-1], (0, 33 - len(ids)))
        logits = np.asarray(apply(padded[None])[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        marks = [i for i in marks if i < len(ids)]
        total -= sum(logs[i - 1, ids[i]] for i in marks)
        count += len(marks)
    assert rows_of(folder / "run")[-1]["val_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("chats", "row 1: the conversation has no answer"),
        ("template", "there is no chat template in"),
        ("column", "holds list<element: int64> in its column 'messages'"),
    ],
)
def test_mistakes_are_one_line(change, says, folder, capsys):
    if change == "template":
        (folder / "pruned" / "chat_template.jinja").unlink()
    else:
        wrong = [1] if change == "column" else [{"role": "user", "content": "a"}]
        pq.write_table(pa.table({"messages": [wrong]}), folder / "chats.parquet")
    argv = ["train", str(folder / "run.gin"), "--mesh", "data=1", "--out", str(folder / "out")]
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert not (folder / "out" / "checkpoints").exists()
