"""Tokens from a model, one after the other, with a key-value cache.

Letters in names: B batch, one row of it a prompt; P tokens of the prompts; D model width; V
vocabulary.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

from pjit_train.errors import UserError
from pjit_train.models.continuation import Continuation
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules, reshard
from sparsity.ranges import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Whole,
    check_number,
)

_PURPOSE = 1  # keeps the draws of samples apart from those of parameters
_MOST_ROWS = 16  # prompts at once, on a shard of the batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Choice of the next token by its logits.

    Attributes:
      temperature: divides the logits before the softmax; 0 takes the likeliest.
      top_k: among the so many likeliest only; None for all.
      top_p: among the fewest likeliest only whose probabilities add up to this (Holtzman et al.,
        2020); None for all.
      repetition_penalty: of tokens that are in the prompt or were chosen before, positive logits
        are divided by it and negative ones multiplied (Keskar et al., 2019).
    """

    temperature: NonNegative = 1.0
    top_k: Count | None = None
    top_p: Fraction | None = None
    repetition_penalty: Positive = 1.0

    def __post_init__(self):
        for name, hint in typing.get_type_hints(Choice, include_extras=True).items():
            check_number(f"sample: {name}", getattr(self, name), hint, UserError)

    @property
    def greedy(self) -> bool:
        """Tells whether the likeliest token is taken, as at what JAX would divide by as by 0."""
        return self.temperature < float(np.finfo(np.float32).tiny)


