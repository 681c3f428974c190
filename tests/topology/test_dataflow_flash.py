"""FlashAttention's dataflow: against a walk, published footprints and traffic, and brute force."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.accelerator.accelerator import CLOUD, EDGE, TPU_V4_CORE, Level, MatrixArray
from topology.accelerator.dataflow import attention_cost, dataflows_of, rows_against_tiles
from topology.accelerator.dataflow_cost import lower_bound
from topology.accelerator.dataflow_flash import (
    FlashMapping,
    FlashTile,
    flash_cost,
    search_flash,
)
from topology.accelerator.dataflow_flat import FlatMapping, flat_cost
from topology.accelerator.dataflow_replay import replay_flash
from topology.accelerator.dataflow_unfused import best_matmul, live_bytes, matmul_traffic
from topology.accelerator.workloads import Attention, Matmul

few = settings(max_examples=80, deadline=None)
sizes = st.integers(1, 9)
loops = st.sampled_from(["rows", "columns"])
tiles = st.one_of(
    st.builds(FlashTile, rows=sizes, columns=sizes, outside=loops, kept=st.booleans()),
    st.builds(FlashTile, rows=sizes, columns=sizes, kept=st.booleans(), whole=st.just(True)),
)


@few
@given(tiles, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), sizes, st.integers(0, 4),
       sizes, st.booleans(), st.booleans())  # fmt: skip
def test_bytes_and_work_are_those_of_the_walk(tile, batch, kv, group, n, more, d, causal, backward):
    work = Attention(
        batch=batch, heads=kv * group, kv_heads=kv, rows=n, columns=n + more, head_dim=d,
        bytes_per_logit=4, causal=causal, backward=backward,
    )  # fmt: skip
    machine = EDGE.replace(buffer=10**9)
    cost = flash_cost(machine, work, FlashMapping(tile=tile))
    moved, macs = replay_flash(work, tile)
    assert cost.off_chip_bytes == moved
    joules = machine.energy
    of_macs = cost.energy - cost.on_chip_bytes * joules.on_chip_byte - moved * joules.off_chip_byte
    assert of_macs == pytest.approx(macs * joules.mac)
    assert macs >= work.macs


def test_logits_that_a_causal_mask_leaves():
    """Of 3 queries and 5 keys: 3, 4 and 5 are seen."""
    work = Attention(batch=1, heads=2, rows=3, columns=5, head_dim=7, causal=True)
    assert work.logits == 2 * (3 + 4 + 5)
    assert work.macs == 2 * work.logits * 7
    assert dataclasses.replace(work, backward=True).macs == 4 * work.logits * 7
    with pytest.raises(ValueError, match="fewer keys than the 3 queries"):
        Attention(batch=1, heads=2, rows=3, columns=2, head_dim=7, causal=True)


def test_footprint_and_traffic_by_hand():
    """128 x 64 logits of heads of 32, 1,024 queries and keys; 2 bytes, logits 4."""
    work = Attention(batch=1, heads=1, rows=1024, head_dim=32, bytes_per_logit=4)
    rows = FlashMapping(tile=FlashTile(rows=128, columns=64))
    cost = flash_cost(EDGE.replace(buffer=10**6), work, rows)
    queries = 2 * 128 * 32 * 2
    output = 128 * 32 * (2 + 4) + 128 * 2 * 4  # as it leaves, its sum, two statistics of a row
    keys_values = 2 * 2 * 64 * 32 * 2
    assert cost.live_buffer == queries + output + keys_values + 128 * 64 * 4
    assert cost.off_chip_bytes == 2 * (1024 * 32 * 2) + 8 * 2 * (1024 * 32 * 2)
    columns = FlashMapping(tile=FlashTile(rows=128, columns=64, outside="columns"))
    cost = flash_cost(EDGE.replace(buffer=10**6), work, columns)
    parts = 2 * 15 * 1024 * (32 * 4 + 2 * 4)  # sums and statistics leave 15 times and come back
    assert cost.off_chip_bytes == (2 + 16) * 1024 * 32 * 2 + 1024 * 32 * 2 + parts


def test_vector_work_by_hand():
    """3 operations a logit; the output once divided, and renewed with each tile of columns."""
    work = Attention(batch=1, heads=1, rows=64, head_dim=16)
    machine = EDGE.replace(buffer=10**6, vector_lanes=2)

    def vector(columns, softmax="overlapped", **options):
        tile = FlashTile(rows=8, columns=columns, **options)
        return flash_cost(machine, work, FlashMapping(tile=tile), softmax=softmax).vector_cycles

    whole = (3 * 64 * 64 + 64 * 16) / 2
    assert vector(64) == vector(16, whole=True) == whole
    assert vector(16) == whole + 3 * 64 * (16 + 4) / 2
    assert vector(16, softmax="free") == 0


def test_traffic_grows_with_the_square_of_the_sequence_and_falls_with_the_buffer():
    """FlashAttention's theorem 2: as n^2 d^2 / buffer, where that is more than the least."""
    slow = EDGE.replace(off_chip_bandwidth=1e6)

    def traffic(n, buffer):
        work = Attention(batch=1, heads=1, rows=n, head_dim=64)
        machine = slow.replace(buffer=buffer)
        return search_flash(machine, work, whole_rows=False)[1].off_chip_bytes

    assert traffic(2**16, 2**17) / traffic(2**15, 2**17) == pytest.approx(4, rel=0.1)
    falls = [traffic(2**16, 2**i) for i in (16, 18, 20)]
    assert falls[0] / falls[1] == pytest.approx(4, rel=0.5)
    assert falls[1] / falls[2] == pytest.approx(4, rel=0.5)


