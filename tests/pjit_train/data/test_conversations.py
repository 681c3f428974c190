"""Conversations: texts of templates and their answers by hand, packed whole, and what is wrong."""

import gzip
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjit_train.data import Bytes, Conversations, TextData, TextFiles, TokenizerJson
from pjit_train.data.chat_template import ChatTemplate, read_template
from pjit_train.data.packing import first_fit
from pjit_train.errors import UserError

PLAIN = """{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}
{%- if add_generation_prompt %}<a>{% endif %}"""
BLOCKS = """{%- for m in messages -%}
  <{{ m.role[0] }}>
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{ m.content }}!{%- endgeneration -%}
  {%- else -%}{{ m.content }}{%- endif -%}
{%- endfor -%}"""
# Earlier answers are cut to their first letter, as Qwen3 leaves out what was thought.
FORGETFUL = """{% for m in messages %}<{{ m.role[0] }}>
{%- if m.role == 'assistant' and not loop.last %}
{{- m.content[0] }}{% else %}{{ m.content }}{% endif %}</>{% endfor %}
{%- if add_generation_prompt %}<a>{% endif %}"""


def chat(*said):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


TALK = chat("hi", "yes", "why", "so")


@pytest.mark.parametrize(
    ("template", "examples"),
    [
        (PLAIN, [("<u>hi</><a>yes</><u>why</><a>so</>", ["yes</>", "so</>"])]),
        (BLOCKS, [("<u>hi<a>yes!<u>why<a>so!", ["yes!", "so!"])]),
        (
            FORGETFUL,
            [("<u>hi</><a>yes</>", ["yes</>"]), ("<u>hi</><a>y</><u>why</><a>so</>", ["so</>"])],
        ),
    ],
)
def test_answers_are_those_of_blocks_or_what_the_text_has_more(template, examples):
    found = ChatTemplate(text=template).examples(TALK)
    assert [(x.text, [x.text[a:b] for a, b in x.answers]) for x in found] == examples


def test_a_template_runs_in_a_sandbox():
    template = ChatTemplate(text="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="the chat template fails: access to attribute"):
        template.examples(TALK)


def test_a_template_is_read_from_files_as_tokenizers_ship_it(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": PLAIN, "bos_token": {"content": "<s>"}}))
    for path in (tmp_path, config):
        assert read_template(path) == ChatTemplate(text=PLAIN, special_tokens={"bos_token": "<s>"})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN}]
    config.write_text(json.dumps({"chat_template": named}))
    assert read_template(config).text == PLAIN
    (tmp_path / "chat_template.jinja").write_text(BLOCKS)
    assert read_template(tmp_path).text == BLOCKS
    config.write_text("{}")
    with pytest.raises(UserError, match="has no chat_template"):
        read_template(config)
    with pytest.raises(UserError, match="cannot be read"):
        read_template(tmp_path / "none.jinja")


@given(st.lists(st.integers(1, 12), max_size=60))
def test_first_fit_is_its_definition(sizes):
    bins: list[list[int]] = []
    for i, size in enumerate(sizes):
        fits = (b for b in bins if sum(sizes[j] for j in b) + size <= 12)
        if (first := next(fits, None)) is None:
            bins.append(first := [])
        first.append(i)
    assert first_fit(sizes, 12) == bins


