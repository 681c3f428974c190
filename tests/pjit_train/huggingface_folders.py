"""What the tests of Hugging Face folders share; reads them without the code under test."""

import functools
from pathlib import Path

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from pjit_train.step import split_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"
LATER = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")
NAMES = ("llama", "llama_tied", "opt", "gpt2", "vit", *LATER)
LLAMA = TransformerConfig(
    d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=24, vocab_size=8, max_len=8
)


def stored(folder):
    """Every tensor of a folder, without our code."""
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@functools.cache
def shapes_of(config):
    """Path -> (shape, dtype) of the parameters of `config.build`."""
    state = nnx.to_pure_dict(split_model(config, Rules())[1])
    return {path: (x.shape, x.dtype) for path, x in flatten_dict(state).items()}


def random_params(config, seed=0):
    draw = np.random.default_rng(seed).normal
    flat = {p: draw(size=shape).astype(dtype) for p, (shape, dtype) in shapes_of(config).items()}
    return unflatten_dict(flat)


def assert_same(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path, x in a.items():
        assert x.dtype == b[path].dtype, path
        assert np.array_equal(np.asarray(x), np.asarray(b[path])), path
