"""Sources: local files, TFDS, and the standard library as a corpus."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from pjit_train.data import PythonStdlib, TextData, TextFiles, Tfds, stdlib_files
from pjit_train.data import files as files_module
from pjit_train.errors import UserError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def splits(source, cache_dir=None):
    return [list(source.documents(split, cache_dir)) for split in ("train", "validation")]


def one_line(call, *named):
    with pytest.raises(UserError) as caught:
        call()
    for name in named:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


# --- local files ---


def test_documents_are_files_and_lines_in_the_order_of_the_paths(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfzwei\r\nZeilen \xc3\xa9\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("deeper")
    rows = [{"text": "one"}, {"text": "two", "other": 3}]
    jsonl(tmp_path / "a.jsonl", rows)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n  \n")
    both = TextFiles(
        train=[str(tmp_path / "**/*.txt"), str(tmp_path / "a.jsonl")],
        validation=str(tmp_path / "b.txt"),
    )
    text = "zwei\r\nZeilen é\n"  # as it is, without the mark at the start
    assert splits(both) == [["one", "two", text, "deeper"], [text]]


def test_a_path_is_not_a_glob_if_it_exists(tmp_path):
    (tmp_path / "odd[1].txt").write_text("odd")
    source = TextFiles(train=str(tmp_path / "odd[1].txt"), validation=str(tmp_path / "*.txt"))
    assert splits(source) == [["odd"], ["odd"]]


def test_many_documents_are_split_by_their_text(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    twice = [*texts, *texts[:500]]
    path = jsonl(tmp_path / "a.jsonl", [{"body": text} for text in twice])
    train, validation = splits(TextFiles(train=path, text_field="body"))
    assert sorted(train + validation) == sorted(twice)
    assert not set(train) & set(validation)  # equal documents go together
    assert 0.03 < len(validation) / len(twice) < 0.07

    # Another order, or more documents, moves none from one split to the other.
    grown = jsonl(tmp_path / "b.jsonl", [{"body": text} for text in [*texts[::-1], "more"]])
    again = splits(TextFiles(train=grown, text_field="body"))[1]
    assert set(validation) <= set(again)


@pytest.mark.parametrize("count", [1, 7])
def test_few_documents_give_their_ends(tmp_path, count):
    texts = [f"{i}" + "abcdefghij" * 20 for i in range(count)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    train, validation = splits(TextFiles(train=str(tmp_path / "*.txt"), validation_fraction=0.1))
    assert [a + b for a, b in zip(train, validation, strict=True)] == texts
    assert {len(text) for text in validation} == {20}


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "DOCUMENT_CHARACTERS", 100)
    text = "äöü 0123456789 " * 50
    (tmp_path / "a.txt").write_text(text)
    path = str(tmp_path / "a.txt")
    pieces = list(TextFiles(train=path, validation=path).documents("train"))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 100


def test_the_key_changes_with_the_files_and_the_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = TextFiles(train=str(path))
    keys = [source.key(), TextFiles(train=str(path), validation_fraction=0.1).key()]
    path.write_text("longer text")
    keys.append(source.key())
    os.utime(path, (1, 1))
    keys.append(source.key())
    assert len({json.dumps(key) for key in keys}) == 4
    assert source.key() == keys[-1]


def test_bad_files_are_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("füße".encode("latin-1"))
    (tmp_path / "notes.md").write_text("# notes")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n\n{"text": "cut\n')
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "\n")

    def read(path, **options):
        path = str(path)
        return lambda: splits(TextFiles(train=path, validation=path, **options))

    one_line(read(tmp_path / "absent.txt"), "absent.txt")
    one_line(read(tmp_path), "/**/*.txt")
    one_line(read(tmp_path / "notes.md"), "notes.md", ".jsonl")
    one_line(read(tmp_path / "gone.*"), "gone.txt")
    one_line(read(tmp_path / "latin.txt"), "latin.txt", "UTF-8", "0xfc")
    one_line(read(broken), f"{broken}:3")
    one_line(read(deep), f"{deep}:1")
    good = jsonl(tmp_path / "good.jsonl", [{"text": "a"}, {"body": "b"}])
    one_line(read(good), f"{good}:2", "'text'", "body")
    one_line(read(jsonl(tmp_path / "n.jsonl", [{"text": 3}])), "n.jsonl:1")
    one_line(read(jsonl(tmp_path / "l.jsonl", [["text"]])), "l.jsonl:1")
    one_line(
        lambda: splits(TextFiles(train=good, validation_fraction=1.0)), "validation_fraction=1.0"
    )


# --- the standard library ---

LIBRARY = {
    "alpha.py": "import beta\n",
    "beta.py": "# -*- coding: latin-1 -*-\nname = 'François'\n",
    "copy_of_alpha.py": "import beta\n",
    "empty.py": "\n",
    "broken.py": None,
    "LICENSE.txt": "terms",
    "LICENSE.py": "terms = 1\n",
    "_sysconfigdata_x.py": "build = 1\n",
    "sitecustomize.py": "site = 1\n",
    "config-3-x86/python-config.py": "config = 1\n",
    "json/__init__.py": "json = 1\n",
    "test/test_json.py": "test = 1\n",
    "json/tests/data.py": "test = 2\n",
    "idlelib/idle_test/x.py": "test = 3\n",
    "unittest/case.py": "case = 1\n",
    "site-packages/numpy.py": "other = 1\n",
    "dist-packages/numpy.py": "other = 2\n",
    "__phello__/spam.py": "hello = 1\n",
    "pydoc_data/topics.py": "topics = 1\n",
} | {f"package/module{i}.py": f"number = {i}\n" * 9 for i in range(100)}


@pytest.fixture
def library(tmp_path, monkeypatch):
    root = tmp_path / "library"
    for name, text in LIBRARY.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding = "latin-1" if name == "beta.py" else "utf-8"
        path.write_bytes(b"bad = '\xff'\n" if text is None else text.encode(encoding))
    monkeypatch.setattr(stdlib_files, "stdlib_dir", lambda: root)
    return root


def test_which_files_of_the_library_are_taken(library):
    files = stdlib_files.select_files(library)
    modules = [f"package/module{i}.py" for i in range(100)]
    expected = ["alpha.py", "beta.py", "json/__init__.py", "unittest/case.py", *modules]
    assert [file.path for file in files] == sorted(expected)
    assert {file.path: file.text for file in files} == {p: LIBRARY[p] for p in expected}
    validation = [file.path for file in files if file.split == "validation"]
    assert 0 < len(validation) < 15


def test_the_library_goes_through_tfds_into_batches(library, tmp_path):
    cache = tmp_path / "cache"
    train, validation = splits(PythonStdlib(), cache)
    files = stdlib_files.select_files(library)
    assert train == [file.text for file in files if file.split == "train"]
    assert validation == [file.text for file in files if file.split == "validation"]
    assert list(cache.glob("*/**/*.array_record*"))

    (manifest,) = cache.glob("python-stdlib-*/files.json")
    rows = json.loads(manifest.read_text())
    assert len(rows) == len(train) + len(validation)
    for row in rows:  # an independent reader finds the same digests
        text = LIBRARY[row["path"]]
        assert row["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert (text in validation) == (row["split"] == "validation")

    batches = TextData(seq_len=8, cache_dir=str(cache)).prepare(0)
    assert batches.tokens_per_epoch > 0.9 * sum(len(text.encode()) for text in train)


def test_the_library_that_runs_is_a_corpus():
    files = stdlib_files.select_files(stdlib_files.stdlib_dir())
    paths = {file.path for file in files}
    assert {"dataclasses.py", "heapq.py", "json/decoder.py"} <= paths
    assert not any({"test", "tests"} & set(path.split("/")) for path in paths)
    sizes = {"train": 0, "validation": 0}
    for file in files:
        sizes[file.split] += len(file.text)
    assert sizes["train"] > 5e6
    assert 0.01 < sizes["validation"] / sizes["train"] < 0.15
    assert len({file.text for file in files}) == len(files)


# --- TFDS ---

# Prepares data sets in argv[1]; the code is in another process, so reading has none.
PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Poems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "year": tfds.features.Scalar(np.int64)}
        return tfds.core.DatasetInfo(
            builder=self, description="Poems.", features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test")}

    def _generate_examples(self, name):
        for i in range(40):
            yield i, {"text": f"{name} poem {i} é", "year": i}

class TinyShakespeare(Poems):  # the name of one that TFDS ships
    pass

for builder in (Poems, TinyShakespeare):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder)], check=True, capture_output=True, timeout=120
    )
    return folder


def test_a_prepared_dataset_is_read_by_name_without_its_code(prepared):
    source = Tfds(name="poems", data_dir=str(prepared), validation_split="test")
    expected = [[f"{name} poem {i} é" for i in range(40)] for name in ("train", "test")]
    assert splits(source) == expected
    assert "tensorflow" not in sys.modules


def test_slices_versions_and_a_dataset_that_tfds_ships(prepared):
    source = Tfds(
        name="poems:1.0.0",
        data_dir=str(prepared),
        train_split="train[:75%]",
        validation_split="train[75%:]",
    )
    assert [len(texts) for texts in splits(source)] == [30, 10]
    ships = Tfds(name="tiny_shakespeare", data_dir=str(prepared), validation_split="test")
    assert next(ships.documents("train")) == "train poem 0 é"


def test_the_key_follows_the_prepared_files_without_importing_tfds(prepared):
    options = f"name='poems', data_dir={str(prepared)!r}"
    program = (
        "import sys, json; from pjit_train.data import Tfds\n"
        f"print(json.dumps(Tfds({options}).key()), 'tensorflow_datasets' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    source = Tfds(name="poems", data_dir=str(prepared))
    assert output.stdout == f"{json.dumps(source.key())} False\n"
    before = source.key()
    info = prepared / "poems" / "1.0.0" / "dataset_info.json"
    os.utime(info, (info.stat().st_atime, info.stat().st_mtime + 1))
    assert source.key() != before


def test_a_bad_dataset_is_one_line(prepared, tmp_path, monkeypatch):
    def read(folder=prepared, **options):
        options = {"name": "poems", "data_dir": str(folder), **options}
        return lambda: next(Tfds(**options).documents("train"))

    one_line(read(name="poem"), "'poem'", "nearest name is 'poems'")
    one_line(lambda: Tfds(name="lm1", data_dir=str(tmp_path)).key(), "nearest name is 'lm1b'")
    one_line(read(name="po ems"), "'po ems'")
    one_line(read(train_split="dev"), "'dev'", "'train'")
    one_line(read(train_split="train[:9"), "train[:9")
    one_line(read(text_field="year"), "'year'", "it has text")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    one_line(read(tmp_path, name="lm1b"), "'lm1b'", "pip install 'torsion[tfds-prepare]'")
    assert not list(tmp_path.iterdir())


def test_a_dataset_of_another_format_is_one_line(prepared, tmp_path):
    copy = tmp_path / "poems" / "1.0.0"
    copy.parent.mkdir()
    copy.mkdir()
    for path in (prepared / "poems" / "1.0.0").iterdir():
        name = path.name.replace("array_record", "tfrecord")
        content = path.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        (copy / name).write_bytes(content)
    source = Tfds(name="poems", data_dir=str(tmp_path))
    one_line(lambda: next(source.documents("train")), "'poems'", "'tfrecord'", "array_record")
