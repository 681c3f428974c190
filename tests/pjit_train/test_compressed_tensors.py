"""Codes, scales and configuration of quantized folders; the library itself reads them in oracle."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from huggingface_folders import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file

from pjit_train.compression.kernels import as_matrices, leaf, parse_format
from pjit_train.errors import UserError
from pjit_train.huggingface import compressed_tensors
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.compressed_tensors import QuantizedWeights
from pjit_train.huggingface.compressed_tensors_codes import (
    decode,
    encode,
    input_scales,
    pack_floats,
    pack_int32,
    scheme,
    unpack_floats,
    unpack_int32,
)
from pjit_train.models.roles import param_roles
from pjit_train.models.transformer import TransformerConfig
from pjit_train.sharding import Rules
from sparsity.numbers.formats import E5M2, FP8, MX, NVFP4, Int
from sparsity.post_training.gptq import Scales, rtn

pytestmark = pytest.mark.usefixtures("quick_compiles")
LLAMA = TransformerConfig(
    vocab_size=40, max_len=16, d_model=32, num_layers=2, num_heads=2, d_ff=64, num_kv_heads=1
)
QUERY, OUT, DOWN = (
    f"blocks/{name}/kernel" for name in ("attention/query", "attention/out", "feed_forward/down")
)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 8), inputs=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_integers_are_packed_bit_after_bit(bits, inputs, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=(3, inputs)).astype(np.int8)
    words = pack_int32(codes, bits)
    assert (words.dtype, words.shape) == (np.int32, (3, -(-inputs * bits // 32)))
    for row, codes_I in zip(words, codes, strict=True):
        number = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(row))
        expected = sum(int(c) + 2 ** (bits - 1) << bits * i for i, c in enumerate(codes_I))
        assert number == expected
    np.testing.assert_array_equal(unpack_int32(words, bits, inputs), codes)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(ml_dtypes.float4_e2m1fn, 4), (ml_dtypes.float6_e2m3fn, 6)]
)
def test_small_floats_are_packed_bit_after_bit(dtype, bits):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, size=(5, 32), dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    table = np.arange(2 ** (bits - 1), dtype=np.uint8).view(dtype).astype(np.float32)
    packed = pack_floats(values, table)
    assert (packed.dtype, packed.shape) == (np.uint8, (5, 32 * bits // 8))
    for row, codes_I in zip(packed, codes, strict=True):
        number = sum(int(byte) << 8 * i for i, byte in enumerate(row))
        assert number == sum(int(code) << bits * i for i, code in enumerate(codes_I))
    found = unpack_floats(packed, table)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(values))
    # What division left beside a number is that number.
    np.testing.assert_array_equal(pack_floats(values * np.float32(1 + 1e-6), table), packed)


@pytest.mark.parametrize(
    ("format", "activations", "name", "nbytes"),
    [
        ("int8", None, "pack-quantized", {"weight_packed": 512, "weight_scale": 32}),
        ("int8", "int8", "int-quantized", {"weight": 512, "weight_scale": 32}),
        ("int8:tensor", "int8", "int-quantized", {"weight": 512, "weight_scale": 32}),
        ("int4", None, "pack-quantized", {"weight_packed": 256, "weight_scale": 32}),
        ("int4:16", "int8", "pack-quantized", {"weight_packed": 256, "weight_scale": 128}),
        ("fp8_e4m3", None, "naive-quantized", {"weight": 512, "weight_scale": 32}),
        ("fp8_e4m3", "fp8_e4m3", "float-quantized", {"weight": 512, "weight_scale": 32}),
        ("mxfp8_e4m3", "mxfp8_e4m3", "mxfp8-quantized", {"weight": 512, "weight_scale": 16}),
        ("mxfp4_e2m1", None, "mxfp4-pack-quantized", {"weight_packed": 256, "weight_scale": 16}),
        ("mxfp6_e2m3", None, "mxfp6-pack-quantized", {"weight_packed": 384, "weight_scale": 16}),
        ("nvfp4", None, "nvfp4-pack-quantized", {"weight_packed": 256, "weight_scale": 32}),
        ("nvfp4", "nvfp4", "nvfp4-pack-quantized", {"weight_packed": 256, "weight_scale": 32}),
        ("fp8_e4m3:16x4", None, "naive-quantized", {"weight": 512, "weight_scale": 32}),
        ("fp8_e4m3:64x5", "fp8_e4m3:64", "float-quantized", {"weight": 512, "weight_scale": 8}),
        (
            "int8:asymmetric",
            "int8:asymmetric",
            "int-quantized",
            {"weight": 512, "weight_scale": 32, "weight_zero_point": 8},
        ),
        (
            "int8:tensor:asymmetric",
            "int8",
            "int-quantized",
            {"weight": 512, "weight_scale": 32, "weight_zero_point": 8},
        ),
        (
            "int4:16:asymmetric",
            None,
            "pack-quantized",
            {"weight_packed": 256, "weight_scale": 128, "weight_zero_point": 16},
        ),
    ],
)
def test_what_is_stored_is_what_it_was(format, activations, name, nbytes):
    rng = np.random.default_rng(1)
    kernel_IO = rng.normal(size=(64, 8)).astype(np.float32) * np.exp(rng.normal(size=8) * 3)
    kernel_IO[:, 3] = 0
    kernel_IO[5, 1] = 0
    format = parse_format(format)
    found = scheme(format, None if activations is None else parse_format(activations))
    assert found.name == name
    assert (found.inputs is None) == (activations is None)
    values, scales = rtn(kernel_IO.astype(np.float32), format)
    values_OI = np.asarray(values).T
    stored = encode(values_OI, scales, format, name)
    extra = {"weight_shape", "weight_global_scale"}
    assert {key: x.nbytes for key, x in stored.items() if key not in extra} == nbytes
    np.testing.assert_array_equal(decode(stored, found.weights, name), values_OI)


@pytest.mark.parametrize(
    ("format", "activations", "says"),
    [
        ("hbfp6", None, "no name for hbfp6; it has int4 and int8"),
        ("nf4", None, "no name for nf4; it has int4 and int8"),
        ("int8", "nf4", "no activations in nf4; it has int8"),
        ("fp8_e4m3:128x128", "int8", "no name for fp8_e4m3:128x128 with activations in int8"),
        ("fp8_e4m3:128x128", "fp8_e4m3", "no name for .* with activations in fp8_e4m3:channel"),
        ("fp8_e4m3:32x32", "mxfp8_e4m3", "no name for .* with activations in mxfp8_e4m3"),
        ("fp8_e4m3", "fp8_e4m3:16", "no name for .* with activations in fp8_e4m3:16"),
        ("mxint8", None, "no name for mxint8"),
        ("mxfp6_e3m2", None, "no name for mxfp6_e3m2"),
        ("mxfp8_e4m3:16", None, "no name for mxfp8_e4m3:16"),
        ("nvfp4", "int4", "no activations in int4; it has int8"),
        ("int8", "nvfp4", "no name for int8 with activations in nvfp4"),
        ("mxfp6_e2m3", "mxfp4_e2m1", "no name for mxfp6_e2m3 with activations in mxfp4_e2m1"),
        ("int8", "hbfp8", "no activations in hbfp8"),
        ("int8", "fp8_e4m3", "no name for int8 with activations in fp8_e4m3:channel"),
        ("mxfp4_e2m1", "mxfp8_e4m3", "no name for mxfp4_e2m1 with activations in mxfp8_e4m3"),
        (Int(bits=4, symmetric=False), "fp8_e4m3", "no name for int4:asymmetric with activations"),
        (FP8(element=E5M2), None, "no name for fp8_e5m2"),
        (FP8(block=128), None, "no name for fp8_e4m3:128"),
        (MX(block="channel"), None, "no name for mxfp8_e4m3:channel"),
        (NVFP4(block=32), None, "no name for nvfp4:32"),
    ],
)
def test_a_format_without_a_name_is_one_line(format, activations, says):
    format = parse_format(format) if isinstance(format, str) else format
    with pytest.raises(UserError, match=says) as raised:
        scheme(format, None if activations is None else parse_format(activations))
    assert "\n" not in str(raised.value)
    assert "--dense" in str(raised.value)


def model(formats, pattern=None):
    """Parameters of LLAMA with kernels in formats, and how they are quantized."""
    state = nnx.split(LLAMA.build(jax.random.key(0), Rules()))[1]
    params = jax.tree.map(lambda x: np.array(x), nnx.to_pure_dict(state))
    quantized = {}
    for name, text in formats.items():
        kernel, scales = leaf(params, name), []
        matrices = as_matrices(param_roles(LLAMA)[name], kernel)
        if pattern:
            matrices.reshape(len(matrices), -1, 4, matrices.shape[-1])[:, :, 2:] = 0
        for matrix_IO in matrices:
            matrix_IO[:], found = rtn(matrix_IO, parse_format(text))
            scales.append(found)
        quantized[name] = QuantizedWeights(format=parse_format(text), scales=scales)
    return params, quantized


def stored(folder):
    """{name: (dtype, shape)} of all tensors of a folder."""
    files = [deserialize(path.read_bytes()) for path in folder.glob("*.safetensors")]
    return {name: (x["dtype"], tuple(x["shape"])) for file in files for name, x in file}


def test_a_folder_says_which_layers_are_stored_how(tmp_path):
    params, quantized = model({QUERY: "int4", OUT: "int4", DOWN: "mxfp8_e4m3"}, "2:4")
    patterns = dict.fromkeys([QUERY, OUT, DOWN], "2:4")
    report = compressed_tensors.save(tmp_path / "folder", LLAMA, params, quantized, patterns)
    assert report["violations"] == {QUERY: 0, OUT: 0, DOWN: 0}
    config = json.loads((tmp_path / "folder/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    groups = list(config["config_groups"].values())
    layer = r"re:^model\.layers\.\d+\."
    assert [group["targets"] for group in groups] == [
        [rf"{layer}self_attn\.q_proj$", rf"{layer}self_attn\.o_proj$"],
        [rf"{layer}mlp\.down_proj$"],
    ]
    assert [group["format"] for group in groups] == ["pack-quantized", "mxfp8-quantized"]
    assert set(config["ignore"]) == {
        *(rf"{layer}self_attn\.{x}_proj$" for x in "kv"),
        *(rf"{layer}mlp\.{x}_proj$" for x in ("gate", "up")),
        "lm_head",
    }
    found = stored(tmp_path / "folder")
    assert found["model.layers.1.self_attn.q_proj.weight_packed"] == ("I32", (32, 4))
    assert found["model.layers.1.self_attn.o_proj.weight_shape"] == ("I64", (2,))
    assert found["model.layers.0.mlp.down_proj.weight"] == ("F8_E4M3", (32, 64))
    assert found["model.layers.0.mlp.down_proj.weight_scale"] == ("U8", (32, 2))
    assert found["model.layers.0.mlp.up_proj.weight"] == ("F32", (64, 32))
    assert "model.layers.0.self_attn.q_proj.weight" not in found
    _, loaded = huggingface.load(tmp_path / "folder")
    assert_same(loaded, params)


def test_shards_hold_what_one_file_does(tmp_path):
    params, quantized = model({QUERY: "nvfp4", DOWN: "int8"})
    compressed_tensors.save(tmp_path / "one", LLAMA, params, quantized)
    compressed_tensors.save(tmp_path / "many", LLAMA, params, quantized, max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert stored(tmp_path / "one") == stored(tmp_path / "many")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(tmp_path / "one"))
    sizes = {"F32": 4, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1}
    assert index["metadata"]["total_size"] == sum(
        sizes[dtype] * int(np.prod(shape)) for dtype, shape in stored(tmp_path / "many").values()
    )


def test_n_m_is_counted_in_the_file(tmp_path):
    params, quantized = model({QUERY: "int4"}, "2:4")
    values = leaf(params, QUERY).reshape(2, 8, 4, -1)
    values[1, 3, :3, 5] = values[1, 3, 0, 5] = np.abs(values[1, ..., 5]).max()
    report = compressed_tensors.save(tmp_path / "folder", LLAMA, params, quantized, {QUERY: "2:4"})
    assert report["violations"] == {QUERY: 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_n_m_is_counted_in_a_file_of_plain_numbers(tmp_path, family, dtype):
    """Also where a tensor of theirs holds several kernels: query, key and value of GPT-2."""
    gpt2 = dict(positions="learned", norm="layernorm", activation="gelu_tanh", use_bias=True)
    config = dataclasses.replace(LLAMA, num_kv_heads=LLAMA.num_heads, param_dtype=dtype)
    if family == "gpt2":
        config = dataclasses.replace(config, tie_head=True, head_dim=None, **gpt2)
    state = nnx.split(config.build(jax.random.key(0), Rules()))[1]
    params = jax.tree.map(lambda x: np.array(x), nnx.to_pure_dict(state))
    key = QUERY.replace("query", "key")
    for name in (QUERY, key, OUT, DOWN):
        kernel = leaf(params, name)
        groups = kernel.reshape(2, -1, 4, param_roles(config)[name].matrix_shape(kernel.shape)[2])
        groups[:, :, 2:] = 0
        if name == key:
            groups[1, 3, :3, 5] = groups[0, 0, :, 0] = 1
    patterns = {QUERY: "2:4", key: "2:4", OUT: "2:4", DOWN: "1:2"}
    report = compressed_tensors.save(tmp_path / "folder", config, params, {}, patterns)
    groups = leaf(params, DOWN).size // 2
    assert report["violations"] == {QUERY: 0, key: 2, OUT: 0, DOWN: groups // 2}
    assert report["bytes"] == (tmp_path / "folder/model.safetensors").stat().st_size
    assert "quantization_config" not in json.loads((tmp_path / "folder/config.json").read_text())
    loaded = huggingface.load(tmp_path / "folder", config)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_values_that_are_not_of_the_format_are_refused(tmp_path):
    params, quantized = model({QUERY: "int4"})
    leaf(params, QUERY)[1, 3] *= 1.01
    with pytest.raises(UserError, match="attention/query/kernel has values that its format"):
        compressed_tensors.save(tmp_path / "folder", LLAMA, params, quantized)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_what_was_written_is_removed(tmp_path, monkeypatch):
    params, quantized = model({QUERY: "int8"})
    save_file = huggingface.save_file

    def flip(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        first = header["model.layers.0.self_attn.q_proj.weight_packed"]["data_offsets"][0]
        data[8 + length + first] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(huggingface, "save_file", flip)
    with pytest.raises(UserError, match="q_proj is read back otherwise than it was written"):
        compressed_tensors.save(tmp_path / "folder", LLAMA, params, quantized)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_known_before_compressing(tmp_path):
    gpt2 = TransformerConfig(
        vocab_size=40,
        max_len=16,
        d_model=32,
        num_layers=2,
        num_heads=2,
        d_ff=64,
        norm="layernorm",
        activation="gelu_tanh",
        use_bias=True,
        positions="learned",
    )
    check = compressed_tensors.check
    with pytest.raises(UserError, match="query/kernel is no linear layer of GPT2LMHeadModel"):
        check(tmp_path / "new", gpt2, {QUERY: ("int8", None)})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is something already"):
        check(tmp_path / "file", LLAMA, {QUERY: ("int8", None)})
    with pytest.raises(UserError, match="no name for hbfp8"):
        check(tmp_path / "new", LLAMA, {QUERY: ("int8", None), OUT: ("hbfp8", "int8")})
    check(tmp_path / "new", LLAMA, {QUERY: ("int8", "int8")})


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    bits=st.integers(2, 8),
    groups=st.sampled_from([None, 4, 8]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_zero_points_are_packed_along_the_outputs(bits, groups, shift, seed):
    """Against the definition, number by number: value = (code - zero point) * scale."""
    rng = np.random.default_rng(seed)
    kernel_IO = (rng.normal(size=(16, 5)) + shift).astype(np.float32)
    kernel_IO[rng.random(kernel_IO.shape) < 0.3] = 0
    kernel_IO[:, 2] = np.abs(kernel_IO[:, 2])  # nothing below 0
    format = Int(bits=bits, block=groups or "channel", symmetric=False)
    values, scales = rtn(kernel_IO, format)
    stored = encode(np.asarray(values).T, scales, format, "pack-quantized")
    size = groups or 16
    words = stored["weight_zero_point"]
    assert (words.dtype, words.shape) == (np.int32, (-(-5 * bits // 32), 16 // size))
    codes_OI = unpack_int32(stored["weight_packed"], bits, 16)
    for o in range(5):
        for i in range(16):
            column = sum(int(word) % 2**32 << 32 * n for n, word in enumerate(words[:, i // size]))
            zero = (column >> bits * o) % 2**bits - 2 ** (bits - 1)
            scale = stored["weight_scale"][o, i // size]
            assert np.float32(codes_OI[o, i] - zero) * scale == np.asarray(values)[i, o]
            assert (codes_OI[o, i] == zero) >= (kernel_IO[i, o] == 0)


def test_activations_in_nvfp4_have_a_tensor_scale_in_the_file(tmp_path):
    params, quantized = model({QUERY: "nvfp4", DOWN: "nvfp4"})
    maxima = np.array([3.5, 0.0])
    quantized = {
        name: dataclasses.replace(weights, activations=NVFP4(), input_scales=input_scales(maxima))
        for name, weights in quantized.items()
    }
    compressed_tensors.save(tmp_path / "folder", LLAMA, params, quantized)
    with safe_open(tmp_path / "folder/model.safetensors", "numpy") as file:
        for layer, expected in enumerate([448 * 6 / 3.5, 2.0**100]):
            for module in ("self_attn.q_proj", "mlp.down_proj"):
                name = f"model.layers.{layer}.{module}.input_global_scale"
                found = file.get_tensor(name)
                assert (found.dtype, found.shape) == (np.float32, (1,))
                assert found == np.float32(expected)
    config = json.loads((tmp_path / "folder/config.json").read_text())["quantization_config"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["dynamic"], inputs["strategy"]) == ("local", "tensor_group")


def test_fp8_without_a_scale_is_stored_with_ones():
    values_OI = np.array([[0.5, -448.0], [2.0**-9, 0]], np.float32)
    tensors = encode(values_OI, Scales(None), FP8(), "naive-quantized")
    np.testing.assert_array_equal(tensors["weight_scale"], np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(decode(tensors, {"num_bits": 8}, "naive-quantized"), values_OI)


def test_layers_that_one_tensor_holds_are_stored_together(tmp_path):
    """Phi-3: q, k and v in one tensor, and gate and up; each has the scales of its own outputs."""
    sizes = dict(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=16)
    config = dataclasses.replace(LLAMA, **sizes, head_dim=8, partial_rotary_factor=0.5)
    names = [f"blocks/attention/{x}/kernel" for x in ("query", "key", "value")]
    names += [f"blocks/feed_forward/{x}/kernel" for x in ("gate", "up")]
    state = nnx.split(config.build(jax.random.key(0), Rules()))[1]
    params = jax.tree.map(lambda x: np.array(x), nnx.to_pure_dict(state))
    quantized, scales = {}, {}
    for name in names:
        matrices, format = as_matrices(param_roles(config)[name], leaf(params, name)), "int8"
        scales[name] = []
        for matrix_IO in matrices:
            matrix_IO[:], found = rtn(matrix_IO, parse_format(format))
            scales[name].append(found)
        quantized[name] = QuantizedWeights(format=parse_format(format), scales=scales[name])
    compressed_tensors.save(tmp_path / "folder", config, params, quantized)  # and reads it back
    document = json.loads((tmp_path / "folder/config.json").read_text())
    assert document["model_type"] == "phi3"
    [group] = document["quantization_config"]["config_groups"].values()
    layer = r"re:^model\.layers\.\d+\."
    assert group["targets"] == [rf"{layer}self_attn\.qkv_proj$", rf"{layer}mlp\.gate_up_proj$"]
    tensors = load_file(tmp_path / "folder/model.safetensors")
    got = tensors["model.layers.1.self_attn.qkv_proj.weight_scale"].reshape(-1)
    want = [scales[name][1].scale.reshape(-1) for name in names[:3]]
    np.testing.assert_array_equal(got, np.concatenate(want))
    del quantized[names[1]]
    with pytest.raises(UserError, match="in one tensor; give them one format") as raised:
        compressed_tensors.save(tmp_path / "other", config, params, quantized)
    assert "\n" not in str(raised.value)
