"""Checkpoints in memory: whole or not there, checked like those on disk, and passed on."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch.pod import memory_copy
from launch.pod.trainer import Fence, StaleAttemptError
from pjit_train.checkpoint import CheckpointConfig, Checkpoints


@pytest.fixture
def memory():
    fd = memory_copy.new_memory()
    yield fd
    os.close(fd)


@pytest.fixture
def state():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    rng = np.random.default_rng(0)
    return {
        "step": put(jnp.int32(7)),
        "params": {
            "a": put(jnp.asarray(rng.normal(size=(8, 12)), jnp.float32), "fsdp", "data"),
            "b": put(jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16), "data"),
            "mask": put(jnp.asarray(rng.random((4, 4)) > 0.5), None, "fsdp"),
        },
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(a, b):
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_what_was_written_is_read(memory, state):
    assert memory_copy.step_in(memory) is None
    memory_copy.write(memory, 7, state)
    assert memory_copy.step_in(memory) == 7
    assert same(memory_copy.read(memory, abstract(state)), state)
    other = jax.tree.map(lambda x: x + x, state)
    memory_copy.write(memory, 8, other)
    assert memory_copy.step_in(memory) == 8
    assert same(memory_copy.read(memory, abstract(state)), other)


def test_each_shard_is_written_once(memory, state):
    """Bytes by hand: 8*12*4 + 8*2 + 16 + 4, not times the devices that hold a replica."""
    size = memory_copy.write(memory, 1, state)
    assert size < 4096 + 8 * 12 * 4 + 64 * 12


def test_the_copy_of_a_copy_is_the_same(memory, state):
    memory_copy.write(memory, 7, state)
    other = memory_copy.new_memory()
    os.pwrite(other, os.pread(memory, os.fstat(memory).st_size, 0), 0)
    assert same(memory_copy.read(other, abstract(state)), state)
    os.close(other)


def test_one_that_is_being_written_is_not_there(memory, state):
    memory_copy.write(memory, 7, state)
    os.pwrite(memory, bytes(8), 0)  # as a kill leaves it: the length of the header comes last
    assert memory_copy.step_in(memory) is None
    with pytest.raises(ValueError, match="no copy"):
        memory_copy.read(memory, abstract(state))


def test_another_layout_is_refused(memory, state):
    memory_copy.write(memory, 7, state)
    mesh = jax.make_mesh((8,), ("all",))
    wanted = abstract(state)
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    wanted["params"]["a"] = jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=sharding)
    with pytest.raises(ValueError, match="no shard"):
        memory_copy.read(memory, wanted)


def test_a_checkpoint_is_restored_from_memory_without_its_file(memory, state, tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, state)
        memory_copy.write(memory, 7, state)
        checkpoints.wait()
        read = []

        def from_memory(wanted):
            read.append(7)
            return memory_copy.read(memory, wanted)

        found = checkpoints.restore(abstract(state), memory=(7, from_memory))
    assert read == [7]
    assert found[0] == 7
    assert same(found[1], state)


def test_a_flipped_bit_in_memory_is_found_and_the_disk_is_read(memory, state, tmp_path, caplog):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, state)
        size = memory_copy.write(memory, 7, state)
        checkpoints.wait()
        place = size - 64 * 3  # in the shards, not in the header
        byte = os.pread(memory, 1, place)
        os.pwrite(memory, bytes([byte[0] ^ 16]), place)
        read = lambda wanted: memory_copy.read(memory, wanted)
        found = checkpoints.restore(abstract(state), memory=(7, read))
    changed = not same(memory_copy.read(memory, abstract(state)), state)
    assert changed
    assert same(found[1], state)
    assert "copy of checkpoint 7 in memory is of no use" in caplog.text


def test_only_the_newest_attempt_may_write(tmp_path):
    fence = Fence(tmp_path / "attempt.json")
    assert fence.current() == 0
    fence.raise_to(1)
    fence.check(1)
    fence.raise_to(2)
    with pytest.raises(StaleAttemptError, match="attempt 1 is over, 2 runs"):
        fence.check(1)
    Fence(tmp_path / "attempt.json").check(2)
