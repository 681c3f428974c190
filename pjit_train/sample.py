"""Text from a language model: continuations of prompts, and answers in a conversation."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from pjit_train.errors import UserError
from pjit_train.language_model import LanguageModel, empty_context
from pjit_train.models.continuation import Continuation
from pjit_train.models.sampler import Choice, Sampler


class TextSampler:
    """Text of a language model.

    It takes the model's parameters over, by `LanguageModel.taken_apart`.

    Args:
      model: of `language_model`.
      tokens: the most that are sampled at a time.
      choice: of each token.
      stop: texts before which a text ends.
      cut: whether a prompt that is too long loses its beginning; else it is an error.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        tokens: int,
        choice: Choice,
        stop: Sequence[str] = (),
        cut: bool = False,
    ):
        if tokens >= model.config.max_len:
            raise UserError(
                f"sample: tokens={tokens} leaves no room for a prompt within the model's max_len="
                f"{model.config.max_len}; use fewer"
            )
        self._model, self._tokens, self._choice = model.taken_apart(), tokens, choice
        self._stop, self._cut = stop, cut
        self._sampler = Sampler(model.config, model.rules, model.tokenizer, model.conventions.ends)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> list[str]:
        """Prompts and their continuations; several prompts are continued at once.

        Raises:
          UserError: a prompt is too long.
        """
        encoded = [self._encoded(prompt) for prompt in prompts]
        with jax.set_mesh(self._model.mesh):
            done = self._sampler.complete(
                self._model.params,
                encoded,
                tokens=self._tokens,
                choice=self._choice,
                stop=self._stop,
                seed=seed,
            )
        return [prompt + new.text for prompt, new in zip(prompts, done, strict=True)]

    def stream(self, prompt: str, *, seed: int = 0) -> Iterator[str]:
        """Yields the continuation of a prompt, as its text becomes sure.

        Raises:
          UserError: the prompt is too long.
        """
        return self._stream(self._encoded(prompt), seed)

    def answer(self, messages: Sequence[Mapping[str, str]], *, seed: int = 0) -> Iterator[str]:
        """Yields the answer to a conversation; see `Conventions.chat`.

        Raises:
          UserError: the model has no template, or the conversation is too long.
        """
        text = self._model.conventions.chat(messages)
        return self._stream(self._fitting(self._model.tokenizer.encode_marked(text)), seed)

    def fits(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Tells whether a conversation leaves room for the answer."""
        text = self._model.conventions.chat(messages)
        return len(self._model.tokenizer.encode_marked(text)) <= self._room

    @property
    def _room(self) -> int:
        """The most tokens of a prompt."""
        return self._model.config.max_len - self._tokens

    def _stream(self, ids: np.ndarray, seed: int) -> Iterator[str]:
        new = Continuation(self._model.tokenizer, ids, ends=self._sampler.ends, stop=self._stop)
        with jax.set_mesh(self._model.mesh):
            for chosen in self._sampler.generate(
                self._model.params, [ids], tokens=self._tokens, choice=self._choice, seed=seed
            ):
                yield new.push(int(chosen[0]))
                if new.done:
                    return
        yield new.finish()

    def _encoded(self, prompt: str) -> np.ndarray:
        """The ids of a prompt, with what stands before a text of this model."""
        ids = self._model.encode(prompt)
        return self._fitting(ids if len(ids) else np.array([empty_context(self._model)]))

    def _fitting(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) <= self._room:
            return ids
        if not self._cut:
            raise UserError(
                f"sample: a prompt of {len(ids)} tokens and {self._tokens} more exceed the model's "
                f"max_len={self._model.config.max_len}; use fewer, or --cut to drop the beginning "
                "of the prompt"
            )
        kept = ids[len(ids) - self._room :]
        if self._model.conventions.adds_begin:
            kept = np.concatenate([ids[:1], kept[1:]])
        return kept