class Sampler:
    """Continues prompts with the parameters of one model.

    Args:
      config: of the model.
      rules: of its parameters; samples are laid on the mesh by their batch alone.
      tokenizer: of `pjit_train.data`.
      ends: ids of the tokens that end a text; None for the tokenizer's separator.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rules: Rules,
        tokenizer,
        ends: Sequence[int] | None = None,
    ):
        self.config, self.tokenizer = config, tokenizer
        self.ends = frozenset([tokenizer.separator] if ends is None else ends)
        self.rules = rules.with_whole_rows()
        build = functools.partial(config.build, jax.random.key(0), self.rules)
        self._graph = nnx.split(nnx.eval_shape(build))[0]
        static = ("greedy", "top_k", "with_top_p", "with_penalty")
        self._begin = jax.jit(self._first, static_argnames=("length", *static))
        self._go_on = jax.jit(
            self._next, static_argnames=static, donate_argnames=("cache", "seen_BV")
        )

    def __call__(
        self,
        params,
        prompts: Sequence[str],
        *,
        tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Continues each prompt until the end of its document, or by `tokens` tokens.

        Args:
          params: of the model, as `Program.weights` gives them, on the mesh that is set.
          prompts: each begins a document; "" leaves the model all of it.
          temperature, top_k: see `Choice`.

        Returns:
          Prompt and continuation, for each prompt.

        Raises:
          UserError: prompt and continuation exceed the longest sequence of the model, or an option
            is out of its range.
        """
        begin = [self.tokenizer.separator]
        encoded = [np.concatenate([begin, self.tokenizer.encode(p)]) for p in prompts]
        choice = Choice(temperature=temperature, top_k=top_k)
        done = self.complete(params, encoded, tokens=tokens, choice=choice, seed=seed)
        texts = map(self.tokenizer.decode, encoded)
        return [text + new.text for text, new in zip(texts, done, strict=True)]

    def complete(
        self,
        params,
        prompts: Sequence[np.ndarray],
        *,
        tokens: int,
        choice: Choice,
        stop: Sequence[str] = (),
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Continuation]:
        """Continues prompts of tokens, several at once, each until it ends.

        Args:
          prompts: ids; one token at least.
          stop: texts before which a continuation ends.
          progress: called with the number of prompts that are done, and that of all.

        Raises:
          UserError: as `generate`.
        """
        check_number("sample: tokens", tokens, Count, UserError)
        check_number("sample: seed", seed, Whole, UserError)
        all_new = [Continuation(self.tokenizer, ids, ends=self.ends, stop=stop) for ids in prompts]
        size = _MOST_ROWS * self._shards()
        for start in range(0, len(prompts), size):
            group = all_new[start : start + size]
            steps = self.generate(
                params,
                prompts[start : start + size],
                tokens=tokens,
                choice=choice,
                seed=seed,
                first=start,
            )
            for chosen in steps:
                for new, token in zip(group, chosen, strict=True):
                    new.push(int(token))
                if all(new.done for new in group):
                    break
            for new in group:
                new.finish()
            if progress is not None:
                progress(start + len(group), len(prompts))
        return all_new

    def generate(
        self,
        params,
        prompts: Sequence[np.ndarray],
        *,
        tokens: int,
        choice: Choice,
        seed: int = 0,
        first: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yields the next token of each prompt, int [prompts], `tokens` times.

        A prompt's tokens do not depend on those beside it, but for rounding.

        Args:
          first: number of the first prompt, by which draws differ between prompts.

        Raises:
          UserError: prompt and continuation exceed the longest sequence of the model.
        """
        longest = max(map(len, prompts))
        if longest + tokens > self.config.max_len:
            raise UserError(
                f"sample: a prompt of {longest} tokens and {tokens} more exceed the model's "
                f"max_len={self.config.max_len}; ask for at most so many together"
            )
        rows = -(-len(prompts) // self._shards()) * self._shards()
        # Few lengths, since each is compiled for itself.
        length = -(-longest // 32) * 32
        vocab = self.tokenizer.vocab_size
        with_penalty = choice.repetition_penalty != 1.0
        prompt_BP = np.zeros((rows, length), np.int32)
        padding_B = np.full(rows, length - 1, np.int32)
        seen_BV = np.zeros((rows, vocab if with_penalty else 1), bool)
        for row, ids in enumerate(prompts):
            prompt_BP[row, length - len(ids) :] = ids
            padding_B[row] = length - len(ids)
            if with_penalty:
                seen_BV[row, ids] = True
        prompt_BP, padding_B, seen_BV, numbers_B = self._by_rows(
            prompt_BP, padding_B, seen_BV, np.arange(first, first + rows, dtype=np.int32)
        )
        options = dict(
            padding_B=padding_B,
            numbers_B=numbers_B,
            key=jax.random.fold_in(jax.random.key(seed), _PURPOSE),
            temperature=1.0 if choice.greedy else choice.temperature,
            top_p=choice.top_p or 0.0,
            penalty=choice.repetition_penalty,
            greedy=choice.greedy,
            top_k=choice.top_k,
            with_top_p=choice.top_p is not None,
            with_penalty=with_penalty,
        )
        token_B, cache, seen_BV = self._begin(
            params, prompt_BP, seen_BV=seen_BV, length=length + tokens, **options
        )
        for step in range(1, tokens + 1):
            # Every process needs the tokens, and not all rows are on each of them.
            chosen_B = reshard(token_B, P(None))
            if step < tokens:  # begun before the tokens are waited for: the devices never wait
                token_B, cache, seen_BV = self._go_on(
                    params,
                    token_B,
                    length + step - 1,
                    step,
                    cache=cache,
                    seen_BV=seen_BV,
                    **options,
                )
            yield np.asarray(chosen_B)[: len(prompts)]

    def _shards(self) -> int:
        mesh = jax.sharding.get_abstract_mesh()
        return 1 if mesh.empty else self.rules.shards(mesh.shape, "batch")

    def _by_rows(self, *arrays: np.ndarray) -> list[jax.Array]:
        """The arrays, their first axis laid on the mesh as a batch."""
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return [jnp.asarray(x) for x in arrays]
        found: list[jax.Array] = []
        for x in arrays:
            spec = self.rules.spec(("batch", *[None] * (x.ndim - 1)))
            make = jax.make_array_from_callback
            found.append(make(x.shape, NamedSharding(mesh, spec), x.__getitem__))
        return found

    def _first(self, params, prompt_BP, *, length, padding_B, seen_BV, **options):
        model = nnx.merge(self._graph, params)
        cache = model.empty_cache(prompt_BP.shape[0], length)
        hidden_BPD, cache = model.hidden(prompt_BP, cache=cache, padding=padding_B)
        token_B, seen_BV = self._chosen(model, hidden_BPD[:, -1:], seen_BV, 0, **options)
        return token_B, cache, seen_BV

    def _next(self, params, token_B, position, step, *, cache, padding_B, seen_BV, **options):
        model = nnx.merge(self._graph, params)
        hidden_B1D, cache = model.hidden(
            token_B[:, None], cache=cache, position=position, padding=padding_B
        )
        token_B, seen_BV = self._chosen(model, hidden_B1D, seen_BV, step, **options)
        return token_B, cache, seen_BV

    def _chosen(self, model, hidden_B1D, seen_BV, step, **options):
        """The next token of each row, and the tokens that were seen, that one too."""
        rows, matrix = self.rules.spec(("batch",)), self.rules.spec(("batch", None))
        # A model may have more tokens than the tokenizer, rounded up to divide by a mesh.
        logits_BV = reshard(model.logits(hidden_B1D)[:, 0], matrix)
        logits_BV = logits_BV[:, : self.tokenizer.vocab_size]
        traced = ("numbers_B", "key", "temperature", "top_p", "penalty")
        arguments = logits_BV, seen_BV, step, *(options.pop(name) for name in traced)
        choose = functools.partial(_choose, **options)
        if jax.sharding.get_abstract_mesh().empty:
            return choose(*arguments)
        return auto_axes(choose, out_sharding=(rows, matrix))(*arguments)


def _choose(
    logits_BV,
    seen_BV,
    step,
    numbers_B,
    key,
    temperature,
    top_p,
    penalty,
    *,
    greedy,
    top_k,
    with_top_p,
    with_penalty,
):
    """A token of each row [B], by its logits, and what has been seen with it; see `Choice`."""
    if with_penalty:
        lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, lowered, logits_BV)
    if greedy:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        # The largest becomes zero: of the quotients only those that do not count overflow.
        logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
        if top_k is not None:
            least = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
            logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
        if with_top_p:
            sorted_BV = -jnp.sort(-logits_BV, axis=-1)
            share_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
            # The likeliest is always kept.
            kept_B1 = jnp.maximum(jnp.sum(before_BV < top_p, axis=-1, keepdims=True), 1)
            least = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
            logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)

        def noise(number):
            of_step = jax.random.fold_in(jax.random.fold_in(key, number), step)
            return jax.random.gumbel(of_step, logits_BV.shape[1:])

        token_B = jnp.argmax(logits_BV + jax.vmap(noise)(numbers_B), axis=-1)
    if with_penalty:
        seen_BV = seen_BV | (jnp.arange(seen_BV.shape[-1]) == token_B[:, None])
    return token_B.astype(jnp.int32), seen_BV
