"""Masks of a target sparsity, under the names of JaxPruner's module (Lee et al., 2023).

All are uint8, 1 where a score is kept, and may be jitted with a traced sparsity.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsity.masks.axes import positive
from sparsity.masks.nm import nm_mask, split_groups
from sparsity.masks.topk import keep_count, topk_mask
from sparsity.sparsity_types import Block, Channel, NByM, SparsityType, Unstructured

MASK_DTYPE = "uint8"

TopKFnType = Callable[[jax.Array, Any], jax.Array]
"""(scores, sparsity) -> mask."""


def get_topk_fn(sparsity_type: SparsityType | type[Unstructured]) -> TopKFnType:
    """The function (scores, sparsity) -> mask of a type of sparsity.

    Raises:
      ValueError: it is no type of sparsity.
    """
    if sparsity_type is Unstructured:  # JaxPruner takes the class, too
        return topk_mask_calculator
    match sparsity_type:
        case Unstructured():
            return topk_mask_calculator
        case NByM():
            return functools.partial(topk_n_by_m_mask_calculator, sparsity_type=sparsity_type)
        case Block((height, width), use_avg_pooling):
            return functools.partial(
                topk_block_mask_calculator,
                block_height=height,
                block_width=width,
                use_avg_pooling=use_avg_pooling,
            )
        case Channel():
            return functools.partial(topk_channel_mask_calculator, sparsity_type=sparsity_type)
    raise ValueError(
        f"{sparsity_type!r} is no type of sparsity; use Unstructured(), NByM(2, 4), Block((4, 4)) "
        "or Channel() of sparsity.sparsity_types"
    )


def topk_mask_calculator(scores: jax.Array, sparsity: Any) -> jax.Array:
    """Keeps `topk.keep_count` of all scores, the largest; of equal ones the first."""
    scores = jnp.asarray(scores)
    return topk_mask(scores, keep_count(scores.size, sparsity)).astype(MASK_DTYPE)


def topk_n_by_m_mask_calculator(scores: jax.Array, sparsity: Any, sparsity_type: NByM) -> jax.Array:
    """Keeps the max(n, ceil(m * (1 - sparsity))) largest of every m scores; of equal ones the last.

    So a sparsity that rises from 0 goes from dense through m-1:m to n:m, and stays there. (In
    JaxPruner any sparsity but 0 gives n:m.)

    Raises:
      ValueError: as `nm.nm_mask`.
    """
    n, m, axis = sparsity_type.n, sparsity_type.m, sparsity_type.axis
    groups, at = split_groups(jnp.asarray(scores), m, axis, n=n)
    # 1e-4: a float32 sparsity of 1 - k / m may give a little more than k.
    kept = jnp.maximum(n, jnp.ceil(m * (1 - sparsity) - 1e-4)).astype(jnp.int32)
    mask = nm_mask(groups, kept, m, axis=at, ties="last")
    return mask.reshape(jnp.shape(scores)).astype(MASK_DTYPE)


def topk_block_mask_calculator(
    scores: jax.Array, sparsity: Any, block_height: int, block_width: int, use_avg_pooling: bool
) -> jax.Array:
    """Keeps blocks of height x width whole: the unstructured mask of their pooled scores.

    A block lies in the first two axes and goes through all others, as in JaxPruner's code (whose
    documentation says the last two); scores of one axis are one row. Blocks at the edges may be
    smaller.
    """
    scores = jnp.asarray(scores)
    if min(block_height, block_width) < 1:
        raise ValueError(
            f"block_shape=({block_height}, {block_width}); height and width are 1 or more"
        )
    spec = jax.typeof(scores).sharding.spec
    if any(spec):  # shards may cut blocks, so each device makes the whole mask
        scores = jax.sharding.reshard(scores, jax.sharding.PartitionSpec())
    shape = scores.shape if scores.ndim > 1 else (1, scores.size)
    rows, columns = shape[:2]
    depth = math.prod(shape[2:])
    high, wide = -(-rows // block_height), -(-columns // block_width)
    padding = ((0, high * block_height - rows), (0, wide * block_width - columns), (0, 0))

    def blocks(x: jax.Array, fill: float) -> jax.Array:
        x = jnp.pad(x.reshape(rows, columns, depth), padding, constant_values=fill)
        return x.reshape(high, block_height, wide, block_width, depth)

    if use_avg_pooling:
        counts = jnp.sum(blocks(jnp.ones(shape, jnp.float32), 0), axis=(1, 3, 4))
        pooled = jnp.sum(blocks(scores.astype(jnp.float32), 0), axis=(1, 3, 4)) / counts
    else:
        pooled = jnp.max(blocks(scores.astype(jnp.float32), -jnp.inf), axis=(1, 3, 4))
    mask = topk_mask_calculator(pooled, sparsity)
    mask = jnp.repeat(jnp.repeat(mask, block_height, axis=0), block_width, axis=1)
    mask = mask[:rows, :columns].reshape(rows, columns, *(1 for _ in shape[2:]))
    mask = jnp.broadcast_to(mask, shape).reshape(scores.shape)
    return jax.sharding.reshard(mask, spec) if any(spec) else mask


def topk_channel_mask_calculator(
    scores: jax.Array, sparsity: Any, sparsity_type: Channel
) -> jax.Array:
    """Keeps whole slices along an axis: the unstructured mask of the sums of their scores.

    Raises:
      ValueError: the scores have no such axis.
    """
    scores = jnp.asarray(scores)
    axis = positive(sparsity_type.axis, scores.ndim)
    others = tuple(a for a in range(scores.ndim) if a != axis)
    sums = jnp.sum(scores.astype(jnp.float32), axis=others, keepdims=True)
    return jnp.broadcast_to(topk_mask_calculator(sums, sparsity), scores.shape)
