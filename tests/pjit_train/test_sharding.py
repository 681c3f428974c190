"""The mesh and its rules: one line for each mistake, and the same training on every layout."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from helpers.tiny_models import (
    LLAMA,
    UNROLLED,
    D,
    F,
    H,
    K,
    V,
    compiled,
    d,
    initial,
    make_batch,
    make_program,
    place,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pjit_train.errors import UserError
from pjit_train.sharding import MeshShape, Rules, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


def losses(model, mesh, accumulate=1) -> list[float]:
    program, step = compiled(model, mesh, accumulate)
    state, values = place(program, initial(model)), []
    for i in range(20):
        state, metrics = step(state, make_batch(program, i))
        values.append(float(metrics["loss"]))
    return values


on_one_device = functools.cache(functools.partial(losses, mesh=()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mesh", "accumulate"),
    [
        (LLAMA, (("data", 8),), 1),
        (LLAMA, (("fsdp", 8),), 1),
        (LLAMA, (("tensor", 2),), 1),
        (LLAMA, (("sequence", 8),), 1),
        (LLAMA, (("data", 2), ("fsdp", 2), ("tensor", 2)), 2),
        (LLAMA, (("fsdp", 2), ("sequence", 2), ("tensor", 2)), 1),
        # its layers one by one: the parameters are the same
        (UNROLLED, (("fsdp", 2), ("sequence", 2), ("tensor", 2)), 1),
    ],
    ids=lambda x: "x".join(f"{a}{n}" for a, n in x) if isinstance(x, tuple) else "",
)
def test_every_layout_trains_as_one_device_does(model, mesh, accumulate):
    want = on_one_device(dataclasses.replace(model, layers="scan"))
    assert want[-1] < 0.8 * want[0]  # the losses compared are of a model that learns
    np.testing.assert_allclose(losses(model, mesh, accumulate), want, rtol=1e-5)


def test_state_is_created_sharded():
    """Neither the state nor the program that makes it holds a sharded parameter whole."""
    program = make_program(mesh={"fsdp": 2, "tensor": 2, "data": 2})
    make = jax.jit(lambda seed: program._new_state(program._new_params(seed)), static_argnums=0)
    with jax.set_mesh(program.mesh):
        creation = make.lower(0).compile()
    state, text = creation(), creation.as_text()
    # fsdp splits d_model; tensor splits heads, key-value heads, the feed-forward and the vocabulary
    sharded = {
        "q": ((3, D, H, d), (3, D // 2, H // 2, d)),
        "k": ((3, D, K, d), (3, D // 2, K // 2, d)),
        "out": ((3, H, d, D), (3, H // 2, d, D // 2)),
        "up": ((3, D, F), (3, D // 2, F // 2)),
        "down": ((3, F, D), (3, F // 2, D // 2)),
        "embedding": ((V, D), (V // 2, D // 2)),
        "head": ((D, V), (D // 2, V // 2)),
    }
    parts = dict(sharded.values())
    shown = lambda shape: f"[{','.join(map(str, shape))}]"
    for name, (whole, part) in sharded.items():
        assert shown(part) in text, name
        assert shown(whole) not in text, name
    seen = set()
    for array in jax.tree.leaves(state):
        part = parts.get(array.shape, array.shape)
        assert {s.data.shape for s in array.addressable_shards} == {part}, array.shape
        assert len(array.addressable_shards) == 8
        seen.add(array.shape)
    assert seen > set(parts)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), program.abstract_state
    )


def test_same_seed_gives_the_same_parameters_on_every_mesh():
    program = make_program(mesh={"fsdp": 2, "sequence": 2, "tensor": 2})
    got, want = jax.device_get(program.new_state()), initial(LLAMA)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want)
    other = make_program(seed=1).new_state()
    assert not np.allclose(other["params"]["embedding"], want["params"]["embedding"])


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.sampled_from([-1, 1, 2, 3, 4, 8]), min_size=4, max_size=4))
def test_sizes_multiply_to_the_devices_or_the_mesh_is_refused(sizes):
    axes = ("data", "fsdp", "sequence", "tensor")
    fixed = math.prod(s for s in sizes if s != -1)
    free = sizes.count(-1)
    if free > 1 or fixed > 24 or (free and 24 % fixed):
        with pytest.raises(UserError) as error:
            MeshShape(**dict(zip(axes, sizes, strict=True))).sizes(24)
        assert "\n" not in str(error.value)
        return
    got = MeshShape(**dict(zip(axes, sizes, strict=True))).sizes(24)
    assert tuple(got) == axes
    assert math.prod(got.values()) == (24 if free else fixed)
    assert all(got[a] == s for a, s in zip(axes, sizes, strict=True) if s != -1)


def test_mesh_uses_the_devices_it_asks_for():
    assert make_mesh(MeshShape()).shape == {"data": 8, "fsdp": 1, "sequence": 1, "tensor": 1}
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tensor=2))
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: MeshShape(tensor=0),
            "MeshShape.tensor=0; use a whole number from 1 to 2147483647 or -1",
        ),
        (
            lambda: MeshShape(data=-1, fsdp=-1),
            "mesh: only one axis may be -1 (the one that takes what is left)",
        ),
        (
            lambda: make_mesh(MeshShape(data=4, tensor=4)),
            "mesh: data=4,tensor=4 needs 16 devices and there are 8; "
            "make it smaller, or emulate more with --devices 16",
        ),
        (
            lambda: make_mesh(MeshShape(data=-1, tensor=3)),
            "mesh: data=-1,tensor=3 leaves 8 devices to divide by 3; "
            "use sizes whose product divides the number of devices",
        ),
        (
            lambda: Rules(mlp=("tensr",)),
            "sharding rule mlp=('tensr',): 'tensr' is no mesh axis; "
            "use a tuple of data, fsdp, sequence, tensor",
        ),
        (
            lambda: Rules(embed="fdsp"),
            "sharding rule embed='fdsp': 'fdsp' is no mesh axis; "
            "use a tuple of data, fsdp, sequence, tensor",
        ),
        (
            lambda: Rules(mlp=("fsdp",)).spec(("embed", "mlp")),
            "sharding rules: ('embed', 'mlp') would be laid on [('fsdp',), ('fsdp',)], one mesh "
            "axis twice; give these logical axes different mesh axes",
        ),
        (
            lambda: make_program(rules=Rules(mlp=("fsdp",)), mesh={"fsdp": 2}),
            "sharding rules: (None, 'embed', 'mlp') would be laid on [(), ('fsdp',), ('fsdp',)], "
            "one mesh axis twice; give these logical axes different mesh axes",
        ),
        (
            lambda: make_program(mesh={"tensor": 4}),  # two key-value heads
            "mesh: blocks.attention.key.kernel has 2 along its axis 'kv_heads', which tensor=4 "
            "does not divide; use a divisor of 2",
        ),
        (
            lambda: make_program(dataclasses.replace(LLAMA, d_model=30), mesh={"fsdp": 4}),
            "mesh: blocks.attention.key.kernel has 30 along its axis 'embed', which fsdp=4 does "
            "not divide; use a divisor of 30",
        ),
    ],
)
def test_mistakes_are_one_line(make, says):
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rules_name_the_mesh_axes_of_each_dimension():
    rules = Rules()
    assert rules.spec(("embed", "mlp")) == P("fsdp", "tensor")
    assert rules.spec(("batch", "length", None)) == P(("data", "fsdp"), "sequence", None)
    # a parameter meets the activations gathered over what splits the batch, and over nothing else
    assert rules.spec(("embed", "heads", None), gathered=True) == P(None, "tensor", None)
    assert Rules(embed=()).spec(("embed", "mlp")) == P(None, "tensor")
    assert Rules(mlp="tensor").mlp == Rules(mlp=["tensor"]).mlp == ("tensor",)  # as gin gives them
    with jax.set_mesh(make_mesh(MeshShape(data=8))):  # axes of size 1 split nothing
        assert rules.spec(("batch", "length", None)) == P("data", None, None)
        assert rules.spec(("embed", "mlp")) == P(None, None)
