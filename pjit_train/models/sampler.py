"""Text from a model, token by token, with a key-value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from pjit_train.errors import UserError
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules, reshard
from sparsity.ranges import Count, NonNegative, Whole, check_number

_PURPOSE = 1  # keeps the draws of samples apart from those of parameters


class Sampler:
    """Continues prompts with the parameters of one model.

    Args:
      config: of the model.
      rules: of its parameters; samples are laid on the mesh by their batch alone.
      tokenizer: of `pjit_train.data`.
    """

    def __init__(self, config: TransformerConfig, rules: Rules, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.rules = rules.with_whole_rows()
        build = functools.partial(config.build, jax.random.key(0), self.rules)
        self._graph = nnx.split(nnx.eval_shape(build))[0]
        self._compiled = jax.jit(self._generate, static_argnames=("tokens", "greedy", "top_k"))

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
          temperature: divides the logits before the softmax; 0 takes the likeliest token.
          top_k: sample among the so many likeliest tokens only; None for all.

        Returns:
          Prompt and continuation, for each prompt.

        Raises:
          UserError: prompt and continuation exceed the longest sequence of the model, or an option
            is out of its range.
        """
        check_number("sample: tokens", tokens, Count, UserError)
        check_number("sample: temperature", temperature, NonNegative, UserError)
        check_number("sample: top_k", top_k, Count | None, UserError)
        check_number("sample: seed", seed, Whole, UserError)
        separator = self.tokenizer.separator
        encoded = [np.concatenate([[separator], self.tokenizer.encode(p)]) for p in prompts]
        longest = max(map(len, encoded), default=0)
        if longest + tokens > self.config.max_len:
            raise UserError(
                f"sample: a prompt of {longest} tokens, the separator one of them, and {tokens} "
                f"more exceed the model's max_len={self.config.max_len}; ask for at most so many "
                "together"
            )
        keys = jax.random.fold_in(jax.random.key(seed), _PURPOSE)
        # One prompt at a time fills the batch, so that prompts of any length need no padding.
        return [
            self._continue(params, ids, tokens, temperature, top_k, jax.random.fold_in(keys, i))
            for i, ids in enumerate(encoded)
        ]

    def _continue(self, params, ids, tokens, temperature, top_k, key) -> str:
        mesh = jax.sharding.get_abstract_mesh()
        rows = int(np.prod([mesh.shape[axis] for axis in self.rules.batch]))
        prompt = np.broadcast_to(ids.astype(np.int32), (rows, len(ids)))
        new = self._compiled(
            params,
            prompt,
            key,
            temperature or 1.0,
            tokens=tokens,
            greedy=temperature < np.finfo(np.float32).tiny,  # what JAX would divide by as by zero
            top_k=top_k,
        )
        # Every process needs the text, and the first row is not on each of them.
        new = np.asarray(reshard(new, P(None, None)))[0]
        ends = np.flatnonzero(new == self.tokenizer.separator)
        return self.tokenizer.decode([*ids, *new[: ends[0] if len(ends) else None]])

    def _generate(self, params, prompt_BT, key, temperature, *, tokens, greedy, top_k):
        model = nnx.merge(self._graph, params)
        batch = self.rules.spec(("batch", None))
        prompt_BT = reshard(prompt_BT, batch)
        rows, length = prompt_BT.shape

        def choose(hidden_BTD, step):
            logits_BV = reshard(model.logits(hidden_BTD[:, -1:])[:, 0], batch)
            # A model may have more tokens than the tokenizer, rounded up to divide by a mesh.
            logits_BV = logits_BV[:, : self.tokenizer.vocab_size]
            if greedy:
                return jnp.argmax(logits_BV, axis=-1)
            # The largest becomes zero: of the quotients only those that do not count overflow.
            logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
            if top_k is not None:
                least = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
                logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
            # The same draw in every row: the rows are copies of one sample.
            noise_V = jax.random.gumbel(jax.random.fold_in(key, step), logits_BV.shape[1:])
            return jnp.argmax(logits_BV + noise_V, axis=-1)

        hidden, cache = model.hidden(prompt_BT, cache=model.empty_cache(rows, length + tokens))
        first = choose(hidden, 0)

        def body(carry, step):
            token_B, cache = carry
            hidden, cache = model.hidden(token_B[:, None], cache=cache, position=length + step - 1)
            token_B = choose(hidden, step)
            return (token_B, cache), token_B

        _, rest = jax.lax.scan(body, (first, cache), jnp.arange(1, tokens))
        return jnp.concatenate([first[None], rest]).T  # [batch, tokens]
