"""Collectives over several slices: closed forms, pipelines by brute force, and bounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import Network, Slice, collective_cost
from topology.collectives.groups import Groups
from topology.collectives.several import Stage, _seconds, several_slices

CUBE = Slice.parse("4x4x4")
WHOLE = Groups(CUBE, np.arange(64)[None])
KINDS = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
GB = 1e9


@pytest.mark.parametrize("kind", KINDS)
def test_stages_by_hand(kind):
    """Three slices of 64 chips, 6 GB, 5 GB/s a chip between slices; whole and without latency."""
    network = Network(bandwidth=45 * GB, hop_latency=0.0)
    cost = several_slices(kind, WHOLE, 3, 6 * GB, dcn=5 * GB, network=network, dcn_latency=0.0,
                          pieces=1)  # fmt: skip
    shard = 2 / 3 * 6 * GB / 64 / (5 * GB)  # what a chip gets from the other two
    gather = 63 / 64 / 6 * 6 / 45
    stages = {
        "all_gather": [shard, gather],
        "reduce_scatter": [gather, shard],
        "all_reduce": [gather, 2 * shard, gather],
        "all_to_all": [collective_cost("all_to_all", WHOLE).load * 2 / 45, 2 / 3 * 6 / 5],
    }[kind]
    assert [stage.seconds for stage in cost.stages] == pytest.approx(stages)
    whole = max(stages) if kind == "all_to_all" else sum(stages)
    assert cost.seconds == pytest.approx(whole)
    between = stages[1] if kind in ("all_to_all", "all_reduce") else shard
    assert cost.bounds["between"] == pytest.approx(between)


def test_pieces_hide_the_shorter_network_and_cost_latency():
    network = Network(bandwidth=45 * GB, hop_latency=0.0)
    options = {"dcn": 2 * GB, "network": network, "dcn_latency": 0.0}
    one, many = (
        several_slices("all_gather", WHOLE, 2, 6 * GB, pieces=p, **options) for p in (1, 1000)
    )
    between, within = (stage.seconds for stage in one.stages)
    assert one.seconds == pytest.approx(between + within)
    longer, shorter = max(between, within), min(between, within)
    assert many.seconds == pytest.approx(longer + shorter / 1000)
    # The best number of pieces: with t of latency each, about sqrt(shorter / t).
    slow = several_slices("all_gather", WHOLE, 2, 6 * GB, **(options | {"dcn_latency": 1e-4}))
    found = {
        p: several_slices(
            "all_gather", WHOLE, 2, 6 * GB, pieces=p, **(options | {"dcn_latency": 1e-4})
        ).seconds
        for p in (2**i for i in range(9))
    }
    assert slow.seconds == min(found.values()) < found[1]
    assert found[slow.pieces] == slow.seconds
    assert found[256] > slow.seconds


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=3), st.integers(1, 6))
def test_a_pipeline_is_no_faster_than_its_networks_and_no_slower_than_in_turn(takes, pieces):
    networks = ["links", "between slices", "links"]
    stages = tuple(Stage(str(i), networks[i], 0.0, seconds) for i, seconds in enumerate(takes))
    found = _seconds(stages, pieces, False)
    each = {name: sum(s.seconds for s in stages if s.network == name) for name in set(networks)}
    assert found >= max(*each.values(), sum(takes) / pieces) * (1 - 1e-9)
    assert found <= sum(takes) * (1 + 1e-9)
    if pieces > 1:
        assert found <= _seconds(stages, 1, False) * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 9), st.floats(1e3, 1e11), st.floats(1e8, 1e11))
def test_no_time_is_below_a_bound(kind, slices, bytes, dcn):
    cost = several_slices(kind, WHOLE, slices, bytes, dcn=dcn)
    assert cost.seconds >= max(cost.bounds.values()) * (1 - 1e-9)
    more = several_slices(kind, WHOLE, slices, bytes, dcn=dcn, failed_links=[0, 1])
    assert more.seconds >= cost.seconds * (1 - 1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "permute"}, "'permute': is within a slice"),
        ({"kind": "gossip"}, "collective 'gossip'"),
        ({"slices": 1}, "slices 1: a whole number, 2"),
        ({"dcn": 0.0}, "dcn 0.0: bytes a second, more than 0"),
        ({"bytes": -1.0}, "bytes -1.0"),
        ({"pieces": 0}, "pieces 0"),
        ({"dcn_latency": -1.0}, "dcn_latency -1.0"),
    ],
)
def test_mistakes_are_named(changes, message):
    good = {"kind": "all_reduce", "groups": WHOLE, "slices": 2, "bytes": 1e6, "dcn": 1e9}
    with pytest.raises(ValueError, match=message):
        several_slices(**(good | changes))


def test_orders_of_stages_are_those_of_the_kinds():
    names = {
        kind: [s.name for s in several_slices(kind, WHOLE, 2, 1e6, dcn=1e9).stages]
        for kind in KINDS
    }
    assert names["all_reduce"] == [
        "reduce_scatter within slices", "all_reduce between slices", "all_gather within slices"
    ]  # fmt: skip
    for a, b in itertools.pairwise(["all_gather", "reduce_scatter"]):
        assert [x.split()[1] for x in names[a]] == [x.split()[1] for x in names[b]][::-1]
