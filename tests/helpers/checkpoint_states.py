"""States of a small training, their layouts, and the files of their checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pjit_train.checkpoint import CheckpointConfig, Checkpoints

P = PartitionSpec


def make_mesh(fsdp=4, tensor=2):
    devices = jax.devices()[: fsdp * tensor]
    types = (AxisType.Explicit,) * 2
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=types, devices=devices)


def spec_of(x):
    """Rows over fsdp, columns over tensor, and a vector over tensor."""
    return P() if x.ndim == 0 else P("fsdp", "tensor") if x.ndim == 2 else P("tensor")


def make_state(seed=0, d_ff=64):
    """A small train state on the CPU of numpy: parameters, Adam, a mask, packed bytes, a count."""
    rng = np.random.default_rng(seed)
    layer = {
        "w": rng.normal(size=(32, d_ff)).astype(np.float32),
        "b": rng.normal(size=d_ff).astype(jnp.bfloat16),
    }
    params = {"layers": [layer, jax.tree.map(lambda x: x * 2, layer)]}
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    opt = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape) * 9).astype(x.dtype), opt)
    mask = rng.random((32, d_ff)) < 0.5
    packed = rng.integers(0, 256, (64, 8), np.uint8)
    return {"params": params, "opt": opt, "mask": mask, "packed": packed, "step": np.int32(seed)}


def put(state, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec_of(x))), state)


def abstract(state, mesh, spec=spec_of):
    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))

    return jax.tree.map(leaf, state)


def assert_same(found, expected):
    """The same tree with the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files_of(directory):
    return sorted(path for path in Path(directory).rglob("*") if path.is_file())


def contents(directory):
    return {path: path.read_bytes() for path in files_of(directory)}


def restore(directory, state=None, mesh=None, **kwargs):
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        wanted = abstract(state or make_state(), mesh or make_mesh())
        return checkpoints.restore(wanted, **kwargs)
