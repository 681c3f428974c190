"""Records of published runs, read: what they say, what is assumed, what is refused."""

import pytest

from pjit_train.compiler.records import NotModelled, options_of, read

RECORD = {
    "source": "maxtext",
    "chip": "v5p",
    "chips": 128,
    "slices": 2,
    "slice_topology": "4x4x4",
    "arch": {"L": 2, "D": 256, "H": 4, "K": 64, "F": 1024, "V": 512, "act": "relu", "tied": True},
    "seq": 128,
    "batch_per_chip": 2,
    "mesh": {"dcn_data": 2, "ici_fsdp": 16, "ici_tensor": 4},
    "remat": "minimal",
    "attention": "flash (pallas)",
    "step_s_derived": 1.5,
}


def test_a_record_that_says_all_is_assumed_nothing():
    found = read(RECORD)
    assert (found.pod, found.shape, found.slices, found.seconds) == ("v5p", "4x4x4", 2, 1.5)
    assert found.step.mesh == {"data": 1, "fsdp": 16, "tensor": 4}
    assert found.step.rows == 128  # of one slice: 64 chips of two rows each
    assert (found.step.saved, found.step.flash, found.step.J) == (("dots",), True, 4)
    assert found.assumed == ()
    # 2 layers of 4 D H K + 2 D F, and the table.
    assert found.step.parameters == 2 * (4 * 256 * 256 + 2 * 256 * 1024) + 512 * 256


@pytest.mark.parametrize(
    ("change", "saved"),
    [
        ("full (save nothing, scan over layers)", ()),
        ("SAVE_NOTHING", ()),
        ("none", None),
        ("save_dot_except_mlpwi", ("query", "key", "value", "out_proj", "mlpwo")),
        ("SAVE_CONTEXT_AND_OUT_PROJ", ("context", "out_proj")),
        ("SAVE_DOT_ONLY", ("all_dots",)),
        ("save_qkv_proj", ("key", "query", "value")),
    ],
)
def test_remat_is_read_from_the_words_of_trainers(change, saved):
    found = read(RECORD | {"remat": change})
    assert found.step.saved == saved
    assert found.assumed == ()


def test_what_a_record_leaves_open_is_said():
    few = {k: v for k, v in RECORD.items() if k not in ("slice_topology", "mesh", "remat")}
    few.pop("attention")
    found = read(few)
    assert found.shape == "4x4x4"
    assert found.step.mesh["fsdp"] == 64
    assert [text.split()[0] for text in found.assumed] == ["slice", "mesh", "remat", "attention"]


def test_rules_of_meshes_take_the_first_of_alternatives_and_fill_up():
    found = read(RECORD | {"mesh": {"rule": "data=-1,fsdp=8..64"}})
    assert found.step.mesh == {"data": 8, "fsdp": 8, "tensor": 1}
    assert any("fsdp=8" in text for text in found.assumed)
    pax = read(RECORD | {"mesh": {"replica_data_model": [1, 16, 4]}})
    assert pax.step.mesh == {"data": 1, "fsdp": 16, "tensor": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chip": "h100"}, "chip"),
        ({"chips": None}, "chips"),
        ({"chips": 127}, "slices"),
        ({"slice_topology": "8x8x8"}, "slice_topology"),
        ({"arch": None}, "arch"),
        ({"arch": RECORD["arch"] | {"experts": 8}}, "experts"),
        ({"arch": RECORD["arch"] | {"D": "wide"}}, "D"),
        ({"arch": RECORD["arch"] | {"kv": 3}}, "kv"),
        ({"arch": RECORD["arch"] | {"act": "maxout"}}, "act"),
        ({"seq": 0}, "seq"),
        ({"batch_per_chip": 0.01}, "batch_per_chip"),
        ({"batch_per_chip": float("nan")}, "batch_per_chip"),
        ({"mesh": {"ici_fsdp": 3}}, "mesh"),
        ({"mesh": {"ici_expert": 4, "ici_fsdp": 16}}, "ici_expert"),
        ({"mesh": "fsdp"}, "mesh"),
        ({"remat": "whatever"}, "remat"),
        ({"remat": "minimal_offloaded"}, "remat"),
        ({"dtype": "int8 (AQT)"}, "int8"),
    ],
)
def test_what_cannot_be_modelled_is_refused_in_a_line(change, says):
    with pytest.raises(NotModelled, match=says) as caught:
        read(RECORD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [None, 3, "x", [], {}, {"chip": 4}])
def test_what_is_no_record_is_refused(record):
    with pytest.raises(NotModelled):
        read(record)


def test_flags_of_scripts():
    flags = "--xla_enable_async_all_gather=true TPU_MEGACORE=MEGACORE_DENSE --xla_x=2 --y=1"
    assert options_of(flags) == {"xla_enable_async_all_gather": True, "xla_x": "2"}
