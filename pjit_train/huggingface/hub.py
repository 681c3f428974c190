"""Models of the Hugging Face Hub, fetched into its own cache by the package `huggingface_hub`.

`HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the rest of its settings
hold. A large file whose fetching was broken off, also by a kill, goes on where it stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pjit_train.data.cache import locked
from pjit_train.errors import UserError
from pjit_train.huggingface.config import read_config
from pjit_train.huggingface.stored import INDEX, WEIGHTS, shard_files

log = logging.getLogger("torsion")
PREFIX = "hf:"
_SPELLING = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s:]+))?(:(?P<file>[^\s:]+\.gguf))?"
)
_TEXTS = {
    *("config.json", "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
}
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Repository:
    """A model of the Hub.

    Attributes:
      name: OWNER/NAME.
      revision: a branch, tag or commit; None for the main branch.
      file: the GGUF file that is meant; None for the safetensors files.
    """

    name: str
    revision: str | None = None
    file: str | None = None

    @staticmethod
    def parse(text: str) -> "Repository":
        """Reads hf:OWNER/NAME[@REVISION][:FILE.gguf]; UserError where it is not that."""
        if not (found := _SPELLING.fullmatch(text)):
            raise UserError(f"{text}: is no hf:OWNER/NAME[@REVISION][:FILE.gguf]")
        return Repository(found["repository"], found["revision"], found["file"])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.name}{revision}" + (f":{self.file}" if self.file else "")


def fetch(repository: Repository, progress: Progress = lambda done, of: None) -> Path:
    """Fetches a model into the cache of `huggingface_hub`, where it is not there already.

    Args:
      progress: is told the bytes that are there and the bytes of all large files.

    Returns:
      The folder of the model in the cache, which holds links; or, where a file is named, that file.

    Raises:
      UserError: the repository, or the network, is not there; it is gated; it has no safetensors
        files; its model is one that we do not have.
    """
    with _explained(repository):
        return _fetch(repository, progress)


def _fetch(repository: Repository, progress: Progress) -> Path:
    from huggingface_hub import HfApi, constants, errors, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging

    if not sys.stderr.isatty():
        disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:  # else each try to reach it is a line
        logging.set_verbosity_error()
    name, revision = repository.name, repository.revision or constants.DEFAULT_REVISION
    main = repository.file or "config.json"

    def download(file: str, revision: str, **options) -> str:
        return hf_hub_download(name, file, revision=revision, **options)

    try:
        info = HfApi().model_info(name, revision=revision)
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
            raise
        try:
            path = Path(download(main, revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise error from None
        if not isinstance(error, errors.OfflineModeIsEnabled):
            log.warning("%s cannot be asked for (%s): taken from the cache", repository, error)
        return path if repository.file else _checked(repository, path.parent)

    files = [sibling.rfilename for sibling in info.siblings or ()]
    if repository.file:
        if main not in files:
            raise UserError(f"{repository}: it has no such file; {_gguf_files(files)}")
        _fetch_large(repository, info.sha, [main], progress)
        return Path(download(main, revision))
    wanted = _wanted(repository, files)
    folder = Path(download(main, revision)).parent
    _refuse_unknown(repository, folder)  # before anything large is fetched
    large = [file for file in wanted if file not in _TEXTS]
    _fetch_large(repository, folder.name, large, progress)
    for file in wanted:
        download(file, folder.name)
    return _checked(repository, folder)


def files_of(folder: Path) -> Iterator[Path]:
    """The files of a fetched model that belong to it, and not others that are in the cache too."""
    for path in sorted(folder.iterdir()):
        if path.name in _TEXTS or path.name == WEIGHTS or _SHARD.fullmatch(path.name):
            yield path


def _wanted(repository: Repository, files: list[str]) -> list[str]:
    """The files to fetch of those of a repository."""
    weights = [WEIGHTS] if WEIGHTS in files else [f for f in files if _SHARD.fullmatch(f)]
    if "config.json" in files and weights:
        texts = _TEXTS - ({INDEX} if WEIGHTS in files else set())
        return sorted(texts.intersection(files)) + sorted(weights)
    if any(file.endswith(".gguf") for file in files):
        raise UserError(f"{repository}: has no safetensors files; {_gguf_files(files)}")
    if any(file.endswith(_PICKLES) for file in files):
        raise UserError(
            f"{repository}: has PyTorch pickles alone, which are never loaded; safetensors files "
            "or a .gguf file are needed"
        )
    what = "safetensors files" if "config.json" in files else "config.json"
    raise UserError(f"{repository}: has no {what}; it is no model of transformers")


def _gguf_files(files: list[str]) -> str:
    found = [file for file in files if file.endswith(".gguf")]
    if not found:
        return "it has no .gguf file"
    more = ", ..." if len(found) > 5 else ""
    return f"name one of its .gguf files after a colon: {', '.join(found[:5])}{more}"


def _refuse_unknown(repository: Repository, folder: Path) -> None:
    try:
        read_config(folder / "config.json")
    except UserError as error:
        text = str(error).removeprefix(str(folder / "config.json"))
        raise UserError(f"{repository}: config.json{text}") from error


def _checked(repository: Repository, folder: Path) -> Path:
    """The folder, where all that belongs to the model is in it."""
    _refuse_unknown(repository, folder)
    try:
        shard_files(folder)
    except UserError as error:
        raise UserError(
            f"{error}: it was not fetched to its end; fetch it with a network"
        ) from error
    return folder


def _fetch_large(repository: Repository, commit: str, files: list[str], progress: Progress) -> None:
    """Fetches large files to where `huggingface_hub` looks for them, on from where it stopped.

    That package itself begins a file again. What it gets by chunks from the Hub's own storage (Xet)
    is left to it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers()
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.name.replace('/', '--')}"
    tasks = []
    for file in files:
        url = hf_hub_url(repository.name, file, revision=commit)
        data = get_hf_file_metadata(url, headers=headers)
        if data.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET:
            continue
        if data.etag and data.size is not None:
            tasks.append((file, url, folder / "blobs" / data.etag, data.size))
    total = sum(size for *_, size in tasks)
    before = 0
    for file, url, blob, size in tasks:
        if not blob.exists():
            what = f"{repository}: {file}"
            add = functools.partial(_tell, progress, before, total)
            _fetch_blob(what, url, headers, blob, size, add)
        before += size
        progress(before, total)


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _fetch_blob(
    what: str,
    url: str,
    headers: dict[str, Any],
    blob: Path,
    size: int,
    progress: Callable[[int], None],
) -> None:
    from huggingface_hub.errors import HTTPError

    part = blob.with_name(f"{blob.name}.torsion.incomplete")
    with locked(part):
        if blob.exists():  # another process was faster
            return
        done = part.stat().st_size if part.exists() else 0
        if done > size:
            part.unlink()
            done = 0
        while done < size:
            before = done
            try:
                for done in _stream(url, headers, part, before):
                    progress(done)
            except HTTPError:
                if done <= before:  # else it goes on from here
                    raise
            if done <= before:  # it sends nothing, and says that this is all
                break
        if done != size:
            part.unlink()
            raise UserError(f"{what}: {done:,} bytes came, and it has {size:,}; run it again")
        if re.fullmatch("[0-9a-f]{64}", blob.name):  # its name is its digest
            with part.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != blob.name:
                    part.unlink()
                    raise UserError(f"{what}: was damaged on its way; run the command again")
        part.rename(blob)
    part.with_name(part.name + ".lock").unlink(missing_ok=True)


