"""Hugging Face folders that say what is not so: numbers, sizes, names, files."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
from huggingface_folders import FIXTURES, stored
from safetensors.numpy import save_file

from pjit_train.errors import UserError
from pjit_train.huggingface import weights as huggingface


@pytest.fixture
def folder(tmp_path):
    """A copy of a Llama of one file."""
    shutil.copytree(FIXTURES / "llama", tmp_path / "llama")
    return tmp_path / "llama"


def mistake(folder) -> str:
    """The one line, which comes at once and names the folder."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        huggingface.load(folder)
    assert time.monotonic() - began < 10
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    assert str(folder) in said
    return said


def configure(folder, text: str) -> None:
    """Puts a text in the place of the closing brace of config.json."""
    document = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(document + text)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_none_or_not_that_of_the_tensors_is_named(key, folder):
    document = json.loads((folder / "config.json").read_text())
    odd = [
        10**8,
        2**60,
        10**9,
        1e8,
        1e400,
        float("nan"),
        "2",
        -2,
        0,
        True,
        2.5,
        [2],
        10**30,
        document[key] + 1,
    ]
    for value in odd:
        if key == "max_position_embeddings" and value in (10**8, 10**9, document[key] + 1):
            continue  # of rotary positions no tensor has that size
        (folder / "config.json").write_text(json.dumps({**document, key: value}))
        said = mistake(folder)
        in_ours = [
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "d_model",
            "d_ff",
            "max_len",
            "tensor",
        ]
        assert any(name in said for name in (key, *in_ours)), said


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "initializer_range"])
def test_a_number_that_is_none_or_out_of_its_meaning_is_named(key, folder):
    document = json.loads((folder / "config.json").read_text())
    document.pop("rope_parameters", None)
    for value in (float("nan"), float("inf"), -1.0, "1", True, [1.0], 1e300):
        (folder / "config.json").write_text(json.dumps({**document, key: value}))
        ours = {"rms_norm_eps": "norm_epsilon", "initializer_range": "init_std"}.get(key, key)
        said = mistake(folder)
        assert key in said or ours in said, said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (', "x": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        (', "x": ' + '{"a":' * 200_000 + "1" + "}" * 200_001, "nested too deeply"),
        (', "hidden_size": 32}', "the key 'hidden_size' stands twice"),
        (', "x": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ("", "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(text, says, folder):
    configure(folder, text)
    assert says in mistake(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_not_finite_are_named_with_their_place(bad, dtype, folder):
    tensors = stored(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(dtype)
    tensors[name][3, 5] = tensors[name][7, 0] = bad
    save_file(tensors, folder / "model.safetensors")
    said = mistake(folder)
    assert f"tensor {name} holds {bad} at [3, 5], and in 2 of {tensors[name].size:,}" in said


def test_weights_that_the_dtype_of_the_parameters_does_not_hold_are_named(folder):
    import dataclasses

    config = dataclasses.replace(huggingface.load(folder)[0], param_dtype="float16")
    tensors = stored(folder)
    tensors["model.norm.weight"][2] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight as float16 holds inf at \[2\]"):
        huggingface.load(folder, config)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_named_and_never_loaded(pickle, folder):
    (folder / "model.safetensors").unlink()
    (folder / pickle).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert f"{pickle}, pickles, which are never loaded; weights must be" in mistake(folder)


def test_a_file_that_ends_early_is_named_wherever_it_does(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "model.safetensors: is no whole safetensors file" in mistake(folder)


def test_a_tensor_under_two_names_or_in_two_files_is_refused(folder):
    tensors = stored(folder)
    norm = "model.norm.weight"
    save_file({**tensors, "norm.weight": tensors[norm] + 1}, folder / "model.safetensors")
    assert f"tensor {norm} is there twice, as " in mistake(folder)

    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({norm: tensors[norm] + 1}, folder / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {norm: "b.safetensors"}
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    said = mistake(folder)
    assert f"tensor {norm} is there twice" in said
    assert "a.safetensors" in said
    assert "b.safetensors" in said


def test_files_that_both_claim_to_be_the_weights_are_refused(folder):
    tensors = stored(folder)
    save_file(tensors, folder / "a.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors")
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    assert "has both model.safetensors and model.safetensors.index.json" in mistake(folder)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("gone.safetensors", "gone.safetensors is missing, which"),
        ("../outside.safetensors", "must give every tensor a file in the folder"),
        ("/etc/passwd", "must give every tensor a file in the folder"),
        ("..", "must give every tensor a file in the folder"),
        (".", "must give every tensor a file in the folder"),
        ("", "must give every tensor a file in the folder"),
        ("a\0b", "must give every tensor a file in the folder"),
        (7, "must give every tensor a file in the folder"),
        ("config.json", "is no whole safetensors file"),
    ],
)
def test_an_index_names_files_of_its_folder(file, says, folder):
    tensors = stored(folder)
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / huggingface.INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, file)})
    )
    assert says in mistake(folder)


def test_an_index_says_which_file_has_a_tensor(folder):
    tensors = stored(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.rotary_emb.inv_freq": np.ones(2, np.float32)}, folder / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    assert "b.safetensors: holds no tensors model.norm.weight" in mistake(folder)


def test_a_header_says_what_the_file_holds(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def write(text: str, claimed: int | None = None) -> None:
        raw = text.encode()
        path.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)

    write(json.dumps(header))
    huggingface.load(folder)  # the header alone is what is wrong below
    first, second, *_ = (name for name in header if name != "__metadata__")
    begin, end = header[first]["data_offsets"]
    shape = header[first]["shape"]
    wrong = {
        "far": {"data_offsets": [begin, 2**62]},
        "reversed": {"data_offsets": [end, begin]},
        "negative": {"data_offsets": [-4, end]},
        "overlapping": {"data_offsets": header[second]["data_offsets"]},
        "too large": {"shape": [2**31, *shape]},
        "overflowing": {"shape": [2**40, 2**40]},
        "of 2^60 elements": {"shape": [2**30, 2**30]},
        "of 2^60 and none": {"shape": [0, 2**60], "data_offsets": [begin, begin]},
        "negative size": {"shape": [-1, *shape[1:]]},
        "of another dtype": {"dtype": "F64"},
        "of no dtype": {"dtype": "F7"},
        "fraction": {"shape": [shape[0] + 0.5, *shape[1:]]},
    }
    for change in wrong.values():
        write(json.dumps(header | {first: header[first] | change}))
        mistake(folder)
    for claimed in (2**63, 2**32, len(whole), 3, 0):
        write(json.dumps(header), claimed)
        mistake(folder)
    write(json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[first])}}}')
    assert "stands twice" in mistake(folder)
    write("[" * 200_000)
    mistake(folder)
    write("{}")
    mistake(folder)
    path.write_bytes(b"")
    mistake(folder)
