"""Conversations: a source whose texts a chat template writes, and of which the answers are learned.

Like the sources of `sources`, but its documents are `tokenizers.Marked`: texts with their answers.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pjit_train.data.chat_template import ChatTemplate, read_template
from pjit_train.data.files import kind, read_rows
from pjit_train.data.local_files import Files
from pjit_train.data.marked import Marked
from pjit_train.data.sources import falls_below
from pjit_train.data.tables import Kind
from pjit_train.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations(Files):
    """Local files of conversations: .jsonl, one a line, also as .gz or .zst; .parquet, .arrow and
    .feather, one a row.

    Each is written as text by the tokenizer's chat template, and only what the role "assistant"
    says counts in the loss (`chat_template.ChatTemplate.examples` says what of the text that is).

    Attributes:
      train: a path or a glob ("chats/*.parquet"), or several; and likewise `validation`.
      validation_fraction: how large a part of `train` validates where `validation` is None. A
        conversation goes by the hash of what is said; of fewer than 20 / validation_fraction, which
        that might leave with none, the last ones go.
      messages: the key of a line, or the column, that holds a list of objects with "role" and
        "content".
      prompt, answer: names of two texts in place of `messages`: what the user says and what is
        answered, such as "question" and "answer".
      template: a file of a chat template, a tokenizer_config.json that has one, or a folder with
        either; by default the folder of the tokenizer's file.
    """

    messages: str = "messages"
    prompt: str | None = None
    answer: str | None = None
    template: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if (self.prompt is None) != (self.answer is None):
            raise UserError(
                f"Conversations: prompt={self.prompt!r} and answer={self.answer!r}; give both, "
                "or neither for messages"
            )

    def documents(self, split: str, cache_dir: Path | None = None) -> Iterator[Marked]:
        """Yields the conversations of a split as text.

        Raises:
          UserError: a file, a line or a row cannot be read, the template fails, a conversation has
            no answer; or, at the end, the split has none.
        """
        template, empty = self._read_template(), True
        for place, chat in self._chats(split):
            try:
                examples = template.examples(chat)
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            for example in examples:
                empty = False
                yield example
        if empty:
            raise UserError(
                f"Conversations: train={self.train!r}, validation={self.validation!r} leave no "
                f"conversation for {split}; give more, or files for each"
            )

    def key(self, cache_dir: Path | None = None) -> Any:
        """Returns the path, size and time of every file, the options, and the template."""
        name, key = super().key(cache_dir)
        return [name, key | {"template": dataclasses.asdict(self._read_template())}]

    def seen_from(self, folder: Path) -> "Conversations":
        """Returns the source with relative paths taken from a folder, if something is there."""
        seen = super().seen_from(folder)
        path = None if self.template is None else folder / Path(self.template).expanduser()
        return seen if path is None or not path.exists() else replace(seen, template=str(path))

    def beside(self, folder: Path | None) -> "Conversations":
        """Returns the source with the template of a tokenizer's folder where it names none."""
        if self.template is not None or folder is None:
            return self
        return replace(self, template=str(folder))

    def _read_template(self) -> ChatTemplate:
        template = None
        if self.template is not None:
            template = read_template(Path(self.template).expanduser())
        if template is None:
            where = f"in {self.template!r}" if self.template else "beside a tokenizer of bytes"
            raise UserError(
                f"Conversations: there is no chat template {where}: set its template to a "
                "chat_template.jinja or a tokenizer_config.json that has one"
            )
        return template

    def _chats(self, split: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The place and the messages of each conversation of a split."""
        if self.validation is not None:
            yield from self._read(self.train if split == "train" else self.validation)
            return
        enough = int(20 / self.validation_fraction)
        count = sum(1 for _ in itertools.islice(self._read(self.train), enough))
        last = count - max(1, round(count * self.validation_fraction))
        for number, (place, chat) in enumerate(self._read(self.train)):
            if count < enough:
                validates = number >= last
            else:
                validates = falls_below(self.validation_fraction, json.dumps(chat, sort_keys=True))
            if validates == (split == "validation"):
                yield place, chat

    def _read(self, patterns) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        kinds: dict[str, Kind] = {self.messages: "messages"}
        if self.prompt is not None and self.answer is not None:
            kinds = {self.prompt: "text", self.answer: "text"}
        for path in self._paths(patterns):
            if ".txt" in Path(path.lower()).suffixes:
                raise UserError(
                    f"Conversations: {path!r} is no .jsonl, .parquet, .arrow or .feather; give one"
                )
            for place, row in read_rows(path, kinds):
                yield place, self._messages(place, row)

    def _messages(self, place: str, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of a row, checked."""
        if self.prompt is not None and self.answer is not None:
            for name in (self.prompt, self.answer):
                if not isinstance(row[name], str):
                    raise UserError(f"{place}: {name!r} is {kind(row[name])}, not a text")
            if not row[self.answer]:
                raise UserError(f"{place}: {self.answer!r} is empty; give an answer")
            said = (("user", row[self.prompt]), ("assistant", row[self.answer]))
            return [{"role": role, "content": text} for role, text in said]
        given = row[self.messages]
        if not isinstance(given, list):
            raise UserError(
                f"{place}: {self.messages!r} is {kind(given)}, not a list of messages such as "
                '{"role": "user", "content": "..."}'
            )
        messages, answered = [], False
        for number, message in enumerate(given, start=1):
            # Arrow gives every message the fields that any has, null where it has none.
            said = message if isinstance(message, dict) else {}
            said = {name: value for name, value in said.items() if value is not None}
            for name in ("role", "content"):
                if not isinstance(said.get(name), str):
                    raise UserError(
                        f"{place}: message {number} has no text under {name!r}; give each "
                        '"role" ("system", "user", "assistant") and "content"'
                    )
            answered |= said["role"] == "assistant" and bool(said["content"])
            messages.append(said)
        if not answered:
            raise UserError(
                f'{place}: the conversation has no answer, a message of the role "assistant" that '
                "is not empty; give it one, or leave it out"
            )
        return messages
