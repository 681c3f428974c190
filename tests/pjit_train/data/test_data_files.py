"""Files of documents: what is read alike, and what is wrong with its line, in one line."""

import codecs
import gzip
import json

import pytest

from pjit_train.data import TextFiles
from pjit_train.data import files as files_module
from pjit_train.data.files import read_documents
from pjit_train.errors import UserError

TEXT = "zwei\r\nZeilen é\n"
ROWS = [{"text": "one"}, {"text": "zwei é", "n": 1}, {"text": ""}, {"text": "\ud800 \0"}]


def lines(rows, end=b"\n"):
    return b"".join(json.dumps(row).encode() + end for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.TXT", TEXT.encode(), [TEXT]),
        ("a.txt", codecs.BOM_UTF8 + TEXT.encode(), [TEXT]),
        ("a.txt.gz", gzip.compress(TEXT.encode(), mtime=0), [TEXT]),
        (
            "a.Txt.GZ",
            gzip.compress(b"one, ", mtime=0) + gzip.compress(b"two", mtime=0),
            ["one, two"],
        ),
        ("a.txt", b"", []),
        ("a.txt.gz", gzip.compress(b"", mtime=0), []),
        ("a.JSONL", lines(ROWS), [row["text"] for row in ROWS]),
        ("a.jsonl", codecs.BOM_UTF8 + lines(ROWS, b"\r\n"), [row["text"] for row in ROWS]),
        (
            "a.jsonl.gz",
            gzip.compress(b"\n \n" + lines(ROWS), mtime=0),
            [row["text"] for row in ROWS],
        ),
        ("a.jsonl", b'{"text": "no end of line"}', ["no end of line"]),
        ("a.jsonl", b'{"text": "a", "meta": {"x": 1, "x": NaN}}', ["a"]),
    ],
)
def test_what_is_read(tmp_path, name, content, documents):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(str(tmp_path / name))) == documents
    assert TextFiles(train=str(tmp_path / name)).key()[1]["train"][0][0].endswith(name)


FINE = b'{"text": "fine"}\n\n'
GZIP = gzip.compress(FINE * 1000, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.jsonl", FINE + b'{"text": null}', 3, "'text' is null, not a text"),
        ("a.jsonl", FINE + b'{"text": 3}', 3, "'text' is a number"),
        ("a.jsonl", FINE + b'{"text": true}', 3, "'text' is true"),
        ("a.jsonl", FINE + b'{"text": ["a"]}', 3, "'text' is an array"),
        ("a.jsonl", FINE + b'{"text": {}}', 3, "'text' is an object"),
        ("a.jsonl", FINE + b'{"body": "b"}', 3, "no text under 'text' (its fields are: 'body')"),
        ("a.jsonl", FINE + b"{}", 3, "its fields are: none"),
        ("a.jsonl", FINE + b"null", 3, "is null, not an object"),
        ("a.jsonl", FINE + b'"text"', 3, "is a string, not an object"),
        ("a.jsonl", FINE + b"[1]", 3, "is an array, not an object"),
        ("a.jsonl", FINE + b'{"text": "a", "\\u0074ext": "b"}', 3, "gives 'text' twice"),
        ("a.jsonl", FINE + b'{"text": "cut', 3, "not a line of JSON: Unterminated string"),
        ("a.jsonl", FINE + b'{"text": "a"} {"text": "b"}', 3, "Extra data at column 15"),
        ("a.jsonl", FINE + b'{"n": ' + b"9" * 5000 + b"}", 3, "not a line of JSON: Exceeds"),
        ("a.jsonl", FINE + b"[" * 200_000, 3, "not a line of JSON"),
        ("a.jsonl", FINE + b'{"text": "f\xfc\xdfe"}', 3, "is not UTF-8 text (invalid start byte"),
        ("a.jsonl", FINE + b"\0" * 500, 3, "NUL byte"),
        ("a.jsonl", FINE.decode().encode("utf-16"), 1, "UTF-16"),
        ("a.jsonl", GZIP, 1, "ending .gz"),
        ("a.txt", b"one\ntwo f\xfc\xdfe\n", 2, "byte 0xfc"),
        ("a.txt", b"one\r\n" * 300_000 + b"\xc3", 300_001, "unexpected end of data"),
        ("a.txt", b"\xe9" + b"one\n" * 300_000, 1, "byte 0xe9"),
        ("a.txt", b"one\n" * 300_000 + b"a\0b", 300_001, "NUL byte"),
        ("a.txt", "text".encode("utf-16"), 1, "UTF-16"),
        ("a.txt", GZIP, 1, "ending .gz"),
        ("a.txt.gz", gzip.compress(b"one\ntwo f\xfc\xdfe\n", mtime=0), 2, "byte 0xfc"),
        ("a.txt.gz", b"plain text", 1, "gzip file is damaged"),
        ("a.jsonl.gz", GZIP[: len(GZIP) // 2], None, "gzip file is damaged or cut short"),
        ("a.jsonl.gz", GZIP[:-8] + b"\0" * 8, None, "gzip file is damaged or cut short"),
        ("a.jsonl.gz", GZIP[:12] + b"\xff" * 50 + GZIP[62:], None, "gzip file is damaged"),
        ("a.jsonl.gz", gzip.compress(FINE + b'{"text": null}', mtime=0), 3, "'text' is null"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(tmp_path, name, content, line, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_documents(str(path)))
    message = str(caught.value)
    assert message.startswith(f"{path}:{'' if line is None else line}")
    assert says in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400 + len(str(path))


def test_a_line_that_unfolds_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines([{"text": "a" * 900}, {"text": "a" * 100_000}]), mtime=0))
    read = read_documents(str(path))
    assert len(next(read)) == 900
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:2: the line is longer than 1,000 bytes"):
        next(read)


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ([{"text": "equal"}] * 400, {}, "its 400 documents are all equal"),
        ([{"text": "a b"}, {"text": "c d"}] * 300, {}, "its 600 documents are only 2 different"),
        ([{"text": ""}] * 500, {}, "has no text: its documents are empty"),
        ([], {}, "has no text"),
        ([{"text": "x"}] * 3, {}, "its 3 documents are too short"),
        ([{"text": ""}], {"validation": "other.txt"}, "TextFiles.train="),
    ],
)
def test_a_split_without_text_says_what_happened(tmp_path, monkeypatch, content, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("other")
    (tmp_path / "a.jsonl").write_bytes(lines(content))
    source = TextFiles(train="a.jsonl", **options)
    with pytest.raises(UserError) as caught:
        _ = [list(source.documents(split)) for split in ("train", "validation")]
    assert says in str(caught.value)
    assert "a.jsonl" in str(caught.value)


def test_empty_documents_count_for_nothing(tmp_path):
    """So few with text that each gives its end, however many empty ones there are."""
    texts = [f"{i}" + "abcdefghij" * 20 for i in range(5)]
    paths = [tmp_path / "few.jsonl", tmp_path / "padded.jsonl"]
    paths[0].write_bytes(lines([{"text": text} for text in texts]))
    paths[1].write_bytes(lines([{"text": ""}] * 500 + [{"text": text} for text in texts]))
    for split in ("train", "validation"):
        few, padded = (list(TextFiles(train=str(path)).documents(split)) for path in paths)
        assert few == padded
        assert len(few) == 5
