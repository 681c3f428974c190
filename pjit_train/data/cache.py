"""The token cache: a corpus is tokenized once, and then memory-mapped.

A cache is one directory named by a digest of what it was made from (source and tokenizer):

  train.tokens, validation.tokens   the ids, uint8, uint16 or uint32 by the size of the vocabulary:
                                    documents end to end, each beginning with the separator
  train.starts, validation.starts   int64, where each document begins
  train.answers, validation.answers of conversations only: bool, whether an id is of an answer;
                                    their documents begin with no separator
  *.crc32                           the checksums of the blocks of these files (see `checked`)
  cache.json                        the key, the type of the ids, and of each split the sizes of its
                                    files, the UTF-8 bytes of its text and the tokens' sha256; and
                                    the sha256 of all that

It is built in a sibling directory and renamed, so it is there whole or not at all.
"""

import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pjit_train.data import checked
from pjit_train.data.marked import Marked
from pjit_train.errors import UserError
from pjit_train.files import json_sha256
from pjit_train.signals import unfinished
from pjit_train.waiting import told

log = logging.getLogger("torsion")
SPLITS = ("train", "validation")
FORMAT = 2  # part of every key: a cache of another layout is never read
BATCH_CHARACTERS = 1 << 20  # what is tokenized at a time: enough to keep every core busy
BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """Split of a tokenized corpus.

    Attributes:
      tokens: [tokens] uint8, uint16 or uint32.
      starts: [documents] int64; where in `tokens` each document's separator is.
      text_bytes: UTF-8 bytes of the documents' text.
      sha256: of the ids as little-endian uint8, uint16 or uint32.
      largest: the greatest id.
      answers: [tokens] bool, whether a token is of an answer in a conversation; None of other text.
      num_answers: tokens of answers.
    """

    tokens: checked.CheckedArray
    starts: checked.CheckedArray
    text_bytes: int
    sha256: str
    largest: int
    answers: checked.CheckedArray | None = None
    num_answers: int = 0


class Encoded(NamedTuple):
    """Encoded documents: the ids of each, [tokens], and the UTF-8 bytes of the text of all.

    Of conversations also whether an id is of an answer, [tokens] bool; the bytes are of answers.
    """

    ids: Sequence[np.ndarray]
    text_bytes: int
    answers: Sequence[np.ndarray] | None = None


def encode(texts: Sequence[str] | Sequence[Marked], tokenizer) -> Encoded:
    """Returns the ids of texts under one of `tokenizers`."""
    marked = [text for text in texts if isinstance(text, Marked)]
    if marked:
        ids, answers = zip(*tokenizer.encode_parts(marked), strict=True)
        parts = (text.text[begin:end] for text in marked for begin, end in text.answers)
        return Encoded(ids, sum(len(part.encode("utf-8", "replace")) for part in parts), answers)
    plain = [text for text in texts if isinstance(text, str)]
    text_bytes = sum(len(text.encode("utf-8", "replace")) for text in plain)
    return Encoded(tokenizer.encode_batch(plain), text_bytes)


def tokenize(source, split: str, tokenizer, cache_dir: Path) -> Iterator[Encoded]:
    """Yields the documents of a split that are not empty, in their order, encoded in this process.

    Another function of this form may do it elsewhere (see `open_cache`): only the documents and
    their order count for the cache, not how many come at a time.
    """
    for texts in batches(source.documents(split, cache_dir)):
        yield encode(texts, tokenizer)


def default_cache_dir() -> Path:
    """Returns $TORSION_CACHE, or ~/.cache/torsion."""
    return Path(os.environ.get("TORSION_CACHE") or "~/.cache/torsion").expanduser()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes `path` a directory to be built by one process of this machine at a time.

    Raises UserError where the directory above it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115
        try:  # the lock falls with the process, so a kill leaves nothing locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with told(f"another process, which makes {path}"):
                fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"cache directory {str(path.parent)!r} cannot be written ({error.strerror}): "
            "set cache_dir or $TORSION_CACHE to one that can"
        ) from error
    with lock:
        yield


def open_cache(
    source,
    tokenizer,
    cache_dir: Path,
    tokenize: Callable[[Any, str, Any, Path], Iterator[Encoded]] = tokenize,
    *,
    keep: bool = True,
) -> dict[str, TokenSplit]:
    """Opens the cache of a source under a tokenizer, and builds it first where there is none.

    Args:
      source: one of `sources`.
      tokenizer: one of `tokenizers`.
      cache_dir: where caches are kept; made if missing.
      tokenize: reads and encodes a split where it has to be built; by default in this process.
      keep: whether a cache that has to be built must be kept; if not, one that cannot be is built
        in a directory that ends with this process.

    Returns:
      The splits "train" and "validation".

    Raises:
      UserError: an unusable source, a split with no text, a directory that cannot be written.
    """
    key = {"format": FORMAT, "source": source.key(cache_dir), "tokenizer": tokenizer.digest()}
    path = cache_dir / f"tokens-{json_sha256(key)[:16]}"
    if (splits := _load(path, key)) is not None:
        return splits
    if not keep and (error := _unwritable(cache_dir)) is not None:
        log.warning(
            "cache directory %s cannot be written (%s): tokens are made for this command alone",
            cache_dir,
            error.strerror,
        )
        with contextlib.suppress(OSError):  # else what follows says what is wrong
            cache_dir = Path(tempfile.mkdtemp(prefix="torsion-"))
            atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
            path = cache_dir / path.name
    with locked(path):
        splits = _load(path, key)  # another process may have built it while this one waited
        if splits is None:
            _build(path, key, source, tokenizer, cache_dir, tokenize)
            splits = _load(path, key)
    return splits


