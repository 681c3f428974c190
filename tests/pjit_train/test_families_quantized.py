"""Families after Llama with formats, calibration and smoothing: layers and norms of other kinds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_models import make_batch, make_program
from huggingface_folders import FIXTURES

from pjit_train.compression import calibrate
from pjit_train.compression.kernels import smooth
from pjit_train.huggingface import weights as huggingface
from pjit_train.models.roles import param_roles
from pjit_train.sharding import Rules
from pjit_train.step import split_model
from sparsity.numbers.quantized import MatmulFormats, Quantization

pytestmark = pytest.mark.usefixtures("quick_compiles")
TOKENS = [{"inputs": np.random.default_rng(i).integers(0, 24, size=(2, 16))} for i in range(2)]


@functools.cache
def loaded(name):
    config, params = huggingface.load(FIXTURES / name)
    return config, split_model(config, Rules())[0], params


def logits(name, params):
    return np.asarray(nnx.merge(loaded(name)[1], params)(TOKENS[0]["inputs"].astype(np.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_the_smoothed_model_computes_the_same(name):
    config, graph, params = loaded(name)
    maxima = calibrate.input_maxima(graph, params, TOKENS)
    smoothed = smooth(param_roles(config), params, maxima, 0.5)
    assert not np.allclose(
        smoothed["blocks"]["attention"]["query"]["kernel"],
        params["blocks"]["attention"]["query"]["kernel"],
    )
    np.testing.assert_allclose(logits(name, smoothed), logits(name, params), atol=2e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "olmo2"])
def test_calibration_walks_through_layers_as_the_model_does(name):
    """What comes out of the last block is what a whole pass has; each layer is of its kind."""
    config, graph, params = loaded(name)
    model = nnx.merge(graph, params)
    hidden = calibrate.enter_all(model, TOKENS)
    walked = list(calibrate.walk(model, params["blocks"], hidden, lambda x: x.sum(), max))
    assert len(walked) == config.num_layers
    for (got, _), batch in zip(hidden, TOKENS, strict=True):
        want = model.body(batch["inputs"].astype(np.int32))[0]
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_figures_of_activations_do_not_depend_on_how_layers_are_told():
    """A window of the whole sequence is none, so layers of two kinds are as those of one."""
    config = loaded("gemma2")[0]
    sizes = dict(d_model=16, d_ff=12, num_heads=4, num_kv_heads=2, vocab_size=56, num_layers=4)
    one = dataclasses.replace(config, **sizes, window=None, local_layers=(False,))
    two = dataclasses.replace(one, window=24, local_layers=(True, False))
    formats = MatmulFormats(activations="int8", gradients="fp8_e4m3")
    found = []
    for model in (one, two):
        program = make_program(model, quantization=Quantization(layers={"kernel": formats}))
        state, batch = program.new_state(), make_batch(program, 0)
        found.append(jax.device_get(program.observe(None, state, batch)))
    assert any(name.endswith("/gradients") for name in found[0])
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_quantized_step_on_a_mesh_is_that_of_one_device(name):
    config = loaded(name)[0]
    sizes = dict(d_model=16, d_ff=12, num_heads=4, num_kv_heads=2, vocab_size=56)
    model = dataclasses.replace(config, **sizes, num_layers=2 * config.period, init_std=0.3)
    found = []
    for mesh in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
        layers = {"kernel": MatmulFormats(weights="int8", activations="int8")}
        program = make_program(model, mesh, quantization=Quantization(layers=layers))
        state, batch = program.new_state(), make_batch(program, 0)
        _, metrics = program.compile_step(batch)(state, batch)
        found.append(float(metrics["loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_embeddings_are_scaled_by_a_root_of_the_width_rounded_as_transformers_does():
    """sqrt(12) is 3.46875 in bfloat16: Gemma's multiplication is in the activations' dtype."""
    config, _, params = loaded("gemma2")
    half = dataclasses.replace(config, dtype="bfloat16")
    model = nnx.merge(split_model(half, Rules())[0], params)
    x_BTD = calibrate.enter_all(model, TOKENS[:1]).held[0][0]
    rows = params["embedding"][TOKENS[0]["inputs"]].astype("bfloat16")
    want = (rows.astype(np.float32) * 3.46875).astype("bfloat16")
    np.testing.assert_array_equal(np.asarray(x_BTD, np.float32), want.astype(np.float32))
