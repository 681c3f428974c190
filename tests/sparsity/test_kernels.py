"""What masked and packed kernels read and pass back, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsity.masks.bits import pack_bits
from sparsity.masks.packed import encode_indices, nm_indices, pack_nm
from sparsity.recipes.kernels import MaskedKernel, PackedKernel, dense

RNG = np.random.default_rng(0)
SHAPE = (3, 16, 5)  # layers, in, out
W = RNG.normal(size=SHAPE).astype(np.float32)
D_OUT = RNG.normal(size=SHAPE).astype(np.float32)
MASK = RNG.random(SHAPE) < 0.5
# Two of every four, along the inputs.
NM_MASK = np.argsort(np.argsort(RNG.random((3, 4, 4, 5)), axis=2), axis=2).reshape(SHAPE) < 2


def masked(decay=0.0, gradient=1.0, weight=W, mask=MASK):
    def scalar(x):
        return jnp.full(weight.shape[:1], x, jnp.float32)

    return MaskedKernel(
        weight=jnp.asarray(weight),
        bits=pack_bits(jnp.asarray(mask), axis=-2),
        decay=scalar(decay),
        gradient=scalar(gradient),
        axis=-2,
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def packed(weight=W, mask=NM_MASK, n=2, m=4):
    mask = jnp.asarray(mask)
    planes = encode_indices(nm_indices(mask, n, m, axis=-2), m, axis=-2)
    return PackedKernel(
        values=pack_nm(jnp.asarray(weight), mask, n, m, axis=-2),
        code=jnp.moveaxis(planes, 0, -3),
        n=n,
        m=m,
        axis=-2,
        code_axis=-2,
    )


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gradient", [0.0, 0.25, 1.0])
def test_masked(decay, gradient):
    kernel = masked(decay, gradient)
    out, pull_back = jax.vjp(lambda k: k.dense(), kernel)
    np.testing.assert_array_equal(out, np.where(MASK, W, np.float32(decay) * W))
    (back,) = pull_back(jnp.asarray(D_OUT))
    np.testing.assert_array_equal(back.weight, np.where(MASK, D_OUT, np.float32(gradient) * D_OUT))
    assert not np.any(back.decay)


def test_pruned_is_exactly_zero_and_dense_exactly_the_weight():
    wild = W.copy()
    wild[0, 0] = [np.inf, -np.inf, np.nan, -0.0, -1e-45]
    mask = MASK.copy()
    mask[0, 0] = False
    out = np.asarray(masked(0.0, weight=wild, mask=mask).dense())
    assert not out[~mask].any()
    assert not np.signbit(out[~mask]).any()
    np.testing.assert_array_equal(masked(1.0, weight=wild, mask=mask).dense(), wild)
    (back,) = jax.vjp(lambda k: k.dense(), masked(0.5, 0.0, mask=mask))[1](jnp.asarray(wild))
    assert not np.asarray(back.weight)[~mask].any()


def test_packed():
    kernel = packed()
    assert kernel.values.shape == (3, 8, 5)
    assert kernel.code.shape == (3, 2, 1, 5)  # two bits, of eight places
    out, pull_back = jax.vjp(jax.jit(dense), kernel)
    np.testing.assert_array_equal(out, np.where(NM_MASK, W, 0))
    (back,) = pull_back(jnp.asarray(D_OUT))
    kept = [D_OUT[layer, :, o][NM_MASK[layer, :, o]] for layer in range(3) for o in range(5)]
    want = np.stack(kept).reshape(3, 5, 8).transpose(0, 2, 1)
    np.testing.assert_array_equal(back.values, want)


@pytest.mark.parametrize("make", [masked, packed])
def test_they_have_the_shape_of_the_array_they_stand_for(make):
    kernel = make()
    out = kernel.dense()
    assert (kernel.shape, kernel.ndim, kernel.dtype) == (out.shape, out.ndim, out.dtype)
    np.testing.assert_array_equal(dense(kernel), out)
    np.testing.assert_array_equal(dense(W), W)


@pytest.mark.parametrize("make", [lambda: masked(0.25, 0.5), packed])
def test_layers_can_be_scanned_and_sliced(make):
    kernel = make()
    whole = jax.jit(lambda k: k.dense())(kernel)
    for layer in range(3):
        one = jax.tree.map(lambda x, i=layer: x[i], kernel)
        assert one.shape == SHAPE[1:]
        np.testing.assert_array_equal(one.dense(), whole[layer])

    def total(kernel):  # sum of D_OUT * kernel, a layer at a time
        def body(sum_, layer):
            kernel, d_out = layer
            return sum_ + jnp.sum(dense(kernel) * d_out), None

        return jax.lax.scan(body, 0.0, (kernel, D_OUT))[0]

    leaf = "weight" if isinstance(kernel, MaskedKernel) else "values"
    scanned = jax.jit(jax.grad(total, allow_int=True))(kernel)
    (at_once,) = jax.vjp(lambda k: k.dense(), kernel)[1](jnp.asarray(D_OUT))
    np.testing.assert_array_equal(getattr(scanned, leaf), getattr(at_once, leaf))


def test_a_gradient_with_respect_to_the_values_alone():
    kernel = packed()

    def loss(values):
        leaf = PackedKernel(values=values, code=kernel.code, n=2, m=4, axis=-2, code_axis=-2)
        return jnp.sum(leaf.dense() ** 2)

    np.testing.assert_allclose(jax.grad(loss)(kernel.values), 2 * kernel.values, rtol=1e-6)


def test_a_packing_along_another_axis_than_the_groups():
    mask = jnp.asarray(NM_MASK.transpose(0, 2, 1))  # [layers, out, in]
    weight = jnp.asarray(W.transpose(0, 2, 1))
    planes = encode_indices(nm_indices(mask, 2, 4, axis=-1), 4, axis=-2)
    kernel = PackedKernel(
        values=pack_nm(weight, mask, 2, 4, axis=-1),
        code=jnp.moveaxis(planes, 0, -2),
        n=2,
        m=4,
        axis=-1,
        code_axis=-2,
    )
    np.testing.assert_array_equal(jax.jit(dense)(kernel), np.where(mask, weight, 0))


def test_the_backward_pass_keeps_bits_and_no_array_of_the_weights():
    pull_back = jax.vjp(lambda w: masked(0.5, 0.5, weight=w).dense(), jnp.asarray(W))[1]
    kept = [x for x in jax.tree.leaves(pull_back) if getattr(x, "size", 0) > 3]
    assert {x.dtype for x in kept} == {np.dtype("uint8")}
    values = packed().values
    pull_back = jax.vjp(
        lambda v: PackedKernel(
            values=v, code=packed().code, n=2, m=4, axis=-2, code_axis=-2
        ).dense(),
        values,
    )[1]
    kept = [x for x in jax.tree.leaves(pull_back) if getattr(x, "size", 0) > 3]
    assert {x.dtype for x in kept} == {np.dtype("uint8")}


def test_bfloat16_stays():
    kernel = masked(0.5, weight=W.astype(jnp.bfloat16))
    assert kernel.dense().dtype == kernel.dtype == jnp.bfloat16
