"""Attention against softmax written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_reference import (
    gradients,
    random,
    reference,
    reference_gradients,
    seen_by,
    weights_of,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pjit_train.attention import attention
from pjit_train.sharding import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")


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
    ids = lambda n: np.sort(rng.integers(0, 3, (2, n)))
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

    def tiled(q, k, v):
        return attention(
            q, k, v, causal=causal, window=window, segments=segments, tile_rows=tile_rows
        )

    _, got = jax.jit(functools.partial(gradients, tiled))(q, k, v)
    (d_out,) = random(99, q.shape)
    want = reference_gradients(q, k, v, d_out, causal=causal, window=window, segments=segments)
    for g, w in zip(got, want, strict=True):
        # As far as float32 logits are right: those of scale 4 go to a hundred.
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * max(1, scale) ** 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "softcap"), [(0.7, None), (None, 0.5), (0.7, 1.5)], ids=["scale", "cap", "both"]
)
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 5}, {}], ids=str)
def test_scaled_and_capped_logits_are_the_definition(scale, softcap, options):
    """Output and directional derivatives, these by differences of the definition in float64."""
    options = options | {"scale": scale, "softcap": softcap}
    q, k, v = random(3, (2, 21, 4, 8), *[(2, 21, 2, 8)] * 2, scale=2.0)
    attend = functools.partial(attention, **options, tile_rows=6)
    out, got = jax.jit(functools.partial(gradients, attend))(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, **options), rtol=1e-5, atol=1e-5)
    (d_out,) = random(99, out.shape)
    inputs = [np.asarray(x, np.float64) for x in (q, k, v)]
    for i, gradient in enumerate(got):
        step = np.asarray(random(i, inputs[i].shape)[0], np.float64)

        def along(size, i=i, step=step):
            moved = [x + size * step if j == i else x for j, x in enumerate(inputs)]
            return np.sum(reference(*moved, **options) * np.asarray(d_out, np.float64))

        want = (along(1e-5) - along(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * step), want, rtol=2e-4, atol=1e-3)


def absolute_terms(q, k, v, d_out, **options):
    """The gradients with every term of their sums taken positive, in float64."""
    weights = weights_of(*wide(q, k, v)[:2], seen_by((*q.shape[:2], k.shape[1]), **options))
    kv_shape = k.shape
    q, k, v = (np.abs(x) for x in wide(q, k, v))
    d_out = np.abs(np.asarray(d_out, np.float64))
    d_weights = np.einsum("bthd,bshd->bhts", d_out, v)
    d_logits = weights * (d_weights + np.sum(weights * d_weights, axis=-1, keepdims=True))
    d_logits /= np.sqrt(q.shape[-1])
    d_q = np.einsum("bhts,bshd->bthd", d_logits, k)
    d_k = np.einsum("bhts,bthd->bshd", d_logits, q)
    d_v = np.einsum("bhts,bthd->bshd", weights, d_out)
    of_heads = (*kv_shape[:2], kv_shape[2], -1, kv_shape[3])
    return d_q, *(x.reshape(of_heads).sum(axis=3) for x in (d_k, d_v))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "bfloat16"]),
    lengths=st.sampled_from([(3, 3), (16, 5), (37, 41), (1, 9)]),
    heads=st.sampled_from([(4, 2), (3, 3), (4, 1)]),
    size=st.sampled_from([5, 8]),
    scale=st.sampled_from([1e-15, 1e-3, 1.0, 30.0]),
    causal=st.booleans(),
    window=st.sampled_from([None, 5]),
    blind=st.booleans(),
    tile_rows=st.sampled_from([2, 5, 128]),
    seed=st.integers(0, 1000),
)
def test_gradients_are_within_their_rounding(
    dtype, lengths, heads, size, scale, causal, window, blind, tile_rows, seed
):
    """In bfloat16 to 1/64, in float32 to 1e-5, of the sum of an entry's terms taken positive.

    (bfloat16 rounds by up to 1/256: here weights, gradients of logits, and the output.) Logits of a
    size L are known to L roundings of float32. `blind`: some rows see nothing.
    """
    q, k, v = (
        x.astype(dtype)
        for x in random(
            seed, (2, lengths[0], heads[0], size), *[(2, lengths[1], heads[1], size)] * 2,
            scale=scale,
        )
    )  # fmt: skip
    segments = tuple(np.zeros((2, n), int) for n in lengths) if blind else None
    if blind:
        segments[0][:, ::3] = 1
    options = dict(causal=causal, window=window, segments=segments)
    _, got = jax.jit(
        functools.partial(gradients, functools.partial(attention, **options, tile_rows=tile_rows))
    )(q, k, v)
    (d_out,) = random(99, q.shape)
    want = reference_gradients(q, k, v, d_out.astype(dtype), **options)
    if blind:
        assert not np.any(np.asarray(got[0], np.float32)[:, ::3])
    logit = size**0.5 * float(jnp.max(jnp.abs(q)) * jnp.max(jnp.abs(k)))
    close = (1e-5 if dtype == "float32" else 1 / 64) + 1e-6 * logit
    bounds = absolute_terms(q, k, v, d_out, **options)
    # A weight below the least normal float32 is zero, whatever it is multiplied by.
    largest = [float(np.max(np.abs(np.asarray(x, np.float32)))) for x in (q, k, v, d_out)]
    lost = 1.2e-38 * sum(lengths) * size * np.prod([max(x, 1) for x in largest])
    for g, w, bound in zip(got, want, bounds, strict=True):
        assert g.dtype == jnp.dtype(dtype)
        assert np.all(np.abs(np.asarray(g, np.float64) - w) <= close * bound + lost)


def test_logits_as_large_as_float32_holds():
    """One column has all of a row's weight, be its logit zero or far below; nothing overflows."""
    rng = np.random.default_rng(0)
    column = rng.integers(0, 6, 9)
    k = np.zeros((1, 6, 1, 8), np.float32)
    k[0, :, 0, :6] = -1e19 * (1 - np.eye(6))
    q = np.zeros((1, 9, 1, 8), np.float32)
    q[0, np.arange(9), 0, column] = 1e19
    for shift in (0, -1e18):  # the largest logit of a row: 0, or -1e37
        v = rng.normal(size=k.shape).astype(np.float32)
        out, (d_q, d_k, d_v) = jax.jit(functools.partial(gradients, attention))(q, k + shift, v)
        np.testing.assert_array_equal(out[0, :, 0], v[0, column, 0])
        # To a rounding of such a logit, a weight is anything between 0 and 1, but no more.
        assert all(np.all(np.isfinite(d)) for d in (d_q, d_k))
        assert np.all(np.abs(d_v) <= np.sum(np.abs(random(99, q.shape)[0])))


