"""The axes that functions are told, and the shards that the type of an array tells of."""

import math

import jax


def positive(axis: int, ndim: int) -> int:
    """The number, from 0, of an axis that may be counted from the end.

    Raises:
      ValueError: there is no such axis.
    """
    if not isinstance(axis, int) or not -ndim <= axis < ndim:
        have = f"0 to {ndim - 1}, or -{ndim} to -1" if ndim else "an array that has axes"
        raise ValueError(f"axis={axis!r} of an array of {ndim} axes; use {have}")
    return axis % ndim


def shards(x: jax.Array, axis: int) -> int:
    """Number of shards of an axis, counted from 0; 1 where the type of x does not say."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    if names is None or names is jax.sharding.PartitionSpec.UNCONSTRAINED:
        return 1
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)
