"""Tokenizers: bytes, or any Hugging Face `tokenizers` JSON file; and how to train such a file.

Each has a separator, the token that begins every document of the packed corpus and that no text
can produce.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pjit_train.data.marked import Marked
from pjit_train.errors import UserError
from pjit_train.files import replacing

# What the common tokenizer files call the token between two documents, most likely first.
KNOWN_SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "[SEP]",
)
LARGEST_VOCABULARY = 1 << 24  # to train: the library takes 70 bytes for each token asked for
_NO_TOKEN = "\ufdd0"  # a noncharacter, which no vocabulary has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """The UTF-8 bytes of a text are its tokens: 256 of them, 0xFF the separator.

    No UTF-8 text has a byte 0xFF (RFC 3629, section 1).
    """

    vocab_size = 256
    separator = 255

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, uint8 [tokens]; a lone surrogate becomes "?"."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_marked(self, text: str) -> np.ndarray:
        """Returns the ids of a text; no text has a special token."""
        return self.encode(text)

    def encode_parts(self, texts: Sequence[Marked]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns of each text the ids, and whether each is of a marked part, bool [tokens]."""
        found = []
        for marked in texts:
            lengths = [len(character.encode("utf-8", "replace")) for character in marked.text]
            found.append((self.encode(marked.text), np.repeat(marked.spans(), lengths)))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, separators dropped; broken UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside 0..255.
        """
        return bytes(int(i) for i in ids if i != self.separator).decode("utf-8", "replace")

    def decode_plain(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without special tokens; see `decode`."""
        return self.decode(ids)

    def token_id(self, token: str) -> None:
        """Returns None: no token has a text by which it would be known."""

    def token_text(self, index: int) -> None:
        """Returns None, as `token_id`."""

    def digest(self) -> str:
        """Returns what identifies this tokenizer in the key of a cache."""
        return "bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerJson:
    """A Hugging Face `tokenizers` JSON file (a `tokenizer.json`).

    Attributes:
      path: the file.
      separator_token: the token between documents, such as "<|endoftext|>"; by default the first of
        `KNOWN_SEPARATORS` that the vocabulary has.

    Every method raises UserError where the file is missing or unreadable, or has no such separator;
    and `encode` for a text that the vocabulary does not cover, where the file names no unknown
    token for it. The file is read at the first use, not in the constructor.
    """

    path: str
    separator_token: str | None = None

    def __getstate__(self) -> dict:
        """The fields and the file's text, so that a copy in another process needs no file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"text": self.text}  # a pickled library object would lose its settings

    @functools.cached_property
    def _tokenizer(self):
        # Imported here because the bytes tokenizer needs no library.
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        try:
            with _silent_stderr():
                tokenizer = Tokenizer.from_str(self.text)
        except BaseException as error:  # the library raises bare Exception for any malformed file
            if not _of_library(error):
                raise
            raise UserError(
                f"tokenizer {self.path!r} is not a Hugging Face tokenizers JSON file: "
                f"{_first_line(error)}"
            ) from error
        # Whole documents are encoded, without cutting or filling ...
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # ... and a document that spells "<|endoftext|>" gets those characters, not a separator.
        tokenizer.encode_special_tokens = True
        model = tokenizer.model
        if getattr(model, "dropout", None):
            model.dropout = None  # the same text has the same ids
        if isinstance(model, BPE) and model.unk_token is None:
            # The library drops what the vocabulary lacks; for an unknown token that is not in the
            # vocabulary it raises an error, as other models do that have none.
            model.unk_token = _NO_TOKEN
        return tokenizer

    @functools.cached_property
    def text(self) -> str:
        """Text of the tokenizer's file."""
        path = Path(self.path).expanduser()
        try:
            if path.exists() and not path.is_file():  # a pipe might never answer
                raise OSError("it is no file")
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"tokenizer {self.path!r} cannot be read ({_first_line(error)}): "
                "give the path of a tokenizer.json"
            ) from error

    @functools.cached_property
    def vocab_size(self) -> int:
        """Size of the vocabulary: the greatest id plus 1 (ids of some files have gaps)."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError(f"tokenizer {self.path!r} has no tokens: give one with a vocabulary")
        return 1 + max(ids)

    @functools.cached_property
    def separator(self) -> int:
        """Id of the separator token."""
        asked = KNOWN_SEPARATORS if self.separator_token is None else (self.separator_token,)
        for token in asked:
            if (index := self._tokenizer.token_to_id(token)) is not None:
                return index
        raise UserError(
            f"tokenizer {self.path!r} has no token {' or '.join(asked)}: "
            "set separator_token to a token of its vocabulary"
        )

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, uint32 [tokens], with no token added at either end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text; the library uses every core for it."""
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # bare Exception again
            if not _of_library(error):
                raise
            raise self._not_encoded(texts, error) from error
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def encode_marked(self, text: str) -> np.ndarray:
        """Returns the ids of a text in which the tokenizer's special tokens stand for themselves.

        As `transformers` encodes: "<|im_start|>" in a chat becomes one token; in `encode` it is
        the characters.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_parts(self, texts: Sequence[Marked]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns of each text the ids, and whether each has a character of a marked part.

        Special tokens stand for themselves. The ids are uint32 [tokens], the others bool [tokens].
        """
        plain = [marked.text.encode("utf-8", "replace").decode("utf-8") for marked in texts]
        self._tokenizer.encode_special_tokens = False
        try:
            encodings = self._tokenizer.encode_batch(plain, add_special_tokens=False)
        except BaseException as error:
            if not _of_library(error):
                raise
            raise self._not_encoded(plain, error) from error
        finally:
            self._tokenizer.encode_special_tokens = True
        found = []
        for marked, encoding in zip(texts, encodings, strict=True):
            before = np.concatenate([[0], np.cumsum(marked.spans())])  # marked characters so far
            begins, ends = np.asarray(encoding.offsets, int).reshape(-1, 2).T
            found.append((np.asarray(encoding.ids, np.uint32), before[ends] > before[begins]))
        return found

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text; None where the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def token_text(self, index: int) -> str | None:
        """Text of a token by its id; None for no token."""
        return self._tokenizer.id_to_token(index)

    def adds_first(self) -> int | None:
        """Id of the token that the file itself puts before every text; None for none."""
        bare, whole = (self._tokenizer.encode("a", add_special_tokens=a).ids for a in (False, True))
        return whole[0] if whole and whole[:1] != bare[:1] else None

    def _not_encoded(self, texts: Sequence[str], error: BaseException) -> UserError:
        """Explains the library's error over some texts, which names neither text nor word."""
        what = f"tokenizer {self.path!r} ({type(self._tokenizer.model).__name__})"
        unknown = next((word for text in texts for word in self._unknown_words(text)), None)
        if unknown is None:
            return UserError(f"{what} cannot encode the text: {_first_line(error)}")
        return UserError(
            f"{what} has no token for {unknown!r} and no unknown token: give it one in its "
            "vocabulary (unk_token), or text that it covers"
        )

    def _unknown_words(self, text: str) -> Iterator[str]:
        """The parts of a text that the vocabulary does not cover, characters where that is so."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        of_characters = type(self._tokenizer.model).__name__ in ("BPE", "Unigram")
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        words = [(text, (0, len(text)))] if splitter is None else splitter.pre_tokenize_str(text)
        for word, (start, end) in words:
            if not self._covers(word):
                shown = text[start:end]
                # `word` may be in the library's own spelling of bytes.
                by_character = of_characters and word == shown
                odd = [c for c in shown if not self._covers(c)] if by_character else []
                yield (odd or [shown[:40]])[0]

    def _covers(self, word: str) -> bool:
        try:
            self._tokenizer.model.tokenize(word)
        except Exception:
            return False
        return True

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, separators dropped."""
        kept = [int(i) for i in ids if i != self.separator]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def decode_plain(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, all special tokens dropped."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def digest(self) -> str:
        """Returns what identifies this tokenizer in the key of a cache: file and separator."""
        return hashlib.sha256(f"{self.separator}\n{self.text}".encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, path: str) -> TokenizerJson:
    """Trains a byte-level BPE tokenizer and writes its JSON file, whole or not at all.

    Args:
      texts: the documents; read once, never held together.
      vocab_size: ids wanted, at least 257: the 256 bytes and the separator "<|endoftext|>". A small
        text may have fewer pairs to merge; then the vocabulary is smaller.
      path: where the file goes; an existing one is replaced.

    Returns:
      The tokenizer, whose `vocab_size` says how many ids there are.

    Raises:
      UserError: a vocabulary too small or too large, no text, or a path that cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes and a separator need at least 257"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} is too large: use {LARGEST_VOCABULARY} at most")
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise UserError(f"tokenizer path {path!r}: the folder {str(target.parent)!r} is missing")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0

    def counted():
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text.encode("utf-8", "replace").decode("utf-8")

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("the corpus of the tokenizer is empty: give at least one document of text")

    try:
        with replacing(target) as new:
            new.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer path {path!r} cannot be written: {error.strerror}") from error
    return TokenizerJson(path=str(target))


def _of_library(error: BaseException) -> bool:
    """Tells whether `tokenizers` raised an error: a bare Exception, or its Rust code's panic."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keeps descriptor 2 away for a moment: Rust prints a panic there, and raises it as well."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
