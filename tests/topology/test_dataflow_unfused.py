"""Unfused dataflows: loops walked tile by tile, and searches against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.accelerator.accelerator import CLOUD, EDGE, MatrixArray
from topology.accelerator.dataflow_cost import lower_bound
from topology.accelerator.dataflow_replay import replay_matmul
from topology.accelerator.dataflow_unfused import (
    ORDERS,
    best_matmul,
    matmul_traffic,
    naive,
    naive_matmul,
    search_flex,
)
from topology.accelerator.workloads import Attention, Matmul

few = settings(max_examples=40, deadline=None)
triples = st.tuples(*[st.integers(1, 7)] * 3)
RIGID = EDGE.replace(array=MatrixArray(rows=4, columns=4))


@few
@given(triples, triples, st.sampled_from(ORDERS))
def test_traffic_is_that_of_the_walk(lengths, tiles, order):
    found = matmul_traffic(lengths, tiles, order)
    walked = replay_matmul(lengths, tiles, order)
    assert {name: getattr(found, name) for name in ("a", "b", "c_written", "c_read")} == {
        name: walked[name] for name in ("a", "b", "c_written", "c_read")
    }


@pytest.mark.parametrize(
    ("order", "a", "b", "c_written", "c_read"),
    [  # m = k = n = 8, tiles of 4: the operand of the two outer loops moves once
        ("mnk", 128, 128, 64, 0),
        ("nkm", 128, 64, 128, 64),
        ("mkn", 64, 128, 128, 64),
    ],
)
def test_traffic_of_the_textbook_loops(order, a, b, c_written, c_read):
    found = matmul_traffic((8, 8, 8), (4, 4, 4), tuple(order))
    assert (found.a, found.b, found.c_written, found.c_read) == (a, b, c_written, c_read)


def walk_array(lengths, tiles):
    """(cycles, elements moved) of the best stationarity, pass by pass of a 4 x 4 array."""
    found = {"output": [0, 0], "weight": [0, 0], "input": [0, 0]}
    cut = [[min(t, n - i) for i in range(0, n, t)] for n, t in zip(lengths, tiles, strict=True)]
    for m, k, n in itertools.product(*cut):
        blocks = {x: [min(4, x - i) for i in range(0, x, 4)] for x in (m, k, n)}
        for i, j in itertools.product(blocks[m], blocks[n]):
            found["output"][0] += k
            found["output"][1] += i * k + k * j + i * j
        for i, j in itertools.product(blocks[k], blocks[n]):
            found["weight"][0] += m
            found["weight"][1] += m * i + i * j + 2 * m * j
        for i, j in itertools.product(blocks[k], blocks[m]):
            found["input"][0] += n
            found["input"][1] += j * i + i * n + 2 * j * n
    return min(found.values())


@settings(max_examples=15, deadline=None)
@given(triples, st.integers(12, 300))
def test_the_best_tile_is_that_of_brute_force(lengths, buffer):
    # So slow a memory that bytes decide.
    accelerator = RIGID.replace(buffer=buffer, off_chip_bandwidth=1.0)
    least = float("inf")
    for tiles in itertools.product(*[[1, 2, 4, 8]] * 3):
        m, k, n = map(min, tiles, lengths)
        live = 4 * (m * k + k * n + m * n)
        spilled = max(0, 1 - buffer / live) * walk_array(lengths, tiles)[1]
        for order in ORDERS:
            least = min(least, spilled + sum(replay_matmul(lengths, tiles, order).values()))
    found = best_matmul(accelerator, Matmul("", 3, *lengths))
    assert found.off_chip_bytes == pytest.approx(3 * 2 * least)


@few
@given(triples, st.integers(12, 300))
def test_naive_is_no_better_than_the_best(lengths, buffer):
    accelerator = RIGID.replace(buffer=buffer)
    matmul = Matmul("", 2, *lengths)
    best, fixed = best_matmul(accelerator, matmul), naive_matmul(accelerator, matmul)
    assert best.seconds <= fixed.seconds * (1 + 1e-6)
    assert fixed.live_buffer <= buffer


@few
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(100, 10**5),
       st.sampled_from(["free", "overlapped"]))  # fmt: skip
def test_unfused_attention_is_above_the_bound_and_falls_with_the_buffer(n, c, d, buffer, softmax):
    work = Attention(batch=2, heads=3, rows=n, columns=c, head_dim=d)
    bound = lower_bound(EDGE, work, softmax)
    small = search_flex(EDGE.replace(buffer=buffer), work, softmax=softmax)
    large = search_flex(EDGE.replace(buffer=10 * buffer), work, softmax=softmax)
    fixed = naive(EDGE.replace(buffer=buffer), work, softmax=softmax)
    for name in ("cycles", "off_chip_bytes", "energy"):
        assert small.seconds <= fixed.seconds * (1 + 1e-6)
        for cost in (small, large, fixed):
            assert getattr(cost, name) >= getattr(bound, name) * (1 - 1e-9)
    assert large.seconds <= small.seconds * (1 + 1e-6)
    assert fixed.live_buffer <= buffer


def test_logits_stay_on_chip_only_if_the_buffer_holds_them():
    work = Attention(batch=8, heads=4, rows=512, head_dim=64)
    logits = work.logits * 2
    large = search_flex(CLOUD.replace(buffer=2 * logits), work, softmax="overlapped")
    assert large.off_chip_bytes == work.compulsory_bytes
    none = search_flex(CLOUD.replace(buffer=10**6), work, softmax="overlapped")
    # Written, read and written by the softmax, read, but for what a megabyte holds.
    assert none.off_chip_bytes > 4 * (logits - 10**6)
    by_head = search_flex(CLOUD.replace(buffer=10**6), work, softmax="overlapped", granularity="H")
    assert by_head.off_chip_bytes < none.off_chip_bytes


def test_a_buffer_too_small_says_the_least():
    work = Attention(batch=1, heads=1, rows=8, head_dim=8)
    for dataflow in (search_flex, naive):
        for buffer in (0, 11):
            with pytest.raises(ValueError, match=f"buffer of {buffer} bytes .* works is 12"):
                dataflow(EDGE.replace(buffer=buffer), work)
        assert dataflow(EDGE.replace(buffer=12), work).off_chip_bytes > work.compulsory_bytes
    with pytest.raises(ValueError, match="no granularity 'R' without fusion"):
        search_flex(EDGE, work, granularity="R")
