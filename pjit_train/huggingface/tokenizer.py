"""The tokenizer of a Hugging Face folder: `tokenizer.json`, and what `transformers` needs too."""

import json
from pathlib import Path
from typing import Any

from pjit_train.data.tokenizers import Bytes, TokenizerJson

BYTES_SEPARATOR = "<|endoftext|>"  # what the folder calls the separator of `Bytes`
# Names in common files of tokens of other uses; Torsion is not known to need them.
_KNOWN = {
    "pad_token": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def write_tokenizer(folder: Path, tokenizer: Bytes | TokenizerJson, max_len: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder.

    The ids are those that the run was trained on. The separator stands both before and after a
    document, so it is the token of beginning and end.

    Args:
      max_len: of the model's sequences, in tokens.

    Raises:
      UserError: the tokenizer cannot be read.
      OSError: the folder cannot be written.
    """
    text = _bytes_json() if isinstance(tokenizer, Bytes) else tokenizer.text
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(json.loads(text), tokenizer.separator),
    }
    (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _special_tokens(document: dict[str, Any], separator: int) -> dict[str, str]:
    """The tokens of a use, of the document of a `tokenizer.json`."""
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # of Unigram: (token, score)
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    names = {index: token for token, index in vocabulary.items()}
    names |= {row["id"]: row["content"] for row in document.get("added_tokens") or ()}
    tokens = set(names.values())
    found = {"bos_token": names[separator], "eos_token": names[separator]}
    unknown = model.get("unk_token")
    if model.get("type") == "Unigram" and model.get("unk_id") is not None:
        unknown = names[model["unk_id"]]
    if unknown in tokens:
        found["unk_token"] = unknown
    for use, spellings in _KNOWN.items():
        if known := [token for token in spellings if token in tokens]:
            found[use] = known[0]
    return found


def _bytes_json() -> str:
    """A `tokenizer.json` whose ids are those of `Bytes`.

    It spells bytes as GPT-2's tokenizer does: those that print as themselves in Latin-1, the others
    as the characters from U+0100 on, in their order.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    spelled = {byte: chr(byte) for byte in printed}
    spelled |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    spelled[Bytes.separator] = BYTES_SEPARATOR  # a byte that no text has
    tokenizer = Tokenizer(models.BPE({token: byte for byte, token in spelled.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BYTES_SEPARATOR])
    return tokenizer.to_str(pretty=True)
