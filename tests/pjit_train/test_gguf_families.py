"""GGUF files of every architecture, made of the small models in tests/fixtures/huggingface."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import gguf_models
from huggingface_folders import FIXTURES, stored

from pjit_train.huggingface.config import difference, read_config
from pjit_train.huggingface.gguf_architectures import ARCHITECTURES
from pjit_train.huggingface.gguf_import import import_gguf

HEAD_OF_8 = {"attention.key_length": 8, "attention.value_length": 8}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
UNSAID = {"window": None, "local_layers": (True,)}  # llama.cpp's converter writes no window of Qwen
# Architecture -> the fixture, keys that its sizes do not say, and what the file cannot say of it.
MODELS = {
    "llama": ("llama", HEAD_OF_8, {}),
    "gpt2": ("gpt2", {}, {}),
    "qwen2": ("qwen2", {}, UNSAID),
    "qwen3": ("qwen3", HEAD_OF_8, UNSAID),
    "olmo2": ("olmo2", LINEAR, {}),
    "phi3": (
        "phi3",
        {"rope.dimension_count": 4, "attention.sliding_window": 6},
        {"partial_rotary_factor": 4 / 6},  # of 6 positions 4 are turned, as 0.67 means
    ),
    "gemma2": (
        "gemma2",
        HEAD_OF_8
        | {"attention.sliding_window": 4}
        | {"attn_logit_softcapping": 0.6, "final_logit_softcapping": 2.0},
        {"attention_scale": 8**-0.5},  # llama.cpp knows another one of the 27B models alone
    ),
    "gemma3": (
        "gemma3_text",
        HEAD_OF_8
        | LINEAR
        | {"attention.sliding_window": 4, "attention.sliding_window_pattern": 2}
        | {"rope.freq_base_swa": 50.0},
        {"attention_scale": 8**-0.5},
    ),
}


def test_all_architectures_are_tried():
    assert MODELS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_comes_back(architecture, tmp_path):
    fixture, keys, unsaid = MODELS[architecture]
    config = json.loads((FIXTURES / fixture / "config.json").read_text())
    tensors = stored(FIXTURES / fixture)
    path = gguf_models.write(tmp_path / "x.gguf", architecture, config, tensors, keys)
    done = import_gguf(path, tmp_path / "out")
    assert done.tokens is None
    found = stored(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        if architecture.startswith("gemma") and "norm" in name:  # 1 was added, and is taken away
            np.testing.assert_allclose(found[name], array, atol=2.0**-23)
        else:
            assert np.array_equal(found[name], array), name
    before = read_config(FIXTURES / fixture / "config.json")[1]
    after = read_config(tmp_path / "out/config.json")[1]
    assert difference(after, dataclasses.replace(before, **unsaid)) is None
