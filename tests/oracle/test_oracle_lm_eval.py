"""The model of lm-eval beside lm-eval's own model of `transformers`, on tasks of local files."""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before the imports

import jax
import numpy as np
import pytest

from launch.cli import main
from pjit_train.data import train_tokenizer
from pjit_train.errors import UserError
from pjit_train.evaluation.choices import run_task
from pjit_train.huggingface import weights as huggingface
from pjit_train.language_model import of_folder
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import MeshShape, Rules
from pjit_train.step import new_params

pytestmark = pytest.mark.oracle

TEXT = "the cat sat on a mat and the dog ran to the man in the van. " * 30
WORDS = sorted(set(TEXT.split()))
CONFIG = TransformerConfig(
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    vocab_size=270,
    max_len=96,
    init_std=0.6,
)
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + m.role + ':' + m.content + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant:' }}{% endif %}"
)
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: answer
        doc_to_choice: choices
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "last": """
        output_type: loglikelihood
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' '+text.split(' ')[-1]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
    """,
    "whole": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: text
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
    """,
    "answers": """
        output_type: generate_until
        doc_to_text: text
        doc_to_target: ""
        generation_kwargs: {until: [" a", "t t"], max_gen_toks: 24, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


def words(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def rows_of(task, rng):
    if task == "choices":  # some longer than the model's sequences
        choices = [[words(rng, 1, 7) for _ in range(n)] for n in rng.integers(2, 5, 24)]
        return [
            {"question": words(rng, 1, 60), "choices": c, "answer": int(rng.integers(len(c)))}
            for c in choices
        ]
    low, high = {"last": (2, 20), "whole": (1, 200), "answers": (1, 60)}[task]
    return [{"text": words(rng, low, high)} for _ in range(24)]


def make_folder(parent, begins):
    """A folder of a tiny Llama; with `begins` its tokenizer puts a token before each text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer([TEXT], vocab_size=268, path=str(parent / "tokenizer.json"))
    params = jax.device_get(new_params(CONFIG, Rules(), 0))
    huggingface.save(parent / "hf", CONFIG, params, tokenizer=tokenizer)
    (parent / "hf" / "SHA256SUMS").unlink()  # of the files as they were
    changed = Tokenizer.from_file(str(parent / "hf" / "tokenizer.json"))
    changed.add_special_tokens(["<begin>", "<turn>"])
    begin = changed.token_to_id("<begin>")
    if begins:
        changed.post_processor = TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", begin)]
        )
    changed.save(str(parent / "hf" / "tokenizer.json"))
    file = parent / "hf" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
    settings["bos_token"] = "<begin>" if begins else None
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return parent / "hf"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and one file of rows for each."""
    import yaml

    folder = tmp_path_factory.mktemp("tasks")
    for seed, (name, said) in enumerate(TASKS.items()):
        rows = rows_of(name, np.random.default_rng(seed))
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = yaml.safe_load(said) | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(file)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begins"])
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def ours(folder):
    from pjit_train.evaluation.harness import TorsionLM

    return TorsionLM(of_folder(folder, MeshShape(data=1)))


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def evaluated(tasks):
    """Evaluates a model on all tasks."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate(model, **options):
        return lm_eval.simple_evaluate(
            model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=10, **options
        )

    return evaluate


@pytest.fixture(scope="module")
def both(evaluated, ours, theirs):
    return evaluated(ours), evaluated(theirs)


def answers(found, task):
    """The answers of the model to each row, in the order of rows."""
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [response[0] for row in rows for response in row["resps"]]


@pytest.mark.parametrize("task", ["choices", "last"])
def test_log_probabilities_and_greediness(both, task):
    mine, yours = ([*zip(*answers(found, task), strict=True)] for found in both)
    np.testing.assert_allclose(mine[0], yours[0], atol=1e-4)
    assert mine[1] == yours[1]
    assert len(mine[0]) >= 24


def test_the_log_probability_of_whole_texts(both):
    mine, yours = (answers(found, "whole") for found in both)
    np.testing.assert_allclose(mine, yours, rtol=1e-6, atol=1e-4)
    assert len(mine) == 24


def test_greedy_texts(both):
    mine, yours = (answers(found, "answers") for found in both)
    assert mine == yours
    assert len(set(mine)) > 12


def numbers(figures):
    found = [(name, value) for name, value in figures.items() if not isinstance(value, str)]
    assert found
    return found


def test_figures(both):
    mine, yours = (found["results"] for found in both)
    for task in TASKS:
        assert mine[task].keys() == yours[task].keys()
        for name, value in numbers(yours[task]):
            assert mine[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_the_tasks_of_torsion_eval_are_scored_as_those_of_lm_eval(both, tasks, folder):
    model = of_folder(folder, MeshShape(data=1))
    mine = run_task(model, tasks / "choices.jsonl")
    yours = both[1]["results"]["choices"]
    assert mine["accuracy"] == yours["acc,none"]
    assert mine["accuracy_normalized"] == yours["acc_norm,none"]
    assert mine["stderr"] == pytest.approx(yours["acc_stderr,none"], rel=1e-12)
    assert mine["stderr_normalized"] == pytest.approx(yours["acc_norm_stderr,none"], rel=1e-12)
    mine, yours = run_task(model, tasks / "last.jsonl"), both[1]["results"]["last"]
    assert mine["accuracy"] == yours["acc,none"]
    assert mine["stderr"] == pytest.approx(yours["acc_stderr,none"], rel=1e-12)
    assert mine["perplexity"] == pytest.approx(yours["perplexity,none"], rel=1e-5)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


PAIRS = [
    ("", "the cat"),
    ("", "<|endoftext|>the cat"),
    ("", "<begin>the cat"),
    ("<begin>the cat", " sat"),
    ("the cat  ", "sat"),
    ("the<turn>", "cat"),
    (TEXT, " the cat"),
    ("a", TEXT[:100]),
    ("ü", " € \N{GRINNING FACE}"),
]


def test_contexts_that_are_empty_marked_or_too_long(ours, theirs):
    requests = instances("loglikelihood", PAIRS)
    mine, yours = (zip(*lm.loglikelihood(requests), strict=True) for lm in (ours, theirs))
    (mine, greedy), (yours, greedy_) = mine, yours
    np.testing.assert_allclose(mine, yours, atol=1e-4)
    assert greedy == greedy_
    texts = ["", "the", "<begin>the cat", "<|endoftext|>", TEXT * 2]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    mine, yours = (lm.loglikelihood_rolling(requests) for lm in (ours, theirs))
    np.testing.assert_allclose(mine, yours, rtol=1e-6, atol=1e-4)
    assert (ours.eot_token_id, ours.prefix_token_id, ours.max_length) == (
        theirs.eot_token_id,
        theirs.prefix_token_id,
        theirs.max_length,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 40, "until": []},
        {"max_new_tokens": 9, "until": "at", "do_sample": False},
        {"max_gen_toks": 30, "until": ["<turn>", "."], "temperature": 0.0},
        {"max_gen_toks": 30, "until": ["\n\n"], "repetition_penalty": 1.4, "num_beams": 1},
        {"max_gen_toks": 12, "do_sample": True, "temperature": 0.7, "top_k": 1, "top_p": 1.0},
    ],
)
def test_texts_of_any_options(ours, theirs, options):
    prompts = ["the cat", "<begin>the dog", "a<turn>man", TEXT, "van. " * 9]
    requests = instances("generate_until", [(prompt, options) for prompt in prompts])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"typical_p": 0.3}, "'typical_p'"),
        ({"max_gen_toks": 96}, "max_gen_toks=96 leaves no room for a prompt within max_length=96"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
    ],
)
def test_options_that_are_not_done_are_one_line(ours, options, said):
    with pytest.raises(UserError, match=said):
        ours.generate_until(instances("generate_until", [("the", options)]))


def test_conversations(ours, theirs):
    user = {"role": "user", "content": "the cat "}
    answered = [user, {"role": "assistant", "content": "sat on "}]
    system = {"role": "system", "content": "a van"}
    for said in ([user], [system, user], [*answered, user], answered):
        assert ours.apply_chat_template(said) == theirs.apply_chat_template(said)
    for said in (answered, [system, *answered]):  # an answer that is begun
        mine, yours = (lm.apply_chat_template(said, False) for lm in (ours, theirs))
        assert mine == yours
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    assert ours.chat_template(False) == ""


def test_the_command_and_a_mesh_give_the_same(both, tasks, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    made = [f"model={folder},data=2", "tensor=2,max_length=96"]
    command = ["lm_eval", "--model", "torsion", "--model_args", *made, "--tasks", *TASKS]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out")]
    assert main(command) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    for task, figures in both[1]["results"].items():
        for name, value in numbers(figures):
            if "stderr" not in name or "acc" in name:  # others are by bootstrap, of other draws
                assert found[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_a_mistake_in_the_arguments_is_one_line(folder, tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    made = f"model={folder},max_length=97"
    command = ["lm_eval", "--model", "torsion", "--model_args", made, "--tasks", "last"]
    assert main([*command, "--include_path", str(tasks)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "torsion: max_length=97: use 2 to 96 tokens, the model's longest sequence"
