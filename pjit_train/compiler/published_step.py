"""The training step of a published run, small enough to read: what its trainer computed, in JAX.

Torsion's own models keep the residual whole along `tensor`; the trainers of the published runs
(MaxText, Pax, axlearn) split it there, and let the compiler choose collectives from a few
constraints. This is that program: a decoder with scanned layers, Adam in float32, and the choices
that `records.Record` has read from a published run.

Letters: B rows, T and S tokens, D width, H query heads, J key and value heads, K head_dim, F
feed-forward width, V vocabulary, L layers.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pjit_train.attention.kernels import attend_splash
from pjit_train.attention.masks import Mask
from pjit_train.compiler.records import Record

ROWS = ("data", "fsdp")


def lowered(devices, record: dict):
    """The step of a record (the fields of `Record`), lowered for one slice of devices."""
    saved = record.get("saved")
    made = Record(**record | {"saved": None if saved is None else tuple(saved)})  # JSON has lists
    mesh = make_mesh(devices, made.mesh)
    with mesh:
        return lower(made, mesh)


def make_mesh(devices, mesh: dict[str, int]) -> Mesh:
    """A mesh of axes data, fsdp, tensor laid on a slice as JAX's `mesh_utils` lays it."""
    sizes = tuple(mesh[axis] for axis in ("data", "fsdp", "tensor"))
    if math.prod(sizes) != len(devices):
        raise ValueError(f"mesh {sizes}: there are {len(devices)} devices")
    array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shapes(r: Record) -> dict[str, tuple[tuple[int, ...], P]]:
    """Shape and layout of each parameter by name; those of blocks have the layers first."""
    H = "tensor"
    J = "tensor" if r.J % r.mesh["tensor"] == 0 else None
    blocks = {
        "query": ((r.D, r.H, r.K), P(None, "fsdp", H, None)),
        "key": ((r.D, r.J, r.K), P(None, "fsdp", J, None)),
        "value": ((r.D, r.J, r.K), P(None, "fsdp", J, None)),
        "out": ((r.H, r.K, r.D), P(None, H, None, "fsdp")),
        "up": ((r.D, r.F), P(None, "fsdp", "tensor")),
        "down": ((r.F, r.D), P(None, "tensor", "fsdp")),
        "norm": ((r.D,), P(None, "tensor")),
    }
    if r.gated:
        blocks["gate"] = blocks["up"]
    if not r.parallel_block:
        blocks["norm_2"] = blocks["norm"]
    if r.qk_norm:
        blocks["query_norm"] = blocks["key_norm"] = ((r.K,), P(None, None))
    found = {name: ((r.L, *shape), spec) for name, (shape, spec) in blocks.items()}
    V = -(-r.V // r.mesh["tensor"]) * r.mesh["tensor"]  # filled up, as trainers do
    found["embedding"] = ((V, r.D), P("tensor", "fsdp"))
    found["last_norm"] = ((r.D,), P("tensor"))
    if not r.tied:
        found["head"] = ((r.D, V), P("fsdp", "tensor"))
    return found


def lower(r: Record, mesh: Mesh):
    place = functools.partial(NamedSharding, mesh)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec))
        for name, (shape, spec) in shapes(r).items()
    }
    state = {"params": params, "first": params, "second": params}
    rows = r.rows  # of one slice
    batch = P(ROWS, None)
    tokens = jax.ShapeDtypeStruct((rows, r.T), jnp.int32, sharding=place(batch))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=place(P()))
    shardings = jax.tree.map(lambda x: x.sharding, (state, count))
    step = jax.jit(
        functools.partial(train_step, r, mesh),
        donate_argnums=(0,),
        out_shardings=(*shardings, place(P())),
    )
    return step.trace(state, count, tokens, tokens).lower(lowering_platforms=("tpu",))


def train_step(r: Record, mesh: Mesh, state, count, inputs, targets):
    """Adam with a clipped gradient: (state, count, inputs, targets) -> (state, count, loss)."""
    loss, grads = jax.value_and_grad(functools.partial(loss_of, r, mesh))(
        state["params"], inputs, targets
    )
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    scale = jnp.minimum(1.0, 1.0 / norm)
    count = count + 1
    t = count.astype(jnp.float32)

    def update(p, m, v, g):
        g = g * scale
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * jnp.square(g)
        ahead = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.95**t)) + 1e-8)
        return p - 3e-4 * (ahead + 0.1 * p), m, v

    parts = jax.tree.map(update, state["params"], state["first"], state["second"], grads)
    first, second, third = ({name: part[i] for name, part in parts.items()} for i in range(3))
    return {"params": first, "first": second, "second": third}, count, loss


