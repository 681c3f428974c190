"""Tasks that are judged by the probability of an answer: several choices, or the last word."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from pjit_train.evaluation.scorer import Row, Score, Scorer
from pjit_train.language_model import LanguageModel, empty_context

# Files of the tasks that have a name of the field.
KNOWN = {
    "lambada": "lambada_test.jsonl",
    "piqa": "piqa_valid.jsonl",
    "arc_easy": "arc_easy_test.jsonl",
}


def pair_row(model: LanguageModel, context: str, continuation: str) -> Row:
    """The row that scores a continuation after a context.

    Both are encoded together, and the tokens past those of the context alone are scored; spaces at
    the end of the context go to the continuation. An empty context is the token of begin, or else
    of end. What is longer than the model's sequences loses tokens at its beginning.

    References:
      The scoring of lm-evaluation-harness (Gao et al., https://zenodo.org/records/12608602).
    """
    if spaces := len(context) - len(context.rstrip()):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if context:
        tokens, known = model.encode(context + continuation), len(model.encode(context))
    else:
        new = model.encode(continuation, begins=False)
        tokens, known = np.concatenate([[empty_context(model)], new]).astype(np.int32), 1
    scored = len(tokens) - known
    if scored < 1:
        raise UserError(
            f"tasks: {continuation[:40]!r} after {context[-40:]!r} has no token of its own; "
            "an answer must be some text"
        )
    longest = model.config.max_len
    if scored > longest:
        raise UserError(
            f"tasks: an answer of {scored} tokens exceeds the model's max_len={longest}"
        )
    return Row(tokens[-(longest + 1) :], scored)


def run_task(
    model: LanguageModel,
    file: Path,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores a file of a task, JSON lines of one of two kinds.

    Rows `{"question", "choices", "answer"}`, the answer an index from 0: each choice is scored
    after "Question: ...\\nAnswer:" and a space, as lm-eval scores ARC and PIQA. Rows `{"text"}`:
    the last word is to be predicted from the others, as LAMBADA (Paperno et al., 2016).

    Args:
      limit: use the first so many rows only.

    Returns:
      `rows`, `accuracy` and its standard error `stderr`; of choices also `accuracy_normalized`, by
      the number of characters of each choice, and `stderr_normalized`; of last words `perplexity`;
      `sha256` of the file.

    Raises:
      UserError: the file cannot be read, or has another row.
    """
    documents, digest = _read(file)
    documents = documents[:limit]
    if "text" in documents[0]:
        figures = _last_words(model, file, documents, progress)
    else:
        figures = _choices(model, file, documents, progress)
    return {"rows": len(documents), **figures, "sha256": digest}


def _choices(model, file: Path, documents: Sequence[Mapping[str, Any]], progress):
    rows: list[Row] = []
    first = []
    for number, document in enumerate(documents, start=1):
        question, choices, answer = _question(f"{file}, row {number}", document)
        first.append(len(rows))
        context = f"Question: {question}\nAnswer:"
        rows += [pair_row(model, context, f" {choice}") for choice in choices]
    scores = Scorer(model)(rows, progress)
    right, right_normalized = [], []
    for start, document in zip(first, documents, strict=True):
        choices, answer = document["choices"], document["answer"]
        nats = np.array([s.log_probability for s in scores[start : start + len(choices)]])
        right.append(int(np.argmax(nats)) == answer)
        by_length = nats / [len(choice) for choice in choices]
        right_normalized.append(int(np.argmax(by_length)) == answer)
    accuracy, stderr = _mean(right)
    normalized, stderr_normalized = _mean(right_normalized)
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "accuracy_normalized": normalized,
        "stderr_normalized": stderr_normalized,
    }


def _last_words(model, file: Path, documents: Sequence[Mapping[str, Any]], progress):
    rows = []
    for number, document in enumerate(documents, start=1):
        text = document.get("text")
        context, space, word = text.rpartition(" ") if isinstance(text, str) else ("", "", "")
        if not word or not context:
            raise UserError(f"{file}, row {number}: 'text' must be a text of several words")
        rows.append(pair_row(model, context, space + word))
    scores: list[Score] = Scorer(model)(rows, progress)
    accuracy, stderr = _mean([score.greedy for score in scores])
    nats = -np.mean([score.log_probability for score in scores])
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "accuracy_normalized": None,
        "perplexity": math.exp(min(float(nats), 700.0)),
    }


def _mean(right: Sequence[bool]) -> tuple[float, float | None]:
    """The mean, and its standard error from the sample's deviation; None of a single row."""
    values = np.asarray(right, np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _question(where: str, document: Mapping[str, Any]) -> tuple[str, list[str], int]:
    question, choices, answer = (document.get(k) for k in ("question", "choices", "answer"))
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not isinstance(question, str) or not texts or len(choices) < 2:
        raise UserError(
            f"{where}: want a text 'question', 'choices' of two texts or more, and 'answer'"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer={answer!r} must be the index of one of {len(choices)} choices, from 0"
        )
    return question, choices, answer


def _read(file: Path) -> tuple[list[dict[str, Any]], str]:
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text: byte {error.start:,} is not") from error
    documents = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: is no JSON ({error})") from error
        if not isinstance(document, dict):
            raise UserError(f"{file}, line {number}: want a JSON object, not {line[:40]!r}")
        documents.append(document)
    if not documents:
        raise UserError(f"{file} has no rows")
    return documents, hashlib.sha256(content).hexdigest()
