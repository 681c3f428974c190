"""Hugging Face folders written: bit for bit, whole or not at all."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_folders import (
    FIXTURES,
    LLAMA,
    NAMES,
    assert_same,
    random_params,
    shapes_of,
    stored,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from pjit_train.data import Bytes
from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.config import read_config
from pjit_train.huggingface.families import FAMILIES, Tensor
from pjit_train.sharding import MeshShape, Rules, make_mesh


@pytest.mark.parametrize("name", NAMES)
def test_saving_what_was_loaded_gives_the_same_tensors_and_meaning(name, tmp_path):
    config, params = huggingface.load(FIXTURES / name)
    huggingface.save(tmp_path / "out", config, params)
    theirs, ours = stored(FIXTURES / name), stored(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for key in theirs:
        np.testing.assert_array_equal(theirs[key], ours[key], err_msg=key)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file
    again, params_again = huggingface.load(tmp_path / "out")
    assert again == config
    assert_same(params_again, params)
    document = json.loads((FIXTURES / name / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    differing = {k for k in written if k in document and written[k] != document[k]}
    # Implicit in one, explicit in the other; and the tokens of released models.
    assert differing <= {"n_inner", "bos_token_id", "eos_token_id", "pad_token_id"}
    older = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
    family, _ = read_config(FIXTURES / name / "config.json")
    said = {key for key, value in family.theirs.items() if written.get(key, ...) == value}
    assert written.keys() - document.keys() <= older | said | {"head_dim"}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_saved_in_shards_and_read_again(param_dtype, tmp_path):
    config = dataclasses.replace(LLAMA, param_dtype=param_dtype)
    params, limit = random_params(config), 4000
    huggingface.save(tmp_path / "out", config, params, max_shard_bytes=limit)
    again, loaded = huggingface.load(tmp_path / "out", config)
    assert again == config
    assert_same(loaded, params)
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read one of the files may read all
    total = 0
    for shard in shards:
        tensors = load_file(tmp_path / "out" / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        size = sum(x.nbytes for x in tensors.values())
        assert size <= limit
        total += size
    assert (
        total == index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    )


def test_loaded_onto_a_mesh_and_saved_from_it(tmp_path):
    whole = huggingface.load(FIXTURES / "llama")[1]
    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        config, params = huggingface.load(FIXTURES / "llama")
        query = params["blocks"]["attention"]["query"]["kernel"]
        assert query.sharding.spec == jax.P(None, "fsdp", "tensor", None)
        assert query.addressable_shards[0].data.shape == (2, 8, 2, 8)
        huggingface.save(tmp_path / "out", config, params)
        wide = ("tensor", "data")
        with pytest.raises(UserError, match=r"key.kernel has 2 along .* 'kv_heads'"):
            huggingface.load(FIXTURES / "llama", rules=Rules(heads=wide, kv_heads=wide))
    assert_same(params, whole)
    for key, tensor in stored(FIXTURES / "llama").items():
        np.testing.assert_array_equal(stored(tmp_path / "out")[key], tensor)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "layernorm"}, "no Hugging Face family is like it; they have llama: "),
        ({"use_bias": True}, "no Hugging Face family"),
        ({"position_offset": 2}, "llama has no position_offset=2; use 0"),
        (
            {"positions": "learned", "norm": "layernorm", "position_offset": 2},
            "opt has no num_kv_heads=2; use 4",
        ),
        (
            {
                "positions": "learned",
                "norm": "layernorm",
                "use_bias": True,
                "num_kv_heads": 4,
                "activation": "swiglu",
            },
            "gpt2 has no activation='swiglu'; use relu, gelu, gelu_tanh",
        ),
    ],
)
def test_models_that_transformers_has_not_are_refused(changes, said, tmp_path):
    config = dataclasses.replace(LLAMA, **changes)
    with pytest.raises(UserError, match=said):
        huggingface.save(tmp_path / "out", config, random_params(config))
    assert not any(tmp_path.iterdir())


def test_parameters_that_are_not_of_the_configuration_are_refused(tmp_path):
    params = random_params(LLAMA)
    tied = dataclasses.replace(LLAMA, tie_head=True)
    with pytest.raises(UserError, match="parameters head are not both"):
        huggingface.save(tmp_path / "out", tied, params)
    params["head"] = params["head"].astype(jnp.bfloat16)
    with pytest.raises(UserError, match=r"head is bfloat16\[16, 8\]; .* float32\[16, 8\]"):
        huggingface.save(tmp_path / "out", LLAMA, params)
    assert not any(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path):
    params = random_params(LLAMA)
    (tmp_path / "empty").mkdir()
    huggingface.save(tmp_path / "empty", LLAMA, params)
    before = stored(tmp_path / "empty")
    with pytest.raises(UserError, match="there is something already"):
        huggingface.save(tmp_path / "empty", LLAMA, random_params(LLAMA, seed=1))
    assert_same(stored(tmp_path / "empty"), before)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="there is something already"):
        huggingface.save(tmp_path / "file", LLAMA, params)
    with pytest.raises(UserError, match="cannot be written"):
        huggingface.save(tmp_path / "file" / "out", LLAMA, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


class Failing(np.ndarray):
    """A parameter that cannot be read."""

    def __getitem__(self, index):
        raise OSError("no space left on device")


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    params = random_params(LLAMA)
    kernel = np.asarray(params["blocks"]["feed_forward"]["down"]["kernel"])
    params["blocks"]["feed_forward"]["down"]["kernel"] = kernel.view(Failing)
    with pytest.raises(UserError, match=r"out: cannot be written \(no space left"):
        huggingface.save(tmp_path / "out", LLAMA, params, max_shard_bytes=1)
    assert not any(tmp_path.iterdir())


WRITER = """
import sys, time
import numpy as np
import jax
from flax import nnx
from pjit_train.huggingface import weights as huggingface
from pjit_train.sharding import Rules
from pjit_train.models.transformer import TransformerConfig

