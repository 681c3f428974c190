"""GGUF files as we import them against those that `transformers` loads itself."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is to be fetched

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import gguf_files
from helpers.gguf_files import llama_tensors

from pjit_train.huggingface import weights
from pjit_train.huggingface.gguf_import import import_gguf
from pjit_train.sharding import Rules
from pjit_train.step import split_model

pytestmark = pytest.mark.oracle
SMOLLM2 = Path(os.environ.get("SMOLLM2_GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"))
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\nlines; it's 3.14159 in 2026",
    " \u2014 na\u00efve caf\u00e9 \u4f60\u597d \U0001f600",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nWhat's up?<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


def assert_same_model(transformers, path, folder, tokens):
    """Logits of our folder in ours and theirs, and of the file as `transformers` loads it."""
    import torch

    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
        del theirs
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        found = model.eval()(torch.from_numpy(tokens)).logits.numpy()
        del model
    scale = np.abs(expected).max()
    assert scale > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-5 * scale, rtol=0)
    config, params = weights.load(folder)
    graph = split_model(config, Rules())[0]
    logits = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, tokens.astype(np.int32))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * scale, rtol=0)


def assert_same_tokens(transformers, path, folder, texts=TEXTS):
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    chat = [{"role": "user", "content": "Hello"}]
    if theirs.chat_template:
        one, other = (x.apply_chat_template(chat, tokenize=False) for x in (ours, theirs))
        assert one == other


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_small_llama(kind, tied, transformers, tmp_path):
    path = gguf_files.write(tmp_path / "x.gguf", llama_tensors(tied=tied), kind=kind)
    import_gguf(path, tmp_path / "out")
    tokens = np.random.default_rng(0).integers(len(gguf_files.TOKENS), size=(2, 24))
    assert_same_model(transformers, path, tmp_path / "out", tokens)
    assert_same_tokens(transformers, path, tmp_path / "out", TEXTS[:1] + TEXTS[2:])


SPACE = "\u2581"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), SPACE, *"abcdehlnorstuw"]
PIECES += [SPACE + part for part in ("t", "the", "s", "w", "wor")] + ["he", "in", "er", "or", "ll"]


def add_sentencepiece(writer):
    """A vocabulary of SentencePiece: bytes, and pieces whose scores say which are merged first."""
    types = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)][::-1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentencepiece(transformers, tmp_path):
    """The same tokens as `transformers` makes of the file, but for spaces that it leaves out."""
    tensors = llama_tensors()
    tensors["model.embed_tokens.weight"] = np.resize(
        tensors["model.embed_tokens.weight"], (len(PIECES), gguf_files.D)
    )
    path = gguf_files.write(tmp_path / "x.gguf", tensors, tokenizer=add_sentencepiece)
    import_gguf(path, tmp_path / "out")
    texts = ("the series of the words", "hello  world\nthe \u00e9\U0001f600", "")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    # As SentencePiece and llama.cpp, a space goes before each text, and what follows a token of
    # control; `transformers` puts none where one is, or after such a token.
    space, the = PIECES.index(SPACE), PIECES.index(f"{SPACE}the")
    assert ours("the")["input_ids"] == [1, the]
    assert ours(" the")["input_ids"] == [1, space, the]
    assert ours("</s>the")["input_ids"] == [1, 2, the]


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="SMOLLM2_GGUF names no file")
def test_smollm2(transformers, tmp_path):
    import_gguf(SMOLLM2, tmp_path / "out")
    assert_same_tokens(transformers, SMOLLM2, tmp_path / "out")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = np.asarray(ours(" ".join(TEXTS))["input_ids"])[None]
    assert_same_model(transformers, SMOLLM2, tmp_path / "out", tokens)
