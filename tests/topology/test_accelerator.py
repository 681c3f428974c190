import dataclasses
import math

import pytest

from topology.accelerator.accelerator import (
    ACCELERATORS,
    EDGE,
    TPU_V4_CORE,
    MatrixArray,
    accelerator,
)
from topology.accelerator.workloads import MODELS, SEQUENCES, Attention, model
from topology.hardware import TPU_V4_CHIP


@pytest.mark.parametrize("row", ACCELERATORS.values(), ids=ACCELERATORS)
def test_every_figure_has_a_source(row):
    assert set(row.sources) == {f.name for f in dataclasses.fields(row)} - {"name", "sources"}


@pytest.mark.parametrize(
    ("name", "elements", "buffer", "on", "off"),
    [
        ("edge", 1024, 524_288, 1e12, 50e9),
        ("cloud", 65_536, 33_554_432, 8e12, 400e9),
        ("independent-edge", 1024, 524_288, math.inf, 53_687_091_200),
        ("independent-cloud", 65_536, 33_554_432, math.inf, 429_496_729_600),
    ],
)
def test_published_platforms(name, elements, buffer, on, off):
    found = accelerator(name)
    assert found.array.elements == elements
    assert (found.buffer, found.on_chip_bandwidth, found.off_chip_bandwidth) == (buffer, on, off)
    assert found.frequency == 940e6


def test_both_tensor_cores_make_a_tpu_v4():
    peak = 2 * 2 * TPU_V4_CORE.array.elements * TPU_V4_CORE.frequency
    assert peak == pytest.approx(TPU_V4_CHIP.peak_bf16, rel=2e-3)
    assert 2 * TPU_V4_CORE.off_chip_bandwidth == TPU_V4_CHIP.hbm_bandwidth


def test_shapes_of_an_array():
    assert MatrixArray(rows=8, columns=4).shapes == [(8, 4)]
    found = MatrixArray(rows=8, columns=4, reshapes=True).shapes
    assert found[0] == (8, 4)
    assert sorted(found) == [(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)]


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"platform 'edg': one of edge, cloud, .*tpu-v4"):
        accelerator("edg")
    with pytest.raises(ValueError, match="model 'GPT': one of BERT, TrXL, FlauBERT, T5, XLM"):
        model("GPT")
    assert model("xlm") is MODELS["XLM"]
    assert EDGE.replace(buffer=1).buffer == 1


def test_parameters_of_published_models():
    # BERT base has 85 million parameters in 12 layers of kernels.
    bert = sum(each.count * each.k * each.n for each in MODELS["BERT"].matmuls(512))
    assert 12 * bert == 84_934_656
    assert {m.d_model for m in MODELS.values()} == {512, 768, 1024, 2048}
    assert all(m.heads * m.head_dim == m.d_model for m in MODELS.values())
    assert SEQUENCES[0] == 512
    assert SEQUENCES[-1] == 65_536


def test_attention_counts():
    work = Attention(batch=2, heads=6, kv_heads=3, rows=5, columns=7, head_dim=4)
    assert work.logits == 2 * 6 * 5 * 7
    assert work.macs == 2 * work.logits * 4
    assert work.compulsory_bytes == 2 * (2 * 2 * 6 * 5 * 4 + 2 * 2 * 3 * 7 * 4)
    assert (work.num_heads, work.head_rows) == (6, 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 4}, "4 heads of keys and values do not divide 6 heads"),
        ({"rows": 0}, "rows 0: a whole number, 1 .. "),
        ({"kv_heads": 0}, "kv_heads 0"),
    ],
)
def test_wrong_attention(changes, message):
    with pytest.raises(ValueError, match=message):
        Attention(**{"batch": 2, "heads": 6, "rows": 5, "head_dim": 4} | changes)
