import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology.routing.routing import best_single_path, dimension_order, optimal_split
from topology.routing.simulate import all_to_all_packets, simulate
from topology.routing.throughput import all_to_all
from topology.torus.slices import Slice

NO_DATELINES = ((frozenset(), frozenset()),) * 3


@given(
    name=st.sampled_from(["2x2x2", "2x4x4", "4x4x4", "4x4x8_twisted"]),
    places=st.sampled_from([1, 3, None]),
    ties=st.sampled_from(["split", "early", "positive"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=15, deadline=None)
def test_never_beats_a_bound(name, places, ties, seed):
    slice = Slice.parse(name)
    packets = all_to_all_packets(slice, dimension_order(slice, ties=ties), seed=seed)
    result = simulate(slice.num_chips, packets, places=places)
    assert result.stuck == 0
    assert result.delivered == slice.num_chips * (slice.num_chips - 1)
    assert result.cycles >= result.link_packets.max() >= all_to_all(slice).lower_bound
    # Every hop of every packet is a packet on that link.
    hops = np.bincount(packets[packets >= 0] % (6 * slice.num_chips), minlength=slice.num_chips * 6)
    np.testing.assert_array_equal(result.link_packets.ravel(), hops)


@pytest.mark.parametrize(
    ("name", "order", "places", "near"),
    [
        ("4x4x8", (2, 0, 1), None, 0.99),
        ("4x4x8", (2, 0, 1), 4, 0.95),
        ("4x4x8_twisted", (0, 1, 2), None, 0.96),
        ("4x4x8_twisted", (0, 1, 2), 8, 0.93),
    ],
)
def test_comes_near_the_bound(name, order, places, near):
    slice = Slice.parse(name)
    routing, _ = best_single_path(slice, order=order)
    result = simulate(slice.num_chips, all_to_all_packets(slice, routing, 16), places=places)
    bound = 16 * all_to_all(slice).max_link_load
    assert near * result.cycles <= bound <= result.cycles


def test_gain_of_the_twist_in_packets():
    cycles = {}
    for name in ("4x4x8", "4x4x8_twisted"):
        slice = Slice.parse(name)
        routing, _ = best_single_path(slice, order=(2, 0, 1))
        packets = all_to_all_packets(slice, routing, 8)
        cycles[name] = simulate(slice.num_chips, packets, places=8).cycles
    gain = cycles["4x4x8"] / cycles["4x4x8_twisted"]
    assert 1.6 < gain < 1.7  # published: 1.63 measured; 1.745 is the ratio of the bounds


def test_one_packet_takes_a_cycle_a_hop():
    slice = Slice.parse("4x4x4")
    path = all_to_all_packets(slice, dimension_order(slice))[:1]
    result = simulate(64, path, places=1)
    assert result.cycles == (path >= 0).sum()


def test_packets_that_share_a_link_take_turns():
    path = np.array([[0, -1]] * 5)
    result = simulate(64, path)
    assert result.cycles == result.link_packets[0, 0] == 5


def test_rings_without_datelines_deadlock_and_with_them_do_not():
    slice = Slice.parse("4x4x4")
    routing = dimension_order(slice)
    for datelines, stuck in ((NO_DATELINES, True), (None, False)):
        packets = all_to_all_packets(slice, routing, 2, datelines=datelines)
        result = simulate(slice.num_chips, packets, places=1)
        assert (result.stuck > 0) == stuck
        assert result.delivered + result.stuck == len(packets)


@pytest.mark.parametrize("name", ["2x4x4", "4x4x8_twisted"])
def test_packets_follow_the_shares(name):
    slice = Slice.parse(name)
    N = slice.num_chips
    routing = optimal_split(slice) if slice.is_torus else dimension_order(slice)
    packets = all_to_all_packets(slice, routing, 3)
    links = 6 * N
    sources = packets[:, 0] % links // 6
    last = packets[np.arange(len(packets)), (packets >= 0).sum(axis=1) - 1] % links
    pairs = sources * N + slice.neighbours.ravel()[last]
    expected = 3 * (1 - np.eye(N, dtype=int))
    np.testing.assert_array_equal(np.bincount(pairs, minlength=N * N).reshape(N, N), expected)
    # Dealt out evenly: a direction's packets are those of the fluid routing, up to rounding.
    mean = np.bincount(packets[packets >= 0] % 6, minlength=6) / N
    assert mean.max() <= 3 * all_to_all(slice).max_link_load * 1.03


@pytest.mark.parametrize(
    ("paths", "places", "message"),
    [([[-1, -1]], 4, "a packet has no hop"), ([[0, -1]], 0, "places: 0")],
)
def test_errors(paths, places, message):
    with pytest.raises(ValueError, match=message):
        simulate(8, paths, places=places)
