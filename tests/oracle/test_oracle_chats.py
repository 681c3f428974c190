"""Conversations as text and the tokens of their answers, against `transformers`."""

import json

import numpy as np
import pytest

from pjit_train.data.chat_template import read_template
from pjit_train.data.tokenizers import TokenizerJson, train_tokenizer

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers")
# As SmolLM2-Instruct and Qwen2.5 write it, and with the blocks that training on answers reads.
CHATML = """{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- BEGIN %}{{- message['content'] + '<|im_end|>' }}{%- END %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
BLOCKS = CHATML.replace("BEGIN", "generation").replace("END", "endgeneration")
PLAIN = CHATML.replace("{%- BEGIN %}", "").replace("{%- END %}", "")
CHATS = [
    [
        ("user", "Hi, größer?"),
        ("assistant", "Yes — größer. 👍"),
        ("user", "no"),
        ("assistant", "k"),
    ],
    [("system", "a\n\nb"), ("user", " x "), ("assistant", "\n  leading and trailing \n")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats")
    text = "Hi there, größer is yes, and leading or trailing. Be brief 👍 — system user assistant"
    train_tokenizer([text] * 3, vocab_size=400, path=str(path / "tokenizer.json"))
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    library.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    library.save_pretrained(path)
    return path


@pytest.mark.parametrize("template", [BLOCKS, PLAIN], ids=["blocks", "plain"])
@pytest.mark.parametrize("chat", CHATS, ids=["turns", "system"])
def test_text_ids_and_answers_are_those_of_transformers(folder, template, chat):
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": content} for role, content in chat]
    (example,) = read_template(folder).examples(messages)
    tokenizer = TokenizerJson(path=str(folder / "tokenizer.json"))
    ((ids, answers),) = tokenizer.encode_parts([example])
    assert example.text == theirs.apply_chat_template(messages, tokenize=False)
    want = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == list(want["input_ids"])
    if template == BLOCKS:
        assert answers.tolist() == [bool(x) for x in want["assistant_masks"]]
        return
    # Without blocks: what the ids up to an answer's end have more than those up to its begin.
    mask = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            options = {"tokenize": True, "return_dict": True}
            before = theirs.apply_chat_template(
                messages[:i], add_generation_prompt=True, **options
            )["input_ids"]
            after = theirs.apply_chat_template(messages[: i + 1], **options)["input_ids"]
            mask[len(before) : len(after)] = True
    assert answers.tolist() == mask.tolist()
