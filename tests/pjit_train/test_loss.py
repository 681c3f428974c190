"""Cross-entropy in chunks against log softmax of all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pjit_train.models import loss
from pjit_train.models.loss import cross_entropy
from pjit_train.sharding import MeshShape, make_mesh

B, T, D, V = 4, 8, 16, 24


def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.uniform(size=(B, T)).astype(np.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ head, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


def capped(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(2.0 * jnp.tanh((hidden @ head) / 2.0), axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("chunk_logits", [1 << 22, 4 * V])
def test_capped_loss_and_gradients_are_those_of_capped_logits(monkeypatch, chunk_logits):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(loss, "MIN_CHUNK_TOKENS", 4)
    want, want_grads = jax.value_and_grad(capped, (0, 1))(*inputs())
    got, got_grads = jax.value_and_grad(cross_entropy, (0, 1))(*inputs(), softcap=2.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_logits", [1 << 22, 4 * V, V])
def test_loss_and_gradients_are_those_of_all_logits(monkeypatch, chunk_logits):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    hidden, head, targets, weights = inputs()
    want, want_grads = jax.value_and_grad(plain, (0, 1))(hidden, head, targets, weights)
    got, got_grads = jax.value_and_grad(cross_entropy, (0, 1))(hidden, head, targets, weights)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(hidden, head, targets, weights), want, rtol=1e-6)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk_logits", [1 << 22, 4 * V])
def test_a_teacher_adds_the_divergence_at_its_temperature(monkeypatch, chunk_logits, temperature):
    """Of a teacher of another width, both with caps, by the formula over all logits."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(loss, "MIN_CHUNK_TOKENS", 4)
    rng = np.random.default_rng(1)
    taught = rng.normal(size=(B, T, 10)).astype(np.float32)
    taught_head = rng.normal(size=(10, V)).astype(np.float32)
    weight = 0.6

    def plain_with_teacher(hidden, head, targets, weights):
        student = 2.0 * jnp.tanh(hidden @ head / 2.0)
        teacher = 3.0 * jnp.tanh(taught @ taught_head / 3.0)
        p = jax.nn.softmax(teacher / temperature)
        ratio = jax.nn.log_softmax(teacher / temperature) - jax.nn.log_softmax(
            student / temperature
        )
        apart = jnp.sum(p * ratio, axis=-1)
        return capped(hidden, head, targets, weights) + weight * temperature**2 * jnp.sum(
            weights * apart
        )

    of = loss.Taught(taught, taught_head, 3.0, temperature, weight)
    want, want_grads = jax.value_and_grad(plain_with_teacher, (0, 1))(*inputs())
    got, got_grads = jax.value_and_grad(cross_entropy, (0, 1))(*inputs(), 2.0, of)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(*inputs(), 2.0, of), want, rtol=1e-6)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_logits", [1 << 22, 4 * V])
def test_a_frozen_head_costs_no_gradient(monkeypatch, chunk_logits):
    """Three products of N x D x V make the logits and both gradients; without the head's, two."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(loss, "MIN_CHUNK_TOKENS", 4)
    hidden, head, targets, weights = inputs()
    want = jax.grad(plain)(hidden, head, targets, weights)
    np.testing.assert_allclose(
        jax.grad(cross_entropy)(hidden, head, targets, weights), want, rtol=1e-4, atol=1e-5
    )
    products = [
        str(jax.make_jaxpr(jax.grad(cross_entropy, wanted))(*inputs())).count("dot_general")
        for wanted in (0, (0, 1))
    ]
    assert products == [2, 3]


def test_memory_holds_one_chunk_of_logits(monkeypatch):
    tokens, vocab = 4096, 512

    def temporary():
        hidden = jax.ShapeDtypeStruct((1, tokens, D), jnp.float32)
        head = jax.ShapeDtypeStruct((D, vocab), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        compiled = jax.jit(jax.grad(cross_entropy, (0, 1))).lower(hidden, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(loss, "CHUNK_LOGITS", 64 * vocab)
    assert temporary() < 4 * tokens * vocab / 4  # a quarter of what float32 logits alone take


@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        (dict(data=2, tensor=4), "tensor"),
        (dict(data=1, fsdp=2, sequence=2, tensor=2), "tensor"),
        (dict(data=2, sequence=2, tensor=2), None),  # a head that tensor parallelism leaves whole
    ],
)
def test_sharded_equals_one_device(shape, vocab):
    hidden, head, targets, weights = inputs()
    grad = jax.value_and_grad(cross_entropy, (0, 1))
    want, want_grads = grad(hidden, head, targets, weights)
    with jax.set_mesh(make_mesh(MeshShape(**shape))):
        batch = "data" if shape["data"] > 1 else "fsdp"
        rows = "sequence" if "sequence" in shape else None
        put = jax.device_put
        got, got_grads = jax.jit(grad)(
            put(hidden, P(batch, rows, None)),
            put(head, P(None, vocab)),
            put(targets, P(batch, rows)),
            put(weights, P(batch, rows)),
        )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
