"""Rows of one length from a packed corpus: row i reads tokens i*seq_len .. i*seq_len + seq_len."""

import dataclasses

import numpy as np

from pjit_train.data.cache import TokenSplit


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """The rows of one split; a random-access source for Grain.

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
