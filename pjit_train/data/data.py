"""Data of a run, whatever is in them: batches by (seed, step)."""

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np


class Batches(Protocol):
    """The batches of a run, a pure function of (seed, step).

    Attributes:
      batch_size: rows of a batch, over all hosts.
    """

    batch_size: int

    @property
    def num_eval_batches(self) -> int:
        """Batches of the validation split, the last one padded."""
        ...

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 that is another one where the data are others."""
        ...

    def train_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of the batch of a step, from step 0; reads no others."""
        ...

    def eval_batch(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of a batch of the validation split; of weight 0 past its end."""
        ...


class Data(abc.ABC):
    """The configuration of data: a frozen dataclass with the size of a batch."""

    batch_size: int
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @abc.abstractmethod
    def prepare(self, seed: int, *, keep: bool = True) -> Batches:
        """Opens the data, and prepares what batches are made from.

        Args:
          seed: of the order of the rows.
          keep: whether what is made on the way (a cache) must be kept for others.

        Raises:
          UserError: they cannot be read, or are too few.
        """

    def seen_from(self, folder: Path) -> "Data":
        """Returns the data with relative paths taken from a folder, where something is there."""
        return self

    @property
    def template_files(self) -> list[Path]:
        """Files beside that of the tokenizer that the data are read with, too."""
        return []

    @property
    def tokenizer_file(self):
        """The `TokenizerJson` that the data are read with; None for none."""
        return None
