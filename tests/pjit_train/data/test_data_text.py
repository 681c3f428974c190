"""Batches, against an implementation with Python lists."""

import dataclasses
import json
import math
import statistics
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjit_train.data import Bytes, TextData, TextFiles
from pjit_train.data.cache import TokenSplit
from pjit_train.data.packing import PackedRows
from pjit_train.errors import UserError

SEPARATOR = 255


def corpus(folder, name="train.jsonl", documents=60, letter="a", seed=0):
    """A .jsonl file of documents of different lengths, each beginning with its number."""
    lengths = np.random.default_rng(seed).integers(1, 60, documents)
    texts = [f"{i}{letter * n}" for i, n in enumerate(lengths)]
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path), texts


@pytest.fixture
def data(tmp_path):
    train, _ = corpus(tmp_path)
    validation, _ = corpus(tmp_path, "validation.jsonl", documents=9, letter="é", seed=1)
    source = TextFiles(train=train, validation=validation)
    return TextData(sources=[source], seq_len=16, batch_size=8, cache_dir=str(tmp_path / "cache"))


def packed(texts):
    """The packed corpus as a list of ids, and the number of each id's document."""
    ids, numbers = [], []
    for number, text in enumerate(texts):
        encoded = [SEPARATOR, *text.encode()]
        ids += encoded
        numbers += [number] * len(encoded)
    return ids, numbers


def split_of(texts):
    ids, _ = packed(texts)
    return TokenSplit(
        tokens=np.asarray(ids, np.uint8),
        starts=np.flatnonzero(np.asarray(ids) == SEPARATOR).astype(np.int64),
        text_bytes=sum(len(text.encode()) for text in texts),
        sha256="",
        largest=max(ids),
    )


def texts_of(path):
    return [json.loads(line)["text"] for line in open(path)]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 20))
def test_rows_are_windows_of_the_packed_corpus(texts, seq_len):
    ids, numbers = packed(texts)
    rows = PackedRows(split=split_of(texts), seq_len=seq_len, mask_documents=True)
    assert len(rows) == (len(ids) - 1) // seq_len
    for index in range(len(rows)):
        begin = index * seq_len
        row = rows[index]
        assert row["inputs"].tolist() == ids[begin : begin + seq_len]
        assert row["targets"].tolist() == ids[begin + 1 : begin + seq_len + 1]
        documents = numbers[begin : begin + seq_len]
        assert row["segments"].tolist() == [1 + number - documents[0] for number in documents]
        assert {array.dtype.name for array in row.values()} == {"int32"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 20))
