"""The tokenizer of an exported folder has the ids of the run, by the library that others use."""

import json

import pytest
import tokenizers
from huggingface_folders import LLAMA, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from pjit_train.data import Bytes, TokenizerJson, train_tokenizer
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, Bytes(), 64)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_are_a_tokenizer_of_bytes(of_bytes, text):
    of_bytes.encode_special_tokens = True
    assert of_bytes.encode(text).ids == list(text.encode())
    assert of_bytes.decode(list(text.encode())) == text


def test_the_separator_of_bytes_is_their_last(of_bytes):
    assert of_bytes.get_vocab_size() == 256
    assert of_bytes.token_to_id("<|endoftext|>") == Bytes().separator
    assert set(of_bytes.get_vocab().values()) == set(range(256))


@pytest.mark.parametrize(
    ("model", "separator", "special"),
    [
        (
            tokenizers.models.WordLevel({"</s>": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"),
            "</s>",
            {"unk_token": "[UNK]"},
        ),
        (tokenizers.models.WordLevel({"</s>": 0, "a": 2}, unk_token="<unk>"), "</s>", {}),
        (
            tokenizers.models.WordPiece(
                {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
            ),
            "[SEP]",
            {
                "unk_token": "[UNK]",
                "pad_token": "[PAD]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
            },
        ),
        (
            tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", 0.0)], unk_id=0),
            "</s>",
            {"unk_token": "<unk>"},
        ),
        (tokenizers.models.BPE({"a": 0}, []), "<eos>", {}),
    ],
)
def test_the_special_tokens_are_those_that_the_file_has(tmp_path, model, separator, special):
    library = tokenizers.Tokenizer(model)
    if separator == "<eos>":  # one that stands beside the vocabulary
        library.add_special_tokens([separator])
    library.save(str(tmp_path / "t.json"))
    tokenizer = TokenizerJson(path=str(tmp_path / "t.json"))
    write_tokenizer(tmp_path, tokenizer, 99)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 99,
        "clean_up_tokenization_spaces": False,
        "bos_token": separator,
        "eos_token": separator,
        **special,
    }


def test_a_saved_model_ends_where_its_tokenizer_says(tmp_path):
    text = "the cat sat " * 50
    tokenizer = train_tokenizer([text], vocab_size=300, path=str(tmp_path / "t.json"))
    params = random_params(LLAMA)
    huggingface.save(tmp_path / "out", LLAMA, params, tokenizer=tokenizer)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.separator
    copy = TokenizerJson(path=str(tmp_path / "out/tokenizer.json"))
    assert copy.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert huggingface.load(tmp_path / "out")[0] == LLAMA
