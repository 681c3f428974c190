"""Perplexity of a text in windows, as the papers on pruning and quantization state it."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.evaluation.scorer import Row, Scorer
from pjit_train.language_model import LanguageModel


def perplexity(
    model: LanguageModel,
    file: Path,
    *,
    sequence: int,
    stride: int | None = None,
    bos: bool = False,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of a text file, which is encoded as a whole and cut into windows.

    Special tokens that the text spells count as such, as `transformers` encodes; no token is added
    but where `bos` says so.

    Args:
      sequence: tokens of a window. Without a stride there are floor(tokens / sequence) windows, and
        in each all tokens but the first are predicted; what is left at the end is not used.
      stride: windows begin so many tokens apart; in each those tokens are predicted that no window
        before it has. Where windows overlap, every token but the text's first so counts once.
      bos: puts the model's token of begin before each window; its first token then counts, too.
      limit: use the first so many windows only.
      progress: see `Scorer`.

    Returns:
      `perplexity`, the exponential of `nats` (a sum) over `predicted` (tokens); `tokens` of the
      text, `windows`, `unused` tokens, `sequence`, `stride`, `bos` and `sha256` of the file.

    Raises:
      UserError: the file cannot be read, is too short for a window, or the window is longer than
        the model's sequences or shorter than the stride.
    """
    limit_of_model = model.config.max_len
    if not 2 <= sequence <= limit_of_model:
        raise UserError(
            f"--sequence {sequence}: use 2 to {limit_of_model} tokens, the model's longest sequence"
        )
    if stride is not None and not 1 <= stride <= sequence:
        raise UserError(f"--stride {stride}: use 1 to --sequence {sequence}")
    begin = model.conventions.begin
    if bos and begin is None:
        raise UserError(f"--bos: {model.source} names no token of begin (bos_token)")
    text, digest = _read(file)
    tokens = model.tokenizer.encode_marked(text).astype(np.int32)
    if len(tokens) < (sequence if stride is None else 2):
        raise UserError(
            f"{file}: has {len(tokens)} tokens; --sequence {sequence} needs at least as many"
        )
    windows = _windows(len(tokens), sequence, stride)[:limit]
    before = np.array([begin] if bos else [], np.int32)
    rows = [
        Row(np.concatenate([before, tokens[start:end]]), min(new, end - start - (not bos)))
        for start, end, new in windows
    ]
    rows = [row for row in rows if row.scored]  # the last may be a single token
    scores = Scorer(model)(rows, progress)
    nats, predicted = -sum(s.log_probability for s in scores), sum(row.scored for row in rows)
    return {
        "perplexity": math.exp(min(nats / predicted, 700.0)),
        "nats": nats,
        "predicted": predicted,
        "windows": len(windows),
        "tokens": len(tokens),
        "unused": len(tokens) - windows[-1][1],
        "sequence": sequence,
        "stride": stride,
        "bos": bos,
        "sha256": digest,
    }


def _windows(tokens: int, sequence: int, stride: int | None) -> list[tuple[int, int, int]]:
    """(first token, the one after the last, how many of the last are new) of each window."""
    if stride is None:
        return [(i * sequence, (i + 1) * sequence, sequence) for i in range(tokens // sequence)]
    windows, before = [], 0
    for start in range(0, tokens, stride):
        end = min(start + sequence, tokens)
        windows.append((start, end, end - before))
        before = end
        if end == tokens:
            break
    return windows


def _read(file: Path) -> tuple[str, str]:
    """The text of a file, and its SHA-256."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text: byte {error.start:,} is not") from error
