"""Rows of a batch to the bags of its features, and gradients of bags to the entries of rows.

S samples, J columns of ids of all features, K = S * J, D width.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.exact import rounded

_UNROLLED = 4  # columns that are added one by one without a loop


def pooled(
    rows_KD: jax.Array, unit_K: jax.Array, gains_SJ: jax.Array, columns: Sequence[int]
) -> list[jax.Array]:
    """The sums of gain * row over the columns of each feature, one column after another.

    Args:
      rows_KD: by unit.
      unit_K: of each entry in the order of [S, J]; K for zeros.
      columns: of each feature.

    Returns:
      [S, D] of each feature.
    """
    unit_SJ, pools, first = unit_K.reshape(gains_SJ.shape), [], 0

    def term(column):
        unit, gain = (
            jax.lax.dynamic_index_in_dim(x, column, axis=1, keepdims=False)
            for x in (unit_SJ, gains_SJ)
        )
        rows = jnp.take(rows_KD, unit, axis=0, mode="fill", fill_value=0)
        return rounded(rows * gain[:, None])

    for count in columns:
        pool = term(first)
        if count <= _UNROLLED:
            for column in range(first + 1, first + count):
                pool = pool + term(column)
        else:
            add = lambda column, pool: pool + term(column)
            pool = jax.lax.fori_loop(first + 1, first + count, add, pool)
        pools.append(pool)
        first += count
    return pools


def spread(
    gradients: Sequence[jax.Array], order_K: jax.Array, gains_SJ: jax.Array, columns: Sequence[int]
) -> jax.Array:
    """The gradient of each sorted entry, gain * that of its bag, float32 [K, D].

    Args:
      gradients: of each feature's bags, [S, D].
      order_K: where each sorted entry is in [S, J].
      columns: of each feature.
    """
    feature_J = np.repeat(np.arange(len(columns), dtype=np.int32), columns)
    count = len(feature_J)
    column = order_K % count
    bag = order_K // count * len(columns) + jnp.asarray(feature_J)[column]
    bags = jnp.stack(gradients, axis=1).reshape(-1, gradients[0].shape[-1])
    return rounded(bags[bag] * gains_SJ.reshape(-1)[order_K][:, None])
