"""Perplexity and tasks against the definitions, worked out token by token from whole logits."""

import dataclasses
import hashlib
import json
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from launch.cli import main
from pjit_train.data.tokenizers import train_tokenizer
from pjit_train.errors import UserError
from pjit_train.evaluation import choices
from pjit_train.evaluation.choices import pair_row, run_task
from pjit_train.evaluation.perplexity import perplexity
from pjit_train.evaluation.scorer import Row, Scorer
from pjit_train.huggingface import weights as huggingface
from pjit_train.language_model import of_folder
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import MeshShape, Rules
from pjit_train.step import new_params, split_model

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEXT = "the cat sat on a mat and the dog ran to the man in the van. " * 30
CONFIG = TransformerConfig(
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    vocab_size=272,
    max_len=48,
    init_std=0.6,
)
MESH = MeshShape(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parent = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], vocab_size=270, path=str(parent / "tokenizer.json"))
    params = jax.device_get(new_params(CONFIG, Rules(), 0))
    huggingface.save(parent / "hf", CONFIG, params, tokenizer=tokenizer)
    (parent / "text.txt").write_text(TEXT + "<|endoftext|>" + TEXT[:50])
    return parent / "hf"


@pytest.fixture(scope="module")
def model(folder):
    return of_folder(folder, MeshShape(data=1))


@pytest.fixture(scope="module")
def surprise(model):
    """(tokens, scored) -> nats and greediness of the last tokens, from float64 logits."""
    graph, _ = split_model(model.config, Rules())
    forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))

    def score(tokens, scored):
        with jax.set_mesh(model.mesh):
            logits = np.asarray(forward(model.params, np.asarray(tokens, np.int32)[None, :-1])[0])
        log = log_softmax(logits.astype(np.float64), axis=-1)[-scored:]
        targets = np.asarray(tokens)[-scored:]
        nats = -log[np.arange(scored), targets].sum()
        return nats, bool(np.all(log.argmax(axis=-1) == targets))

    return score


