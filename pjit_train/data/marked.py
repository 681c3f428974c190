"""Texts of which parts are marked: conversations with their answers."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked:
    """A text with parts of it marked.

    Attributes:
      answers: (begin, end) of each part, in characters; ends are exclusive.
    """

    text: str
    answers: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.text)

    def spans(self) -> np.ndarray:
        """Tells of each character whether it is in a marked part, bool [characters]."""
        inside = np.zeros(len(self.text), bool)
        for begin, end in self.answers:
            inside[begin:end] = True
        return inside
