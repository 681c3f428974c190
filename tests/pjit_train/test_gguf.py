"""GGUF files: every type of tensor decoded, and a whole file as a Hugging Face folder."""

import json
import struct

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from helpers import gguf_files
from helpers.gguf_files import HEADS, KV_HEADS, TOKENS, D, llama_tensors
from huggingface_folders import stored

from launch.cli import main
from pjit_train.errors import UserError
from pjit_train.files import check_sums
from pjit_train.huggingface import weights
from pjit_train.huggingface.gguf_file import GGUF, TYPES
from pjit_train.huggingface.gguf_import import import_gguf
from pjit_train.huggingface.sources import folder_of

QUANTIZED_BY_GGUF = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_AND_IQ = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def test_all_types_are_tried():
    assert {*QUANTIZED_BY_GGUF, *K_AND_IQ} == {name for name, _, _ in TYPES.values()}


def one_tensor(path, kind, data, rows):
    writer = GGUFWriter(path, "llama")
    number = GGMLQuantizationType[kind]
    if kind == "F32" or kind == "F16":
        writer.add_tensor("x", data)
    else:
        writer.add_tensor("x", data.reshape(rows, -1), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF(path)


@pytest.mark.parametrize("kind", QUANTIZED_BY_GGUF)
def test_a_tensor_that_gguf_quantizes(kind, tmp_path):
    array = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    number = GGMLQuantizationType[kind]
    data = quantize(array, number)
    found = one_tensor(tmp_path / "x.gguf", kind, data, 5).read("x", np.float32)
    assert np.array_equal(found, dequantize(data, number))
    step = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}.get(kind, 1 / 7)
    assert np.abs(found - array).max() <= step * np.abs(array).max()


def signed(byte):
    return byte - 256 if byte > 127 else byte


def half(block, at):
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def six_bits(scales):
    """The 8 scales and 8 minima of 6 bits in the 12 bytes of Q4_K and Q5_K."""
    found = []
    for j in range(8):
        if j < 4:
            found.append((scales[j] & 63, scales[j + 4] & 63))
        else:
            low, top = scales[j + 4], (scales[j - 4] >> 6, scales[j] >> 6)
            found.append(((low & 15) | top[0] << 4, (low >> 4) | top[1] << 4))
    return found