def loss_of(r: Record, mesh: Mesh, params, inputs, targets):
    """Mean cross entropy of the next tokens, logits in float32."""
    hold = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
    embedding = params["embedding"].astype(jnp.bfloat16)
    V = embedding.shape[0]
    if r.one_hot:
        x = jnp.einsum("btv,vd->btd", jax.nn.one_hot(inputs, V, dtype=jnp.bfloat16), embedding)
    else:
        x = embedding[inputs]
    x = hold(x, ROWS, None, "tensor")
    names = ("embedding", "last_norm", "head")
    blocks = {name: p for name, p in params.items() if name not in names}
    body = functools.partial(block, r, mesh, hold)
    if r.saved is not None:
        body = jax.checkpoint(body, policy=policy(r.saved), prevent_cse=False)
    x, _ = jax.lax.scan(lambda x, p: (body(x, p), None), x, blocks)
    x = normed(x, params["last_norm"])
    if r.tied:
        logits = jnp.einsum("btd,vd->btv", x, embedding)
    else:
        logits = jnp.einsum("btd,dv->btv", x, params["head"].astype(jnp.bfloat16))
    logits = hold(logits, ROWS, None, "tensor").astype(jnp.float32)
    chosen = jnp.sum(logits * jax.nn.one_hot(targets, V), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def policy(saved: tuple[str, ...]):
    """The policy of what the backward pass finds kept: "dots", or results by name."""
    if saved == ("dots",):
        return jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
    if saved == ("all_dots",):
        return jax.checkpoint_policies.checkpoint_dots
    return jax.checkpoint_policies.save_only_these_names(*saved)


def normed(x, scale):
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def block(r: Record, mesh: Mesh, hold, x, params):
    p = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    h = hold(normed(x, p["norm"]), ROWS, None, "tensor")
    read = hold(attend(r, mesh, hold, h, p), ROWS, None, "tensor")
    if r.parallel_block:
        return hold(x + read + feed_forward(r, hold, h, p), ROWS, None, "tensor")
    x = hold(x + read, ROWS, None, "tensor")
    h = hold(normed(x, p["norm_2"]), ROWS, None, "tensor")
    return hold(x + feed_forward(r, hold, h, p), ROWS, None, "tensor")


def feed_forward(r: Record, hold, h, p):
    up = hold(jnp.einsum("btd,df->btf", h, p["up"]), ROWS, None, "tensor")
    up = checkpoint_name(up, "mlpwi")
    if r.gated:
        gate = hold(jnp.einsum("btd,df->btf", h, p["gate"]), ROWS, None, "tensor")
        up = jax.nn.silu(checkpoint_name(gate, "mlpwi")) * up
    else:
        up = jax.nn.relu(up) if r.act == "relu" else jax.nn.gelu(up)
    down = hold(jnp.einsum("btf,fd->btd", up, p["down"]), ROWS, None, "tensor")
    return checkpoint_name(down, "mlpwo")


def attend(r: Record, mesh: Mesh, hold, h, p):
    shared = "tensor" if r.J % r.mesh["tensor"] == 0 else None
    q, k, v = (
        checkpoint_name(
            hold(jnp.einsum("btd,dhk->bthk", h, p[name]), ROWS, None, axis, None), saved
        )
        for name, axis, saved in (
            ("query", "tensor", "query"),
            ("key", shared, "key"),
            ("value", shared, "value"),
        )
    )
    if r.qk_norm:
        q, k = normed(q, p["query_norm"]), normed(k, p["key_norm"])
    if r.flash:
        if r.mesh["tensor"] > r.J:
            k, v = (jnp.repeat(x, r.H // r.J, axis=2) for x in (k, v))
            k, v = (hold(x, ROWS, None, "tensor", None) for x in (k, v))
        heads = P(ROWS, None, "tensor", None)
        attend_one = lambda q, k, v: attend_splash(q, k, v, None, Mask(True, None, 0, False))
        context = jax.shard_map(
            attend_one, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads, check_vma=False
        )(q, k, v)
    else:
        context = dense_attention(r, hold, q, k, v)
    context = checkpoint_name(hold(context, ROWS, None, "tensor", None), "context")
    return checkpoint_name(jnp.einsum("bthk,hkd->btd", context, p["out"]), "out_proj")


def dense_attention(r: Record, hold, q, k, v):
    """Attention with all logits in memory, the softmax in float32."""
    if r.J == r.H:
        logits = jnp.einsum("bthk,bshk->bhts", q, k).astype(jnp.float32) / np.sqrt(r.K)
    elif r.J == 1:
        logits = jnp.einsum("bthk,bsk->bhts", q, k[:, :, 0]).astype(jnp.float32) / np.sqrt(r.K)
    else:
        k, v = (jnp.repeat(x, r.H // r.J, axis=2) for x in (k, v))
        logits = jnp.einsum("bthk,bshk->bhts", q, k).astype(jnp.float32) / np.sqrt(r.K)
    logits = hold(logits, ROWS, "tensor", None, None)
    seen = jnp.arange(r.T)[:, None] >= jnp.arange(r.T)
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1).astype(jnp.bfloat16)
    if r.J == 1:
        return jnp.einsum("bhts,bsk->bthk", weights, v[:, :, 0])
    return jnp.einsum("bhts,bshk->bthk", weights, v)