def _answers_of(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of a split that conversations have; none of other text."""
    if "num_answers" not in entry:
        return {}
    answers = checked.CheckedArray(path, bool)
    if len(answers) * entry["id_bytes"] != entry["tokens_bytes"]:
        raise ValueError(f"{path} is not of the size of its tokens")
    return {"answers": answers, "num_answers": entry["num_answers"]}


def _unwritable(directory: Path) -> OSError | None:
    """Error that keeps a directory from being written to; None where it can be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        return error
    return None


def _load(path: Path, key: Any) -> dict[str, TokenSplit] | None:
    """Maps the cache at `path`; None if it is missing, cut short, unreadable or of another key."""
    try:
        meta = json.loads((path / "cache.json").read_text())
        if meta.pop("sha256") != json_sha256(meta) or meta["key"] != json.loads(json.dumps(key)):
            return None
        splits = {}
        for split in SPLITS:
            entry = meta["splits"][split]
            tokens, starts = path / f"{split}.tokens", path / f"{split}.starts"
            if [tokens.stat().st_size, starts.stat().st_size] != [
                entry["tokens_bytes"],
                entry["starts_bytes"],
            ]:
                return None
            splits[split] = TokenSplit(
                tokens=checked.CheckedArray(tokens, meta["dtype"]),
                starts=checked.CheckedArray(starts, np.int64),
                text_bytes=entry["text_bytes"],
                sha256=entry["sha256"],
                largest=entry["largest"],
                **_answers_of(path / f"{split}.answers", entry),
            )
        return splits
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _build(path: Path, key: Any, source, tokenizer, cache_dir: Path, tokenize) -> None:
    """Builds the cache at `path`, in place of an unreadable one."""
    prefix = f"{path.name}.{socket.gethostname()}."  # hosts may share the directory, not the lock
    for abandoned in path.parent.glob(f"{prefix}*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    dtype = id_type(tokenizer.vocab_size)
    try:
        with unfinished(temporary):
            temporary.mkdir()
            splits = {
                split: _write_split(
                    temporary / split,
                    tokenize(source, split, tokenizer, cache_dir),
                    tokenizer.separator,
                    dtype,
                )
                for split in SPLITS
            }
            for split, entry in splits.items():
                if not entry["tokens_bytes"]:
                    raise UserError(
                        f"the {split} split of {source} has no text: give it at least one document"
                    )
            meta = {"key": key, "dtype": np.dtype(dtype).name, "splits": splits}
            meta["sha256"] = json_sha256(meta)
            (temporary / "cache.json").write_text(json.dumps(meta, indent=1))
            if _load(path, key) is None:  # else a host that shares the directory was faster
                if path.exists():
                    path.rename(unreadable := path.with_name(f"{prefix}unreadable.tmp"))
                    shutil.rmtree(unreadable, ignore_errors=True)
                temporary.rename(path)
    except OSError as error:
        raise UserError(f"the token cache {str(path)!r} cannot be built: {error}") from error


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds the ids of a vocabulary."""
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _write_split(
    stem: Path, encoded: Iterable[Encoded], separator: int, dtype: type[np.unsignedinteger]
) -> dict[str, Any]:
    """Writes stem.tokens and stem.starts; returns their entry in cache.json."""
    digest = hashlib.sha256()
    written = text_bytes = largest = documents_written = num_answers = 0
    marked = False
    tokens_path, starts_path = Path(f"{stem}.tokens"), Path(f"{stem}.starts")
    with contextlib.ExitStack() as files:
        tokens_file, starts_file = (
            files.enter_context(checked.Writer(path)) for path in (tokens_path, starts_path)
        )
        for documents, size, answers in encoded:
            if answers is not None and not marked:
                answers_file = files.enter_context(checked.Writer(Path(f"{stem}.answers")))
                marked = True
            before = [] if marked else [np.asarray([separator])]
            parts = [part for ids in documents for part in (*before, ids)]
            tokens = np.concatenate(parts)
            lengths = np.asarray([len(before) + len(ids) for ids in documents])
            starts = written + np.cumsum(lengths) - lengths
            largest = max(largest, int(tokens.max()))
            data = tokens.astype(dtype).tobytes()
            tokens_file.write(data)
            starts_file.write(starts.astype(np.int64).tobytes())
            digest.update(data)
            if answers is not None:
                of_answers = np.concatenate(answers)
                answers_file.write(of_answers.tobytes())
                digest.update(of_answers.tobytes())
                num_answers += int(of_answers.sum())
            written += len(tokens)
            documents_written += len(starts)
            text_bytes += size
    entry = {"num_answers": num_answers, "id_bytes": np.dtype(dtype).itemsize} if marked else {}
    return entry | {
        "tokens_bytes": written * np.dtype(dtype).itemsize,
        "starts_bytes": documents_written * np.dtype(np.int64).itemsize,
        "text_bytes": text_bytes,
        "sha256": digest.hexdigest(),
        "largest": largest,
    }


def batches(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """Groups the documents that are not empty into lists small enough to hold."""
    batch, characters = [], 0
    for text in documents:
        if not text:
            continue
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