def _stream(url: str, headers: dict[str, Any], part: Path, done: int) -> Iterator[int]:
    """Appends to a file what follows its `done` bytes; yields how many it has then."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    asked = headers | {"Accept-Encoding": "identity"}
    asked |= {"Range": f"bytes={done}-"} if done else {}
    with get_session().stream("GET", url, headers=asked) as response, part.open("ab") as file:
        hf_raise_for_status(response)
        if done and response.status_code != 206:  # it sends all of it
            file.truncate(0)
            done = 0
        for chunk in response.iter_raw():
            file.write(chunk)
            done += len(chunk)
            yield done


@contextlib.contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Turns the errors of `huggingface_hub` into lines that say what would be right."""
    from huggingface_hub import constants, errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository}: is gated: accept its terms at {constants.ENDPOINT}/{repository.name}, "
            "and set HF_TOKEN to a token of yours"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: {constants.ENDPOINT} has no such repository, or it is private: then "
            "set HF_TOKEN to a token that may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository}: has no such revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(
            f"{repository}: is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            "set; fetch it once without that"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(f"{repository}: {constants.ENDPOINT} answers {status}: {error}") from error
    except errors.HTTPError as error:
        raise UserError(
            f"{repository}: {constants.ENDPOINT} cannot be reached, or broke off ({error}); look "
            "at the network or HF_ENDPOINT: the same command goes on from there"
        ) from error
    except (OSError, ValueError) as error:  # its cache cannot be written; no answer of a Hub
        raise UserError(f"{repository}: cannot be fetched: {error}") from error
