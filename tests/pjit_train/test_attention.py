"""Attention against softmax written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pjit_train.attention import attention
from pjit_train.sharding import MeshShape, make_mesh


def reference(q, k, v, *, causal=False, window=None, segments=None, row_offset=0):
    """[B, T, H, D] by the definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    rows = row_offset + np.arange(q.shape[1])[:, None]
    cols = np.arange(k.shape[1])[None, :]
    seen = np.ones((q.shape[0], 1, rows.size, cols.size), bool)
    if causal:
        seen &= cols <= rows
    if window is not None:
        seen &= cols > rows - window
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    logits = np.where(seen, logits, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhts,bshd->bthd", weights, v)


def random(seed, *shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s) * scale, jnp.float32) for s in shapes]


def gradients(function, *args):
    """Gradients of a fixed random projection of the output, and the output."""
    out, vjp = jax.vjp(function, *args)
    (d_out,) = random(99, out.shape)
    return out, vjp(d_out)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 100]),
    offset=st.integers(0, 5),
    segmented=st.booleans(),
    tile_rows=st.sampled_from([1, 4, 7, 128]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_output_is_the_definition(
    rows, columns, heads, causal, window, offset, segmented, tile_rows, scale, seed
):
    q, k, v = random(seed, (2, rows, heads[0], 8), *[(2, columns, heads[1], 8)] * 2, scale=scale)
    rng = np.random.default_rng(seed)
    ids = lambda n: np.sort(rng.integers(0, 3, (2, n)))  # noqa: E731
    segments = (ids(rows), ids(columns)) if segmented else None
    options = dict(causal=causal, window=window, segments=segments, row_offset=offset)
    got = jax.jit(functools.partial(attention, **options, tile_rows=tile_rows))(q, k, v)
    # A float32 logit is off by its own rounding, and the weights are relatively off by as much.
    logit = 8**0.5 * float(jnp.max(jnp.abs(q)) * jnp.max(jnp.abs(k)))
    atol = scale * (1e-5 + 1e-6 * logit)
    np.testing.assert_allclose(got, reference(q, k, v, **options), rtol=1e-5, atol=atol)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.sampled_from([3, 16, 37]),
    columns=st.sampled_from([None, 5, 41]),
    scale=st.sampled_from([1e-3, 1.0, 4.0]),
    causal=st.booleans(),
    window=st.sampled_from([None, 5]),
    tile_rows=st.sampled_from([2, 5, 128]),
    segmented=st.booleans(),
)
def test_gradients_are_those_of_the_definition(
    rows, columns, scale, causal, window, tile_rows, segmented
):
    columns = columns or rows
    q, k, v = random(0, (2, rows, 4, 8), *[(2, columns, 2, 8)] * 2, scale=scale)
    segments = None
    if segmented:
        rng = np.random.default_rng(1)
        segments = tuple(np.sort(rng.integers(0, 3, (2, n))) for n in (rows, columns))

    def plain(q, k, v):
        """Differentiated by jax, in float64 (enabled around the call)."""
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
        t, s = np.arange(rows)[:, None], np.arange(columns)[None]
        seen = np.ones((2, 1, rows, columns), bool)
        seen &= (s <= t) if causal else True
        seen &= (s > t - window) if window else True
        if segmented:
            seen &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
        # A row that sees nothing has no weights, and no gradient.
        logits = jnp.where(seen, logits, -1e300)
        weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def tiled(q, k, v):
        return attention(
            q, k, v, causal=causal, window=window, segments=segments, tile_rows=tile_rows
        )

    _, got = jax.jit(functools.partial(gradients, tiled))(q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        d_out = jnp.asarray(np.asarray(random(99, q.shape)[0]), jnp.float64)
        want = jax.jit(lambda *a: jax.vjp(plain, *a)[1](d_out))(*wide)
    for g, w in zip(got, want, strict=True):
        # As far as float32 logits are right: those of scale 4 go to a hundred.
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * max(1, scale) ** 3)


def test_a_row_that_sees_nothing_gives_zeros_and_no_gradient():
    q, k, v = random(0, *[(1, 4, 2, 8)] * 3)
    segments = (np.array([[0, 0, 7, 0]]), np.array([[0, 0, 0, 0]]))
    out, grads = gradients(lambda *a: attention(*a, segments=segments), q, k, v)
    assert np.all(np.asarray(out)[0, 2] == 0)
    assert np.all(np.asarray(grads[0])[0, 2] == 0)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_bfloat16_is_within_its_rounding_of_float32():
    q, k, v = random(0, *[(2, 64, 4, 16)] * 3)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = attention(*low, causal=True)
    assert got.dtype == jnp.bfloat16
    want = reference(*[np.asarray(x, np.float32) for x in low], causal=True)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.02)


def test_memory_is_linear_in_the_length():
    """Temporary memory of a compiled gradient, which holds every logit if attention is plain."""

    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attention(q, k, v, causal=True).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.6 * temporary(2048)


@pytest.mark.parametrize(
    "shape",
    [dict(data=2, tensor=2), dict(data=1, sequence=4), dict(data=1, fsdp=2, sequence=2, tensor=2)],
)
def test_sharded_equals_one_device(shape):
    q, k, v = random(0, (2, 32, 4, 8), *[(2, 32, 2, 8)] * 2)
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 32)))
    attend = lambda *a: attention(*a, causal=True, segments=(ids, ids), tile_rows=8)  # noqa: E731
    want, want_grads = gradients(attend, q, k, v)
    with jax.set_mesh(make_mesh(MeshShape(**shape))):
        used = {a for a, n in shape.items() if n > 1}
        batch = tuple(a for a in ("data", "fsdp") if a in used) or None
        rows = "sequence" if "sequence" in used else None
        spec = P(batch, rows, "tensor" if "tensor" in used else None, None)
        put = [jax.device_put(np.asarray(x), spec) for x in (q, k, v)]
        (d_out,) = random(99, want.shape)

        @jax.jit
        def run(d_out, *args):
            out, vjp = jax.vjp(attend, *args)
            return out, vjp(d_out)

        out, grads = run(jax.device_put(np.asarray(d_out), spec), *put)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8)), {}, "the heads of k dividing"),
        (((1, 4, 2, 8), (1, 4, 2, 4)), {}, "do not fit"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"window": 0}, "window=0"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(shapes, options, says):
    q, k = random(0, *shapes)
    with pytest.raises(ValueError, match=says) as error:
        attention(q, k, k, **options)
    assert "\n" not in str(error.value)
