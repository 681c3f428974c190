"""Digests of sharded arrays, computed where the arrays lie.

A digest is two 32-bit sums, modulo 2^32, over the elements of an array, of a mix of the element's
bits and of its global index. Addition does not mind the order, so a digest does not depend on how
the array is sharded: it is taken on one mesh when a checkpoint is written, and checked on any other
when it is read. Every device sums what it holds, and only the sums travel, in one all-reduce.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Two bijections of 32-bit words: (stride of the index, multiplier, multiplier, three shifts).
# The first is `lowbias32` of C. Wellons' hash-prospector, the second the finalizer of MurmurHash3.
_LANES = (
    (0x9E3779B1, 0x7FEB352D, 0x846CA68B, (16, 15, 16)),
    (0x85EBCA77, 0x85EBCA6B, 0xC2B2AE35, (16, 13, 16)),
)


def digests(tree: Any) -> Any:
    """The digest of every array of `tree`, in one pass over it on the devices that hold it.

    Args:
      tree: a pytree of jax.Arrays of floats, integers or bools of up to 64 bits, sharded in any
        way over meshes with axes of any type.

    Returns:
      A pytree of the same structure of uint32[2], the same for the same bits and shape, however
      the arrays are sharded. While the other elements stay as they are, each half of the digest is
      a bijection of any one 32-bit word, so a change of one element of up to 32 bits is always
      seen; any other change goes unseen with a probability of about 2^-64. The index is taken
      modulo 2^32: in an array of more elements, two that lie 2^32 apart could change places.

      The call returns once the work is enqueued, so the arrays may be donated after it. Wait for
      the result before enqueueing an unrelated program with collectives on emulated CPU devices:
      XLA:CPU can deadlock when two such programs run at once.

    Raises:
      TypeError: an array is of another kind (complex numbers, PRNG keys).
    """
    leaves, structure = jax.tree.flatten(tree)
    meshes: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        sharding = leaf.sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        meshes.setdefault(mesh, []).append(i)
    found: list[Any] = [None] * len(leaves)
    for mesh, members in meshes.items():
        arrays = [leaves[i] for i in members]
        if mesh is None:
            results = [_digest(x) for x in arrays]
        else:
            with jax.set_mesh(mesh):  # the mesh of the arrays, whatever the caller's is
                results = _mesh_digests(arrays, mesh, tuple(x.sharding.spec for x in arrays))
        for i, result in zip(members, results, strict=True):
            found[i] = result
    return jax.tree.unflatten(structure, found)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mesh_digests(arrays: list, mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> list:
    """The digests of arrays on one mesh: every device sums its shards, then one all-reduce."""

    def local(*shards):
        sums = []
        for x, spec in zip(shards, specs, strict=True):
            names = [() if n is None else (n,) if isinstance(n, str) else n for n in spec]
            names += [()] * (x.ndim - len(names))
            sizes = [math.prod(mesh.shape[name] for name in axes) for axes in names]
            starts = [
                lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(dim) if axes else 0
                for axes, dim in zip(names, x.shape, strict=True)
            ]
            shape = tuple(n * dim for n, dim in zip(sizes, x.shape, strict=True))
            used = {name for axes in names for name in axes}
            copied = tuple(name for name in mesh.axis_names if name not in used)
            first = lax.axis_index(copied) == 0 if copied else True  # count one copy of a shard
            sums.append(jnp.where(first, _digest(x, starts, shape), jnp.uint32(0)))
        return lax.psum(jnp.stack(sums), mesh.axis_names)

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return list(spread(*arrays))


@functools.partial(jax.jit, static_argnames="shape")
def _digest(x: jax.Array, starts: list | None = None, shape: tuple[int, ...] | None = None):
    """uint32[2]: what the part `x`, at `starts` in an array of `shape`, adds to its digest."""
    words = _words(x)
    index = _linear_index(x, starts or [0] * x.ndim, shape or x.shape)
    lanes = [jnp.zeros_like(index) for _ in _LANES]
    for i, word in enumerate(words):
        position = index * jnp.uint32(len(words)) + jnp.uint32(i)
        lanes = [
            total + _mix(word + position * jnp.uint32(lane[0]), lane)
            for total, lane in zip(lanes, _LANES, strict=True)
        ]
    # One reduction of both lanes: XLA:CPU would write each lane out before a reduction of its own,
    # twice the array in memory and a tenth of the speed.
    zero = jnp.uint32(0)
    sums = lax.reduce(
        tuple(lanes), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim))
    )
    return jnp.stack(sums)


def _words(x: jax.Array) -> list[jax.Array]:
    """The bit patterns of `x` as one uint32 array of its shape, or two for 64-bit elements."""
    if x.dtype == jnp.bool_:
        return [x.astype(jnp.uint32)]
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"digests: an array of {x.dtype}; it must be of floats, integers or bools")
    bits = jax.dtypes.itemsize_bits(x.dtype)
    x = lax.bitcast_convert_type(x, f"uint{bits}")
    if bits == 64:
        return [x.astype(jnp.uint32), (x >> 32).astype(jnp.uint32)]
    return [x.astype(jnp.uint32)]


def _linear_index(x: jax.Array, starts: list, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of the shape of `x`: the row-major indices modulo 2^32 in the array of `shape`."""
    index = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        here = lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(starts[axis])
        index = index + here * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(word: jax.Array, lane: tuple) -> jax.Array:
    """Maps 32-bit words one to one to words that look random."""
    _, mul1, mul2, (shift1, shift2, shift3) = lane
    word = (word ^ (word >> shift1)) * jnp.uint32(mul1)
    word = (word ^ (word >> shift2)) * jnp.uint32(mul2)
    return word ^ (word >> shift3)
