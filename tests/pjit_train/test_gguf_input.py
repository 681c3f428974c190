"""GGUF files that are damaged, lie or are not supported: each ends in one line, with no folder."""

import resource
import struct

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFWriter
from helpers import gguf_files
from helpers.gguf_files import TOKENS, add_llama_keys, add_tokenizer, llama_tensors

from launch.cli import main
from pjit_train.errors import UserError
from pjit_train.huggingface.gguf_file import GGUF
from pjit_train.huggingface.gguf_import import import_gguf
from pjit_train.huggingface.gguf_models import read_model
from pjit_train.huggingface.gguf_tokenizer import GGUFTokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return gguf_files.write(
        path, llama_tensors(layers=1), keys=lambda w: add_llama_keys(w, layers=1)
    )


def refused(path, says, folder):
    """The line in which an import ends; nothing is left, and little memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=says) as error:
        import_gguf(path, folder / "out")
    assert str(error.value).startswith(str(path))
    assert not [p for p in folder.iterdir() if "out" in p.name]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_file_cut_short_anywhere(tiny, tmp_path):
    data = tiny.read_bytes()
    end = GGUF(tiny).tensors["output_norm.weight"].start
    last = max(s.start + s.size for s in GGUF(tiny).tensors.values())
    assert end < last
    cuts = {*range(0, 40), *np.linspace(40, last - 1, 150, dtype=int).tolist(), last - 1}
    for cut in sorted(cuts):
        path = tmp_path / "cut.gguf"
        path.write_bytes(data[:cut])
        refused(path, "cut short|begins with|magic", tmp_path)


def u32(x):
    return struct.pack("<I", x)


def u64(x):
    return struct.pack("<Q", x)


def text(x):
    return u64(len(x)) + x.encode()


def header(tensors, keys, *, version=3, count=None, key_count=None):
    """A header by hand: keys as (name, bytes of type and value), tensors as bytes."""
    count = len(tensors) if count is None else count
    key_count = len(keys) if key_count is None else key_count
    body = b"GGUF" + u32(version) + u64(count) + u64(key_count)
    body += b"".join(text(name) + value for name, value in keys) + b"".join(tensors)
    return body + bytes(256)


def info(name="x", shape=(4,), kind=0, offset=0, axes=None):
    """A tensor's row in the header; the shape as the file has it, the fastest axis first."""
    axes = len(shape) if axes is None else axes
    return text(name) + u32(axes) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


