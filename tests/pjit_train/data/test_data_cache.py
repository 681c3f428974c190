"""The token cache: what is on disk, and what kills, truncation and rivals do to it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pjit_train.data import (
    Bytes,
    PythonStdlib,
    TextData,
    TextFiles,
    TokenizerJson,
    train_tokenizer,
)
from pjit_train.data.cache import locked, open_cache
from pjit_train.errors import UserError

DOCUMENTS = ["first document", "der zweite für sich", "3"]

# A builder of the cache of the files in argv[1] under argv[2], as a process of its own.
BUILDER = """
import sys
import time
from pathlib import Path
from pjit_train.data import Bytes, TextFiles
from pjit_train.data.cache import open_cache

class Loud(Bytes):
    def encode_batch(self, texts):
        print("tokenizing", flush=True)
        time.sleep(float(sys.argv[3]))
        return super().encode_batch(texts)

source = TextFiles(train=sys.argv[1], validation=sys.argv[1])
splits = open_cache(source, Loud(), Path(sys.argv[2]))
print(splits["train"].sha256)
"""


class Documents:
    """A source of given texts that counts how often it is read."""

    def __init__(self, documents, identity="documents"):
        self.texts, self.identity, self.reads = documents, identity, 0

    def key(self, cache_dir=None):
        return self.identity

    def documents(self, split, cache_dir=None):
        self.reads += 1
        yield from self.texts


def expected(documents, encode, separator):
    return [token for text in documents for token in (separator, *encode(text))]


def names(folder, suffix=""):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(suffix))


def test_the_files_are_the_documents_end_to_end(tmp_path):
    splits = open_cache(Documents(DOCUMENTS), Bytes(), tmp_path)
    ids = expected(DOCUMENTS, str.encode, 255)
    assert splits["train"].tokens[:].tolist() == ids
    assert splits["train"].starts[:].tolist() == [i for i, token in enumerate(ids) if token == 255]
    assert splits["train"].text_bytes == len("".join(DOCUMENTS).encode())
    assert splits["train"].largest == 255
    (cache,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (cache / "train.tokens").read_bytes() == bytes(ids)
    np.testing.assert_array_equal(
        np.fromfile(cache / "train.starts", np.int64), splits["train"].starts[:]
    )


@pytest.mark.parametrize(("vocab_size", "name"), [(300, "uint16"), (70_000, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary(tmp_path, vocab_size, name):
    path = tmp_path / "t.json"
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300, path=str(path))
    if vocab_size > 300:  # one id far out
        document = json.loads(path.read_text())
        document["model"]["vocab"]["far"] = vocab_size - 1
        path.write_text(json.dumps(document))
        tokenizer = TokenizerJson(path=str(path))
    tokens = open_cache(Documents(DOCUMENTS), tokenizer, tmp_path)["train"].tokens
    assert tokens.dtype.name == name
    assert tokens[:].tolist() == expected(
        DOCUMENTS, lambda text: tokenizer.encode(text).tolist(), tokenizer.separator
    )


def test_a_warm_cache_does_not_read_the_corpus(tmp_path):
    source = Documents(DOCUMENTS)
    open_cache(source, Bytes(), tmp_path)
    reads = source.reads
    again = open_cache(source, Bytes(), tmp_path)
    assert source.reads == reads == 2
    assert not again["train"].tokens[:].flags.owndata  # mapped, not read


def test_another_source_or_tokenizer_has_another_cache(tmp_path):
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size=300, path=str(tmp_path / "t.json"))
    open_cache(Documents(DOCUMENTS), Bytes(), tmp_path)
    open_cache(Documents(["other"], "another"), Bytes(), tmp_path)
    open_cache(Documents(DOCUMENTS), tokenizer, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def garble(path):
    path.write_text("{")


def nest(path):
    path.write_text("[" * 200_000)


def retype(path):
    path.write_text('"of another type"')


def claim(path):
    """Changes a figure that nothing else holds."""
    text = path.read_text()
    path.write_text(text.replace('"text_bytes": 35', '"text_bytes": 34'))
    assert path.read_text() != text


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (truncate, "train.tokens"),
        (truncate, "validation.starts"),
        (remove, "train.starts"),
        (remove, "cache.json"),
        (garble, "cache.json"),
        (nest, "cache.json"),
        (retype, "cache.json"),
        (remove, "validation.tokens.crc32"),
        (truncate, "train.starts.crc32"),
        (claim, "cache.json"),
    ],
)
def test_a_damaged_cache_is_built_anew(tmp_path, damage, name):
    source = Documents(DOCUMENTS)
    whole = open_cache(source, Bytes(), tmp_path)["train"].tokens[:].tolist()
    (cache,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    damage(cache / name)
    assert open_cache(source, Bytes(), tmp_path)["train"].tokens[:].tolist() == whole
    assert source.reads == 4
    assert names(tmp_path, ".tmp") == []


def test_a_cache_of_another_corpus_in_its_place_is_not_read(tmp_path):
    open_cache(Documents(["other"], "another"), Bytes(), tmp_path)
    (other,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    open_cache(Documents(DOCUMENTS), Bytes(), tmp_path)
    (cache,) = [path for path in tmp_path.iterdir() if path.is_dir() and path != other]
    shutil.rmtree(cache)
    other.rename(cache)
    ids = expected(DOCUMENTS, str.encode, 255)
    assert open_cache(Documents(DOCUMENTS), Bytes(), tmp_path)["train"].tokens[:].tolist() == ids


def test_a_killed_builder_leaves_no_cache_and_the_next_one_builds_it(tmp_path):
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("some text " * 100)
    command = [sys.executable, "-c", BUILDER, str(text), str(cache)]
    builder = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "tokenizing\n"
    os.kill(builder.pid, signal.SIGKILL)
    builder.wait()
    builder.stdout.close()
    assert len(names(cache, ".tmp")) == 1  # what it had begun, and no cache
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".tmp"]

    splits = open_cache(TextFiles(train=str(text), validation=str(text)), Bytes(), cache)
    assert bytes(splits["train"].tokens[:]) == b"\xff" + text.read_bytes()
    assert names(cache, ".tmp") == []


def test_of_processes_at_once_one_tokenizes_and_all_read_the_same(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text " * 1000)
    # Slow enough that without the lock every one would begin before the first has ended.
    command = [sys.executable, "-c", BUILDER, str(text), str(tmp_path / "cache"), "0.7"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(lines.count("tokenizing") for lines in outputs) == 2  # one process, two splits


def test_who_waits_for_another_that_builds_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pjit_train.waiting._SAY", 0.05)
    caplog.set_level("INFO", logger="torsion")
    monkeypatch.setattr(logging.getLogger("torsion"), "propagate", True)
    entered = threading.Event()

    def wait():
        with locked(tmp_path / "tokens-1"):
            entered.set()

    with locked(tmp_path / "tokens-1"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        assert not entered.is_set()
    waiting.join(timeout=10)
    assert entered.is_set()
    assert f"another process, which makes {tmp_path / 'tokens-1'}" in caplog.text


def test_an_error_while_building_leaves_nothing(tmp_path):
    class Broken(Documents):
        def documents(self, split, cache_dir=None):
            yield "text"
            raise RuntimeError("the disk fell out")

    with pytest.raises(RuntimeError, match="fell out"):
        open_cache(Broken(DOCUMENTS), Bytes(), tmp_path)
    assert names(tmp_path) == names(tmp_path, ".lock")


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    text = "0123456789abcdef" * (1 << 16)  # 1 MiB, read 48 times

    def peak(count):
        tracemalloc.start()
        try:
            open_cache(Documents([text] * count, count), Bytes(), tmp_path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(48) < 1.5 * peak(6)


def test_a_warm_cache_of_the_default_corpus_imports_no_tfds(tmp_path, monkeypatch):
    # One module stands for the library here; its key is that of the process below.
    monkeypatch.setattr(PythonStdlib, "documents", lambda *_: iter(["print('a module')\n" * 99]))
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "cache"))
    warm = TextData().prepare(0)
    program = (
        "import sys\n"
        "from pjit_train.data import TextData\n"
        "print(TextData().prepare(0).digest)\n"
        "print([m for m in ('tensorflow_datasets', 'tokenizers') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout.split("\n")[:2] == [warm.digest, "[]"]


def test_who_only_reads_needs_no_directory_that_can_be_written(tmp_path, caplog):
    nowhere = Path("/dev/null/cache")
    with pytest.raises(UserError, match="cannot be written"):
        open_cache(Documents(DOCUMENTS), Bytes(), nowhere)
    splits = open_cache(Documents(DOCUMENTS), Bytes(), nowhere, keep=False)
    assert splits["train"].tokens[:].tolist() == expected(DOCUMENTS, str.encode, 255)
    [line] = caplog.messages
    assert line.startswith(f"cache directory {nowhere} cannot be written (Not a directory)")
    open_cache(Documents(DOCUMENTS), Bytes(), tmp_path)
    open_cache(Documents(DOCUMENTS), Bytes(), tmp_path, keep=False)
    assert len(caplog.messages) == 1
