"""Text of folders: choices of tokens against their formulas, stop texts, streams, chats."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from launch.cli import main
from pjit_train.data.tokenizers import Bytes, train_tokenizer
from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.conventions import Conventions, read_conventions
from pjit_train.language_model import of_folder
from pjit_train.models.continuation import Continuation
from pjit_train.models.sampler import Choice, Sampler, _choose
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sample import TextSampler
from pjit_train.sharding import MeshShape, Rules
from pjit_train.step import new_params

pytestmark = pytest.mark.usefixtures("quick_compiles")
TEXT = "the cat sat on a mat and the dog ran to the man in the van. " * 30
TEMPLATE = (
    "{% for m in messages %}{{ '<|endoftext|>' + m.role + ':' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant:' }}{% endif %}"
)
CONFIG = TransformerConfig(
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    d_ff=24,
    vocab_size=272,
    max_len=96,
    init_std=0.6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    parent = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], vocab_size=270, path=str(parent / "tokenizer.json"))
    params = jax.device_get(new_params(CONFIG, Rules(), 0))
    huggingface.save(parent / "hf", CONFIG, params, tokenizer=tokenizer)
    (parent / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return parent / "hf"


def sampler(folder, mesh=None, **options):
    model = of_folder(folder, mesh or MeshShape(data=1))
    options = {"tokens": 12, "choice": Choice(temperature=0)} | options
    return TextSampler(model, **options)


PROMPTS = ["the cat", "a", "the dog ran to the man in the van. the dog ran to the man in", ""]


@pytest.fixture(scope="module")
def alone(folder):
    """The greedy continuation of each prompt by itself."""
    one = sampler(folder)
    return [one([prompt])[0] for prompt in PROMPTS]


@pytest.mark.slow
def test_prompts_of_any_lengths_at_once_are_continued_as_each_alone(folder, alone):
    assert sampler(folder)(PROMPTS) == alone
    assert len(set(alone)) == len(PROMPTS)
    mesh = MeshShape(data=2, fsdp=2, tensor=2)
    assert sampler(folder, mesh)(PROMPTS) == alone


def test_a_stream_is_the_text_in_pieces(folder, alone):
    pieces = list(sampler(folder).stream(PROMPTS[0]))
    assert PROMPTS[0] + "".join(pieces) == alone[0]
    assert sum(map(bool, pieces)) > 3


def test_a_text_that_spells_the_token_of_begin_gets_no_second(folder):
    model = of_folder(folder, MeshShape(data=1))
    begin, bare = model.conventions.begin, list(model.tokenizer.encode("the cat"))
    assert list(model.encode("the cat")) == bare
    conventions = dataclasses.replace(model.conventions, adds_begin=True)
    model = dataclasses.replace(model, conventions=conventions)
    assert list(model.encode("the cat")) == [begin, *bare]
    assert list(model.encode("<|endoftext|>the cat")) == [begin, *bare]
    assert list(model.encode("the cat", begins=False)) == bare
    assert list(model.encode("")) == [begin]


def test_a_text_is_plain_without_special_tokens(folder):
    tokenizer = read_conventions(folder)[0]
    ids = [*tokenizer.encode("the cat"), tokenizer.separator, *tokenizer.encode(" sat")]
    assert tokenizer.decode_plain(ids) == "the cat sat"
    tokenizer = dataclasses.replace(tokenizer, separator_token="a")
    assert tokenizer.decode_plain(ids) == "the cat sat"
    assert Bytes().decode_plain([104, 105, 255]) == "hi"
    assert (Bytes().token_id("<s>"), Bytes().token_text(255)) == (None, None)


def test_progress_counts_the_prompts_that_are_done(folder):
    model, told = of_folder(folder, MeshShape(data=1)), []
    complete = Sampler(model.config, model.rules, model.tokenizer).complete
    prompts = [np.array([i % 9]) for i in range(20)]
    with jax.set_mesh(model.mesh):
        complete(
            model.params,
            prompts,
            tokens=1,
            choice=Choice(),
            progress=lambda *counts: told.append(counts),
        )
    assert told == [(16, 20), (20, 20)]


def test_a_stop_text_ends_the_text_before_it(folder, alone):
    new = alone[0][len(PROMPTS[0]) :]
    stop = new[5:8]
    want = PROMPTS[0] + new[: new.index(stop)]
    stopped = sampler(folder, stop=["\0", stop])
    assert stopped([PROMPTS[0]]) == [want]
    assert PROMPTS[0] + "".join(stopped.stream(PROMPTS[0])) == want


def test_a_prompt_that_is_too_long_is_refused_or_cut(folder):
    long = "the cat sat on a mat. " * 40
    with pytest.raises(UserError, match="or --cut to drop the beginning"):
        sampler(folder)([long])
    (text,) = sampler(folder, cut=True)([long])
    model = of_folder(folder, MeshShape(data=1))
    ids = model.tokenizer.encode(long)[-(CONFIG.max_len - 12) :]
    short = model.tokenizer.decode(ids)
    assert text[len(long) :] == sampler(folder)([short])[0][len(short) :]
    with pytest.raises(UserError, match="tokens=96 leaves no room"):
        sampler(folder, tokens=96)


def chosen(logits, count=4000, seen=None, **choice):
    """How often each token is chosen of these logits."""
    choice = Choice(**choice)
    rows = np.tile(np.asarray(logits, np.float32), (count, 1))
    seen = np.zeros_like(rows, bool) if seen is None else np.tile(seen, (count, 1))
    token, _ = _choose(
        rows,
        seen,
        3,
        np.arange(count),
        jax.random.key(5),
        choice.temperature,
        choice.top_p or 0.0,
        choice.repetition_penalty,
        greedy=choice.greedy,
        top_k=choice.top_k,
        with_top_p=choice.top_p is not None,
        with_penalty=choice.repetition_penalty != 1,
    )
    return np.bincount(token, minlength=rows.shape[1]) / count


LOGITS = np.log([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.39, [1]), (0.41, [1, 2]), (0.7, [1, 2, 3]), (1.0, range(5))]
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(top_p, kept):
    want = np.zeros(5)
    want[list(kept)] = np.exp(LOGITS)[list(kept)]
    np.testing.assert_allclose(chosen(LOGITS, top_p=top_p), want / want.sum(), atol=0.04)
    assert np.all((chosen(LOGITS, top_p=top_p) > 0) == (want > 0))


def test_top_p_counts_after_temperature_and_top_k():
    # Squares: 0.16, 0.0625, 0.04, ... of the first three 0.61, 0.24, 0.15.
    share = chosen(LOGITS, temperature=0.5, top_k=3, top_p=0.8)
    np.testing.assert_allclose(share, [0, 0.719, 0.281, 0, 0], atol=0.04)


def test_repetition_makes_seen_tokens_less_likely_whatever_their_sign():
    logits, seen = np.array([2.0, -1.0, 0.5, 1.0]), np.array([True, True, False, False])
    want = softmax([1.0, -2.0, 0.5, 1.0])
    share = chosen(logits, seen=seen, repetition_penalty=2.0)
    np.testing.assert_allclose(share, want, atol=0.04)
    # The likeliest, too: 2 / 2.5 < 1.
    greedy = chosen(logits, seen=seen, repetition_penalty=2.5, temperature=0.0)
    assert list(greedy) == [0, 0, 0, 1]


def test_a_penalty_counts_prompt_and_text(folder):
    """No token comes twice under a penalty that leaves seen tokens no chance."""
    model = of_folder(folder, MeshShape(data=1))
    prompt = model.tokenizer.encode("the cat")
    choice = Choice(temperature=0, repetition_penalty=1e30)
    shut = Sampler(model.config, model.rules, model.tokenizer)
    with jax.set_mesh(model.mesh):
        tokens = [
            int(t[0]) for t in shut.generate(model.params, [prompt], tokens=60, choice=choice)
        ]
    assert len({*tokens, *prompt.tolist()}) == 60 + len(set(prompt.tolist()))


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_a_continuation_shows_all_up_to_the_first_stop_text_and_nothing_twice(text, stop):
    text = text.encode("utf-8", "replace").decode()
    new = Continuation(Bytes(), np.array([255]), ends=(255,), stop=stop)
    pieces = []
    for byte in [*text.encode(), 255, 65]:
        pieces.append(new.push(byte))
        assert "".join(pieces) == new.text
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    assert new.text == (text[: min(ends)] if ends else text)
    assert new.done


def test_a_character_in_parts_is_shown_whole():
    new = Continuation(Bytes(), np.array([255]), ends=(255,))
    assert [new.push(byte) for byte in "é".encode()] == ["", "é"]
    assert [new.push(0xC3), new.finish()] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_chat_is_written_by_the_template_and_answered_in_turn(folder, capsys):
    one = sampler(folder)
    first = "".join(one.answer([{"role": "user", "content": "the cat"}]))
    prompt = "<|endoftext|>user:the cat<|endoftext|>assistant:"
    assert first == sampler(folder)([prompt])[0][len(prompt) :]
    argv = ["sample", str(folder), "--chat", "--temperature", "0", "--tokens", "12"]
    assert main([*argv, "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out == first + "\n"
    # Five turns exceed the model's 96 tokens: the oldest are dropped.
    assert main([*argv, "--prompt", *["the cat sat on a mat"] * 5]) == 0
    assert len(capsys.readouterr().out.split("\n")) >= 6


def test_lines_of_the_input_are_messages(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\n  a dog \n"))
    argv = ["sample", str(folder), "--chat", "--temperature", "0", "--tokens", "4"]
    assert main(argv) == 0
    lines = capsys.readouterr().out
    assert main([*argv, "--prompt", "the cat", "a dog"]) == 0
    assert capsys.readouterr().out == lines


def test_a_template_sees_the_special_tokens_and_may_refuse(folder, tmp_path):
    special = {"bos_token": "<s>"}
    told = Conventions(
        begin=1,
        ends=(2,),
        adds_begin=False,
        chat_template="{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}{{ messages | tojson }}",
        special_tokens=special,
    )
    messages = [{"role": "user", "content": "a<b"}]
    assert told.chat(messages) == "<s>" + json.dumps(messages)
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert dataclasses.replace(told, chat_template=marked).chat(messages) == "a<b"
    with pytest.raises(UserError, match="refuses the messages: no system"):
        told.chat([{"role": "system", "content": "x"}])
    with pytest.raises(UserError, match="has no chat template"):
        Conventions(begin=1, ends=(), adds_begin=False).chat(messages)


def test_conventions_are_those_of_all_the_files(folder, tmp_path):
    there = tmp_path / "hf"
    shutil.copytree(folder, there)
    (there / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    settings = json.loads((there / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "c"}, "add_bos_token": True}
    (there / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, found = read_conventions(there)
    assert found.ends == (7, 9, 0)
    assert found.begin == tokenizer.token_id("c") > 0
    assert found.adds_begin
    assert found.chat_template == TEMPLATE
    assert tokenizer.separator == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--system", "x"], "--system is of --chat"),
        (["--prompt", "the cat sat " * 60], "or --cut to drop"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(folder, options, said, capsys):
    assert main(["sample", str(folder), "--tokens", "5", *options]) == 2
    assert said in capsys.readouterr().err
