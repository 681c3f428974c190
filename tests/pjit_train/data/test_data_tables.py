"""Text in Parquet, Arrow and zstd files: the same documents as of .jsonl, and what is wrong."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pjit_train.data.files import read_documents
from pjit_train.data.sources import TextFiles
from pjit_train.errors import UserError

TEXTS = [f"document {i}\nhas two lines, größer" for i in range(3000)] + ["", "last"]


def written(path, table):
    """The table in the format that the name of the file says."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=700)
    elif path.suffix == ".feather":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=900)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


def zstd(path, data: bytes):
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as out:
        out.write(data)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "A.PARQUET"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_column_is_read_whole_and_in_order(name, kind, tmp_path):
    table = pa.table({"id": list(range(len(TEXTS))), "body": pa.array(TEXTS).cast(kind)})
    path = tmp_path / name
    if path.suffix == ".PARQUET":
        pq.write_table(table, path)
    else:
        written(path, table)
    assert list(read_documents(str(path), "body")) == TEXTS


@pytest.mark.parametrize("name", ["a.txt.zst", "a.jsonl.zst"])
def test_zstd_files_are_unfolded(name, tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    path = zstd(tmp_path / name, lines.encode())
    found = list(read_documents(str(path)))
    assert found == (TEXTS if name.startswith("a.jsonl") else [lines])


def test_shards_of_a_dataset_are_one_corpus(tmp_path):
    for shard in range(3):
        table = pa.table({"text": TEXTS[shard::3]})
        written(tmp_path / f"train-{shard:05}-of-00003.parquet", table)
    source = TextFiles(train=str(tmp_path / "*.parquet"))
    texts = [*source.documents("train"), *source.documents("validation")]
    assert sorted(texts) == sorted(filter(None, TEXTS))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"body": ["a"], "title": ["b"]}, "no column 'text'.*it has 'body', 'title'"),
        ({"text": [1, 2]}, "holds int64 in its column 'text'.*it has none"),
        ({"text": [["a"]], "body": ["b"]}, "holds list<.*it has 'body'"),
        ({"text": ["a", "b", None]}, "row 3: 'text' is null, not a text"),
        ({"text": ["a", "b\0"]}, "row 2: 'text' has a NUL byte"),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_wrong_is_named(name, columns, says, tmp_path):
    path = written(tmp_path / name, pa.table(columns))
    with pytest.raises(UserError, match=f"(?s)^{path}: .*{says}") as error:
        list(read_documents(str(path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.jsonl.zst"])
def test_a_file_that_is_cut_or_damaged_is_named(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".zst"):
        zstd(path, "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    else:
        written(path, pa.table({"text": TEXTS}))
    whole = path.read_bytes()
    for body in (whole[: len(whole) // 2], b"PAR1" + b"\xff" * 400, b"text"):
        path.write_bytes(body)
        with pytest.raises(UserError, match=f"^{path}") as error:
            list(read_documents(str(path)))
        assert "\n" not in str(error.value)


def test_a_zstd_file_without_its_ending_is_told(tmp_path):
    path = zstd(tmp_path / "a.jsonl", b'{"text": "a"}\n')
    with pytest.raises(UserError, match=r"it is a zstd file: give its name the ending \.zst"):
        list(read_documents(str(path)))
