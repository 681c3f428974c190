"""Digests against numpy, on every sharding, and what they must notice."""

import contextlib
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pjit_train.digest import _mesh_digests, digests

DTYPES = (
    *("float32", "bfloat16", "float16", "int32", "uint32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
)


def mesh(axis_type=AxisType.Explicit):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)


def mix(word, mul1, mul2, shifts):
    for shift, multiplier in zip(shifts, (mul1, mul2, 1), strict=True):
        word = ((word ^ (word >> shift)) * multiplier) % 2**32
    return word


def by_hand(words):
    """The digest of a list of 32-bit words in row-major order, in Python's own integers."""
    murmur = [mix((w + i * 0x85EBCA77) % 2**32, 0x85EBCA6B, 0xC2B2AE35, (16, 13, 16))
              for i, w in enumerate(words)]  # fmt: skip
    lowbias = [mix((w + i * 0x9E3779B1) % 2**32, 0x7FEB352D, 0x846CA68B, (16, 15, 16))
               for i, w in enumerate(words)]  # fmt: skip
    return [sum(lowbias) % 2**32, sum(murmur) % 2**32]


def test_the_mixes_are_the_published_ones():
    # fmix32(1) of MurmurHash3, and the first step of lowbias32 by its definition.
    assert mix(1, 0x85EBCA6B, 0xC2B2AE35, (16, 13, 16)) == 0x514E28B7
    assert mix(0, 0x7FEB352D, 0x846CA68B, (16, 15, 16)) == 0


def bits(array):
    """The words of a numpy array, from its bytes; a 4-bit element lies alone in the low half."""
    array = np.asarray(array)
    if array.dtype == bool:
        return [int(x) for x in array.ravel()]
    raw = np.ascontiguousarray(array).ravel().view(f"u{array.dtype.itemsize}")
    mask = 15 if array.dtype in (ml_dtypes.int4, ml_dtypes.uint4) else 2**32 - 1
    return [int(x) & mask for x in raw]


def some(shape, dtype, seed):
    """Random bits as an array of `dtype`."""
    random = np.random.default_rng(seed).integers(0, 256, (*shape, 4), np.uint8)
    if dtype == "bool":
        return random[..., 0] > 127
    if dtype in ("int4", "uint4"):
        low = 8 if dtype == "int4" else 0
        return ((random[..., 0] % 16).astype(np.int8) - low).astype(dtype)
    width = jnp.dtype(dtype).itemsize
    return np.ascontiguousarray(random[..., :width]).view(jnp.dtype(dtype)).reshape(shape)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_equals_python_integers(shape, dtype, seed):
    array = some(shape, dtype, seed)
    assert digests(jnp.asarray(array)).tolist() == by_hand(bits(array))


def test_64_bits_are_two_words():
    with jax.enable_x64(True):
        array = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (3, 5))
        words = [int(w) for w in array.ravel().view(np.uint32)]  # little endian: low, high
        assert digests(jnp.asarray(array)).tolist() == by_hand(words)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_does_not_depend_on_the_sharding(axis_type, dtype):
    array = some((8, 16, 3), dtype, 1)
    expected = by_hand(bits(array))
    names = ("fsdp", "tensor")
    specs = [(), ("fsdp",), (None, "fsdp"), ("tensor", "fsdp"), (names,), (None, names[::-1])]
    on = mesh(axis_type)
    tree = {
        str(i): jax.device_put(array, NamedSharding(on, PartitionSpec(*spec)))
        for i, spec in enumerate(specs)
    }
    tree["scalar"] = jax.device_put(jnp.int32(7), NamedSharding(on, PartitionSpec()))
    tree["one device"] = jnp.asarray(array)
    for current in (None, on, jax.make_mesh((8,), ("x",))):
        with contextlib.nullcontext() if current is None else jax.set_mesh(current):
            found = digests(tree)
        assert found.pop("scalar").tolist() == by_hand([7])
        assert [d.tolist() for d in found.values()] == [expected] * (len(specs) + 1)


@settings(max_examples=40, deadline=None)
@given(where=st.integers(0, 8 * 16 - 1), bit=st.integers(0, 31), seed=st.integers(0, 5))
def test_one_flipped_bit_changes_both_halves(where, bit, seed):
    array = some((8, 16), "uint32", seed)
    before = digests(jnp.asarray(array))
    array.ravel()[where] ^= np.uint32(1 << bit)
    assert (digests(jnp.asarray(array)) != before).all()


def test_order_and_place_count():
    array = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    zeros = jnp.zeros((8, 8)).at[3, 3].set(1.0)
    changed = [array.T, array[::-1], jnp.roll(array, 1), jnp.roll(array, 1, axis=1), zeros, zeros.T]
    changed += [jnp.roll(zeros, 1), -zeros, jnp.zeros((8, 8)), -jnp.zeros((8, 8))]
    found = {tuple(digests(x).tolist()) for x in (array, *changed)}
    assert len(found) == len(changed)  # all differ but zeros and its transpose
    assert digests(zeros).tolist() == digests(zeros.T).tolist()


def test_only_the_sums_travel():
    on = mesh()
    specs = (PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor"), PartitionSpec())
    arrays = [jax.device_put(jnp.ones((64, 64)), NamedSharding(on, spec)) for spec in specs]
    compiled = _mesh_digests.lower(arrays, on, specs).compile()
    pattern = r"= (\S+) ((?:all|collective|reduce-scatter|ragged|gather)[-a-z]*)\("
    moved = re.findall(pattern, compiled.as_text())
    assert [(shape.split("{")[0], op) for shape, op in moved] == [("u32[3,2]", "all-reduce")]
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 8  # one pass, nothing written


def test_the_arrays_may_be_donated_at_once():
    on = mesh()
    array = some((512, 512), "uint32", 3)
    state = jax.device_put(array, NamedSharding(on, PartitionSpec("fsdp", "tensor")))
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    expected = digests(jnp.asarray(array)).tolist()
    found = digests(state)
    state = step(state)
    assert found.tolist() == expected
    assert digests(state).tolist() != expected


def test_other_kinds_are_refused():
    with pytest.raises(TypeError, match="complex64; it must be of floats"):
        digests({"a": jnp.ones(3, jnp.complex64)})
