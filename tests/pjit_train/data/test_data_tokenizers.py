"""Tokenizers: what they must give back, and what they may never produce."""

import json
import os
from pathlib import Path

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


MODELS = {
    "WordLevel": lambda: tokenizers.models.WordLevel({"</s>": 0, "the": 1, "cat": 2}),
    "WordPiece": lambda: tokenizers.models.WordPiece({"</s>": 0, "the": 1, "c": 2, "##at": 3}),
    "BPE": lambda: tokenizers.models.BPE(
        {c: i for i, c in enumerate(["</s>", *"theca", "th"])}, [("t", "h")]
    ),
    "Unigram": lambda: tokenizers.models.Unigram(
        [("</s>", -9.0), *((c, -1.0) for c in "theca"), ("the", -2.0)]
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("splitter", ["WhitespaceSplit", "Metaspace", None])
def test_a_text_that_no_token_covers_is_one_line_and_never_dropped(tmp_path, kind, splitter):
    model = tokenizers.Tokenizer(MODELS[kind]())
    words = ["the", "cat"]
    if splitter:
        model.pre_tokenizer = getattr(tokenizers.pre_tokenizers, splitter)()
    if splitter == "Metaspace":  # spells every word with a mark before it
        document = json.loads(
            model.to_str().replace('"prepend_scheme":"always"', '"prepend_scheme":"never"')
        )
        model = tokenizers.Tokenizer.from_str(json.dumps(document))
    path = tmp_path / "t.json"
    model.save(str(path))
    tokenizer = TokenizerJson(path=str(path))
    covered = tokenizer.encode_batch(words)
    assert [ids.tolist() for ids in covered] == [model.encode(word).ids for word in words]
    assert all(len(ids) for ids in covered)
    for text in ("zoo", "the zoo"):
        with pytest.raises(UserError) as caught:
            tokenizer.encode_batch(["the", text])
        message = str(caught.value)
        assert f"tokenizer {str(path)!r} ({kind}) has no token for " in message
        assert "unk_token" in message
        assert "\n" not in message
        if splitter == "WhitespaceSplit":
            lacks = "zoo" if kind.startswith("Word") else "z"
            assert f"no token for {lacks!r} " in message


def test_what_a_byte_level_vocabulary_lacks_is_named(trained, tmp_path):
    """One of the 256 bytes is taken from the vocabulary of a trained tokenizer."""
    document = json.loads(Path(trained.path).read_text())
    document["model"]["merges"] = []
    document["model"]["vocab"] = {
        token: index for token, index in document["model"]["vocab"].items() if len(token) == 1
    } | {"<|endoftext|>": 0}
    del document["model"]["vocab"]["\u00b6"]  # stands for its own byte, the last of an "ö" too
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    tokenizer = TokenizerJson(path=str(path))
    assert tokenizer.decode(tokenizer.encode("für die Katze")) == "für die Katze"
    with pytest.raises(UserError, match=r"\(BPE\) has no token for 'Döner'"):
        tokenizer.encode("Döner")


def test_a_tokenizer_with_an_unknown_token_uses_it(tmp_path):
    vocabulary = {"[UNK]": 0, "</s>": 1, "a": 2, "##b": 3}
    models = [
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"),
        tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"),
        tokenizers.models.BPE(vocabulary, [], unk_token="[UNK]"),
        tokenizers.models.Unigram([(token, -1.0) for token in vocabulary], unk_id=0),
    ]
    for number, model in enumerate(models):
        path = str(tmp_path / f"{number}.json")
        tokenizers.Tokenizer(model).save(path)
        assert TokenizerJson(path=path).encode("z").tolist() == [0]


def test_dropout_is_for_other_trainings(trained, tmp_path):
    document = json.loads(Path(trained.path).read_text())
    document["model"]["dropout"] = 0.9
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    assert (
        TokenizerJson(path=str(path)).encode(TEXTS[0]).tolist() == trained.encode(TEXTS[0]).tolist()
    )


def test_bad_input_is_one_line(tmp_path, capfd):
    (tmp_path / "bytes.json").write_bytes(b"{\xff}")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "none.json"))
    panics = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    panics["continuing_subword_prefix"] = "longer than b"
    (tmp_path / "panic.json").write_text(json.dumps({"model": panics}))
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    plain = write_vocabulary(tmp_path / "plain.json", ["a", "b"])
    cases = [
        (lambda: TokenizerJson(path="absent.json").vocab_size, "absent.json"),
        *(
            (lambda name=name: TokenizerJson(path=str(tmp_path / name)).vocab_size, name)
            for name in (
                "broken.json",
                "bytes.json",
                "deep.json",
                "none.json",
                "pipe.json",
                "panic.json",
                "",
            )
        ),
        (lambda: TokenizerJson(path="a\0b").vocab_size, "cannot be read"),
        (lambda: TokenizerJson(path=plain).separator, "separator_token"),
        (lambda: TokenizerJson(path=plain, separator_token="<x>").separator, "<x>"),
        (lambda: train_tokenizer(["a"], vocab_size=256, path=str(tmp_path / "t")), "257"),
        (lambda: train_tokenizer(["a"], vocab_size=2**31, path=str(tmp_path / "t")), "16777216"),
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
    assert capfd.readouterr().err == ""