ARCHITECTURE = ("general.architecture", u32(8) + text("llama"))
HEADERS = {
    "version 1": (header([], [], version=1), "version 1; 2 and 3 are read"),
    "version 99": (header([], [], version=99), "version 99"),
    "big-endian": (header([], [], version=3 << 24), "big-endian"),
    "2^60 tensors": (header([], [], count=2**60), r"1,152,921,504,606,846,976 tensors"),
    "2^63 keys": (header([], [], key_count=2**63), "keys"),
    "a text of 2^63": (header([], [("a", u32(8) + u64(2**63))]), "9,223,372,036,854,775,808 bytes"),
    "a key of 2^62": (header([], [], key_count=1)[:24] + u64(2**62) + bytes(99), "a key of"),
    "2^60 numbers": (header([], [("a", u32(9) + u32(5) + u64(2**60))]), "the value of 'a'"),
    "2^60 texts": (header([], [("a", u32(9) + u32(8) + u64(2**60))]), "the value of 'a'"),
    "lists of lists": (header([], [("a", u32(9) + u32(9) + u64(1))]), "unknown type 9"),
    "an unknown type of value": (header([], [("a", u32(13) + bytes(8))]), "unknown type 13"),
    "a key twice": (header([], [("a", u32(4) + u32(1))] * 2), "'a' stands in it twice"),
    "a key that is no text": (
        header([], [], key_count=1)[:24] + u64(2) + b"\xff\xfe" + bytes(20),
        "no UTF-8",
    ),
    "100 dimensions": (header([info(axes=100)], [ARCHITECTURE]), "has 100 dimensions"),
    "no dimension": (header([info(shape=())], [ARCHITECTURE]), "has 0 dimensions"),
    "no element": (header([info(shape=(0,))], [ARCHITECTURE]), "without an element"),
    "2^60 elements": (header([info(shape=(2**60,))], [ARCHITECTURE]), "cut short"),
    "2^252 elements": (header([info(shape=(2**63,) * 4)], [ARCHITECTURE]), "cut short"),
    "a tensor twice": (header([info()] * 2, [ARCHITECTURE]), "'x' stands in it twice"),
    "an unknown type": (header([info(kind=77)], [ARCHITECTURE]), "77, which is unknown; F32, F16"),
    "a type not decoded": (header([info(kind=16)], [ARCHITECTURE]), "IQ2_XXS; F32, F16"),
    "a part of a block": (header([info(shape=(31,), kind=8)], [ARCHITECTURE]), "multiple of 32"),
    "an offset of its own": (header([info(offset=64)], [ARCHITECTURE]), "begins at 64"),
    "an offset of 2^63": (header([info(offset=2**63)], [ARCHITECTURE]), "begins at 9,223"),
    "one over another": (
        header([info(shape=(32,)), info("y", (32,), offset=64)], [ARCHITECTURE]),
        "begins at 64 of the data, and the tensors before it end at 128",
    ),
    "an alignment of 3": (header([], [("general.alignment", u32(4) + u32(3))]), "no power of two"),
    "an alignment of 0": (header([], [("general.alignment", u32(4) + u32(0))]), "no power of two"),
    "a part of a model": (header([], [("split.count", u32(2) + b"\x03\0")]), "one of 3 parts"),
    "no architecture": (header([info()], []), "general.architecture=None is not supported"),
    "an unknown architecture": (
        header([info()], [("general.architecture", u32(8) + text("mamba"))]),
        "general.architecture='mamba' is not supported; llama",
    ),
    "an adapter": (
        header([info()], [("general.type", u32(8) + text("adapter")), ARCHITECTURE]),
        "general.type='adapter' is no model",
    ),
    "no keys": (header([info()], [ARCHITECTURE]), "llama.embedding_length is missing"),
    "a pickle": (b"\x80\x02}q\x00.", "pickle, which is never loaded"),
    "a pickle of protocol 4": (b"\x80\x04\x95" + bytes(60), "pickle, which is never loaded"),
    "a zipped pickle": (b"PK\x03\x04" + bytes(60), "pickle, which is never loaded"),
    "nothing": (b"", "begins with b''"),
    "another file": (b"{}", "begins with b'{}'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(name, tmp_path):
    data, says = HEADERS[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    refused(path, says, tmp_path)


def but(key, value):
    """The keys of a Llama, one with another value; None leaves it out."""

    def add(writer):
        add_llama_keys(writer)
        part = writer.kv_data[0]
        if value is None:
            del part[f"llama.{key}"]
        elif isinstance(value, str):
            part.pop(f"llama.{key}", None)
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, float):
            part.pop(f"llama.{key}", None)
            writer.add_float32(f"llama.{key}", value)
        elif isinstance(value, list):
            part.pop(f"llama.{key}", None)
            writer.add_array(f"llama.{key}", value)
        else:
            part.pop(f"llama.{key}", None)
            writer.add_uint64(f"llama.{key}", value)

    return add


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("block_count", None, "llama.block_count is missing"),
        ("block_count", 10**9, "block_count=1000000000 and there are 20 tensors"),
        ("block_count", 3, "tensors blk.2.attn_k.weight, .* are missing"),
        ("block_count", 1, "tensors blk.1.attn_k.weight, .* are not of this model"),
        ("block_count", 2.0, "llama.block_count=2.0 is not supported; a size of a model is"),
        ("block_count", "two", "llama.block_count='two' is not supported; a size of a model is"),
        ("embedding_length", 65, "token_embd.weight is .* the keys make it|rope.dimension_count"),
        ("embedding_length", 2**60, "embedding_length=1152921504606846976 is not supported"),
        ("feed_forward_length", [96, 64], r"feed_forward_length=array\(.* is not supported"),
        ("attention.head_count", 0, "attention.head_count=0 is not supported; a size"),
        ("attention.head_count_kv", 3, "num_key_value_heads|num_kv_heads|the keys make it"),
        ("attention.key_length", 24, "rope.dimension_count=16 is not supported; only 24"),
        (
            "attention.layer_norm_rms_epsilon",
            float("nan"),
            "epsilon=nan is not supported; a positive",
        ),
        ("rope.dimension_count", 8, "rope.dimension_count=8 is not supported; only 16"),
        ("rope.scaling.type", "yarn", "rope_type='yarn' is not supported"),
        ("expert_count", 8, "llama.expert_count=8 is not supported"),
        ("attention.sliding_window", 16, "llama.attention.sliding_window=16 is not supported"),
        ("something.new", 1.5, "llama.something.new=1.5 is not supported"),
    ],
)
def test_keys_that_are_not_of_the_tensors_or_not_done(key, value, says, tmp_path):
    path = gguf_files.write(tmp_path / "x.gguf", llama_tensors(), keys=but(key, value))
    refused(path, says, tmp_path)


