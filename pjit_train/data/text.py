"""Batches of text that are a pure function of (seed, step)."""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.data.cache import TokenSplit, default_cache_dir, open_cache, tokenize
from pjit_train.data.chat_template import FILES
from pjit_train.data.conversations import Conversations
from pjit_train.data.data import Data
from pjit_train.data.packing import PackedExamples, PackedRows
from pjit_train.data.sources import PythonStdlib, TextFiles, Tfds
from pjit_train.data.tokenizers import Bytes, TokenizerJson
from pjit_train.errors import UserError
from sparsity.ranges import Count, Positive, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData(Data):
    """Text, how it becomes tokens, and how large the batches are.

    Attributes:
      sources: where documents come from; several are mixed.
      weights: of a mixture, how often a row comes from each source, in any unit (kept to 1 %); by
        default equally often.
      tokenizer: text to ids.
      seq_len: positions of a row.
      batch_size: rows of a step, over all hosts.
      mask_documents: whether batches carry `segments`, so that no position sees another document.
      cache_dir: where tokens are kept; by default $TORSION_CACHE or ~/.cache/torsion.
    """

    sources: Sequence[TextFiles | Tfds | PythonStdlib | Conversations] = (PythonStdlib(),)
    weights: Sequence[Positive] | None = None
    tokenizer: Bytes | TokenizerJson = dataclasses.field(default_factory=Bytes)
    seq_len: Count = 256
    batch_size: Count = 16
    mask_documents: bool = False
    cache_dir: str | None = None

    def __post_init__(self):
        check_fields(self, UserError)

    def prepare(self, seed: int, *, keep: bool = True) -> "Batches":
        """Opens the corpus, tokenized into the cache first if it is not there.

        Several processes may call it at once, on one machine or on hosts that share the directory.

        Args:
          seed: of the order of the rows.
          keep: as `cache.open_cache` takes it.

        Raises UserError for an option that makes no sense and for a corpus that cannot be read or
        is shorter than one row.
        """
        caches = self.open_caches(keep=keep)
        rows = {
            split: [self._packed(cache[split]) for cache in caches]
            for split in ("train", "validation")
        }
        for split, source in itertools.product(rows, range(len(caches))):
            packed = rows[split][source]
            if isinstance(packed, PackedExamples) and not len(packed):
                raise UserError(
                    f"{self.sources[source]}: no conversation of the {split} split has an answer "
                    f"that begins within seq_len={self.seq_len}; use a larger one"
                )
        for source, packed in zip(self.sources, rows["train"], strict=True):
            if not len(packed):
                raise UserError(
                    f"{source} has {len(packed.split.tokens)} training tokens, fewer than the "
                    f"{self.seq_len + 1} of one row: give more text, or a seq_len below them"
                )
        weights = [1.0] * len(caches) if self.weights is None else list(self.weights)
        return Batches(self, rows, weights, seed)

    def _packed(self, split: TokenSplit) -> PackedRows | PackedExamples:
        if split.answers is not None:
            return PackedExamples(split=split, seq_len=self.seq_len)
        masked = self.mask_documents
        return PackedRows(split=split, seq_len=self.seq_len, mask_documents=masked)

    @property
    def has_conversations(self) -> bool:
        """Tells whether a source is one of conversations."""
        return any(isinstance(source, Conversations) for source in self.sources)

    @property
    def arrays(self) -> dict[str, str]:
        """The arrays of a training batch, by their names, and their dtypes; see `Batches`."""
        names = ["inputs", "targets", *(["segments"] if self.mask_documents else [])]
        if self.has_conversations:
            names = ["inputs", "targets", "segments", "positions"]
        more = {"weights": "float32"} if self.has_conversations else {}
        return dict.fromkeys(names, "int32") | more

    @property
    def template_files(self) -> list[Path]:
        """Files beside the tokenizer's that chat templates are read from."""
        folder = self._tokenizer_folder
        named = {s.template for s in self.sources if isinstance(s, Conversations)}
        if folder is None or None not in named:
            return []
        return [path for name in FILES if (path := folder / name).is_file()]

    @property
    def _tokenizer_folder(self) -> Path | None:
        file = self.tokenizer_file
        return None if file is None else Path(file.path).expanduser().parent

    def seen_from(self, folder: Path) -> "TextData":
        """Returns the data with relative paths taken from a folder, where something is there."""
        seen: dict[str, Any] = {"sources": [source.seen_from(folder) for source in self.sources]}
        if self.cache_dir and (cache := folder / Path(self.cache_dir).expanduser()).exists():
            seen["cache_dir"] = str(cache)
        return dataclasses.replace(self, **seen)

    @property
    def tokenizer_file(self) -> TokenizerJson | None:
        """The tokenizer where it is a file's; None for bytes."""
        return self.tokenizer if isinstance(self.tokenizer, TokenizerJson) else None

    def open_caches(self, tokenize=tokenize, *, keep: bool = True) -> list[dict[str, TokenSplit]]:
        """Opens the token cache of each source, tokenized first if it is not there.

        Args:
          tokenize: makes the tokens of a source, as `cache.open_cache` takes it.
          keep: whether a cache that has to be built must be kept, likewise.

        Raises UserError for an option that makes no sense and for a corpus that cannot be read.
        """
        if not isinstance(self.sources, Sequence) or not self.sources:
            raise UserError(f"TextData.sources={self.sources!r} must be a list of sources")
        weights = [1.0] * len(self.sources) if self.weights is None else list(self.weights)
        if len(weights) != len(self.sources):
            raise UserError(
                f"TextData.weights={weights} must be as many as the {len(self.sources)} sources"
            )

        cache_dir = Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()
        return [
            open_cache(self._placed(source), self.tokenizer, cache_dir, tokenize, keep=keep)
            for source in self.sources
        ]

    def _placed(self, source: Any) -> Any:
        """A source, one of conversations with its template."""
        if isinstance(source, Conversations):
            return source.beside(self._tokenizer_folder)
        return source