def test_padded_rows_target_every_token_once(texts, seq_len):
    ids, numbers = packed(texts)
    rows = PackedRows(split=split_of(texts), seq_len=seq_len, mask_documents=True)
    inputs, targets, segments = [], [], []
    for index in range(rows.num_padded):
        row = rows.padded(index)
        counted = row["weights"] == 1
        assert np.all(row["weights"][~counted] == 0)
        inputs += row["inputs"][counted].tolist()
        targets += row["targets"][counted].tolist()
        first = numbers[index * seq_len]
        segments += (row["segments"][counted] + first - 1).tolist()
        assert np.all(
            row["segments"][~counted][1:] == 0
        )  # the last token is an input that counts 0
    assert inputs == ids[:-1]
    assert targets == ids[1:]
    assert segments == numbers[:-1]
    beyond = rows.padded(rows.num_padded)
    assert not any(beyond[name].any() for name in ("weights", "targets"))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(data, seed):
    data = dataclasses.replace(data, batch_size=1)
    batches = data.prepare(seed)
    ids, _ = packed(texts_of(data.sources[0].train))
    rows = sorted(ids[i : i + 17] for i in range(0, len(ids) - 16, 16))
    assert batches.num_train_sequences == len(rows)
    assert batches.tokens_per_epoch == 16 * len(rows)

    def read(step):
        batch = batches.train_batch(step)
        return [*batch["inputs"][0].tolist(), int(batch["targets"][0, -1])]

    epochs = [[read(epoch * len(rows) + i) for i in range(len(rows))] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == rows
        assert epoch != rows
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_neighbouring_seeds_share_no_epoch(data):
    # Grain shuffles epoch e by seed + e, which would make epoch 1 of seed 0 epoch 0 of seed 1.
    data = dataclasses.replace(data, batch_size=1)
    zero, one = data.prepare(0), data.prepare(1)
    epoch = zero.num_train_sequences
    shifted = [zero.train_batch(epoch + i)["inputs"].tolist() for i in range(epoch)]
    assert shifted != [one.train_batch(i)["inputs"].tolist() for i in range(epoch)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_read_the_global_batch_and_each_only_its_rows(data, hosts, monkeypatch):
    data = dataclasses.replace(data, mask_documents=True)
    whole = data.prepare(7)
    reads = []
    original = PackedRows.padded
    per_host = data.batch_size // hosts
    for step in [0, 3, 1000]:
        parts = []
        for host in range(hosts):
            mine = data.prepare(7)  # a process of its own knows nothing but seed and step
            with monkeypatch.context() as patch:
                patch.setattr(
                    PackedRows, "padded", lambda rows, i: (reads.append(i), original(rows, i))[1]
                )
                parts.append(mine.train_batch(step, slice(host * per_host, (host + 1) * per_host)))
            assert len(reads) == per_host
            reads.clear()
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        same(joined, whole.train_batch(step))


def test_a_batch_depends_on_seed_and_step_alone(data):
    first, second = data.prepare(3), data.prepare(3)
    for step in [5, 2, 9]:  # in any order, from any start
        same(first.train_batch(step), second.train_batch(step))
    assert any(
        (first.train_batch(s)["inputs"] != data.prepare(4).train_batch(s)["inputs"]).any()
        for s in range(3)
    )


def test_evaluation_reads_the_validation_split_in_order_and_fills_the_last_batch(data):
    batches = data.prepare(0)
    ids, _ = packed(texts_of(data.sources[0].validation))
    read = [batches.eval_batch(i) for i in range(batches.num_eval_batches)]
    assert all(batch["inputs"].shape == (8, 16) for batch in read)
    targets = np.concatenate([batch["targets"].ravel() for batch in read])
    weights = np.concatenate([batch["weights"].ravel() for batch in read])
    assert weights.dtype == np.float32
    assert targets[weights == 1].tolist() == ids[1:]
    assert (weights == 0).sum() == len(read) * 8 * 16 - (len(ids) - 1) > 0
    halves = [batches.eval_batch(1, slice(0, 4)), batches.eval_batch(1, slice(4, 8))]
    same({k: np.concatenate([h[k] for h in halves]) for k in halves[0]}, batches.eval_batch(1))


def test_the_first_batches_of_an_evaluation_see_every_source(tmp_path):
    sources = []
    for letter, documents in (("p", 40), ("q", 80)):
        path = corpus(tmp_path, f"{letter}.jsonl", documents, letter)[0]
        sources.append(TextFiles(train=path, validation=path))
    options = dict(seq_len=16, batch_size=6, cache_dir=str(tmp_path / "cache"))
    batches = TextData(sources=sources, **options).prepare(0)
    alone = [TextData(sources=[source], **options).prepare(0) for source in sources]
    sizes = [
        sum(b.eval_batch(i)["weights"].any(axis=1).sum() for i in range(b.num_eval_batches))
        for b in alone
    ]
    half = batches.num_eval_batches // 2
    rows = np.concatenate([batches.eval_batch(i)["inputs"] for i in range(half)])
    seen = [sum(letter in Bytes().decode(row) for row in rows) for letter in "pq"]
    for size, count in zip(sizes, seen, strict=True):
        assert abs(count - size * len(rows) / sum(sizes)) <= 2


def test_bits_per_byte_of_a_known_model(data):
    # A model that gives every token 1/256 spends 8 bits on each token, separators included.
    batches = data.prepare(0)
    texts = texts_of(data.sources[0].validation)
    text_bytes = sum(len(text.encode()) for text in texts)
    expected = 8 * (text_bytes + len(texts)) / text_bytes
    assert math.log(256) / math.log(2) / batches.bytes_per_token() == pytest.approx(expected)


def test_a_mixture_keeps_its_weights_and_reads_each_source_evenly(tmp_path):
    paths = []
    for letter in "xyz":  # documents of 7 bytes make rows of 8 tokens, one each
        paths.append(str(tmp_path / f"{letter}.jsonl"))
        lines = [json.dumps({"text": f"{letter}{i:06d}"}) for i in range(301)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    valid = corpus(tmp_path, "valid.jsonl", 8, letter="v")[0]
    data = TextData(
        sources=[TextFiles(train=path, validation=valid) for path in paths],
        weights=[5, 3, 2],
        seq_len=8,
        batch_size=10,
        cache_dir=str(tmp_path / "cache"),
    )
    batches = data.prepare(0)
    rows = np.concatenate([batches.train_batch(step)["inputs"] for step in range(120)])
    texts = [Bytes().decode(row) for row in rows]
    counts = [sum(text[0] == letter for text in texts) for letter in "xyz"]
    np.testing.assert_allclose(np.asarray(counts) / 1200, [0.5, 0.3, 0.2], atol=0.005)
    for letter in "xyz":  # every row of a source comes once before any comes again
        own = [text for text in texts if text[0] == letter]
        assert sorted(own[:300]) == sorted({f"{letter}{i:06d}" for i in range(300)} & set(own))
    ids, _ = packed(texts_of(valid))
    weights = sum(batches.eval_batch(i)["weights"].sum() for i in range(batches.num_eval_batches))
    assert weights == 3 * (len(ids) - 1)


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path):
    digests = []
    for name, seed in [("one", 0), ("two", 0), ("three", 1)]:
        folder = tmp_path / name
        folder.mkdir()
        path, _ = corpus(folder, seed=seed)
        data = TextData(sources=[TextFiles(train=path)], seq_len=8, cache_dir=str(folder))
        digests.append(data.prepare(0).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_vocabulary_too_small_for_the_text_is_refused(data):
    batches = data.prepare(0)
    assert batches.vocab_size == Bytes().vocab_size == 256
    batches.check_vocabulary(256)
    with pytest.raises(UserError, match="token id 255"):
        batches.check_vocabulary(255)


def test_bad_options_are_one_line(data, tmp_path):
    (tmp_path / "short.txt").write_text("seventeen bytes.")
    (tmp_path / "empty.txt").write_text("")
    short = TextFiles(train=str(tmp_path / "short.txt"))
    empty = TextFiles(train=str(tmp_path / "empty.txt"))
    half = TextFiles(train=data.sources[0].train, validation=str(tmp_path / "empty.txt"))
    cases = [
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": "256"}, "seq_len"),
        ({"batch_size": -4}, "batch_size"),
        ({"sources": []}, "sources"),
        ({"sources": short}, "sources"),
        ({"weights": [1, 2]}, "weights"),
        ({"weights": [0]}, "weights"),
        ({"weights": [math.nan]}, "weights"),
        ({"sources": [short]}, "16 training tokens, fewer than the 17"),
        ({"sources": [empty]}, "empty.txt"),
        ({"sources": [half]}, "TextFiles.validation="),
        ({"cache_dir": "/dev/null/x"}, "cache_dir"),
    ]
    for changes, named in cases:
        with pytest.raises(UserError) as caught:
            dataclasses.replace(data, **changes).prepare(0)
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_batch_of_the_quickstart_takes_less_than_2_percent_of_a_second(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("0123456789abcde\n" * 200_000)
    data = TextData(sources=[TextFiles(train=str(path))], cache_dir=str(tmp_path))
    batches = dataclasses.replace(data, mask_documents=True).prepare(0)
    times = []
    for step in range(50):
        began = time.perf_counter()
        batch = batches.train_batch(step)
        times.append(time.perf_counter() - began)
    assert batch["inputs"].shape == (16, 256)
    assert statistics.median(times) < 0.02
