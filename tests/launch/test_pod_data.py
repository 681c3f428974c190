"""The token cache that a Ray Data job makes: the very bytes of one process, whatever dies."""

import json
import subprocess
import sys

import pytest
from helpers.processes import environment
from tokenizers import Tokenizer, models, pre_tokenizers

from pjit_train.data import Bytes, TextFiles, TokenizerJson, train_tokenizer
from pjit_train.data.cache import open_cache
from pjit_train.errors import UserError

# Builds caches on a Ray of three processors: [corpus, tokenizer or None, cache, what dies] of each
# line of standard input; says "made", or what the user's mistake is.
JOBS = """
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.pod import ray_internals
from launch.pod.cluster import private_directory
from launch.pod.data import tokenize_on_cluster
from pjit_train.data import Bytes, TextFiles, TokenizerJson
from pjit_train.data.cache import open_cache
from pjit_train.errors import UserError


def once(file):
    try:
        open(file, "x").close()
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Dying(Bytes):
    marks: str

    def encode_batch(self, texts):
        if once(self.marks + "/slow"):
            time.sleep(1)  # so that later documents are done before these
        elif once(self.marks + "/encoder"):
            os._exit(1)
        return super().encode_batch(texts)


@dataclass(frozen=True, kw_only=True)
class DyingFiles(TextFiles):
    marks: str

    def key(self, cache_dir=None):
        return TextFiles(train=self.train, validation=self.validation).key()

    def documents(self, split, cache_dir=None):
        for number, text in enumerate(super().documents(split, cache_dir)):
            if number == 2500 and once(self.marks + "/reader"):
                os._exit(1)
            yield text


directory = private_directory()
token = directory / "token"
token.touch(mode=0o600)
token.write_text("0" * 64)
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(token),
    **ray_internals.LOOPBACK,
    "RAY_USAGE_STATS_ENABLED": "0",
}
import ray

ray.init(
    address="local",
    include_dashboard=False,
    num_cpus=3,
    object_store_memory=100 * 2**20,
    log_to_driver=False,
    **ray_internals.own(directory),
)
try:
    for line in sys.stdin:
        corpus, tokenizer, cache, marks = json.loads(line)
        source = TextFiles(train=corpus)
        tokenizer = TokenizerJson(path=tokenizer) if tokenizer else Bytes()
        if marks:
            source = DyingFiles(train=corpus, marks=marks)
            tokenizer = Dying(marks=marks)
        try:
            open_cache(source, tokenizer, Path(cache), tokenize_on_cluster)
        except UserError as error:
            print(f"mistake {error}", flush=True)
        else:
            print("made", flush=True)
finally:
    ray.shutdown()
    shutil.rmtree(directory)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The corpus, a tokenizer, and what the jobs printed: made, or the mistake."""
    folder = tmp_path_factory.mktemp("tokens")
    words = ["the cat", "\ud800", "<|endoftext|>", "日本", "sat\n", "", "\x00"]
    texts = ["", *(" ".join(words[(n * k) % 7] for k in range(n % 80)) for n in range(20000))]
    rows = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(rows))
    (folder / "bad.jsonl").write_text("\n".join([*rows[:5000], "{'text'", *rows[:50]]))
    train_tokenizer(texts[:200], vocab_size=300, path=str(folder / "t.json"))
    words = Tokenizer(models.WordLevel({"</s>": 0, "the": 1, "cat": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "words.json"))
    (folder / "marks").mkdir()
    given = [
        ["a.jsonl", None, "bytes", None],
        ["a.jsonl", str(folder / "t.json"), "bpe", None],
        ["a.jsonl", None, "died", str(folder / "marks")],
        ["bad.jsonl", None, "bad", None],
        ["a.jsonl", str(folder / "words.json"), "uncovered", None],
    ]
    done = subprocess.run(
        [sys.executable, "-c", JOBS],
        input="\n".join(map(json.dumps, given)),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # Ray's are among them
    return folder, [line for line in lines if line.startswith(("made", "mistake "))]


def built(cache_dir):
    """The files of the one cache in a directory."""
    [cache] = (path for path in cache_dir.glob("tokens-*") if path.is_dir())
    return {file.name: file.read_bytes() for file in cache.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_cache_is_that_of_one_process(jobs, name, tmp_path):
    folder, said = jobs
    assert said[:2] == ["made", "made"]
    tokenizer = Bytes() if name == "bytes" else TokenizerJson(path=str(folder / "t.json"))
    splits = open_cache(TextFiles(train=str(folder / "a.jsonl")), tokenizer, tmp_path)
    assert len(splits["train"].starts) > 15000  # several blocks
    files = built(folder / name)
    assert len(files) == 9  # of each split tokens and starts with their checksums; cache.json
    assert files == built(tmp_path)


def test_tasks_that_die_change_nothing(jobs):
    folder, said = jobs
    assert said[2] == "made"
    assert sorted(file.name for file in (folder / "marks").iterdir()) == [
        "encoder",
        "reader",
        "slow",
    ]
    files = built(folder / "died")
    del files["cache.json"]  # its key names the folder of the marks
    expected = built(folder / "bytes")
    assert files == {name: expected[name] for name in files}
    assert len(files) == 8


def test_a_document_that_cannot_be_read_is_one_line(jobs, tmp_path):
    folder, said = jobs
    with pytest.raises(UserError) as error:
        open_cache(TextFiles(train=str(folder / "bad.jsonl")), Bytes(), tmp_path)
    assert said[3] == f"mistake {error.value}"
    assert "bad.jsonl:5001:" in str(error.value)
    assert [path.name for path in (folder / "bad").iterdir() if path.is_dir()] == []


def test_a_word_that_the_tokenizer_lacks_is_one_line(jobs):
    folder, said = jobs
    words = str(folder / "words.json")
    assert said[4].startswith(f"mistake tokenizer {words!r} (WordLevel) has no token for ")
    assert [path.name for path in (folder / "uncovered").iterdir() if path.is_dir()] == []