def written(path, chats, column="messages"):
    rows = [{"id": i, column: messages} for i, messages in enumerate(chats)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".zst":
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
            out.write(lines)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def data_of(folder, source, **options):
    (folder / "t.jinja").write_text(options.pop("template", PLAIN))
    source = Conversations(**{"template": str(folder / "t.jinja"), **source})
    options = {"seq_len": 40, "batch_size": 2, "cache_dir": str(folder / "cache"), **options}
    return TextData(sources=[source, *options.pop("others", ())], **options)


def text(ids):
    return bytes(ids.astype(np.uint8)).decode()


def test_rows_hold_whole_conversations_with_the_answers_weighed(tmp_path):
    """40 places of a row: 16, 34 and 20 tokens are two rows, the first and third in one."""
    chats = [chat("1", "one"), chat("2" * 9, "two" * 4), chat("3", "three, 3")]
    path = written(tmp_path / "c.jsonl", chats)
    batches = data_of(tmp_path, {"train": path, "validation": path}).prepare(0)
    batch = batches.eval_batch(0)
    assert batches.num_eval_batches == 1
    texts = ["<u>1</><a>one</>", "<u>222222222</><a>twotwotwotwo</>", "<u>3</><a>three, 3</>"]
    sizes = [len(t) - 1 for t in texts]
    assert sizes == [15, 32, 20]
    first, second = ({name: x[row] for name, x in batch.items()} for row in (0, 1))
    assert text(first["inputs"][:15]) == texts[0][:-1]
    assert text(first["targets"][15:35]) == texts[2][1:]
    assert first["segments"].tolist() == [1] * 15 + [2] * 20 + [0] * 5
    assert first["positions"].tolist() == [*range(15), *range(20), *[0] * 5]
    assert text(first["targets"][first["weights"] == 1]) == "one</>three, 3</>"
    assert text(second["targets"][second["weights"] == 1]) == "twotwotwotwo</>"
    assert batches.bytes_per_token("validation") == 1.0
    assert {name: x.dtype.name for name, x in batch.items()} == data_of(
        tmp_path, {"train": path}
    ).arrays


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet", "c.arrow"])
def test_every_file_gives_the_same_batches_and_a_batch_is_of_seed_and_step(name, tmp_path):
    chats = [chat(f"number {i}", "x" * (i % 23 + 1)) for i in range(300)]
    chats[7] = [{"role": "system", "content": "be brief"}, *chats[7]]

    def prepared(name, seed=3):
        source = {"train": written(tmp_path / name, chats, "talk"), "messages": "talk"}
        return data_of(tmp_path, source).prepare(seed)

    one, other = prepared("c.jsonl"), prepared(name)
    assert one.digest == other.digest
    for step in (0, 5, 400):
        batch = one.train_batch(step)
        for key, x in other.train_batch(step).items():
            np.testing.assert_array_equal(x, batch[key])
            np.testing.assert_array_equal(x[1:], other.train_batch(step, slice(1, 2))[key])
    assert not np.array_equal(prepared(name, 4).train_batch(5)["inputs"], batch["inputs"])
    both = [*one._rows["train"], *one._rows["validation"]]
    seen = [packed.padded(i)["segments"].max() for packed in both for i in range(len(packed))]
    assert sum(seen) == 300  # each in one split, once


def test_questions_and_answers_are_conversations(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"{i}!", "n": i} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa.parquet")
    source = {"train": str(tmp_path / "qa.parquet"), "prompt": "question", "answer": "answer"}
    source = data_of(tmp_path, source).sources[0]
    train, validation = ([x.text for x in source.documents(s)] for s in ("train", "validation"))
    assert train == [f"<u>{i}?</><a>{i}!</>" for i in range(3)]
    assert validation == ["<u>3?</><a>3!</>"]


def test_text_and_conversations_mix(tmp_path):
    (tmp_path / "t.txt").write_text("plain text " * 400)
    path = written(tmp_path / "c.jsonl", [TALK] * 30)
    texts = TextFiles(train=str(tmp_path / "t.txt"))
    batches = data_of(tmp_path, {"train": path}, others=[texts], batch_size=8).prepare(0)
    batch = batches.train_batch(0)
    rows = [{name: x[i] for name, x in batch.items()} for i in range(8)]
    plain = [row for row in rows if row["weights"].all()]
    assert 0 < len(plain) < 8
    for row in plain:
        assert set(row["segments"]) == {1}
        assert row["positions"].tolist() == list(range(40))


def test_what_is_longer_than_a_row_loses_its_end_with_a_warning(tmp_path, caplog):
    chats = [chat("q", "a" * 60), chat("q" * 60, "lost"), chat("q", "b")]
    path = written(tmp_path / "c.jsonl", chats)
    batches = data_of(tmp_path, {"train": path, "validation": path}).prepare(0)
    first, second = batches.eval_batch(0)["targets"]
    assert text(first) == "u>q</><a>" + "a" * 31
    assert text(second[: len("u>q</><a>b</>")]) == "u>q</><a>b</>"
    assert "2 of 3 conversations are longer than seq_len=40 and lose their end, 1 of" in caplog.text
    with pytest.raises(UserError, match="no conversation of the train split has an answer"):
        data_of(tmp_path, {"train": path, "validation": path}, seq_len=4).prepare(0)


def tokenizer_file(folder):
    """A byte-level file in which "</>" is a special token, with a template beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</>", "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(PLAIN)
    return TokenizerJson(path=str(folder / "tokenizer.json"))


def test_the_template_is_that_beside_the_tokenizer_and_special_tokens_are_tokens(tmp_path):
    tokenizer = tokenizer_file(tmp_path)
    path = written(tmp_path / "c.jsonl", [chat("ü", "größer"), chat("1", "2")])
    data = data_of(tmp_path, {"train": path, "template": None}, tokenizer=tokenizer)
    assert [p.name for p in data.template_files] == ["chat_template.jinja"]
    row = data.prepare(0).train_batch(0, slice(1))
    answer = row["targets"][row["weights"] == 1]
    assert tokenizer.decode(answer) == "größer</>"
    assert answer[-1] == tokenizer.token_id("</>")
    assert row["weights"].sum() == len("größer".encode()) + 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no answer"),
        ('{"messages": []}', "has no answer"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "has no answer"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text under 'content'"),
        ('{"messages": ["x"]}', "message 1 has no text under 'role'"),
        ('{"messages": "x"}', "'messages' is a string, not a list of messages"),
        ('{"text": "x"}', r"has no 'messages' \(its fields are: 'text'\)"),
        ("3", "has no 'messages'"),
        ('{"messages": [}', "is not a line of JSON"),
        ('{"messages": [], "messages": []}', "gives 'messages' twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(line, says, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: .*{says}") as error:
        data_of(tmp_path, {"train": str(path)}).prepare(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "source", "says"),
    [
        ([{"messages": "x"}], {}, "holds string in its column 'messages': set messages to a"),
        ([{"messages": [1]}], {}, "holds list<.*it has none"),
        ([{"talk": TALK}], {}, "has no column 'messages'.*it has 'talk'"),
        ([{"messages": TALK}, {"messages": None}], {}, "row 2: 'messages' is null"),
        ([{"messages": TALK[:1]}], {}, "row 1: the conversation has no answer"),
        (
            [{"q": 1, "a": "x"}],
            {"prompt": "q", "answer": "a"},
            "holds int64 in its column 'q': set prompt and answer to a column of text.*it has 'a'",
        ),
        ([{"q": "x", "a": ""}], {"prompt": "q", "answer": "a"}, "row 1: 'a' is empty"),
    ],
)
def test_a_table_that_is_wrong_is_named(rows, source, says, tmp_path):
    path = str(tmp_path / "c.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=f"^{path}: .*{says}") as error:
        data_of(tmp_path, {"train": path, **source}).prepare(0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in %}", r"c\.jsonl:1: the chat template fails: .* \(line 1\)"),
        ("{{ messages[9].content.x }}", r"c\.jsonl:1: the chat template fails: .*no element 9"),
        ("{{ raise_exception('never') }}", r"c\.jsonl:1: .*refuses the messages: never"),
        ("{{ 1 / 0 }}", r"c\.jsonl:1: the chat template fails: division by zero"),
        ("{% generation %}{% endgeneration %}", "blocks hold none of its answers"),
        ("{{ messages | length }}{% if add_generation_prompt %}x{% endif %}", "otherwise than"),
    ],
)
def test_a_template_that_fails_is_one_line(template, says, tmp_path):
    path = written(tmp_path / "c.jsonl", [TALK] * 3)
    with pytest.raises(UserError, match=says) as error:
        data_of(tmp_path, {"train": path}, template=template).prepare(0)
    assert "\n" not in str(error.value)


def test_no_template_is_said(tmp_path):
    path = written(tmp_path / "c.jsonl", [TALK] * 3)
    for template in (None, str(tmp_path)):
        data = data_of(tmp_path, {"train": path, "template": template}, tokenizer=Bytes())
        with pytest.raises(UserError, match="there is no chat template"):
            data.prepare(0)
    with pytest.raises(UserError, match="give both, or neither"):
        Conversations(train=path, prompt="question")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UserError, match=r"is no \.jsonl"):
        data_of(tmp_path, {"train": str(tmp_path / "x.txt")}).prepare(0)
