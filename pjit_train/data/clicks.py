"""Batches of samples with clicks that are a pure function of (seed, step)."""

import dataclasses
import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from pjit_train.data.click_sources import ClickTable, CriteoFiles, SyntheticClicks, WordPairs
from pjit_train.data.data import Data
from pjit_train.data.text import derived_seed
from pjit_train.errors import UserError
from sparsity.ranges import Count, check_fields


class OpenedClicks(Protocol):
    """Samples of a source, by their index in a split.

    Attributes:
      digest: hexadecimal SHA-256 of what they are made from.
      sizes: samples of each split, "train" and "validation".
    """

    digest: str
    sizes: dict[str, int]

    def samples(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of samples: "labels" float32 [n], "dense" float32 [n, num_dense] where there are
        any, "ids" int32 [n, sum of hotness], and "lengths" int32 [n, features] where bags are of
        several lengths."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClickData(Data):
    """Samples with clicks, and how large the batches are.

    Attributes:
      source: where samples come from.
      batch_size: samples of a step, over all hosts.
    """

    source: SyntheticClicks | CriteoFiles | ClickTable | WordPairs
    batch_size: Count = 2048

    def __post_init__(self):
        check_fields(self, UserError)

    def prepare(self, seed: int, *, keep: bool = True) -> "ClickBatches":
        """Opens the samples; see `Data.prepare`."""
        opened = self.source.open()
        for split, size in opened.sizes.items():
            if not size:
                raise UserError(f"{self.source} has no samples for {split}; give it some")
        return ClickBatches(self, opened, seed)

    def seen_from(self, folder: Path) -> "ClickData":
        """Returns the data with relative paths of the source taken from a folder."""
        return dataclasses.replace(self, source=self.source.seen_from(folder))


class ClickBatches:
    """The batches of a `ClickData`, made by `ClickData.prepare`.

    A batch is a dict of arrays as `OpenedClicks.samples` gives them; and in evaluation batches
    "weights", float32 [rows]: 0 past the end of the split.
    """

    def __init__(self, data: ClickData, opened: OpenedClicks, seed: int):
        self.data, self.seed, self.batch_size = data, seed, data.batch_size
        self._opened, self.digest = opened, opened.digest
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def num_train(self) -> int:
        """Number of samples of the training split."""
        return self._opened.sizes["train"]

    @property
    def num_eval_batches(self) -> int:
        """Batches in which every sample of the validation split stands once."""
        return -(-self._opened.sizes["validation"] // self.batch_size)

    def train_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The given rows of the batch of a step; reads no others."""
        places = step * self.batch_size + np.arange(self.batch_size)[rows]
        epochs, within = np.divmod(places, self.num_train)
        indices = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            indices[of_epoch] = self._order(int(epoch))[within[of_epoch]]
        return self._opened.samples("train", indices)

    def eval_batch(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """The given rows of batch `index` of the validation split, in its order."""
        indices = index * self.batch_size + np.arange(self.batch_size)[rows]
        last = self._opened.sizes["validation"] - 1
        found = self._opened.samples("validation", np.minimum(indices, last))
        return found | {"weights": (indices <= last).astype(np.float32)}

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([derived_seed(self.seed, 0), epoch])
        return rng.permutation(self.num_train)
