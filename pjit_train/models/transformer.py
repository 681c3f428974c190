"""A decoder-only transformer whose configuration gives Llama, OPT, GPT-2 and their kin.

Llama (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.
OPT (Zhang et al., 2022): LayerNorm, learned positions offset by two, ReLU, biases, tied head.
GPT-2 (Radford et al., 2019): LayerNorm, learned positions, GELU, biases, tied head.
What the families after Llama change of it, docs/models.md tells.
"""

import dataclasses
import logging
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from pjit_train.errors import UserError
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.blocks import (
    Block,
    Layers,
    Norm,
    is_apart,
    rotary_angles,
    run_layers,
)
from pjit_train.models.loss import capped
from pjit_train.models.parameters import Initializer, gathered, gathered_for_tokens
from pjit_train.models.projection import straight_through
from pjit_train.models.roles import Role
from pjit_train.sharding import Rules, out_sharding, spec_axes, spec_of, varying
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.ranges import Count, Fraction, NonNegative, Positive, Whole, check_choice

log = logging.getLogger("torsion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """Configuration of a decoder-only language model.

    Attributes:
      max_len: longest sequence; with learned positions, the number of their embeddings.
      rope_scaling: (factor,) of all rotary frequencies, or (factor, low_freq_factor,
        high_freq_factor, original_max_position_embeddings) of Llama 3.1's; see `rotary_angles`.
      partial_rotary_factor: the share of a head's dimensions, the first, that positions rotate.
      window: how many tokens, the last of them itself, a token sees in a local layer (sliding
        window, Beltagy et al., 2020); None for all before it.
      local_layers: whether each layer is local, from the first on and then again from its
        beginning: (True, False) alternates. It is kept as its shortest period.
      rope_local_theta: theta of local layers, whose frequencies are not scaled then (Gemma 3); None
        where they are rotated as the others.
      position_offset: index of the embedding of position 0 (OPT: 2, below it stand unused rows).
      tie_head: the head is the transposed token embedding.
      scale_embedding: multiply token embeddings by sqrt(d_model), rounded to the activations' dtype
        (Gemma).
      logit_softcap: caps the logits of the head softly, as `attention_softcap` those of attention.
    """

    vocab_size: Count
    max_len: Count
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: Positive = 10_000.0
    rope_scaling: tuple[Positive] | tuple[Positive, Positive, Positive, Count] | None = None
    rope_local_theta: Positive | None = None
    partial_rotary_factor: Fraction = 1.0
    window: Count | None = None
    local_layers: tuple[bool, ...] = (True,)
    position_offset: Whole = 0
    position_init_std: NonNegative = 0.02
    tie_head: bool = False
    scale_embedding: bool = False
    logit_softcap: Positive | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choice("model: positions", self.positions, ("rope", "learned"), UserError)
        self._check_rotation()
        self._check_layers()

    def _check_rotation(self) -> None:
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"model: head_dim={self.head_dim} is odd; rotary positions need pairs")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))
            factor, *rest = self.rope_scaling
            if not (factor >= 1 and (not rest or rest[0] < rest[1])):
                raise UserError(
                    f"model: rope_scaling={self.rope_scaling} must be (factor >= 1, low, "
                    "high > low, original length), or (factor >= 1,)"
                )
        if self.positions == "rope" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise UserError(
                f"model: partial_rotary_factor={self.partial_rotary_factor} rotates "
                f"{self.rotary_dim} of head_dim={self.head_dim}; use one that rotates pairs"
            )
        for name, neutral in (
            ("rope_scaling", None),
            ("rope_local_theta", None),
            ("partial_rotary_factor", 1.0),
        ):
            if self.positions != "rope" and (value := getattr(self, name)) != neutral:
                raise UserError(
                    f"model: {name}={value} is of rotary positions and "
                    f"positions={self.positions!r}; use {name}={neutral}"
                )

    def _check_layers(self) -> None:
        local = tuple(self.local_layers)
        if not local or len(local) > self.num_layers or any(type(x) is not bool for x in local):
            shown = f"{str(local)[:60]} of {len(local)}"
            raise UserError(
                f"model: local_layers={shown} for num_layers={self.num_layers}; use True or False "
                "for each layer, or for the first ones, if the rest repeat them"
            )
        if not any(local):  # then nothing is said of local layers
            if self.window is not None or self.rope_local_theta is not None:
                raise UserError(
                    f"model: no layer is local and window={self.window}, "
                    f"rope_local_theta={self.rope_local_theta}; use None for both"
                )
        elif self.window is None and self.rope_local_theta is None and not all(local):
            raise UserError(
                "model: local_layers says that some layers are local, and window=None; say the "
                "window"
            )
        # Two of the given periods show whether a shorter one gives the same layers.
        local = (2 * local)[: self.num_layers]
        shortest = next(n for n in range(1, len(local) + 1) if local[n:] == local[:-n])
        object.__setattr__(self, "local_layers", local[:shortest])

    @property
    def period(self) -> int:
        return len(self.local_layers)

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotary positions rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    def check_data(self, *, vocab_size: int, seq_len: int) -> None:
        """Raises a UserError where text of this vocabulary and length does not fit the model."""
        if vocab_size > self.vocab_size:
            raise UserError(
                f"data: token ids go up to {vocab_size - 1} and the model has vocab_size="
                f"{self.vocab_size}; use vocab_size >= {vocab_size}"
            )
        if seq_len > self.max_len:
            raise UserError(
                f"data: seq_len={seq_len} exceeds the model's max_len={self.max_len}; "
                f"use seq_len <= {self.max_len}, or a larger max_len"
            )
        if (self.attention_tile_rows or 0) > seq_len:
            log.warning(
                "attention_tile_rows=%d exceeds seq_len=%d: all %d rows are one tile",
                self.attention_tile_rows,
                seq_len,
                seq_len,
            )

    def build(self, key: jax.Array, rules: Rules) -> "Transformer":
        return Transformer(self, key, rules)

    @property
    def num_params(self) -> int:
        """Elements of all parameters, as `count_params` counts them in the built model."""
        tables = self.vocab_size * (1 if self.tie_head else 2)
        if self.positions == "learned":
            tables += self.max_len + self.position_offset
        blocks = self.num_layers * self.num_block_params
        return tables * self.d_model + blocks + self.num_norm_params

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations per token of a training step: 3 forward passes, no remat.

        Matmuls only, with the causal half of the logits (as Chowdhery et al., 2022, appendix B,
        where the whole is counted).
        """
        windows = [self.window if local else None for local in self.local_layers]
        layers = sum(
            self.block_products(_columns_seen(seq_len, window)) * of_kind
            for window, of_kind in zip(windows, self._layers_of_period(), strict=True)
        )
        return 6.0 * (layers + self.d_model * self.vocab_size)

    def _layers_of_period(self) -> list[int]:
        """Number of the layers of each entry of `local_layers`."""
        period = len(self.local_layers)
        return [len(range(i, self.num_layers, period)) for i in range(period)]


def _columns_seen(rows: int, window: int | None) -> float:
    """Columns that a row of causal attention sees, on average."""
    wide = min(window or rows, rows)
    return (wide * (wide + 1) / 2 + (rows - wide) * wide) / rows


class Transformer(nnx.Module):
    """Token embedding, a stack of blocks, a norm and a head."""

    def __init__(self, config: TransformerConfig, key: jax.Array, rules: Rules):
        c = self.config = config
        self.rules = rules
        init = Initializer(key, rules, c.param_dtype)
        role = Role(
            kind="embedding",
            inputs=(-1,),  # of its transpose, as a head
            matmul=c.tie_head,
            input_axes=(None,),
            output_axes=(None,),
        )
        self.embedding = init.normal(
            (c.vocab_size, c.d_model), ("vocab", "embed"), role, c.init_std
        )
        role = Role(kind="positions", inputs=(-2,))
        positions = (c.max_len + c.position_offset, c.d_model), (None, "embed"), role
        learned = c.positions == "learned"
        self.position_embedding = init.normal(*positions, c.position_init_std) if learned else None
        self.blocks = Block(c, init.stacked(c.num_layers))
        self.norm = Norm(c, init)
        role = Role(kind="head", inputs=(-2,), matmul=True, input_axes=(None,), output_axes=(None,))
        head = (c.d_model, c.vocab_size), ("embed", "vocab"), role, c.init_std
        self.head = None if c.tie_head else init.normal(*head)

    def hidden(self, tokens_BT, **options):
        """The normalised output of the last block [batch, tokens, d_model], and the new cache.

        Arguments are those of `body`.
        """
        x_BTD, cache = self.body(tokens_BT, **options)
        return self.norm(x_BTD), cache

    def body(
        self,
        tokens_BT,
        *,
        segments=None,
        positions=None,
        cache=None,
        position=0,
        padding=None,
        collect=False,
    ):
        """The output of the last block [batch, tokens, d_model], and the new cache.

        Args:
          tokens_BT: int [batch, tokens].
          segments: int [batch, tokens]; tokens see only their own segment.
          positions: int [batch, tokens], of each token in its text; None for 0, 1, ... from
            `position` on. Without a cache.
          cache: what `empty_cache` made, or an earlier call returned.
          position: of the first token: how many tokens the cache holds.
          padding: int [batch]; so many of a row's first tokens, from position 0 on, are none, and
            its text begins after them. Only with a cache.
          collect: without a cache; what each layer gives is returned in place of it.
        """
        c = self.config
        columns_T = position + jnp.arange(tokens_BT.shape[1])
        of_rows = positions is not None or padding is not None
        if positions is None:
            positions = columns_T
        if padding is not None:
            positions = jnp.maximum(columns_T - padding[:, None], 0)  # [batch, tokens]
            columns_C = jnp.arange(cache_length(cache))
            segments = tuple((at >= padding[:, None]).astype(int) for at in (columns_T, columns_C))
        table_VD = gathered_for_tokens(self.embedding, self.rules, c.dtype, exact=True)
        x_BTD = lookup(table_VD, tokens_BT)
        if c.scale_embedding:
            x_BTD *= jnp.asarray(np.float32(math.sqrt(c.d_model)), c.dtype)
        angles = local_angles = None
        if self.position_embedding is None:
            angles = rotary_angles(positions, c.rotary_dim, c.rope_theta, c.rope_scaling)
            local_angles = angles
            if c.rope_local_theta is not None:
                local_angles = rotary_angles(positions, c.rotary_dim, c.rope_local_theta)
        else:
            table = gathered(self.position_embedding, self.rules, c.dtype)
            if of_rows:
                x_BTD += lookup(table, positions + c.position_offset)
            else:
                first = position + c.position_offset
                x_BTD += jax.lax.dynamic_slice_in_dim(table, first, tokens_BT.shape[1])
        everywhere = dict(causal=True, segments=segments)
        beyond = everywhere | dict(angles=angles, window=None)
        within = everywhere | dict(angles=local_angles, window=c.window)
        inputs = [within if local else beyond for local in c.local_layers]
        options = dict(cache=cache, position=position, collect=collect)
        return run_layers(self.blocks, x_BTD, c, inputs, **options)

    def head_kernel(self) -> jax.Array:
        """The head [d_model, vocab], in the dtype of the activations."""
        if self.head is not None:
            return gathered_for_tokens(self.head, self.rules, self.config.dtype)
        table_VD = gathered_for_tokens(self.embedding, self.rules, self.config.dtype, exact=True)
        stored = self.embedding.get_value()
        if isinstance(stored, QuantizedKernel):  # after it was gathered, as the lookup's table is
            read = lambda table: dataclasses.replace(stored, kernel=table).dense()
            table_VD = straight_through(read, table_VD)
        return table_VD.T

    def head_inputs(self, hidden_BTD: jax.Array) -> jax.Array:
        """Quantizes the output of `hidden` as the head's matmul reads it, if that is quantized."""
        stored = (self.embedding if self.head is None else self.head).get_value()
        return stored.inputs(hidden_BTD) if isinstance(stored, QuantizedKernel) else hidden_BTD

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Computes logits, float32 [batch, tokens, vocab]."""
        kernel, spec = self.head_kernel(), self.rules.spec(("batch", "length", "vocab"))
        logits_BTV = jnp.einsum(
            "btd,dv->btv",
            self.head_inputs(hidden_BTD),
            kernel,
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding(spec),
        )
        return capped(logits_BTV, self.config.logit_softcap)

    def __call__(self, tokens_BT: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Logits of the next token, float32 [batch, tokens, vocab]."""
        return self.logits(self.hidden(tokens_BT, segments=segments)[0])

    def empty_cache(self, batch: int, max_tokens: int):
        """Keys and values of no tokens yet, with room for `max_tokens`; see `run_layers`."""
        c = self.config
        shape = (batch, max_tokens, c.num_kv_heads, c.head_dim)
        spec = ("batch", None, "kv_heads", None)

        def zeros(shape, spec):
            return jnp.zeros(shape, c.dtype, out_sharding=out_sharding(self.rules.spec(spec)))

        if is_apart(self.blocks):
            layers = range(c.num_layers)
            keys, values = (Layers(tuple(zeros(shape, spec) for _ in layers)) for _ in range(2))
            return keys, values
        stacked = zeros((c.num_layers, *shape), (None, *spec))
        return stacked, stacked


def cache_length(cache) -> int:
    """Tokens that a cache of `Transformer.empty_cache` has room for."""
    return jax.tree.leaves(cache)[0].shape[-3]


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a table [batch, tokens, d_model]; the table may be split over its rows.

    Each device looks up the ids that it holds, and a sum over the vocabulary's axis joins them: the
    table is not gathered, and its gradient is made where it is stored.
    """
    spec = spec_of(table_VD)
    vocab, _ = spec.partitions
    batch, rows = spec_of(ids_BT)
    if vocab is batch is rows is None:
        return jnp.take(table_VD, ids_BT, axis=0, mode="clip")

    def shard(table_VD, ids_BT):
        table_VD = varying(table_VD, spec_axes(P(batch, rows)))
        if vocab is None:
            return jnp.take(table_VD, ids_BT, axis=0, mode="clip")
        ids_BT = ids_BT - jax.lax.axis_index(vocab) * table_VD.shape[0]
        held = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
        rows_BTD = jnp.take(table_VD, ids_BT, axis=0, mode="clip")
        return jax.lax.psum(jnp.where(held[..., None], rows_BTD, 0), vocab)

    out = P(batch, rows, None)
    return jax.shard_map(shard, in_specs=(spec, P(batch, rows)), out_specs=out)(table_VD, ids_BT)


def count_params(params) -> int:
    """Number of elements of a pytree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