class Slow(np.ndarray):
    def __getitem__(self, index):
        time.sleep(0.2)
        return np.asarray(super().__getitem__(index))

config = TransformerConfig(**{config})
params = nnx.to_pure_dict(nnx.state(config.build(jax.random.key(0), Rules())))
params = jax.tree.map(lambda x: np.asarray(x).view(Slow), params)
huggingface.save(sys.argv[1], config, params, max_shard_bytes=1)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    fields = {"d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "d_ff": 24}
    script = WRITER.replace("{config}", repr({**fields, "vocab_size": 8, "max_len": 8}))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("model-*.safetensors"))) < 3:
        assert process.poll() is None, "the writer ended early"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    params = random_params(LLAMA)
    huggingface.save(tmp_path / "out", LLAMA, params)
    assert_same(huggingface.load(tmp_path / "out")[1], params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@settings(max_examples=30, deadline=None)
@given(
    row=st.sampled_from([t for family in FAMILIES.values() for t in family.tensors]),
    sizes=st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
def test_layouts_say_where_each_element_goes(row: Tensor, sizes):
    """Against einsum, which knows the letters by itself."""
    ours, theirs = row.layout.split(" -> ")
    shape = tuple(sizes[: len(ours)])
    parts = [np.random.default_rng(i).normal(size=shape) for i in range(len(row.paths))]
    joined = row.join(parts)
    shapes = [shape] * len(parts)
    assert joined.shape == row.shape(shapes)
    order = theirs.replace(",", "").replace("1", "")
    expected = np.concatenate(
        [np.einsum(f"{ours}->{order}", x).reshape(row.shape([shape])) for x in parts], axis=row.axis
    )
    np.testing.assert_array_equal(joined, expected)
    for part, back in zip(parts, row.split(joined, shapes), strict=True):
        np.testing.assert_array_equal(back, part)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=12), limit=st.integers(0, 30))
def test_shards_hold_all_in_order_and_no_more_than_they_may(sizes, limit):
    counts = huggingface.split_sizes(sizes, limit)
    assert sum(counts) == len(sizes)
    assert all(counts)
    bounds = np.cumsum([0, *counts])
    totals = [sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(t <= limit or n == 1 for t, n in zip(totals, counts, strict=True))
    for i in range(len(totals) - 1):  # greedy: the next tensor would not have fitted
        assert totals[i] + sizes[bounds[i + 1]] > limit


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_stands_once_in_the_table(family):
    config = huggingface.load(FIXTURES / family)[0]
    rows = [path for tensor in FAMILIES[family].tensors for path in tensor.paths]
    assert len(rows) == len(set(rows))
    assert {".".join(path) for path in shapes_of(config)} <= set(rows)
    assert isinstance(config, FAMILIES[family].config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_was_changed_or_lost_is_named(tmp_path, caplog, name):
    folder = tmp_path / "model"
    huggingface.save(folder, LLAMA, random_params(LLAMA), tokenizer=Bytes())
    _, params = huggingface.load(folder)
    assert not caplog.records
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    data = (folder / name).read_bytes()
    if name.endswith(".json"):  # people edit it
        (folder / name).write_bytes(data + b"\n")
        assert_same(huggingface.load(folder)[1], params)
        assert f"{name} was changed since SHA256SUMS was written" in caplog.text
    else:
        for at in (len(data) // 2, len(data) - 1):
            changed = bytearray(data)
            changed[at] ^= 1
            (folder / name).write_bytes(changed)
            with pytest.raises(UserError, match=f"{name} was changed since SHA256SUMS"):
                huggingface.load(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        huggingface.load(folder)
