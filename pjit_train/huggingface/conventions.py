"""Conventions of a Hugging Face folder: tokens of begin and end, and the form of a chat."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pjit_train.data.chat_template import FILES, ChatTemplate, read_template, special_tokens
from pjit_train.data.tokenizers import TokenizerJson
from pjit_train.errors import UserError
from pjit_train.files import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventions:
    """Ways in which a model was used in training, besides its text.

    Attributes:
      begin: id of the token that begins a text; None where the model has none.
      ends: ids of the tokens that end one.
      adds_begin: whether the tokenizer puts `begin` before a text by itself.
      chat_template: Jinja template of a conversation, or None.
      special_tokens: texts of tokens by their use, such as "bos_token", for the template.
    """

    begin: int | None
    ends: tuple[int, ...]
    adds_begin: bool
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> str:
        """The text of a conversation, as the template of the model writes it.

        Args:
          messages: each has a "role" ("system", "user", "assistant") and a "content".
          answer: whether the text ends where the model's answer begins.

        Raises:
          UserError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise UserError(
                "chat: the model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); use --prompt"
            )
        template = ChatTemplate(text=self.chat_template, special_tokens=self.special_tokens)
        return template.render(messages, answer=answer)


def copy_conventions(folder: Path, to: Path) -> None:
    """Copies the files of a folder that say how its tokenizer is used, those that it has."""
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def read_conventions(folder: Path) -> tuple[TokenizerJson, Conventions]:
    """The tokenizer of a Hugging Face folder, and how the model is used with it.

    The token of begin is that of tokenizer_config.json or else of config.json; the tokens of end
    are all that generation_config.json, config.json and tokenizer_config.json name.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has no tokenizer.json, by which text becomes tokens")
    config = read_json(folder / "config.json")
    generation = _read_if_there(folder / "generation_config.json")
    settings = _read_if_there(folder / "tokenizer_config.json")
    tokens = special_tokens(settings)
    plain = TokenizerJson(path=str(folder / "tokenizer.json"))
    ids = {name: plain.token_id(text) for name, text in tokens.items()}

    begin = ids.get("bos_token")
    if begin is None:
        begin = next(iter(_ids(config.get("bos_token_id"))), None)
    ends = [*_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    if (end := ids.get("eos_token")) is not None:
        ends.append(end)
    ends = tuple(dict.fromkeys(i for i in ends if i < plain.vocab_size))

    adds = settings.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = begin is not None and plain.adds_first() == begin
    template = read_template(folder)
    separator = plain.token_text(ends[0]) if ends else None
    return TokenizerJson(path=plain.path, separator_token=separator), Conventions(
        begin=begin,
        ends=ends,
        adds_begin=adds,
        chat_template=None if template is None else template.text,
        special_tokens=tokens,
    )


_FILES = (*FILES, "generation_config.json", "special_tokens_map.json")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(value: Any) -> list[int]:
    """Ids of a value that may be one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and i >= 0]
