"""A bare GPT-2 training step in plain JAX, written by hand: the other side of the benchmarks.

No library of ours and no framework: a dict of arrays, einsums, `jax.nn.softmax`, `jax.nn.gelu`, all
logits at once, optax's AdamW, one `jax.jit` that donates its state.
"""

import math

import jax
import jax.numpy as jnp
import optax

LAYERS, WIDTH, HEADS, LENGTH, BATCH, VOCAB = 6, 384, 6, 256, 16, 256


def init(key):
    def normal(shape, std=0.02):
        nonlocal key
        key, draw = jax.random.split(key)
        return std * jax.random.normal(draw, shape)

    def block():
        residual = 0.02 / math.sqrt(2 * LAYERS)
        return {
            "norm1": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
            "qkv": {"kernel": normal((WIDTH, 3 * WIDTH)), "bias": jnp.zeros(3 * WIDTH)},
            "out": {"kernel": normal((WIDTH, WIDTH), residual), "bias": jnp.zeros(WIDTH)},
            "norm2": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
            "up": {"kernel": normal((WIDTH, 4 * WIDTH)), "bias": jnp.zeros(4 * WIDTH)},
            "down": {"kernel": normal((4 * WIDTH, WIDTH), residual), "bias": jnp.zeros(WIDTH)},
        }

    return {
        "tokens": normal((VOCAB, WIDTH)),
        "positions": normal((LENGTH, WIDTH)),
        "blocks": [block() for _ in range(LAYERS)],
        "norm": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)},
    }


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def attention(p, x):
    batch, length, _ = x.shape
    qkv = dense(p["qkv"], x).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(WIDTH // HEADS)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, v)
    return dense(p["out"], out.reshape(batch, length, WIDTH))


def loss(params, inputs, targets):
    x = params["tokens"][inputs] + params["positions"]
    for p in params["blocks"]:
        x = x + attention(p, norm(p["norm1"], x))
        x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))))
    logits = norm(params["norm"], x) @ params["tokens"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step():
    """(state, step): the state, and the jitted (state, inputs, targets) -> (state, loss)."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1)
    )
    params = jax.jit(init)(jax.random.key(0))

    def step(state, inputs, targets):
        params, optimizer_state = state
        value, grads = jax.value_and_grad(loss)(params, inputs, targets)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    return (params, jax.jit(optimizer.init)(params)), jax.jit(step, donate_argnums=0)


if __name__ == "__main__":  # prints the seconds of each of argv[1] steps
    import sys
    import time

    import numpy as np

    state, step = make_step()
    rng = np.random.default_rng(0)
    for _ in range(int(sys.argv[1])):
        began = time.perf_counter()
        inputs, targets = rng.integers(0, VOCAB, (2, BATCH, LENGTH)).astype(np.int32)
        state, value = step(state, inputs, targets)
        jax.block_until_ready(value)
        print(time.perf_counter() - began, flush=True)
