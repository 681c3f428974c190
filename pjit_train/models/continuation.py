"""The text of tokens that come one after the other."""

from collections.abc import Collection, Sequence

import numpy as np

_CONTEXT = 16  # tokens of the prompt that are decoded with the new ones: spaces depend on them
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # of a character whose last bytes are still to come


class Continuation:
    """Text that continues a prompt, until a token or a text that ends it.

    Args:
      tokenizer: of `pjit_train.data`.
      prompt: its ids.
      ends: ids of the tokens that end the text; they are no part of it.
      stop: texts that end it; they are no part of it either.

    Attributes:
      ids: of the new tokens, without one that ended the text.
      text: as far as it is sure: no character or stop text is begun.
      done: whether the text has ended.
    """

    def __init__(
        self,
        tokenizer,
        prompt: np.ndarray,
        *,
        ends: Collection[int] = (),
        stop: Sequence[str] = (),
    ):
        self.ids: list[int] = []
        self.text, self.done = "", False
        self._tokenizer, self._ends = tokenizer, ends
        self._stop = [text for text in stop if text]
        self._context = [int(i) for i in prompt[-_CONTEXT:]]
        self._before = len(tokenizer.decode(self._context))

    def push(self, token: int) -> str:
        """Takes the next token, and returns what is new of the text; "" once it has ended."""
        if self.done:
            return ""
        if token in self._ends:
            return self.finish()
        self.ids.append(token)
        return self._show(self._decoded(), whole=False)

    def finish(self) -> str:
        """Ends the text where it is, and returns what is new of it."""
        if self.done:
            return ""
        new = self._show(self._decoded(), whole=True)
        self.done = True
        return new

    def _decoded(self) -> str:
        return self._tokenizer.decode([*self._context, *self.ids])[self._before :]

    def _show(self, text: str, *, whole: bool) -> str:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.done = text[: min(found)], True
        elif not whole:
            text = text.rstrip(_BROKEN)
            held = max((_begun(text, stop) for stop in self._stop), default=0)
            text = text[: len(text) - held]
        if not text.startswith(self.text):  # a decoder that changes what it said: keep to that
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
