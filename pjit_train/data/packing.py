"""Rows of one length: of text laid end to end, or of whole examples laid side by side."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from pjit_train.data.cache import TokenSplit

log = logging.getLogger("torsion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The rows of one split of text; a random-access source for Grain. Row i reads tokens
    i*seq_len .. i*seq_len + seq_len.

    Attributes:
      split: the tokens, documents laid end to end, each beginning with the separator.
      seq_len: positions of a row.
      mask_documents: whether rows say which document each position belongs to.

    `len` and `[]` are of full rows, as training reads them: a tail shorter than a row is left out.
    """

    split: TokenSplit
    seq_len: int
    mask_documents: bool

    def __len__(self) -> int:
        return max(len(self.split.tokens) - 1, 0) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns row `index`, each array [seq_len] int32; see `padded` for the names."""
        row = self.padded(index)
        del row["weights"]
        return row

    @property
    def num_padded(self) -> int:
        """Rows in which every token but the first is a target, the last one filled up."""
        return -(-(len(self.split.tokens) - 1) // self.seq_len)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted, over the bytes of the text."""
        return len(self.split.tokens)

    def padded(self, index: int) -> dict[str, np.ndarray]:
        """Returns row `index`, filled with zeros past the end of the corpus.

        Returns:
          inputs: int32 [seq_len]; targets: int32 [seq_len], the token after each input.
          weights: float32 [seq_len], 1 where there is a target and 0 past the end.
          segments, if `mask_documents`: int32 [seq_len], 1, 2, ... by document from the row's
            start, 0 past the end.
        """
        start = index * self.seq_len
        window = self.split.tokens[start : start + self.seq_len + 1].astype(np.int32)
        length = len(window)
        if length <= self.seq_len:
            window = np.pad(window, (0, self.seq_len + 1 - length))
        positions = np.arange(self.seq_len)
        row = {
            "inputs": window[:-1],
            "targets": window[1:],
            "weights": (positions < length - 1).astype(np.float32),
        }
        if self.mask_documents:
            starts = self.split.starts[:]
            first, last = np.searchsorted(starts, [start + 1, start + self.seq_len])
            begins = np.zeros(self.seq_len, np.int32)
            begins[starts[first:last] - start] = 1
            segments = 1 + np.cumsum(begins, dtype=np.int32)
            row["segments"] = np.where(positions < length, segments, np.int32(0))
        return row


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedExamples:
    """Rows of the conversations of one split, kept apart; a random-access source for Grain.

    A conversation is whole in a row, in the first one that has room for it, in their order. One
    longer than a row loses its end, and one whose answers all begin there is left out.

    Attributes:
      split: the tokens, with `answers`.
      seq_len: positions of a row.
    """

    split: TokenSplit
    seq_len: int

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns row `index`; see `padded`."""
        return self.padded(index)

    @property
    def num_padded(self) -> int:
        """Rows, all of which may have places left."""
        return len(self)

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted, over the bytes of the answers."""
        return self.split.num_answers

    @functools.cached_property
    def _rows(self) -> list[list[tuple[int, int]]]:
        """(first token, tokens) of the examples of each row."""
        starts = [*self.split.starts[:].tolist(), len(self.split.tokens)]
        examples, cut, lost = [], 0, 0
        for start, end in itertools.pairwise(starts):
            size = min(end - start, self.seq_len + 1)
            cut += size < end - start
            if self.split.answers[start + 1 : start + size].any():
                examples.append((start, size))
            else:
                lost += 1
        if cut:
            log.warning(
                "%d of %d conversations are longer than seq_len=%d and lose their end, %d of them "
                "all their answers",
                *(cut, len(starts) - 1, self.seq_len, lost),
            )
        rows = first_fit([size - 1 for _, size in examples], self.seq_len)
        return [[examples[i] for i in row] for row in rows]

    def padded(self, index: int) -> dict[str, np.ndarray]:
        """Returns row `index`, each array [seq_len], zeros past the last example and the last row.

        Returns:
          inputs, targets: int32, a token and that after it in its conversation.
          weights: float32, 1 where the target is of an answer.
          segments: int32, 1, 2, ... by conversation.
          positions: int32, 0, 1, ... in each conversation.
        """
        names = ("inputs", "targets", "weights", "segments", "positions")
        row = {name: np.zeros(self.seq_len, np.int32) for name in names}
        row["weights"] = row["weights"].astype(np.float32)
        at = 0
        examples = self._rows[index] if index < len(self) else []
        for segment, (start, size) in enumerate(examples, start=1):
            tokens = self.split.tokens[start : start + size]
            here, at = slice(at, at + size - 1), at + size - 1
            row["inputs"][here], row["targets"][here] = tokens[:-1], tokens[1:]
            row["weights"][here] = self.split.answers[start + 1 : start + size]
            row["segments"][here] = segment
            row["positions"][here] = np.arange(size - 1)
        return row


def first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Bins of things: each thing, in their order, is in the first bin that has room for it.

    Args:
      sizes: of the things, from 1 to `room`.
      room: of a bin.

    Returns:
      The indices of the things in each bin. At most 1.7 times as many bins as the fewest possible,
      rounded down (Dosa and Sgall, 2013).
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    free = [room] * (2 * leaves)  # a tree: free[i] is the most room of the bins below node i
    bins: list[list[int]] = []
    for thing, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node + (free[2 * node] < size)
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(thing)
        free[node] -= size
        while node := node // 2:
            free[node] = max(free[2 * node], free[2 * node + 1])
    return bins
