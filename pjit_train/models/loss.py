"""Cross-entropy that never holds all logits.

Letters in names: N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pjit_train.sharding import spec_axes, spec_of, varying, varying_axes

CHUNK_LOGITS = 1 << 22  # logits held at a time on a device: 16 MiB in float32
MIN_CHUNK_TOKENS = 512  # or more, so that a large vocabulary's head is not read for a few tokens


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits capped softly, softcap * tanh(logits / softcap); as they are where it is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Sum over tokens of weights * -log softmax(hidden @ head)[target].

    The logits are made a chunk of tokens at a time, and, where a gradient is wanted, the gradients
    of the sum with respect to `hidden` and `head` in the same pass: nothing is made twice, and
    memory holds one chunk of logits.

    Args:
      hidden: [batch, length, d_model].
      head: [d_model, vocab]; may be split over the vocabulary, not over d_model.
      targets: int [batch, length].
      weights: float [batch, length]; ones where None.
      softcap: caps logits softly, as softcap * tanh(logit / softcap); None for no cap.

    Returns:
      A float32 scalar, in nats.
    """
    if weights is None:
        weights = jnp.ones_like(targets, jnp.float32)
    batch, rows, _ = spec_of(hidden)
    _, vocab = spec_of(head).partitions
    if batch is rows is vocab is None:
        return _summed(hidden, head, targets, weights, None, softcap)
    tokens, kernel = P(batch, rows), P(None, vocab, reduced=spec_of(head).reduced)
    arrays = (
        hidden,
        jax.sharding.reshard(head, kernel),
        targets,
        jax.sharding.reshard(weights, tokens),
    )

    def shard(hidden, head, targets, weights):
        hidden, head = varying((hidden, head), spec_axes(tokens, kernel))
        loss = _summed(hidden, head, targets, weights, vocab, softcap)
        return jax.lax.psum(loss, spec_axes(tokens))

    specs = P(batch, rows, None), kernel, tokens, tokens
    return jax.shard_map(shard, in_specs=specs, out_specs=P())(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(hidden, head, targets, weights, vocab_axis, softcap):
    return _chunks(hidden, head, targets, weights, vocab_axis, softcap)


def _summed_fwd(hidden, head, targets, weights, vocab_axis, softcap):
    values = (x.value for x in (hidden, head, targets, weights))
    of_head = head.perturbed  # a frozen head has no gradient, a third of the loss's arithmetic
    return _chunks(*values, vocab_axis, softcap, with_gradients=True, of_head=of_head)


def _summed_bwd(vocab_axis, softcap, gradients, d_loss):
    d_hidden, d_head = gradients
    return (
        (d_hidden * d_loss).astype(d_hidden.dtype),
        None if d_head is None else (d_head * d_loss).astype(d_head.dtype),
        None,
        None,
    )


_summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)


def _chunks(
    hidden, head, targets, weights, vocab_axis, softcap, *, with_gradients=False, of_head=False
):
    """The loss; with gradients also those of `hidden` and of `head`, None where not asked for."""
    D, V = head.shape
    hidden_ND, targets_N, weights_N = (
        hidden.reshape(-1, D),
        targets.reshape(-1),
        weights.reshape(-1),
    )
    N = targets_N.size
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * V

    def chunk(hidden_CD, targets_C, weights_C):
        logits_CV = jnp.einsum("cd,dv->cv", hidden_CD, head, preferred_element_type=jnp.float32)
        logits_CV = capped(logits_CV, softcap)
        top_C = jnp.max(logits_CV, axis=-1)
        if vocab_axis is not None:
            top_C = jax.lax.pmax(top_C, vocab_axis)
        hit_CV = (targets_C - first)[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, V), 1)
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = jnp.sum(exp_CV, axis=-1)
        target_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1)
        if vocab_axis is not None:
            total_C, target_C = jax.lax.psum((total_C, target_C), vocab_axis)
        loss = jnp.sum(weights_C * (top_C + jnp.log(total_C) - target_C))
        if not with_gradients:
            return loss
        d_logits_CV = (exp_CV / total_C[:, None] - hit_CV) * weights_C[:, None]
        if softcap is not None:
            d_logits_CV *= 1 - (logits_CV / softcap) ** 2
        d_logits_CV = d_logits_CV.astype(hidden.dtype)
        d_hidden_CD = jnp.einsum("cv,dv->cd", d_logits_CV, head)
        d_head_DV = None
        if of_head:
            d_head_DV = jnp.einsum(
                "cd,cv->dv", hidden_CD, d_logits_CV, preferred_element_type=jnp.float32
            )
        return loss, d_hidden_CD, d_head_DV

    C = min(N, max(CHUNK_LOGITS // V, MIN_CHUNK_TOKENS))
    if C == N:
        results = chunk(hidden_ND, targets_N, weights_N)
        if not with_gradients:
            return results
        loss, d_hidden, d_head = results
    else:

        def split(x):  # [N, ...] -> [chunks, C, ...], the last one filled up with weights of zero
            x = jnp.pad(x, [(0, -N % C)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(-1, C, *x.shape[1:])

        xs = (split(hidden_ND), split(targets_N), split(weights_N))
        zero = varying(jnp.zeros(()), varying_axes(targets))
        if not with_gradients:
            return jax.lax.scan(lambda s, x: (s + chunk(*x), None), zero, xs)[0]

        def body(sums, x):
            loss, d_hidden, d_head = chunk(*x)
            return jax.tree.map(jnp.add, sums, (loss, d_head)), d_hidden

        none_yet = None
        if of_head:
            none_yet = varying(jnp.zeros(head.shape, jnp.float32), varying_axes(head))
        zeros = zero, none_yet
        (loss, d_head), d_hidden = jax.lax.scan(body, zeros, xs)
    d_hidden = d_hidden.reshape(-1, D)[:N]
    return loss, (
        d_hidden.reshape(hidden.shape),
        None if d_head is None else d_head.astype(head.dtype),
    )


def token_scores(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softcap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the likeliest token.

    As `cross_entropy`, the logits are made a chunk at a time; there is no gradient. On a mesh call
    it in `jax.sharding.auto_axes`.

    Args:
      hidden: [batch, length, d_model].
      head: [d_model, vocab].
      targets: int [batch, length].
      softcap: see `cross_entropy`.

    Returns:
      Natural logarithms, float32 [batch, length], and bool [batch, length].
    """
    batch, length, _ = hidden.shape
    tokens = max(CHUNK_LOGITS // head.shape[1], MIN_CHUNK_TOKENS)
    size = min(length, max(1, tokens // batch))

    def chunk(hidden_BCD, targets_BC):
        logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head, preferred_element_type=jnp.float32)
        logits_BCV = capped(logits_BCV, softcap)
        top_BC = jnp.max(logits_BCV, axis=-1)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        total_BC = jnp.sum(jnp.exp(logits_BCV - top_BC[..., None]), axis=-1)
        # The first of equal logits is the likeliest, as of `argmax`.
        greedy_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return target_BC - top_BC - jnp.log(total_BC), greedy_BC

    if size == length:
        return chunk(hidden, targets)

    def split(x):  # [batch, length, ...] -> [chunks, batch, size, ...], the last one filled up
        x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    parts = jax.lax.map(lambda x: chunk(*x), (split(hidden), split(targets)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
    return join(parts[0]), join(parts[1])
