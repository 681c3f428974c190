"""Tokenizers: what they must give back, and what they may never produce."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from pjit_train.data import Bytes, TokenizerJson, train_tokenizer
from pjit_train.errors import UserError

TEXTS = ["the cat sat on the mat. " * 20, "a döner für die Katze; 猫が座った。\n" * 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer(iter(TEXTS), vocab_size=300, path=str(path))


def write_vocabulary(path, tokens):
    """A word-level tokenizer file with the given tokens as its vocabulary."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=tokens[-1])
    tokenizers.Tokenizer(model).save(str(path))
    return str(path)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_are_the_utf8_bytes_and_never_the_separator(text):
    ids = Bytes().encode(text)
    assert ids.tolist() == list(text.encode())
    assert Bytes().separator not in ids
    assert Bytes().decode([255, *ids, 255]) == text


def test_bytes_decode_broken_utf8_with_replacement_characters():
    assert Bytes().decode(np.asarray([0x61, 0xC3, 0x62])) == "a\ufffdb"


def test_a_lone_surrogate_is_encoded(trained):
    assert Bytes().decode(Bytes().encode("a\ud800b")) == "a?b"
    assert trained.decode(trained.encode("a\ud800b")) == "a?b"


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_trained_tokenizer_gives_every_text_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode([trained.separator, *ids]) == text
    assert ids.size == 0 or ids.max() < trained.vocab_size


def test_training_merges_frequent_pairs_and_is_repeatable(trained, tmp_path):
    again = train_tokenizer(iter(TEXTS), vocab_size=300, path=str(tmp_path / "again.json"))
    assert again.digest() == trained.digest()
    assert trained.vocab_size == 300
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]


def test_the_file_is_one_the_library_reads_alike(trained):
    library = tokenizers.Tokenizer.from_file(trained.path)
    assert trained.encode(TEXTS[1]).tolist() == library.encode(TEXTS[1]).ids


def test_a_separator_spelled_in_a_text_is_text(trained):
    ids = trained.encode("one <|endoftext|> two")
    assert trained.separator not in ids
    assert trained.decode(ids) == "one <|endoftext|> two"


def test_truncation_and_padding_of_a_file_do_not_touch_documents(trained, tmp_path):
    library = tokenizers.Tokenizer.from_file(trained.path)
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "cut.json"))
    cut = TokenizerJson(path=str(tmp_path / "cut.json"))
    assert cut.encode(TEXTS[0]).tolist() == trained.encode(TEXTS[0]).tolist()
    assert cut.encode("a").size == 1


@pytest.mark.parametrize(
    ("tokens", "asked", "expected"),
    [
        (["a", "<s>", "</s>"], None, 2),
        (["a", "<|endoftext|>", "</s>"], None, 1),
        (["<bos>", "a", "b"], None, 0),
        (["a", "<s>", "[MY]"], "[MY]", 2),
    ],
)
def test_which_token_is_the_separator(tmp_path, tokens, asked, expected):
    path = write_vocabulary(tmp_path / "t.json", tokens)
    assert TokenizerJson(path=path, separator_token=asked).separator == expected


def test_the_digest_tells_files_and_separators_apart(tmp_path):
    one = write_vocabulary(tmp_path / "one.json", ["a", "<s>", "</s>"])
    two = write_vocabulary(tmp_path / "two.json", ["b", "<s>", "</s>"])
    digests = {
        TokenizerJson(path=one).digest(),
        TokenizerJson(path=two).digest(),
        TokenizerJson(path=one, separator_token="<s>").digest(),
        Bytes().digest(),
    }
    assert len(digests) == 4


def test_vocab_size_counts_ids_with_gaps(tmp_path):
    path = tmp_path / "gap.json"
    write_vocabulary(path, ["a", "b", "</s>"])
    document = json.loads(path.read_text())
    document["model"]["vocab"]["far"] = 999
    path.write_text(json.dumps(document))
    assert TokenizerJson(path=str(path)).vocab_size == 1000


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "broken.json").write_text('{"model": 3}')
    plain = write_vocabulary(tmp_path / "plain.json", ["a", "b"])
    cases = [
        (lambda: TokenizerJson(path="absent.json").vocab_size, "absent.json"),
        (lambda: TokenizerJson(path=str(tmp_path / "broken.json")).vocab_size, "broken.json"),
        (lambda: TokenizerJson(path=plain).separator, "separator_token"),
        (lambda: TokenizerJson(path=plain, separator_token="<x>").separator, "<x>"),
        (lambda: train_tokenizer(["a"], vocab_size=256, path=str(tmp_path / "t")), "257"),
        (lambda: train_tokenizer([], vocab_size=300, path=str(tmp_path / "t")), "empty"),
        (lambda: train_tokenizer(["a"], vocab_size=300, path="absent/t.json"), "absent"),
        (lambda: train_tokenizer(["a"], vocab_size=300, path=str(tmp_path)), str(tmp_path)),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for call, named in cases:
        with pytest.raises(UserError) as caught:
            call()
        assert named in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
