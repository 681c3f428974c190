"""The vision transformer; its logits against those of `transformers` are in test_huggingface."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from pjit_train.errors import UserError
from pjit_train.models.vit import ViTConfig, split_patches
from pjit_train.sharding import MeshShape, Rules, make_mesh
from pjit_train.step import split_model

CONFIG = ViTConfig(
    d_model=16,
    num_layers=2,
    num_heads=4,
    d_ff=32,
    image_size=8,
    patch_size=4,
    num_classes=3,
)
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(8) % 3


@functools.cache
def program(config, mesh):
    """The graph of the model, and random parameters laid on the mesh as the model lays them."""
    graph, state = split_model(config, Rules())
    draw, placed = np.random.default_rng(0), {}
    for path, param in nnx.to_flat_state(state):
        sharding = NamedSharding(mesh, Rules().spec(param.get_metadata("axes")))
        values = (path[-1] == "scale") + 0.3 * draw.normal(size=param.shape)
        placed[path] = jax.device_put(values.astype(param.dtype), sharding)
    return graph, unflatten_dict(placed)


def run(config, shape, images=IMAGES):
    """Logits on a mesh."""
    with jax.set_mesh(mesh := make_mesh(shape)):
        graph, params = program(config, mesh)
        images = jax.device_put(images, NamedSharding(mesh, Rules().spec(("batch",))))
        return jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, images)


@functools.cache
def run_gradients(config, shape):
    """Parameters, logits, and the gradients of a loss, on a mesh."""
    with jax.set_mesh(mesh := make_mesh(shape)):
        graph, params = program(config, mesh)

        def loss(params, images, labels):
            logits = nnx.merge(graph, params)(images)
            picked = jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 3)
            return -jnp.mean(jnp.sum(picked, axis=-1)), logits

        batch = NamedSharding(mesh, Rules().spec(("batch",)))
        images, labels = (jax.device_put(x, batch) for x in (IMAGES, LABELS))
        grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params, images, labels)
        return params, logits, grads


ONE = MeshShape(data=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [MeshShape(data=2, fsdp=2, tensor=2), MeshShape(fsdp=4, sequence=2)],
    ids=["data-fsdp-tensor", "fsdp-sequence"],
)
def test_logits_and_gradients_on_a_mesh_are_those_of_one_device(shape):
    params, logits, grads = run_gradients(CONFIG, shape)
    _, expected_logits, expected_grads = run_gradients(CONFIG, ONE)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)
    kernel = params["blocks"]["attention"]["query"]["kernel"]
    ways = shape.fsdp * shape.tensor
    assert kernel.addressable_shards[0].data.size * ways == kernel.size
    assert grads["blocks"]["attention"]["query"]["kernel"].sharding == kernel.sharding


def test_every_parameter_has_a_gradient():
    for path, grad in flatten_dict(run_gradients(CONFIG, ONE)[2]).items():
        # A key's bias moves all logits of a row alike, which the softmax takes out.
        if path != ("blocks", "attention", "key", "bias"):
            assert np.abs(grad).max() > 1e-4, path


def test_layers_unrolled_change_nothing():
    unrolled = run(dataclasses.replace(CONFIG, layers="unroll"), ONE)
    np.testing.assert_allclose(unrolled, run(CONFIG, ONE), atol=1e-6)


def test_images_are_apart_and_every_patch_is_seen_where_it_stands():
    swapped = np.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
    last = IMAGES.copy()
    last[:, 7, 7] += 1.0  # of the last patch, which the class token at the front attends to
    logits = run(CONFIG, ONE)
    same, moved, changed = np.split(run(CONFIG, ONE, np.concatenate([IMAGES, swapped, last])), 3)
    np.testing.assert_allclose(same, logits, atol=1e-5)
    assert (np.abs(moved - logits).max(axis=1) > 1e-2).all()
    assert (np.abs(changed - logits).max(axis=1) > 1e-3).all()


def test_logits_are_float32_in_any_dtype():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    logits = run(config, ONE)
    assert (logits.shape, logits.dtype) == ((8, 3), jnp.float32)
    assert np.isfinite(logits).all()


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), patch=st.integers(1, 3))
def test_patches_stand_row_by_row(rows, columns, patch):
    height, width = rows * patch, columns * patch
    images = np.arange(2 * height * width * 2).reshape(2, height, width, 2)
    patches = split_patches(jnp.asarray(images), patch)
    expected = [
        images[:, i : i + patch, j : j + patch]
        for i in range(0, height, patch)
        for j in range(0, width, patch)
    ]
    np.testing.assert_array_equal(patches, np.stack(expected, axis=1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="patch_size=3 does not divide image_size=8"):
        dataclasses.replace(CONFIG, patch_size=3)
    with pytest.raises(ValueError, match=r"images are \(1, 8, 8, 1\); they must be \[batch, 8, 8"):
        nnx.eval_shape(lambda: CONFIG.build(jax.random.key(0), Rules())(jnp.zeros((1, 8, 8, 1))))
