"""A checkpoint's shards in memory: of the host that wrote them, and of the next one.

A trainer writes its shards into memory that it shares with its agent and that has no name, so it is
gone with the last of them. The agent of the next process keeps a copy. After a loss, every process
finds its shards in its host's memory, or gets them from the next host, and reads nothing from disk.
What is read is checked against the digests of the checkpoint on disk, as that itself would be.

The memory holds the length of a header, the header (JSON), and the shards, one after another.
"""

import json
import mmap
import os
from typing import Any

_LENGTH = 8  # bytes of the length of the header, 0 while a copy is being written


def new_memory() -> int | None:
    """The file descriptor of new anonymous memory; None on systems that have none."""
    return os.memfd_create("torsion") if hasattr(os, "memfd_create") else None


def write(fd: int, step: int, state: Any) -> int:
    """Writes the shards of `state` that this process holds; returns the bytes written."""
    import jax
    import numpy as np

    shards, header, offset = [], [], 0
    for path, leaf in jax.tree.leaves_with_path(state):
        seen = set()
        for shard in leaf.addressable_shards:
            index = _index(shard.index, leaf.shape)
            if index in seen:
                continue
            seen.add(index)
            shards.append(np.ascontiguousarray(np.asarray(shard.data)))
            header.append((_name(path), index, leaf.dtype.name, offset, shards[-1].nbytes))
            offset += -(-shards[-1].nbytes // 64) * 64
    text = json.dumps({"step": step, "shards": header}).encode()
    begin = -(-(_LENGTH + len(text)) // 64) * 64
    os.pwrite(fd, bytes(_LENGTH), 0)
    os.ftruncate(fd, begin + offset)
    for (*_, place, size), shard in zip(header, shards, strict=True):
        if size:
            os.pwrite(fd, shard.reshape(-1).view(np.uint8).data, begin + place)
    os.pwrite(fd, text, _LENGTH)
    os.pwrite(fd, len(text).to_bytes(_LENGTH, "little"), 0)
    return begin + offset


def step_in(fd: int) -> int | None:
    """The step whose shards are in the memory; None where there are none."""
    header = _header(fd)
    return None if header is None else header[0]["step"]


def read(fd: int, wanted: Any) -> Any:
    """The state of the shards in the memory, as the abstract pytree `wanted` says.

    Raises:
      ValueError: they are not there, or of another layout.
    """
    import jax
    import numpy as np

    header = _header(fd)
    if header is None:
        raise ValueError("no copy in memory")
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    places = {(name, _tuples(index)): rest for name, index, *rest in header[0]["shards"]}

    def leaf(path, x):
        def shard(index):
            key = _name(path), _index(index, x.shape)
            if key not in places or places[key][0] != x.dtype.name:
                raise ValueError(f"no shard {key[1]} of {key[0]} in memory")
            _, place, size = places[key]
            shape = [stop - start for start, stop in key[1]]
            count = size // x.dtype.itemsize
            array = np.frombuffer(memory, x.dtype, count, header[1] + place)
            return array.reshape(shape)

        # Copied by the device: what it would only refer to is overwritten by the next checkpoint.
        return jax.make_array_from_callback(x.shape, x.sharding, lambda i: shard(i).copy())

    return jax.tree.map_with_path(leaf, wanted)


def _header(fd: int) -> tuple[dict, int] | None:
    """(header, offset of the shards); None where no whole copy is."""
    length = int.from_bytes(os.pread(fd, _LENGTH, 0), "little")
    if not length:
        return None
    begin = -(-(_LENGTH + length) // 64) * 64
    return json.loads(os.pread(fd, length, _LENGTH)), begin


def _name(path) -> str:
    import jax

    return jax.tree_util.keystr(path, simple=True, separator="/")


def _index(index, shape) -> tuple[tuple[int, int], ...]:
    """Place of a shard in its array, as ((start, stop), ...)."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _tuples(index) -> tuple[tuple[int, int], ...]:
    return tuple(map(tuple, index))