def test_of_each_whole_window_all_but_the_first_token_is_predicted(model, folder, surprise):
    file = folder.parent / "text.txt"
    tokens = model.tokenizer.encode_marked(file.read_text())
    assert list(tokens).count(model.tokenizer.separator) == 1  # the token that the text spells
    found = perplexity(model, file, sequence=32)
    want = sum(surprise(tokens[i : i + 32], 31)[0] for i in range(0, len(tokens) // 32 * 32, 32))
    windows = len(tokens) // 32
    assert (found["windows"], found["predicted"]) == (windows, 31 * windows)
    assert (found["tokens"], found["unused"]) == (len(tokens), len(tokens) % 32)
    assert found["nats"] == pytest.approx(want, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(want / (31 * windows)), rel=1e-5)
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("stride", [16, 31, 32])
def test_with_a_stride_every_token_counts_once(model, folder, surprise, stride):
    file = folder.parent / "text.txt"
    tokens = model.tokenizer.encode_marked(file.read_text())
    found = perplexity(model, file, sequence=32, stride=stride)
    news = list(_news(len(tokens), 32, stride))
    assert found["predicted"] == sum(count for _, count in news)
    if stride < 32:
        assert found["predicted"] == len(tokens) - 1
    want = sum(surprise(tokens[s : s + 32], count)[0] for s, count in news if count)
    assert found["nats"] == pytest.approx(want, rel=1e-5)


def _news(count, sequence, stride):
    """(start, tokens predicted) of each window, from a set of those that have been."""
    seen = set()
    for start in range(0, count, stride):
        inside = set(range(start + 1, min(start + sequence, count)))
        yield start, len(inside - seen)
        seen |= inside
        if start + sequence >= count:
            return


def test_the_token_of_begin_stands_before_each_window(model, folder, surprise):
    file = folder.parent / "text.txt"
    tokens = model.tokenizer.encode_marked(file.read_text())
    found = perplexity(model, file, sequence=48, bos=True, limit=2)
    begin = model.conventions.begin
    want = sum(surprise([begin, *tokens[i : i + 48]], 48)[0] for i in (0, 48))
    assert (found["windows"], found["predicted"]) == (2, 96)
    assert found["nats"] == pytest.approx(want, rel=1e-5)


def test_scores_do_not_depend_on_what_else_is_scored_nor_on_the_mesh(model, folder, surprise):
    rng = np.random.default_rng(0)
    rows = [
        Row(rng.integers(0, 270, size).astype(np.int32), scored)
        for size, scored in [(2, 1), (49, 48), (20, 3), (33, 32), (5, 4), (41, 1), (33, 1)]
    ]
    want = [surprise(*row) for row in rows]
    for scores in (Scorer(model)(rows), Scorer(of_folder(folder, MESH))(rows)):
        np.testing.assert_allclose(
            [-s.log_probability for s in scores], [nats for nats, _ in want], rtol=1e-5
        )
        assert [s.greedy for s in scores] == [greedy for _, greedy in want]
    assert Scorer(model)([]) == []


@pytest.mark.slow
def test_a_greedy_text_is_found_greedy(model):
    graph, _ = split_model(model.config, Rules())
    ids = [model.conventions.begin]
    with jax.set_mesh(model.mesh):
        for _ in range(6):
            logits = nnx.merge(graph, model.params)(np.asarray([ids], np.int32))
            ids.append(int(np.argmax(logits[0, -1])))
    other = [*ids[:-1], (ids[-1] + 1) % 270]
    right, wrong = Scorer(model)([Row(np.asarray(x, np.int32), 6) for x in (ids, other)])
    assert right.greedy
    assert not wrong.greedy


QUESTIONS = [
    {"question": "the cat sat", "choices": ["on a mat", "in the van and ran"], "answer": 0},
    {"question": "a dog", "choices": ["ran", "sat on", "the man in"], "answer": 2},
    {"question": "the man", "choices": ["and the dog ran to the man", "van"], "answer": 1},
    {"question": "", "choices": ["mat", "cat"], "answer": 0},
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_choices_are_scored_after_the_question_and_by_their_length(
    model, surprise, tmp_path, monkeypatch
):
    monkeypatch.setattr(choices, "_mean", lambda right: (right, None))
    found = run_task(model, lines(tmp_path / "mine.jsonl", QUESTIONS))
    plain, normalized = [], []
    for row in QUESTIONS:
        nats = []
        for choice in row["choices"]:
            context = model.tokenizer.encode(f"Question: {row['question']}\nAnswer:")
            tokens = model.tokenizer.encode(f"Question: {row['question']}\nAnswer: {choice}")
            nats.append(surprise(tokens[-49:], len(tokens) - len(context))[0])
        plain.append(int(np.argmin(nats)) == row["answer"])
        by_length = np.array(nats) / [len(c) for c in row["choices"]]
        normalized.append(int(np.argmin(by_length)) == row["answer"])
    assert found["rows"] == 4
    assert (found["accuracy"], found["accuracy_normalized"]) == (plain, normalized)


def test_the_standard_error_is_that_of_a_mean():
    # Three of four right: s^2 = (3 * 0.25^2 + 0.75^2) / 3 = 0.25, and sqrt(0.25 / 4) = 0.25.
    assert choices._mean([True, True, False, True]) == pytest.approx((0.75, 0.25))
    assert choices._mean([True]) == (1.0, None)


def test_the_last_word_is_predicted_from_the_others(model, surprise, tmp_path):
    texts = ["the cat sat on a mat", "the dog ran to the man"]
    found = run_task(model, lines(tmp_path / "words.jsonl", [{"text": t} for t in texts]))
    nats = []
    for text in texts:
        context = model.tokenizer.encode(text[: text.rindex(" ")])
        tokens = model.tokenizer.encode(text)
        nats.append(surprise(tokens, len(tokens) - len(context)))
    assert found["perplexity"] == pytest.approx(math.exp(np.mean([n for n, _ in nats])), rel=1e-5)
    assert found["accuracy"] == np.mean([greedy for _, greedy in nats])


def test_a_row_is_cut_at_its_beginning_and_spaces_go_to_the_answer(model):
    long = pair_row(model, "the cat " * 60, "mat")
    assert len(long.tokens) == CONFIG.max_len + 1
    whole = model.tokenizer.encode("the cat " * 60 + "mat")
    assert np.array_equal(long.tokens, whole[-49:])
    assert long.scored == len(whole) - len(model.tokenizer.encode(("the cat " * 60).rstrip()))
    alone = pair_row(model, "", "mat")
    assert alone.tokens[0] == model.conventions.begin
    assert alone.scored == len(alone.tokens) - 1
    begins = dataclasses.replace(model.conventions, adds_begin=True)
    row = pair_row(dataclasses.replace(model, conventions=begins), "a cat", " sat")
    assert row.tokens[0] == model.conventions.begin
    assert row.scored == pair_row(model, "a cat", " sat").scored


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"question": "a", "choices": ["b"], "answer": 0}', "row 1: want a text 'question'"),
        ('{"question": "a", "choices": ["b", 1], "answer": 0}', "row 1: want a text 'question'"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer=2 must be the index"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "0"}', "answer='0' must be"),
        ('{"text": "one"}', "row 1: 'text' must be a text of several words"),
        ('{"text": 5}', "row 1: 'text' must be"),
        ("[1]", "line 1: want a JSON object"),
        ("{", "line 1: is no JSON"),
        ("", "has no rows"),
    ],
)
def test_another_row_is_an_error_of_one_line(model, tmp_path, rows, said):
    file = tmp_path / "bad.jsonl"
    file.write_text(rows)
    with pytest.raises(UserError) as error:
        run_task(model, file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sequence", "99"], "--sequence 99: use 2 to 48 tokens"),
        (["--sequence", "8", "--stride", "9"], "--stride 9: use 1 to --sequence 8"),
        (["--step", "3"], "--step is of a run directory"),
        (["--mesh", "data=99"], "99 devices"),
        (["--tasks", "lambada"], "--tasks lambada: there is no file lambada_test.jsonl"),
        (["--tasks", "nothing"], "--tasks nothing: is no file, and no task of lambada"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(folder, options, said, capsys):
    file = ["--perplexity", str(folder.parent / "text.txt")]
    assert main(["eval", str(folder), *file, *options]) == 2
    output = capsys.readouterr()
    assert said in output.err
    assert len(output.err.splitlines()) == 1


def test_the_command_reads_a_folder_and_prints_what_two_people_compare(folder, tmp_path, capsys):
    file, task = folder.parent / "text.txt", lines(tmp_path / "mine.jsonl", QUESTIONS)
    argv = ["eval", str(folder), "--perplexity", str(file), "--sequence", "32"]
    assert main([*argv, "--tasks", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"] / found["predicted"]))
    assert found["tasks"]["mine"]["rows"] == 4
    assert main([*argv, "--limit", "1"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["windows"], shown["predicted"], shown["bos"]) == ("1", "31", "False")
    assert main(["eval", str(folder)]) == 2
    assert "has no validation text of its own" in capsys.readouterr().err
    assert main(["eval", str(folder), "--sequence", "32"]) == 2
    assert "--sequence is of --perplexity" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_or_with_anothers_is_refused(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "SHA256SUMS").unlink(missing_ok=True)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        of_folder(bare, MeshShape(data=1))
    train_tokenizer([TEXT * 3], vocab_size=290, path=str(bare / "tokenizer.json"))
    text = json.loads((bare / "tokenizer.json").read_text())
    text["added_tokens"].append({**text["added_tokens"][0], "id": 299, "content": "<more>"})
    (bare / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="they are not of one model"):
        of_folder(bare, MeshShape(data=1))