class Batches:
    """The batches of a `TextData`, made by `TextData.prepare`.

    A batch is a dict of arrays [rows, seq_len], `rows` being those asked for of `batch_size`:
      inputs: int32. Documents lie end to end, each beginning with the separator token.
      targets: int32, the token after each input.
      segments: int32, if `mask_documents`: 1, 2, ... by document from the row's start.
      weights: float32, in evaluation batches only: 1 where a target counts, 0 past the end.

    Where a source is one of conversations, every batch has segments, by conversation, and weights,
    of conversations 1 for the tokens of answers alone; and
      positions: int32, from 0 in each conversation, and in each row of other text.
    """

    def __init__(
        self,
        data: TextData,
        rows: dict[str, list[PackedRows | PackedExamples]],
        weights: Sequence[float],
        seed: int,
    ):
        import grain

        self.vocab_size: int = data.tokenizer.vocab_size
        self.batch_size = data.batch_size
        self.seq_len = data.seq_len
        self._rows = rows
        self._whole: dict[str, np.ndarray] = {}  # what a row of text has beside conversations
        if data.has_conversations:
            self._whole = {
                "weights": np.ones(self.seq_len, np.float32),
                "segments": np.ones(self.seq_len, np.int32),
                "positions": np.arange(self.seq_len, dtype=np.int32),
            }
        datasets = [
            # Grain shuffles epoch e with seed + e, so neighbouring seeds must be made strangers.
            grain.MapDataset.source(packed).shuffle(seed=derived_seed(seed, i)).repeat()
            for i, packed in enumerate(rows["train"])
        ]
        mixed = len(datasets) > 1
        self._train = grain.MapDataset.mix(datasets, weights) if mixed else datasets[0]
        # (source, row) of each row of an evaluation: the sources evenly mixed, each in its order.
        sizes = [packed.num_padded for packed in rows["validation"]]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        sources = np.repeat(np.arange(len(sizes)), sizes)
        within = np.concatenate([np.arange(size) for size in sizes])
        order = np.argsort(places, kind="stable")
        self._eval_rows = np.stack([sources[order], within[order]], axis=1)

    @property
    def num_train_sequences(self) -> int:
        """Number of full rows of the training split, over all sources."""
        return sum(len(packed) for packed in self._rows["train"])

    @property
    def tokens_per_epoch(self) -> int:
        """Number of training targets, over all sources."""
        return self.num_train_sequences * self.seq_len

    @property
    def num_eval_batches(self) -> int:
        """Batches in which every token of the validation split is a target once."""
        return -(-len(self._eval_rows) // self.batch_size)

    @property
    def digest(self) -> str:
        """Identifies the tokens of all splits: hosts that read the same corpus agree on it."""
        splits = [packed.split.sha256 for rows in self._rows.values() for packed in rows]
        return hashlib.sha256("".join(splits).encode()).hexdigest()

    def bytes_per_token(self, split: str = "validation") -> float:
        """UTF-8 bytes of the text of a split over its tokens, separators among the tokens.

        So `loss / ln 2 / bytes_per_token` is bits per byte where `loss`, in nats, is the mean over
        all targets: a separator is a token to predict that adds no byte. Of conversations only
        answers count.
        """
        rows = self._rows[split]
        return sum(r.split.text_bytes for r in rows) / sum(r.num_targets for r in rows)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError if a model of `vocab_size` tokens lacks one that the text has."""
        largest = max(packed.split.largest for rows in self._rows.values() for packed in rows)
        if largest >= vocab_size:
            raise UserError(
                f"the model's vocab_size={vocab_size} is too small: the text has token id {largest}"
                f", so it must be at least {largest + 1} (the tokenizer's is {self.vocab_size})"
            )

    def train_batch(self, step: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the given rows of the batch of a step; reads no other row.

        Row r of step s is element s * batch_size + r of the shuffled rows, endlessly repeated and
        shuffled anew each time: an index permutation, so nothing is held in memory.
        """
        first = step * self.batch_size
        return self._stacked([self._train[first + r] for r in range(self.batch_size)[rows]])

    def eval_batch(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns the given rows of batch `index` of the validation split, its sources mixed.

        Over batches 0 .. num_eval_batches - 1 every token of the split but the first of each source
        is a target of weight 1 exactly once.
        """
        first = index * self.batch_size
        return self._stacked([self._eval_row(first + r) for r in range(self.batch_size)[rows]])

    def _stacked(self, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        rows = [self._whole | row for row in rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _eval_row(self, index: int) -> dict[str, np.ndarray]:
        sources = self._rows["validation"]
        if index >= len(self._eval_rows):  # past the end: all padding
            return sources[0].padded(sources[0].num_padded)
        source, row = self._eval_rows[index]
        return sources[source].padded(int(row))


def derived_seed(seed: int, source: int) -> int:
    """Returns the seed of 32 bits with which a source is shuffled."""
    return int.from_bytes(hashlib.sha256(f"shuffle {seed} {source}".encode()).digest()[:4], "big")
