import numpy as np
import pytest

from topology.accelerator.accelerator import CLOUD, EDGE, TPU_V4_CORE
from topology.accelerator.dataflow import (
    DATAFLOWS,
    attention_cost,
    best_tile,
    layer_cost,
    least_full_buffer,
    lower_bound,
)
from topology.accelerator.workloads import MODELS, SEQUENCES

MiB = 2**20


@pytest.mark.parametrize("sequence", [512, 8192])
@pytest.mark.parametrize("softmax", ["free", "in-turn"])
def test_a_layer_is_its_attention_and_its_matmuls(sequence, softmax):
    model = MODELS["T5"]
    for dataflow in DATAFLOWS:
        layer = layer_cost(CLOUD, model, sequence, dataflow, softmax=softmax)
        attention = attention_cost(CLOUD, model.attention(sequence), dataflow, softmax=softmax)
        tokens, d, ff = 64 * sequence, 512, 2048
        macs = tokens * (4 * d * d + 2 * d * ff) + 2 * 64 * 8 * sequence**2 * 64
        assert layer.macs == macs
        assert layer.seconds > attention.seconds
        assert layer.utilisation == pytest.approx(macs / 65_536 / 940e6 / layer.seconds)


def test_dataflows_in_their_order_where_memory_is_slow():
    for name, model in MODELS.items():
        for sequence in (512, 4096):
            work = model.attention(sequence)
            seconds = [attention_cost(CLOUD, work, x).seconds for x in DATAFLOWS]
            assert seconds[0] >= seconds[1] > 2 * seconds[2], name
            assert seconds[2] >= lower_bound(CLOUD, work).seconds


def test_lower_bound_is_compute_or_compulsory_traffic():
    work = MODELS["BERT"].attention(512)
    bound = lower_bound(EDGE, work)
    assert bound.seconds == pytest.approx(2 * 64 * 12 * 512 * 512 * 64 / 1024 / 940e6)
    slow = lower_bound(EDGE.replace(off_chip_bandwidth=1e9), work)
    assert slow.seconds == pytest.approx(4 * 64 * 12 * 512 * 64 * 2 / 1e9)
    assert slow.energy == bound.energy


def test_flat_needs_a_smaller_buffer_than_flex_for_full_utilisation():
    work = MODELS["BERT"].attention(4096)
    least = {
        dataflow: least_full_buffer(
            lambda size, x=dataflow: attention_cost(CLOUD.replace(buffer=size), work, x)
        )
        for dataflow in ("flex", "flat")
    }
    # Nearly all logits of the batch against a few rows, K and V of one head.
    assert least["flex"] == pytest.approx(work.logits * 2, rel=0.3)
    assert 4096 * 64 * 2 < least["flat"] < 8 * MiB
    for dataflow, size in least.items():
        below = attention_cost(CLOUD.replace(buffer=int(size / 2**0.25)), work, dataflow)
        assert (
            below.utilisation
            < 0.95 * attention_cost(CLOUD.replace(buffer=2**50), work, dataflow).utilisation
            <= attention_cost(CLOUD.replace(buffer=size), work, dataflow).utilisation
        )


@pytest.mark.parametrize("rows", SEQUENCES[:5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_best_tile_is_that_of_brute_force(rows, head_dim):
    """Of the tiles whose footprint fits VMEM the fastest, by a plain loop."""
    cycles = {}
    for r in [2**i for i in range(3, 14) if 2**i <= rows]:
        live = 2 * (2 * r * head_dim + 2 * rows * head_dim) * 2 + r * rows * 4
        if live > 16 * MiB:
            continue

        # Weights of 128 x 128 stay and r rows stream, or r rows stay and keys stream, or outputs.
        def blocks(x):
            return int(np.ceil(x / 128))

        logit = min(
            blocks(head_dim) * blocks(rows) * max(r, 128),
            blocks(head_dim) * blocks(r) * rows,
            blocks(r) * blocks(rows) * max(head_dim, 128),
        )
        attend = min(
            blocks(rows) * blocks(head_dim) * max(r, 128),
            blocks(rows) * blocks(r) * max(head_dim, 128),
            blocks(r) * blocks(head_dim) * rows,
        )
        heads, tiles = 8 * 12, rows // r
        array = heads * tiles * (logit + attend) / 4
        vector = heads * rows * rows * 4 / 1024
        traffic = heads * 4 * rows * head_dim * 2
        cycles[r] = max(max(array, vector) / 1.05e9, traffic / 600e9) + 0.35e-6 * heads * tiles
    tile = best_tile(TPU_V4_CORE, batch=8, heads=12, rows=rows, head_dim=head_dim)
    if tile.heads == 1:
        assert tile.seconds == pytest.approx(min(cycles.values()), rel=1e-3)
        assert tile.seconds == pytest.approx(cycles[tile.rows], rel=1e-3)
    else:  # several heads at once save steps of the grid
        assert tile.rows == rows
        assert tile.seconds < min(cycles.values())
    assert tile.live_buffer <= 16 * MiB


def test_live_buffer_of_a_tile_is_what_the_compiler_allots():
    # libtpu, compiling a row-tiled kernel for v4 (bfloat16, float32 logits, head size 128): MiB.
    for columns, rows, compiled in ((16384, 32, 18.04), (8192, 256, 16.21), (8192, 512, 24.46)):
        roomy = TPU_V4_CORE.replace(buffer=2**40)
        tile = best_tile(
            roomy, batch=1, heads=1, rows=rows, columns=columns, head_dim=128, row_multiple=rows
        )
        assert tile.live_buffer / MiB == pytest.approx(compiled, rel=3e-3)


def test_tile_of_shared_keys_and_of_few_rows():
    shared = best_tile(TPU_V4_CORE, batch=2, heads=8, kv_heads=2, rows=2048, head_dim=128)
    assert shared.rows <= 4 * 2048
    few = best_tile(TPU_V4_CORE, batch=2, heads=8, rows=3, columns=2048, head_dim=128)
    assert few.rows == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_heads": 3}, "3 heads of keys and values do not divide 8 heads"),
        ({"rows": 0}, "rows 0"),
        ({"rows": 16384}, "a buffer of 16777216 bytes .* the least that works is 17309696"),
    ],
)
def test_wrong_tiles(wrong, message):
    with pytest.raises(ValueError, match=message):
        best_tile(TPU_V4_CORE, **{"batch": 1, "heads": 8, "rows": 512, "head_dim": 128} | wrong)


def test_least_buffer_of_a_tile():
    sizes = {"batch": 1, "heads": 2, "rows": 512, "head_dim": 64}
    least = 2 * (2 * 8 * 64 + 2 * 512 * 64) * 2 + 8 * 512 * 4
    for buffer in (0, least - 1):
        with pytest.raises(ValueError, match=f"the least that works is {least}"):
            best_tile(TPU_V4_CORE.replace(buffer=buffer), **sizes)
    tile = best_tile(TPU_V4_CORE.replace(buffer=least), **sizes)
    assert (tile.granularity, tile.rows, tile.live_buffer) == ("R", 8, least)


def test_unknown_dataflow():
    with pytest.raises(ValueError, match="dataflow 'fast': one of naive, flex, flat"):
        attention_cost(EDGE, MODELS["BERT"].attention(512), "fast")
