"""Collectives around failed links: the same data arrives, and some cases worked by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import Slice, collective_cost, degraded_cost, groups_of_axes
from topology.collectives.collectives import KINDS, Network, lower_bounds
from topology.collectives.degraded import cost_of, degraded_rounds, load_rounds
from topology.routing.throughput import all_to_all, is_cut, switch_links


def groups_on(name, axes=(0, 1, 2)):
    slice = Slice.parse(name)
    return groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), axes)


def surplus(slice, loads):
    """float [N]: what each chip sends more than it receives."""
    tail, direction = np.nonzero(slice.neighbours >= 0)
    received = np.zeros(slice.num_chips)
    np.add.at(received, slice.neighbours[tail, direction], loads[tail, direction])
    return loads.sum(axis=1) - received


@pytest.mark.parametrize("axes", [(0, 1, 2), (2,), (0, 2)])
@pytest.mark.parametrize("name", ["4x4x4", "4x4x8", "4x4x8_twisted", "2x2x4", "4x8x8"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rounds_of_a_whole_slice_cost_what_the_collective_does(kind, name, axes):
    groups = groups_on(name, axes)
    cost, rounds = collective_cost(kind, groups), load_rounds(kind, groups)
    assert cost_of(rounds).hops == cost.hops
    assert cost_of(rounds).load == pytest.approx(cost.load, rel=1e-9)
    assert degraded_cost(kind, groups, []).hops == cost.hops


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_chip_sends_and_receives_what_it_did(data):
    name = data.draw(st.sampled_from(["4x4x4", "4x4x8_twisted", "2x2x4", "4x4x8"]))
    axes = data.draw(st.sampled_from([(0, 1, 2), (1,), (0, 2)]))
    kind, groups = data.draw(st.sampled_from(KINDS)), groups_on(name, axes)
    slice = groups.slice
    there = np.flatnonzero(slice.neighbours.ravel() >= 0).tolist()
    failed = data.draw(st.lists(st.sampled_from(there), min_size=1, max_size=6, unique=True))
    if is_cut(slice, failed):
        with pytest.raises(ValueError, match="cut it in two"):
            degraded_cost(kind, groups, failed)
        return
    before, after = load_rounds(kind, groups), degraded_rounds(kind, groups, failed)
    for old, new in zip(before, after, strict=True):
        assert not new.loads.ravel()[failed].any()
        assert not new.loads[slice.neighbours < 0].any()
        assert new.loads.min() >= 0
        assert surplus(slice, new.loads) == pytest.approx(surplus(slice, old.loads), abs=1e-9)
        assert new.hops >= old.hops
    network = Network(hop_latency=0.0)
    bounds = lower_bounds(kind, groups, 1.0, network, failed_links=failed)
    seconds = degraded_cost(kind, groups, failed).seconds(1.0, network)
    assert max(bounds.values()) <= seconds * (1 + 1e-9)


def test_a_detour_by_hand():
    """Chip 0 of 2x2x1 has lost the link to chip 1 (x), both ways: a path of three links is left.

    Of an all-gather of 4 bytes two cross each of the four links in both directions: a chip gets one
    from each neighbour, and half of the far chip's by each. Between chips 0 and 1 all that goes by
    the other three links: 1 in the first round, and 1/2 in the second.
    """
    groups = groups_on("2x2x1")
    slice = groups.slice
    direction = int(np.flatnonzero(slice.neighbours[0] >= 0)[0])
    other = int(slice.neighbours[0, direction])
    failed = [6 * 0 + direction, 6 * other + (direction ^ 1)]
    whole, around = (
        collective_cost("all_gather", groups),
        degraded_cost("all_gather", groups, failed),
    )
    assert (whole.hops, whole.load) == (2, pytest.approx((1 + 1 / 2) / 4))
    assert (around.hops, around.load) == (2 + 2 + 2, pytest.approx((2 + 2 / 2) / 4))


@pytest.mark.parametrize("name", ["4x4x8", "4x4x8_twisted", "8x8x8"])
def test_an_all_to_all_around_a_switch_has_the_best_routing(name):
    groups = groups_on(name)
    failed = switch_links(groups.slice, 2, 0, 0)
    best = all_to_all(groups.slice, failed).max_link_load / groups.slice.num_chips
    assert degraded_cost("all_to_all", groups, failed).load == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["4x4x8", "4x4x8_twisted", "8x8x8", "16x16x16"])
def test_an_all_gather_around_a_switch_is_as_fast_as_its_poorest_chip(name):
    groups = groups_on(name)
    n = groups.size
    failed = switch_links(groups.slice, 2, 1, 3)
    assert degraded_cost("all_gather", groups, failed).load == pytest.approx((n - 1) / n / 5)


def test_shorter_detours_wait_less_and_carry_more():
    groups = groups_on("4x4x8")
    failed = switch_links(groups.slice, 2, 0, 0)
    short, long = (degraded_cost("all_gather", groups, failed, longer=n) for n in (0, 2))
    assert short.hops < long.hops
    assert short.load > long.load


def test_what_is_no_link_is_named():
    groups = groups_on("2x2x1")
    for failed, says in (([24], "failed link 24"), ([1.5], "failed link"), ([4], "has none")):
        with pytest.raises(ValueError, match=says):
            degraded_cost("all_gather", groups, failed)