@pytest.mark.parametrize("way", ["rows", "flat"])
@pytest.mark.parametrize("logit", [1e3, 1e6, 2.0**34])
def test_equal_logits_share_a_row_however_large_they_are(way, logit):
    """In the gradient as in the output; integers, whose products are exact."""
    k = np.full((1, 3, 1, 4), 2.0, np.float32)
    q = np.full((1, 5, 1, 4), logit / 4, np.float32)  # logits of 2 logit, less after scaling
    k[0, 2] = 1.0  # far below
    (v,) = random(0, k.shape)
    out, (d_q, d_k, d_v) = gradients(functools.partial(attention, way=way), q, k, v)
    (d_out,) = random(99, q.shape)
    share = np.array([0.5, 0.5, 0.0])
    np.testing.assert_allclose(out[0, :, 0], np.tile(share @ v[0, :, 0], (5, 1)), rtol=1e-6)
    np.testing.assert_allclose(d_v[0, :, 0], np.outer(share, d_out.sum((0, 1, 2))), rtol=1e-5)
    d_weights = d_out[0, :, 0] @ v[0, :, 0].T
    d_logits = share * (d_weights - (d_weights @ share)[:, None])
    np.testing.assert_allclose(d_q[0, :, 0], d_logits @ k[0, :, 0] / 2, atol=1e-5)
    np.testing.assert_allclose(d_k[0, :, 0], d_logits.T @ q[0, :, 0] / 2, rtol=1e-4)


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


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 30}])
def test_an_offset_known_only_while_running(options):
    """One program for all; its rows' columns begin and end anywhere, in the cache and outside."""
    q, k, v = random(0, (1, 40, 2, 8), *[(1, 300, 2, 8)] * 2)
    segments = (np.zeros((1, 40), int), np.zeros((1, 300), int))
    (d_out,) = random(99, q.shape)

    @jax.jit
    def run(offset):
        attend = functools.partial(
            attention, **options, segments=segments, row_offset=offset, tile_rows=16
        )
        return gradients(attend, q, k, v)

    for offset in (0, 100, 117, 260, 290):
        out, grads = run(offset)
        where = options | {"row_offset": offset}
        np.testing.assert_allclose(out, reference(q, k, v, **where), rtol=1e-5, atol=1e-5)
        want = reference_gradients(q, k, v, d_out, **where)
        for g, w in zip(grads, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_split_rows_skip_what_the_mask_empties(monkeypatch):
    """Exponentials that 4 devices compute, of 512 x 512 that each would without a mask."""
    counts, exponential = [], jnp.exp

    def counted(x):
        jax.debug.callback(lambda size=x.size: counts.append(size))
        return exponential(x)

    monkeypatch.setattr(jnp, "exp", counted)
    (q,) = random(0, (1, 512, 1, 8))

    def of(shape, function):
        with jax.set_mesh(make_mesh(MeshShape(data=1, **shape))):
            spec = P(None, "sequence" if shape else None, None, None)
            x = jax.device_put(np.asarray(q), spec)
            jax.block_until_ready(jax.jit(function)(x))
            jax.effects_barrier()
        found = sum(counts) / 512**2
        counts.clear()
        return found

    attend = lambda x: attention(x, x, x, causal=True, tile_rows=32)
    # A tile has up to 127 columns more than its last row sees; half, and a quarter of them.
    assert 0.5 < of({"sequence": 4}, attend) < 0.5 + 0.25
    forward = of({"sequence": 4}, attend)
    both = of({"sequence": 4}, lambda x: gradients(attend, x))
    # Blocks of the backward pass are done if any of it is seen: 16 x 17 / 2 of 16 x 16.
    assert both - forward == pytest.approx(17 / 32)


def test_memory_is_linear_in_the_length():
    """Temporary memory of a compiled gradient, which holds every logit if attention is plain."""

    def temporary(length):
        q = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = lambda q, k, v: attention(q, k, v, causal=True).sum()
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.6 * temporary(2048)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [dict(data=2, tensor=2), dict(data=1, sequence=4), dict(data=1, fsdp=2, sequence=2, tensor=2)],
)
def test_sharded_equals_one_device(shape):
    q, k, v = random(0, (2, 32, 4, 8), *[(2, 32, 2, 8)] * 2)
    ids = np.sort(np.random.default_rng(1).integers(0, 3, (2, 32)))
    attend = lambda *a: attention(*a, causal=True, segments=(ids, ids), tile_rows=8)
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