@few
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.integers(1, 64))
def test_whole_rows_with_all_kept_are_flats(rows, n, c, d):
    """The same bytes and cycles; live are two statistics of a row more."""
    work = Attention(batch=2, heads=3, rows=n, columns=c, head_dim=d)
    machine = CLOUD.replace(buffer=10**9, array=MatrixArray(rows=16, columns=16))
    flat = flat_cost(machine, work, FlatMapping(granularity="R", rows=rows))
    tile = FlashTile(rows=rows, columns=c, kept=True, whole=True)
    flash = flash_cost(machine, work, FlashMapping(tile=tile))
    assert flash.off_chip_bytes == flat.off_chip_bytes
    assert flash.live_buffer == flat.live_buffer + 2 * 2 * min(rows, n)
    assert flash.array_cycles <= flat.array_cycles  # it also takes the best stationarity
    assert flash.macs == flat.macs


@few
@given(st.integers(1, 3), st.integers(1, 300), st.integers(0, 300), st.integers(1, 40),
       st.integers(2_000, 10**6), st.sampled_from(["free", "overlapped", "in-turn"]),
       st.booleans(), st.booleans())  # fmt: skip
def test_the_search_is_above_the_bound_and_falls_with_the_buffer(
    heads, n, more, d, buffer, softmax, causal, backward
):
    work = Attention(
        batch=2, heads=heads, rows=n, columns=n + more, head_dim=d, causal=causal, backward=backward
    )
    bound = lower_bound(EDGE, work, softmax)
    found = []
    for size in (buffer, 2 * buffer, 100 * buffer):
        accelerator = EDGE.replace(buffer=size)
        mapping, cost = search_flash(accelerator, work, softmax=softmax)
        assert flash_cost(accelerator, work, mapping, softmax=softmax) == cost
        for name in ("cycles", "off_chip_bytes", "on_chip_bytes", "energy", "array_cycles"):
            assert getattr(cost, name) >= getattr(bound, name) * (1 - 1e-9), name
        assert cost.vector_cycles >= bound.vector_cycles * (1 - 1e-9)
        assert 0 < cost.utilisation <= 1 + 1e-9
        assert cost.live_buffer <= size
        found.append(cost.seconds)
    assert found[0] >= found[1] * (1 - 1e-6)
    assert found[1] >= found[2] * (1 - 1e-6)