def q2_k(b):
    """16 groups of 16: scale and minimum of 4 bits; 2 bits a weight, 4 rows of 32 in 32 bytes."""
    for i in range(256):
        part, row, column = i // 128, i % 128 // 32, i % 32
        q = b[16 + part * 32 + column] >> 2 * row & 3
        scale = b[i // 16]
        yield half(b, 80) * (scale & 15) * q - half(b, 82) * (scale >> 4)


def q3_k(b):
    """16 signed scales of 6 bits; 2 bits a weight, and a third of which 0 takes 4 away."""
    scales = b[96:108]
    for i in range(256):
        part, row, column, group = i // 128, i % 128 // 32, i % 32, i // 16
        q = b[32 + part * 32 + column] >> 2 * row & 3
        q -= 0 if b[column] >> (i // 32) & 1 else 4
        low = scales[group % 8] >> 4 * (group // 8) & 15
        high = scales[8 + group % 4] >> 2 * (group // 4) & 3
        yield half(b, 108) * ((low | high << 4) - 32) * q


def q4_k(b):
    groups = six_bits(b[4:16])
    for i in range(256):
        scale, least = groups[i // 32]
        q = b[16 + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
        yield half(b, 0) * scale * q - half(b, 2) * least


def q5_k(b):
    groups = six_bits(b[4:16])
    for i in range(256):
        scale, least = groups[i // 32]
        q = b[48 + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
        q += 16 * (b[16 + i % 32] >> (i // 32) & 1)
        yield half(b, 0) * scale * q - half(b, 2) * least


def q6_k(b):
    for i in range(256):
        part, row, column = i // 128, i % 128 // 32, i % 32
        low = b[part * 64 + row % 2 * 32 + column] >> 4 * (row // 2) & 15
        high = b[128 + part * 32 + column] >> 2 * row & 3
        yield half(b, 208) * signed(b[192 + i // 16]) * ((low | high << 4) - 32)


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(b):
    for i in range(32):
        yield half(b, 0) * LEVELS[b[2 + i % 16] >> 4 * (i // 16) & 15]


def iq4_xs(b):
    high = b[2] | b[3] << 8
    for i in range(256):
        group, place = divmod(i, 32)
        scale = (b[4 + group // 2] >> 4 * (group % 2) & 15) | (high >> 2 * group & 3) << 4
        yield (
            half(b, 0)
            * (scale - 32)
            * LEVELS[b[8 + group * 16 + place % 16] >> 4 * (place // 16) & 15]
        )


@pytest.mark.parametrize("kind", K_AND_IQ)
def test_blocks_made_by_hand(kind, tmp_path):
    """Bits at random, weight by weight by the definition of the block in ggml-common.h."""
    _, elements, size = next(row for row in TYPES.values() if row[0] == kind)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2))
    halves = (0,) if kind.startswith("IQ") else halves
    draw = np.random.default_rng(2)
    blocks = [bytearray(draw.integers(256, size=size, dtype=np.uint8).tobytes()) for _ in range(6)]
    for block in blocks:
        for at in halves:
            struct.pack_into("<e", block, at, draw.normal() / 8)
    data = np.frombuffer(b"".join(blocks), np.uint8)
    file = one_tensor(tmp_path / "x.gguf", kind, data, 3)
    expected = [x for block in blocks for x in globals()[kind.lower()](bytes(block))]
    assert file.tensors["x"].shape == (3, 2 * elements)
    found = file.read("x", np.float32)
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small Llama in float32, its tensors, and what was imported of it."""
    folder = tmp_path_factory.mktemp("gguf")
    tensors = llama_tensors()
    gguf_files.write(folder / "tiny.gguf", tensors)
    done = import_gguf(folder / "tiny.gguf", folder / "out")
    return folder / "tiny.gguf", tensors, folder / "out", done


def test_the_tensors_are_those_of_hugging_face(tiny):
    _, tensors, out, done = tiny
    found = stored(out)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert np.array_equal(found[name], array), name
    assert done.types == {"F32": len(tensors)}
    assert done.bytes == sum(a.nbytes for a in tensors.values())
    check_sums(out)


def test_the_configuration_and_the_model(tiny):
    _, tensors, out, _ = tiny
    config, params = weights.load(out)
    assert (config.d_model, config.num_heads, config.num_kv_heads) == (D, HEADS, KV_HEADS)
    assert (config.norm_epsilon, config.rope_theta, config.max_len) == (1e-5, 1e4, 128)
    assert config.tie_head
    assert np.array_equal(params["embedding"], tensors["model.embed_tokens.weight"])
    document = json.loads((out / "config.json").read_text())
    assert (document["bos_token_id"], document["eos_token_id"]) == (1, 2)
    assert document["dtype"] == "float32"


def test_the_tokenizer(tiny):
    from tokenizers import Tokenizer

    _, _, out, done = tiny
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert done.tokens == tokenizer.get_vocab_size() == len(TOKENS)
    encoding = tokenizer.encode("<|im_start|>the in the 123<think>é")
    assert encoding.tokens == [
        *("<|im_start|>", "the", "Ġ", "in", "Ġthe", "Ġ", "1", "2", "3", "<think>"),
        *("Ã", "©"),  # é is C3 A9; "12" would be a token, were digits not split first
    ]
    assert encoding.ids == [TOKENS.index(token) for token in encoding.tokens]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == (
        "<|im_start|>the in the 123<think>é"
    )
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()
    assert config["chat_template"] == gguf_files.TEMPLATE
    assert config["add_bos_token"] is False
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]  # the end of a turn, and of a text


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_each_value_is_exact_by_default(kind, tmp_path):
    tensors = llama_tensors(1, tied=False)
    path = gguf_files.write(tmp_path / "x.gguf", tensors, kind=kind)
    import_gguf(path, tmp_path / "out", max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = stored(tmp_path / "out")
    assert found.keys() == tensors.keys()
    number = GGMLQuantizationType[kind]
    for name, array in tensors.items():
        exact = dequantize(quantize(array, number), number) if array.ndim > 1 else array
        assert np.array_equal(found[name].astype(np.float32), exact), name
    width = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert found["lm_head.weight"].dtype.name == width
    config, params = weights.load(tmp_path / "out")
    assert not config.tie_head
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_texts_end_at_the_token_of_the_file(tmp_path):
    def add(writer):
        gguf_files.add_tokenizer(writer)
        for key in ("eos", "bos"):  # of no token that is known to end texts, and the first of all
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}_token_id")
        writer.add_eos_token_id(0)
        writer.kv_data[0].pop("tokenizer.ggml.token_type")

    path = gguf_files.write(tmp_path / "x.gguf", llama_tensors(), tokenizer=add)
    import_gguf(path, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": 0}


def test_a_dtype_says_what_it_rounds(tmp_path):
    tensors = llama_tensors(2)
    path = gguf_files.write(tmp_path / "x.gguf", tensors)
    done = import_gguf(path, tmp_path / "out", dtype="float16")
    off = [np.abs(a - a.astype(np.float16).astype(np.float32)) for a in tensors.values()]
    assert done.rounding.values == sum(a.size for a in tensors.values())
    assert done.rounding.rounded == sum(np.count_nonzero(x) for x in off)
    assert done.rounding.largest == max(x.max() for x in off)
    with pytest.raises(UserError, match="dtype='int8' is unknown; use float32, float16, bfloat16"):
        import_gguf(path, tmp_path / "other", dtype="int8")


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
    tensors = llama_tensors(3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    path = gguf_files.write(tmp_path / "x.gguf", tensors)
    import_gguf(path, tmp_path / "out")
    assert weights.load(tmp_path / "out")[0].tie_head


@pytest.mark.parametrize(
    "scaling", [(8.0, 1.0, 4.0, 8192), (4.0, 1.0, 3.0, 512), (32.0, 1.0, 1.5, 60)]
)
def test_llama_3_scaling_is_found_from_its_factors(scaling, tmp_path):
    factor, low, high, length = scaling
    frequencies = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    factors = []
    for frequency in frequencies:  # as the paper's code, over wavelengths
        wavelength = 2 * np.pi / frequency
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    add = lambda writer: writer.add_tensor("rope_freqs.weight", np.float32(factors))
    path = gguf_files.write(tmp_path / "x.gguf", llama_tensors(), extra=add)
    import_gguf(path, tmp_path / "out")
    config, _ = weights.load(tmp_path / "out")
    assert config.rope_scaling[0] == factor
    _, low, high, length = config.rope_scaling  # perhaps others, of the same effect
    smooth = np.clip((length / (2 * np.pi / frequencies) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(1 / (smooth + (1 - smooth) / factor), factors, rtol=1e-4)


def test_a_folder_is_its_own_and_a_file_is_imported_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "cache"))
    path, tensors, out, _ = tiny
    assert folder_of(out) == out
    assert folder_of(str(tmp_path / "nowhere")) == tmp_path / "nowhere"
    found = folder_of(path)
    assert stored(found).keys() == tensors.keys()
    before = (found / "config.json").stat()
    again = tmp_path / "other-name.gguf"
    again.write_bytes(path.read_bytes())
    assert folder_of(again) == found
    assert (found / "config.json").stat() == before
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {found.name, f"{found.name}.lock"}
    with pytest.raises(UserError, match="cannot be read"):
        folder_of(tmp_path / "missing.gguf")


def test_commands_take_the_file_where_they_take_a_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORSION_CACHE", str(tmp_path / "cache"))
    path, _, out, _ = tiny
    (tmp_path / "text.txt").write_text("the in the 12 " * 20)
    said = []
    for model in (out, path):
        argv = ["eval", str(model), "--perplexity", str(tmp_path / "text.txt"), "--sequence", "32"]
        assert main([*argv, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert said[0]["predicted"] == 31 * said[0]["windows"] > 0
