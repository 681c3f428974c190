"""Cross-entropy that never holds all logits.

Letters in names: N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pjit_train.sharding import spec_axes, spec_of, varying, varying_axes

CHUNK_LOGITS = 1 << 22  # logits held at a time on a device: 16 MiB in float32
MIN_CHUNK_TOKENS = 512  # or more, so that a large vocabulary's head is not read for a few tokens


def capped(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits capped softly, softcap * tanh(logits / softcap); as they are where it is None."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


class Taught(NamedTuple):
    """Result of a frozen teacher for the same tokens.

    Attributes:
      hidden: [batch, length, its d_model].
      head: [its d_model, vocab], split as the student's.
      softcap: of its logits.
      temperature, weight: weight * temperature^2 * KL(teacher, student) of their softmax at the
        temperature is added to the loss of a token (Hinton et al., 2015).
    """

    hidden: jax.Array
    head: jax.Array
    softcap: float | None
    temperature: float
    weight: float


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    softcap: float | None = None,
    taught: Taught | None = None,
) -> jax.Array:
    """Sum over tokens of weights * (-log softmax(hidden @ head)[target], and what `taught` adds).

    The logits are made a chunk of tokens at a time, and, where a gradient is wanted, the gradients
    of the sum with respect to `hidden` and `head` in the same pass: nothing is made twice, and
    memory holds one chunk of logits, and one of the teacher's. A head of which none is wanted costs
    none; a teacher has none.

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
    teacher, kl = None, None
    if taught is not None:
        teacher, kl = (taught.hidden, taught.head), (taught.softcap, *taught[3:])
    batch, rows, _ = spec_of(hidden)
    _, vocab = spec_of(head).partitions
    if batch is rows is vocab is None:
        return _summed(hidden, head, targets, weights, teacher, None, softcap, kl)
    tokens, kernel = P(batch, rows), P(None, vocab, reduced=spec_of(head).reduced)
    frozen = P(None, vocab)
    if teacher is not None:
        teacher = teacher[0], jax.sharding.reshard(teacher[1], frozen)
    arrays = (
        hidden,
        jax.sharding.reshard(head, kernel),
        targets,
        jax.sharding.reshard(weights, tokens),
        teacher,
    )

    def shard(hidden, head, targets, weights, teacher):
        hidden, head = varying((hidden, head), spec_axes(tokens, kernel))
        loss = _summed(hidden, head, targets, weights, teacher, vocab, softcap, kl)
        return jax.lax.psum(loss, spec_axes(tokens))

    rest = P(batch, rows, None)
    specs = rest, kernel, tokens, tokens, None if teacher is None else (rest, frozen)
    return jax.shard_map(shard, in_specs=specs, out_specs=P())(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _summed(hidden, head, targets, weights, teacher, vocab_axis, softcap, kl):
    return _chunks(hidden, head, targets, weights, teacher, vocab_axis, softcap, kl)


def _summed_fwd(hidden, head, targets, weights, teacher, vocab_axis, softcap, kl):
    values = (x.value for x in (hidden, head, targets, weights))
    teacher = jax.tree.map(lambda x: x.value, teacher, is_leaf=lambda x: hasattr(x, "perturbed"))
    of_head = head.perturbed  # a frozen head has no gradient, a third of the loss's arithmetic
    return _chunks(*values, teacher, vocab_axis, softcap, kl, with_gradients=True, of_head=of_head)


def _summed_bwd(vocab_axis, softcap, kl, gradients, d_loss):
    d_hidden, d_head = gradients
    return (
        (d_hidden * d_loss).astype(d_hidden.dtype),
        None if d_head is None else (d_head * d_loss).astype(d_head.dtype),
        None,
        None,
        None,
    )


_summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)


def _chunks(
    hidden,
    head,
    targets,
    weights,
    teacher,
    vocab_axis,
    softcap,
    kl,
    *,
    with_gradients=False,
    of_head=False,
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
    taught_ND = None if teacher is None else teacher[0].reshape(N, -1)

    def softmax(logits_CV):
        """(exp of the logits less their largest, their sum, log of the sum of all exp)."""
        top_C = jnp.max(logits_CV, axis=-1)
        if vocab_axis is not None:
            top_C = jax.lax.pmax(top_C, vocab_axis)
        exp_CV = jnp.exp(logits_CV - top_C[:, None])
        total_C = over_vocab(exp_CV)
        return exp_CV, total_C, top_C + jnp.log(total_C)

    def over_vocab(x_CV):
        total_C = jnp.sum(x_CV, axis=-1)
        return total_C if vocab_axis is None else jax.lax.psum(total_C, vocab_axis)

    def logits_of(x_CD, kernel, cap):
        made = jnp.einsum("cd,dv->cv", x_CD, kernel, preferred_element_type=jnp.float32)
        return capped(made, cap)

    def chunk(hidden_CD, targets_C, weights_C, taught_CD):
        logits_CV = logits_of(hidden_CD, head, softcap)
        hit_CV = (targets_C - first)[:, None] == jax.lax.broadcasted_iota(jnp.int32, (1, V), 1)
        exp_CV, total_C, log_C = softmax(logits_CV)
        target_C = over_vocab(jnp.where(hit_CV, logits_CV, 0.0))
        losses_C = log_C - target_C
        if taught_CD is not None:
            teacher_cap, temperature, weight = kl
            taught_CV = logits_of(taught_CD, teacher[1], teacher_cap) / temperature
            cooled_CV = logits_CV / temperature
            p_CV, p_total_C, p_log_C = softmax(taught_CV)
            at_one = temperature == 1  # the student's softmax is made already
            q_CV, q_total_C, q_log_C = (exp_CV, total_C, log_C) if at_one else softmax(cooled_CV)
            p_CV = p_CV / p_total_C[:, None]
            apart_C = over_vocab(p_CV * (taught_CV - cooled_CV)) - p_log_C + q_log_C
            losses_C += weight * temperature**2 * apart_C
        loss = jnp.sum(weights_C * losses_C)
        if not with_gradients:
            return loss
        d_logits_CV = exp_CV / total_C[:, None] - hit_CV
        if taught_CD is not None:
            d_logits_CV += weight * temperature * (q_CV / q_total_C[:, None] - p_CV)
        d_logits_CV *= weights_C[:, None]
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
        results = chunk(hidden_ND, targets_N, weights_N, taught_ND)
        if not with_gradients:
            return results
        loss, d_hidden, d_head = results
    else:

        def split(x):  # [N, ...] -> [chunks, C, ...], the last one filled up with weights of zero
            x = jnp.pad(x, [(0, -N % C)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(-1, C, *x.shape[1:])

        xs = jax.tree.map(split, (hidden_ND, targets_N, weights_N, taught_ND))
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