LEVEL = Level(name="second", size=6_000, bandwidth=4e9, byte_energy=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_mapping_of_two_levels_is_faster_than_the_best(causal, backward):
    """Every pair of tiles, tried one after the other."""
    machine = EDGE.replace(
        array=MatrixArray(rows=2, columns=2), buffer=1_500, off_chip_bandwidth=1e9, levels=(LEVEL,)
    )
    work = Attention(
        batch=1, heads=2, kv_heads=1, rows=8, columns=16, head_dim=4,
        causal=causal, backward=backward,
    )  # fmt: skip
    mapping, best = search_flash(machine, work, softmax="overlapped")
    assert flash_cost(machine, work, mapping, softmax="overlapped") == best
    assert best.off_chip_bytes <= best.level_bytes[0]
    least = math.inf
    powers = (1, 2, 4, 8, 16)
    choices = [("rows", False), ("rows", True), ("columns", False)]
    inner = [
        FlashTile(rows=r, columns=c, outside=outside, kept=kept, whole=whole)
        for r, c, kept, (outside, whole) in itertools.product(
            powers, powers, (False, True), choices
        )
        if not (whole and c < 2)
    ]
    outer = [
        None,
        *(
            FlashTile(rows=r, columns=c, outside=outside)
            for r, c, outside in itertools.product(powers, powers, ("rows", "columns"))
        ),
    ]
    tried = 0
    for tile, second in itertools.product(inner, outer):
        one = FlashMapping(tile=tile, levels=(second,))
        try:
            least = min(least, flash_cost(machine, work, one, softmax="overlapped").seconds)
        except ValueError:  # too large, or smaller than the tile inside
            continue
        tried += 1
    assert tried > 500
    assert best.seconds == pytest.approx(least)


@pytest.mark.parametrize("dataflow", ["flex", "flash"])
def test_a_level_helps_as_far_as_it_holds(dataflow):
    work = Attention(batch=1, heads=4, rows=512, head_dim=64, causal=True)
    plain = EDGE.replace(buffer=32 * 2**10, off_chip_bandwidth=5e9)
    fast = {"bandwidth": 1e15, "byte_energy": 0.0}
    none = attention_cost(plain, work, dataflow)
    tiny = plain.replace(levels=(Level(name="tiny", size=1, **fast),))
    assert attention_cost(tiny, work, dataflow).seconds == pytest.approx(none.seconds)
    seconds = [none.seconds]
    for size in (2**18, 2**20, 2**30):
        level = plain.replace(levels=(Level(name="large", size=size, **fast),))
        cost = attention_cost(level, work, dataflow)
        assert len(cost.level_bytes) == 1
        assert cost.level_bytes[0] >= cost.off_chip_bytes * (1 - 1e-9)
        seconds.append(cost.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]
    assert cost.off_chip_bytes == pytest.approx(work.compulsory_bytes)  # of the largest


def test_a_matmul_by_two_levels_is_that_of_brute_force():
    machine = EDGE.replace(
        array=MatrixArray(rows=2, columns=2), buffer=200, off_chip_bandwidth=1e9,
        levels=(Level(name="second", size=900, bandwidth=3e9, byte_energy=0.0),),
    )  # fmt: skip
    m, k, n = 16, 8, 16
    cost = best_matmul(machine, Matmul("x", 1, m, k, n))
    orders = list(itertools.permutations("mkn"))
    grid = list(itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8, 16)))
    moved = {
        tile: min(
            2 * float(x.a + x.b + x.c)
            for x in (matmul_traffic((m, k, n), tile, order) for order in orders)
        )
        for tile in grid
    }
    live = {
        tile: 2 * 2 * (tile[0] * tile[1] + tile[1] * tile[2] + tile[0] * tile[2]) for tile in grid
    }
    least = math.inf
    for inner in grid:
        if live[inner] > machine.buffer:
            continue
        for outer in grid:
            if live[outer] > 900 or any(a > b for a, b in zip(inner, outer, strict=True)):
                continue
            crossed = min(moved[outer], moved[inner])
            least = min(least, max(moved[inner] / 3e9, crossed / 1e9))
    # The array and the buffer are faster than either.
    assert cost.seconds <= least * (1 + 1e-9) + 1e-12
    assert cost.seconds >= least * 0.5  # more live than the buffer may spill instead


def test_timeloops_tiled_matmul():
    """Dense accesses of Timeloop's exercise 02.2.2: 8 x 8 x 8, n outside in tiles of 2."""
    moved = matmul_traffic((8, 8, 8), (8, 8, 2), ("n", "m", "k"))
    assert (moved.a, moved.b, moved.c_written, moved.c_read) == (64, 64, 64, 0)


