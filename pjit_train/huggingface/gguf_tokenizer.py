"""The tokenizer of a GGUF file, written as Hugging Face has it: tokenizer.json and what is with it.

A file has tokens, their types, merges or scores, and the name of the rule by which text is split
before it is merged; the rules themselves are those of llama.cpp (`src/llama-vocab.cpp`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.huggingface.gguf_file import GGUF

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_KINDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list of texts",
    np.ndarray: "a list of numbers",
}
_NO_ID = 2**32 - 1
_SPACE = "▁"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2
_DIGIT = r"\p{N}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # for "is", "not", "are", ...
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN, _GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{short}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{short}|\p{{N}}{digits}"
    + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
    for short, digits in (("", ""), (f"{_SHORT}?", "{1,3}"))
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# The rule of each name: text is split by the first expression, its parts by the next, and so on.
_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "mellum"), (_WORDS,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (_DIGIT, _WORDS),
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_GPT4O,)),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Rules of files where a word that is a token is not merged, and where BOS begins a text.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
# Tokens that end a turn or a text, whatever else the file says; llama.cpp looks for these too.
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<|return|>", "< EOT >", "_< EOT >", "<|end_of_turn|>"),
}


class GGUFTokenizer:
    """The tokenizer of a GGUF file.

    Attributes:
      tokens: their texts, in the order of their ids.
      ids: "bos", "eos", "unk", "pad" -> the id of that token, where the file names one.
      ends: ids at which a text that is generated ends.

    Raises:
      UserError: what the file says is no tokenizer, or one that is not known.
    """

    def __init__(self, file: GGUF):
        self._file = file
        self.kind = self._value("model", str)
        if self.kind not in ("gpt2", "llama"):
            raise self._wrong("model", f"{self.kind!r} is not supported; gpt2 and llama are")
        self.tokens: list[str] = self._value("tokens", list)
        if not self.tokens:
            raise self._wrong("tokens", "[] has no tokens")
        self._types = self._numbers("token_type", _NORMAL)
        self._index = {token: i for i, token in enumerate(self.tokens)}
        if len(self._index) < len(self.tokens):
            i = next(i for i, token in enumerate(self.tokens) if self._index[token] != i)
            raise self._wrong("tokens", f"{self.tokens[i]!r} twice, with the id {i} again later")
        self.ids = self._special_ids()
        self.ends = self._ends()
        self._rule = self._value("pre", str, "default")
        if self.kind == "gpt2" and self._rule not in _SPLITS:
            raise self._wrong("pre", f"{self._rule!r} is not supported; {', '.join(_SPLITS)} are")
        spm = self.kind == "llama"
        begins = spm or self._rule in _WHOLE_WORDS
        self._adds = {
            "bos": self._value("add_bos_token", bool, begins) and "bos" in self.ids,
            "eos": self._value("add_eos_token", bool, False) and "eos" in self.ids,
        }

    def write(self, folder: Path, max_len: int) -> None:
        """Writes tokenizer.json, tokenizer_config.json, generation_config.json, a chat template.

        Args:
          max_len: of the model's sequences, in tokens.

        Raises:
          UserError: the tokens and merges make no tokenizer.
          OSError: the folder cannot be written.
        """
        try:
            text = self._build().to_str(pretty=True)
        except Exception as error:  # the library has no other
            raise UserError(
                f"{self._file.path}: tokenizer.ggml: makes no tokenizer ({error})"
            ) from error
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_len,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": self._adds["bos"],
            "add_eos_token": self._adds["eos"],
            **{f"{use}_token": self.tokens[index] for use, index in self.ids.items()},
        }
        ends = self.ends[0] if len(self.ends) == 1 else self.ends
        generation = {
            "bos_token_id": self.ids.get("bos"),
            "eos_token_id": ends if self.ends else None,
            "pad_token_id": self.ids.get("pad"),
        }
        template = self._file.values.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(
            folder / "generation_config.json",
            {key: value for key, value in generation.items() if value is not None},
        )

    def _build(self) -> Any:
        from tokenizers import AddedToken, Tokenizer, models, processors

        merges = self._merges()
        unknown = self.tokens[self.ids["unk"]] if "unk" in self.ids else None
        if self.kind == "llama":
            model = models.BPE(
                self._index, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
            )
            tokenizer = Tokenizer(model)
            self._set_sentencepiece(tokenizer)
        else:
            whole = self._rule in _WHOLE_WORDS
            tokenizer = Tokenizer(models.BPE(self._index, merges, ignore_merges=whole))
            self._set_byte_level(tokenizer)
        kinds = [(_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)]
        for kind, special in kinds:
            added = [
                AddedToken(self.tokens[i], normalized=False, special=special)
                for i in np.flatnonzero(self._types == kind)
            ]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
        if any(self._adds.values()):
            names = {use: self.tokens[self.ids[use]] for use in self._adds if self._adds[use]}
            around = [names.get("bos"), "{}", names.get("eos")]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[x.format("$A") if x == "{}" else x for x in around if x],
                pair=[
                    x.format(part) if x == "{}" else f"{x}:{i}"
                    for i, part in enumerate(("$A:0", "$B:1"))
                    for x in around
                    if x
                ],
                special_tokens=[(names[use], self.ids[use]) for use in names],
            )
        return tokenizer

    def _set_byte_level(self, tokenizer: Any) -> None:
        from tokenizers import Regex, decoders, pre_tokenizers

        splits = [pre_tokenizers.Split(Regex(x), "isolated") for x in _SPLITS[self._rule]]
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_])
        tokenizer.decoder = decoders.ByteLevel()

    def _set_sentencepiece(self, tokenizer: Any) -> None:
        from tokenizers import decoders, normalizers

        prefix = self._value("add_space_prefix", bool, True)
        spaces = normalizers.Replace(" ", _SPACE)
        before = [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, spaces])
        after = [decoders.Strip(content=" ", left=1)] if prefix else []
        parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        tokenizer.decoder = decoders.Sequence(parts)

    def _merges(self) -> list[tuple[str, str]]:
        """The merges that the file lists, or else those that its scores mean, best first.

        Of two parts that make a token the merge is as good as the token's score; where several
        pairs make one token, the one with the longer first part comes first, as in `transformers`.
        """
        key = "merges"
        if f"tokenizer.ggml.{key}" in self._file.values or self.kind == "gpt2":
            merges = []
            for merge in self._value(key, list, []):
                at = merge.find(" ", 1)
                if at < 0:
                    raise self._wrong(key, f"... {merge!r} is no pair of tokens")
                merges.append((merge[:at], merge[at + 1 :]))
            return merges
        scores = self._scores()
        normal = {self.tokens[i] for i in np.flatnonzero(self._types == _NORMAL)}
        found = [
            (scores[self._index[token]], at, len(token) - at, token)
            for token in normal
            for at in range(1, len(token))
            if token[:at] in normal and token[at:] in normal
        ]
        # The last key only makes the order the same each time.
        found.sort(key=lambda x: (-x[0], -x[1], -x[2], self._index[x[3]]))
        return [(token[:at], token[at:]) for _, at, _, token in found]

    def _scores(self) -> list[float]:
        if self._file.values["general.architecture"] in ("gemma", "gemma2", "gemma3"):
            return [-i for i in range(len(self.tokens))]  # theirs are in another order
        return self._numbers("scores", 0).tolist()

    def _special_ids(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        defaults = {"bos": 1, "eos": 2, "unk": 0} if self.kind == "llama" else {}
        found = {}
        for use, name in names.items():
            index = self._id(f"{name}_token_id")
            if index is None and defaults.get(use, len(self.tokens)) < len(self.tokens):
                index = defaults[use]
            if index is not None:
                found[use] = index
        return found

    def _ends(self) -> list[int]:
        asked = [self.ids.get("eos"), self._id("eot_token_id"), self._id("eom_token_id")]
        known = (self._index.get(token) for token in sorted(_ENDS))
        control = (i for i in known if i is not None and self._types[i] == _CONTROL)
        return list(dict.fromkeys(i for i in (*asked, *control) if i is not None))

    def _id(self, key: str) -> int | None:
        index = self._value(key, int, _NO_ID)
        if index == _NO_ID:
            return None
        if not 0 <= index < len(self.tokens):
            raise self._wrong(key, f"{index} is no id of its {len(self.tokens):,} tokens")
        return index

    def _numbers(self, key: str, default: float) -> np.ndarray:
        """A number for each token."""
        found = self._value(key, np.ndarray, np.full(len(self.tokens), default))
        if len(found) != len(self.tokens):
            raise self._wrong(key, f"{len(found):,} numbers for {len(self.tokens):,} tokens")
        if not np.isfinite(found).all():
            raise self._wrong(key, "a number that is not finite")
        return found

    def _value(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._file.values.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise UserError(f"{self._file.path}: tokenizer.ggml.{key} is missing")
        if type(value) is not kind:
            raise self._wrong(key, f"{value!r:.60} is not {_KINDS[kind]}")
        return value

    def _wrong(self, key: str, what: str) -> UserError:
        return UserError(f"{self._file.path}: tokenizer.ggml.{key}={what}")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
