"""Record, in a run directory, of what the run was made from, so that it stands by itself.

`checkpoints/run.json` holds the configuration a second time, beside the checkpoints that depend on
it, and digests of the tokens and of the tokenizer; `tokenizer.json` is a copy of the tokenizer's
file, and beside it stand copies of the files of a chat template that are read with it. Runs of
before have `corpus.sha256`, the digest of the tokens, and neither of these.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from pjit_train.data.data import Data
from pjit_train.data.tokenizers import TokenizerJson
from pjit_train.errors import UserError
from pjit_train.files import json_sha256, write_whole

FILE, TOKENIZER = "checkpoints/run.json", "tokenizer.json"
_CORPUS = "corpus.sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Contents of `checkpoints/run.json`.

    Attributes:
      config: the operative configuration, as in `config.gin`.
      folder: the working directory, from which the relative paths in it count.
      corpus: `Batches.digest`, of the tokens.
      tokenizer: sha256 of the text of `tokenizer.json`, or None for bytes.
    """

    config: str
    folder: str
    corpus: str
    tokenizer: str | None


def read(directory: Path) -> Record | None:
    """The record of a run directory; None where it has none.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    path = directory / FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        body = json.loads(content)
        if body.pop("sha256") != json_sha256(body):
            raise ValueError
        return Record(**body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: it does not have the digest that it holds; remove it, and "
            "config.gin alone counts"
        ) from error


def read_if_whole(directory: Path) -> Record | None:
    """The record of a run directory; None where it has none, or a damaged one."""
    try:
        return read(directory)
    except UserError:
        return None


def write(
    directory: Path, data: Data, *, config_text: str, corpus: str, folder: str | None = None
) -> None:
    """Writes the record, `tokenizer.json` and `config.gin`, each whole or not at all.

    Args:
      directory: of the run; made if missing.
      data: of the run.
      config_text, corpus, folder: see `Record`; the folder is by default the working directory.
    """
    text = None if data.tokenizer_file is None else data.tokenizer_file.text
    body = {
        "config": config_text,
        "folder": folder or os.getcwd(),
        "corpus": corpus,
        "tokenizer": None if text is None else _sha256(text),
    }
    sealed = {"sha256": json_sha256(body), **body}
    # First the record, by which a directory is known as that of a run.
    (directory / FILE).parent.mkdir(parents=True, exist_ok=True)
    write_whole(directory / FILE, json.dumps(sealed, indent=1) + "\n")
    if text is not None and _file_sha256(directory / TOKENIZER) != body["tokenizer"]:
        write_whole(directory / TOKENIZER, text)
    for path in data.template_files:
        if not (directory / path.name).exists():
            write_whole(directory / path.name, path.read_text(encoding="utf-8"))
    write_whole(directory / "config.gin", config_text)


def to_train(data: Data, directory: Path) -> Data:
    """The data of a run that is trained in a directory, with the tokenizer that it began with.

    Raises:
      UserError: the configuration names another tokenizer, or there is none any more.
    """
    record = read(directory)
    if record is None or data.tokenizer_file is None:
        return data
    path, then = data.tokenizer_file.path, record.tokenizer
    now = _file_sha256(Path(path).expanduser())
    if now is not None and now != then:
        raise UserError(
            f"{directory} was begun with another tokenizer than {path!r} is now (sha256 "
            f"{_short(then)} then, {_short(now)} now); put back the file, remove it (the run has a "
            "copy), or use another --out"
        )
    return _with_copy(data, directory, record)


def to_read(data: Data, directory: Path, record: Record | None) -> Data:
    """The data of a run whose directory is read, from wherever that is done.

    The tokenizer is the run's copy, and relative paths count from where the run was trained if
    there is something.

    Raises:
      UserError: the tokenizer is gone.
    """
    if record is None:
        return data
    return _with_copy(data.seen_from(Path(record.folder)), directory, record)


def _with_copy(data: Data, directory: Path, record: Record) -> Data:
    if data.tokenizer_file is None:
        return data
    copy, given = directory / TOKENIZER, Path(data.tokenizer_file.path).expanduser()
    for path in (copy, Path(record.folder, given), given):
        if _file_sha256(path) == record.tokenizer:
            tokenizer = dataclasses.replace(data.tokenizer_file, path=str(path))
            return dataclasses.replace(data, tokenizer=tokenizer)
    what = "damaged" if copy.exists() else "missing"
    raise UserError(
        f"{copy} is {what}, and {data.tokenizer_file.path!r} is not the tokenizer that the run was "
        f"trained with either; put back the file of sha256 {_short(record.tokenizer)}"
    )


def corpus_of(directory: Path) -> str | None:
    """The digest of the tokens that a run was begun with; None where it is not known."""
    if (record := read_if_whole(directory)) is not None:
        return record.corpus
    try:
        return (directory / _CORPUS).read_text().strip()
    except (OSError, ValueError):
        return None


def other_corpus(directory: Path, now: str) -> str | None:
    """Says that a run was trained on other data than those of the digest `now`, if so."""
    then = corpus_of(directory)
    if then in (None, now):
        return None
    return (
        f"{directory} was trained on other data than its sources hold now (sha256 "
        f"{_short(then)} then, {_short(now)} now: changed files, or another Python's standard "
        "library)"
    )


def _file_sha256(path: Path) -> str | None:
    """The digest of a tokenizer's file; None where it cannot be read."""
    try:
        return _sha256(TokenizerJson(path=str(path)).text)
    except UserError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "of bytes" if digest is None else f"{digest[:16]}..."