def test_a_matmul_that_zigzag_searches():
    """No tile of divisors, in any order of loops, moves fewer bytes; ZigZag 3.9.1 finds 819,200."""
    lengths, room = (256, 512, 384), 2 * 32 * 2**10
    machine = EDGE.replace(
        buffer=room, off_chip_bandwidth=1.0, array=MatrixArray(rows=32, columns=32)
    )
    found = best_matmul(machine, Matmul("x", 1, *lengths), sizes=(1, 1, 1)).off_chip_bytes
    divisors = [[x for x in range(1, k + 1) if k % x == 0] for k in lengths]
    least = min(
        float(moved.a + moved.b + moved.c)
        for tile in itertools.product(*divisors)
        if live_bytes(tile, (1, 1, 1)) <= room
        for order in itertools.permutations("mkn")
        for moved in [matmul_traffic(lengths, tile, order)]
    )
    assert found == least == 753_664 < 819_200


def test_what_each_dataflow_covers():
    work = Attention(batch=1, heads=2, rows=64, head_dim=16)
    causal, backward = (dataclasses.replace(work, **{x: True}) for x in ("causal", "backward"))
    levels = EDGE.replace(levels=(LEVEL,))
    assert dataflows_of(EDGE, work) == ("naive", "flex", "flat", "flash")
    for machine, each, what in (
        (levels, work, "several levels of memory"),
        (EDGE, causal, "a causal mask"),
        (EDGE, backward, "the backward pass"),
    ):
        assert dataflows_of(machine, each) == ("flex", "flash")
        for dataflow in ("naive", "flat"):
            with pytest.raises(ValueError, match=f"dataflow {dataflow}: {what} is not part of it"):
                attention_cost(machine, each, dataflow)


def test_unfused_backward_makes_four_matmuls_and_moves_the_logits():
    """A buffer that holds no logits: P comes in, dP goes out and in, dS out and in thrice."""
    work = Attention(batch=2, heads=4, rows=1024, head_dim=64, backward=True)
    machine = EDGE.replace(buffer=64 * 2**10, vector_lanes=2**20)
    cost = attention_cost(machine, work, "flex", softmax="overlapped")
    of_logits = work.logits * 2
    assert cost.off_chip_bytes >= 7 * of_logits
    assert cost.array_cycles >= 4 * work.logits * 64 / 1024 * (1 - 1e-9)
    fused = attention_cost(machine, work, "flash", softmax="overlapped")
    assert fused.off_chip_bytes < cost.off_chip_bytes
    assert fused.seconds < cost.seconds


def test_rows_win_where_they_fit_and_the_lanes_are_slow():
    work = Attention(batch=8, heads=12, rows=4096, head_dim=64)
    slow = CLOUD.replace(vector_lanes=64)
    rows, tiles = rows_against_tiles(slow, work, softmax="overlapped")
    assert rows.seconds < tiles.seconds
    small = slow.replace(buffer=256 * 2**10)
    rows, tiles = rows_against_tiles(small, work, softmax="free")
    assert rows.seconds > tiles.seconds
    tiny = TPU_V4_CORE.replace(buffer=48 * 2**10)
    rows, tiles = rows_against_tiles(tiny, work)
    assert rows is None
    assert tiles is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashTile(rows=0, columns=1), "tile: rows 0: a whole number, 1 or more"),
        (lambda: FlashTile(rows=1, columns=1, outside="heads"), "outer loop 'heads': one of rows"),
        (lambda: FlashTile(rows=1, columns=1, outside="columns", whole=True), "rows outside"),
    ],
)
def test_a_tile_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mapping_that_does_not_fit():
    work = Attention(batch=1, heads=1, rows=64, head_dim=16)
    machine = EDGE.replace(buffer=4096, levels=(LEVEL,))
    small, large = FlashTile(rows=4, columns=4), FlashTile(rows=64, columns=64)

    def fails(message, tile, *levels):
        with pytest.raises(ValueError, match=message):
            flash_cost(machine, work, FlashMapping(tile=tile, levels=levels))

    fails("mapping of 0 levels: edge has 1 between", small)
    fails("a buffer of 4096 bytes is too small for a tile", large, None)
    fails("tile of second, 2 x 4: smaller than the 4 x 4", small, FlashTile(rows=2, columns=4))
    fails("tile of second: .* bytes, of 6000", small, large)
    with pytest.raises(ValueError, match="the least that works is"):
        search_flash(EDGE.replace(buffer=10), work)
