"""Chat templates: Jinja, as tokenizers of Hugging Face ship them, that write conversations as text.

A template is run in Jinja's sandbox: it may come from anybody.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pjit_train.data.marked import Marked
from pjit_train.errors import UserError
from pjit_train.files import read_json

FILES = ("chat_template.jinja", "tokenizer_config.json")
_USES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_SECRET = os.urandom(8).hex()  # no message can hold it
_MARKS = _BEGIN, _END = f"\ufdd0{_SECRET}\ufdd0", f"\ufdd1{_SECRET}\ufdd1"


class _Generation(Extension):
    """Tag of a template around what the model said: marks its text."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in _MARKS)
        return [begin, *body, end]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """Jinja template of a conversation.

    Attributes:
      text: of the template.
      special_tokens: texts of tokens by their use, such as "bos_token", which it may write.
    """

    text: str
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool) -> str:
        """The text of a conversation.

        Args:
          messages: each has a "role" ("system", "user", "assistant") and a "content".
          answer: whether the text ends where the model's answer begins.

        Raises:
          UserError: the template fails, or refuses the messages.
        """
        return self._marked(messages, answer=answer).replace(_BEGIN, "").replace(_END, "")

    def examples(self, messages: Sequence[Mapping[str, Any]]) -> list[Marked]:
        """The texts of a conversation to learn from, with the answers of "assistant" marked.

        Where the template has `{% generation %}` blocks, they are the answers. Otherwise an answer
        is what the text up to its end has more than the text up to where it begins: the whole
        conversation is one text. A template that changes earlier messages as a conversation goes on
        (by leaving out what was thought) gives a text for each answer, as the model will see it.

        Raises:
          UserError: the template fails, or marks no answer.
        """
        whole = self._marked(messages, answer=False)
        if "generation" in self._tags:
            text, answers = _unmarked(whole)
            if not any(end > begin for begin, end in answers):
                raise UserError("the template's {% generation %} blocks hold none of its answers")
            return [Marked(text=text, answers=answers)]
        pairs = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:number], answer=True)
                after = self.render(messages[: number + 1], answer=False)
                if not after.startswith(before):
                    raise UserError(
                        f"the template writes message {number + 1} otherwise than after its "
                        "prompt for an answer; give it {% generation %} blocks around answers"
                    )
                pairs.append((before, after))
        if all(whole.startswith(after) for _, after in pairs):
            answers = tuple((len(before), len(after)) for before, after in pairs)
            return [Marked(text=whole, answers=answers)]
        return [Marked(text=after, answers=((len(before), len(after)),)) for before, after in pairs]

    def _marked(self, messages: Sequence[Mapping[str, Any]], *, answer: bool) -> str:
        try:
            return _compiled(self.text).render(
                messages=list(messages), add_generation_prompt=answer, **self.special_tokens
            )
        except Exception as error:  # a template is a program: anything may go wrong
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if isinstance(error, TemplateError) and (line := getattr(error, "lineno", None)):
                said = f"{said} (line {line})"
            does = "refuses the messages" if type(error) is TemplateError else "fails"
            raise UserError(f"the chat template {does}: {said}") from error

    @functools.cached_property
    def _tags(self) -> set[str]:
        """Names of its tags, such as "if"."""
        return set(re.findall(r"{%[-+]?\s*(\w+)", self.text))


def read_template(path: Path) -> ChatTemplate | None:
    """The chat template of a file or folder; None where a folder has none.

    Args:
      path: a folder of Hugging Face, a tokenizer_config.json, or a file of a template, for which
        the special tokens are those of the tokenizer_config.json beside it.

    Raises:
      UserError: it cannot be read, or a file has none.
    """
    folder = path if path.is_dir() else path.parent
    config = folder / FILES[1] if path.suffix != ".json" else path
    settings = read_json(config) if config.is_file() else {}
    text = settings.get("chat_template")
    if isinstance(text, list):  # several, by name
        named = {row.get("name"): row.get("template") for row in text if isinstance(row, dict)}
        text = named.get("default")
    file = folder / FILES[0] if path.is_dir() else path
    if path.suffix != ".json" and (file.is_file() or file == path):
        text = _text(file)
    if not isinstance(text, str):
        if path.is_dir():
            return None
        raise UserError(f"{path}: has no chat_template; give a file that has one")
    return ChatTemplate(text=text, special_tokens=special_tokens(settings))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens by their use, as a tokenizer_config.json has them."""
    return {name: text for name in _USES if (text := _token_text(settings.get(name))) is not None}


@functools.lru_cache(maxsize=4)
def _compiled(text: str):
    def refuse(message):
        raise TemplateError(message)

    # As `transformers` sets it up, for which templates are written.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _json  # Jinja's own escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)


def _unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A text without marks, and (begin, end) in it of what stood between them."""
    parts, answers, size = [], [], 0
    for number, part in enumerate(re.split(f"{_BEGIN}|{_END}", text)):
        if number % 2:
            answers.append((size, size + len(part)))
        parts.append(part)
        size += len(part)
    return "".join(parts), tuple(answers)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(
            f"chat template {str(path)!r} cannot be read ({said}): give the path of a "
            "chat_template.jinja, a tokenizer_config.json or a folder with one"
        ) from error


def _token_text(value: Any) -> str | None:
    """The text of a token as tokenizer_config.json gives it: itself, or in an object."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