def tokens_but(**changes):
    def add(writer):
        add_tokenizer(writer)
        for key, value in changes.items():
            full = f"tokenizer.ggml.{key}"
            writer.kv_data[0].pop(full, None)
            if isinstance(value, list):
                writer.add_array(full, value)
            elif isinstance(value, str):
                writer.add_string(full, value)
            elif value is not None:
                writer.add_uint32(full, value)

    return add


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"tokens": [*TOKENS, "more"], "token_type": None},
            "has 267 tokens, and the embedding 266",
        ),
        ({"tokens": TOKENS[:-1], "token_type": None}, "has 265 tokens, and the embedding 266"),
        ({"tokens": [*TOKENS[:-1], TOKENS[7]]}, "twice"),
        ({"token_type": [1, 2, 3]}, "token_type=3 numbers for 266 tokens"),
        ({"model": "t5"}, "model='t5' is not supported; gpt2 and llama are"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": "falcon"}, "pre='falcon' is not supported; gpt-2, "),
        ({"merges": ["th"]}, "'th' is no pair of tokens"),
        ({"merges": ["q zz"]}, "makes no tokenizer"),
        ({"eos_token_id": 266}, "eos_token_id=266 is no id of its 266 tokens"),
        ({"bos_token_id": "one"}, "bos_token_id='one' is not a whole number"),
    ],
)
def test_a_tokenizer_that_is_none_or_does_not_fit(changes, says, tmp_path):
    path = gguf_files.write(tmp_path / "x.gguf", llama_tensors(), tokenizer=tokens_but(**changes))
    refused(path, says, tmp_path)


@pytest.mark.parametrize(("kind", "bad"), [("F32", np.nan), ("F16", np.inf), ("Q8_0", np.nan)])
def test_weights_that_are_not_finite(kind, bad, tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 40] = bad
    with np.errstate(invalid="ignore"):
        path = gguf_files.write(tmp_path / "x.gguf", tensors, kind=kind)
    at = 32 if kind == "Q8_0" else 40  # a block of 32 shares a scale
    refused(path, rf"blk.1.ffn_up.weight holds (nan|inf) at \[3, {at}\]", tmp_path)


def test_weights_that_a_dtype_cannot_hold(tmp_path):
    tensors = llama_tensors()
    tensors["model.norm.weight"][5] = 1e5
    path = gguf_files.write(tmp_path / "x.gguf", tensors)
    with pytest.raises(UserError, match=r"output_norm.weight holds inf at \[5\] as float16"):
        import_gguf(path, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_other_byte_order(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama", endianess=GGUFEndian.BIG)
    add_llama_keys(writer)
    writer.add_tensor("x", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", "big-endian GGUF file; only little-endian", tmp_path)


def test_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02pickle")
    for argv, says in (
        ([str(tiny), "full"], "full: there is something already"),
        ([str(tiny), "no/out"], "no/out: the folder no is missing; make it first"),
        ([str(tiny), "full/file/out"], "full/file/out: the folder full/file is missing"),
        ([str(tiny), "out", "--dtype", "int4"], "dtype='int4' is unknown; use float32"),
        (["full", "out"], "full: is a folder; give a .gguf file, or hf:OWNER/NAME"),
        (["missing.gguf", "out"], "missing.gguf: cannot be read (No such file"),
        (["model.bin", "out"], "model.bin: is a PyTorch pickle, which is never loaded"),
        (["/dev/null", "out"], "/dev/null: is no file"),
    ):
        assert main(["import", *argv]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"torsion: {says}")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "model.bin"}
    assert (tmp_path / "full/file").read_text() == "mine"
    assert main(["import", str(tiny), "out"]) == 0
    assert "every value exact; 266 tokens" in capsys.readouterr().out


def test_damage_at_random(tiny, tmp_path):
    """A file with some bytes changed is imported, or refused in a line that names it."""
    data = tiny.read_bytes()
    header_end = min(stored.start for stored in GGUF(tiny).tensors.values())
    draw = np.random.default_rng(7)
    path, whole, lines = tmp_path / "x.gguf", 0, []
    for i in range(300):
        damaged = bytearray(data)
        end = header_end if i % 4 else len(data)
        for _ in range(int(draw.integers(1, 4))):
            damaged[int(draw.integers(end))] = int(draw.integers(256))
        path.write_bytes(damaged)
        try:
            file = GGUF(path)
            _, sources = read_model(file)
            GGUFTokenizer(file).write(tmp_path, 128)
            for source in sources.values():
                source.arrange(file.read(source.name, np.float32))
            whole += 1
        except UserError as error:
            lines.append(str(error))
    assert 0 < len(lines) == 300 - whole < 300
    assert all(line.startswith(str(path)) and len(line) < 1000 for line in lines)
