"""A language model as a model of lm-evaluation-harness (`lm-eval`), which the extra lm-eval brings.

It encodes, cuts and stops as lm-eval's own model of `transformers` does, so figures are the same.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pjit_train.errors import UserError
from pjit_train.evaluation.scorer import Row, Score, Scorer
from pjit_train.language_model import LanguageModel, empty_context
from pjit_train.models.sampler import Choice, Sampler

log = logging.getLogger("torsion")

NEW_TOKENS = 256  # of a text, where a task says none
# The end of a message that the model is to go on with; its space is gone where a template strips.
_MARK = "\0\0 "


class TorsionLM(TemplateLM):
    """A language model that lm-eval asks for log-probabilities and texts.

    Requests are batched by length, so lm-eval's batch size is of no use.

    Args:
      model: of `language_model`; its parameters are taken over.
      max_length: the longest sequence, in tokens; None for the model's.
      add_bos_token: whether the token of begin stands before a text; None for what the tokenizer
        does.
      seed: of texts that are sampled.

    Raises:
      UserError: the model has no such sequences, or no token of begin.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
    ):
        super().__init__()
        longest = model.config.max_len
        if max_length is not None and not 2 <= max_length <= longest:
            raise UserError(
                f"max_length={max_length}: use 2 to {longest} tokens, the model's longest sequence"
            )
        if add_bos_token and model.conventions.begin is None:
            raise UserError(
                f"add_bos_token={add_bos_token}: {model.source} names no token of begin (bos_token)"
            )
        if add_bos_token is not None:
            conventions = dataclasses.replace(model.conventions, adds_begin=add_bos_token)
            model = dataclasses.replace(model, conventions=conventions)
        self.max_length, self._seed = max_length or longest, seed
        self._model, self._scorer = model, Scorer(model)
        self._sampler: Sampler | None = None

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's token of end, or else the model's first."""
        if (end := self._special("eos_token")) is not None:
            return end
        ends = self._model.conventions.ends
        return ends[0] if ends else empty_context(self._model)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        if (begin := self._special("bos_token")) is not None:
            return begin
        end = self._special("eos_token")
        return empty_context(self._model) if end is None else end

    def _special(self, use: str) -> int | None:
        text = self._model.conventions.special_tokens.get(use)
        return None if text is None else self._model.tokenizer.token_id(text)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The ids of a text, the last `left_truncate_len` of them; see `LanguageModel.encode`."""
        ids = self._model.encode(string, begins=add_special_tokens is not False).tolist()
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._model.tokenizer.decode_plain(tokens)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any):
        """(log-probability, whether greedy) of each (texts, ids of context, of continuation)."""
        pairs = [(context, new) for _, context, new in requests]
        scores = self._scores(pairs, "Running loglikelihood requests", disable_tqdm)
        answers = [(score.log_probability, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text as a whole, in disjoint windows of `max_length`."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        found = [0.0] * len(requests)
        scores = self._scores(pairs, "Running loglikelihood_rolling requests", disable_tqdm)
        for number, score in zip(owners, scores, strict=True):
            found[number] += score.log_probability
        for request, nats in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return found

    def _scores(self, pairs, what: str, hidden: bool) -> list[Score]:
        """Scores of (context, continuation); what is too long loses tokens of the context."""
        rows = []
        for context, new in pairs:
            if not 1 <= len(new) <= self.max_length:
                raise UserError(
                    f"lm-eval: a continuation of {len(new)} tokens; the model takes 1 to "
                    f"max_length={self.max_length}"
                )
            tokens = np.array([*context, *new][-(self.max_length + 1) :], np.int32)
            rows.append(Row(tokens, len(new)))
        with _progress(what, len(rows), hidden) as progress:
            return self._scorer(rows, progress)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that continues each prompt; prompts with the same options are continued at once.

        Of the options of lm-eval `until`, `max_gen_toks` (and its other names), `do_sample`,
        `temperature`, `top_k`, `top_p` and `repetition_penalty` hold. A prompt that leaves no room
        for as many new tokens loses its beginning.

        Raises:
          UserError: another option, one out of its range, or no room for a prompt.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(options, []).append(number)
        texts = [""] * len(requests)
        what = "Running generate_until requests"
        for members in groups.values():
            prompts = [requests[number].args[0] for number in members]
            options = requests[members[0]].args[1]
            with _progress(what, len(members), disable_tqdm) as progress:
                done = self._continued(prompts, options, progress)
            for number, text in zip(members, done, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _continued(self, prompts: Sequence[str], options: Mapping[str, Any], progress):
        tokens, stop, choice = _choice(options)
        stop = handle_stop_sequences(stop, self._model.tokenizer.token_text(self.eot_token_id))
        room = self.max_length - tokens
        if room < 1:
            raise UserError(
                f"lm-eval: max_gen_toks={tokens} leaves no room for a prompt within max_length="
                f"{self.max_length}; use fewer (--gen_kwargs max_gen_toks=N)"
            )
        encoded = [np.array(self.tok_encode(text, None, room), np.int32) for text in prompts]
        empty = np.array([empty_context(self._model)], np.int32)
        encoded = [ids if len(ids) else empty for ids in encoded]
        if self._sampler is None:
            model = self._model = self._model.taken_apart()
            self._scorer = Scorer(model)
            conventions = model.conventions
            self._sampler = Sampler(model.config, model.rules, model.tokenizer, conventions.ends)
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        with jax.set_mesh(self._model.mesh):
            done = self._sampler.complete(
                self._model.params,
                [encoded[i] for i in order],
                tokens=tokens,
                choice=choice,
                stop=stop,
                seed=self._seed,
                progress=progress,
            )
        texts = [""] * len(prompts)
        for i, new in zip(order, done, strict=True):
            texts[i] = postprocess_generated_text(self.tok_decode(new.ids), stop, None)
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation: up to where the answer begins, or to its last message's end.

        Raises:
          UserError: as `Conventions.chat`, also without what the system says.
        """
        history = list(chat_history)
        if not add_generation_prompt:  # the model is to go on with the last message
            history[-1] = {**history[-1], "content": history[-1]["content"] + _MARK}
        chat = self._model.conventions.chat
        try:
            text = chat(history, answer=add_generation_prompt)
        except UserError as error:
            kept = [message for message in history if message["role"] != "system"]
            if len(kept) == len(history):
                raise
            log.warning("without what the system says: %s", error)
            text = chat(kept, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        text, _, after = text.rpartition(_MARK.strip())
        return text if after.startswith(" ") else text.rstrip()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm-eval to note; "" where it is not asked for.

        Raises:
          UserError: the model has none.
        """
        if not chat_template:
            return ""
        self._model.conventions.chat([{"role": "user", "content": ""}])
        return self._model.conventions.chat_template

    @property
    def tokenizer_name(self) -> str:
        """The model's name, by which lm-eval keeps requests that it has made before."""
        return self._model.source.replace("/", "__")


def _choice(options: Mapping[str, Any]) -> tuple[int, list[str], Choice]:
    """The most new tokens, the texts that end one, and the choice of tokens that options say."""
    known = dict(normalize_gen_kwargs(dict(options), NEW_TOKENS))
    tokens, stop = known.pop("max_gen_toks"), known.pop("until")
    sampled, beams = known.pop("do_sample"), known.pop("num_beams", 1)
    if beams != 1:
        raise UserError(f"lm-eval: num_beams={beams}: there is no search with beams; use 1")
    # 0 and 1 are what says "all" in transformers.
    choice = {
        "temperature": known.pop("temperature", 1.0) if sampled else 0.0,
        "top_k": known.pop("top_k", None) or None,
        "top_p": None if (top_p := known.pop("top_p", None)) == 1 else top_p,
        "repetition_penalty": known.pop("repetition_penalty", 1.0),
    }
    if not sampled:
        known.pop("temperature", None)
    if known:
        raise UserError(
            f"lm-eval: generation option {min(known)!r} is not done; use until, max_gen_toks, "
            f"do_sample, {', '.join(choice)}"
        )
    return tokens, stop, Choice(**choice)


@contextlib.contextmanager
def _progress(what: str, total: int, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives a function that is told (done, of all), and shows them as lm-eval does."""
    with tqdm(total=total, desc=what, disable=hidden) as bar:
        yield lambda done, of: bar.update(done - bar.n)
