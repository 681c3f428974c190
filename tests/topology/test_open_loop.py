"""Open-loop packets against queueing formulas, an independent simulation, and fluid bounds."""

import itertools

import numpy as np
import pytest

from topology import Slice
from topology.routing.loads import link_loads
from topology.routing.open_loop import TRIES, latency_curve, measure
from topology.routing.patterns import traffic_of
from topology.routing.routing import dimension_order, routes


def flows(slice, sources, destinations):
    traffic = np.zeros((slice.num_chips,) * 2)
    traffic[sources, destinations] = 1
    return traffic


@pytest.mark.parametrize("rate", [0.2, 0.6, 0.85])
def test_a_link_is_a_slotted_queue(rate):
    """Batches of Binomial(6, r / 6) on a link that takes one a cycle: by Lindley's recursion the
    mean time is 1 + E[A (A - 1)] / (2 r (1 - r)), E[A (A - 1)] = 5/6 r^2; M/D/1 has no 5/6."""
    slice = Slice.parse("4x4x4")  # 64 links that share nothing: each chip to the next along x
    traffic = flows(slice, np.arange(64), slice.neighbours[:, 0])
    found = measure(slice, dimension_order(slice), traffic, rate, cycles=2000)
    waits = (1 - 1 / TRIES) * rate / (2 * (1 - rate))
    assert found.latency == pytest.approx(1 + waits, rel=0.05)
    assert found.latency == pytest.approx(1 + rate / (2 * (1 - rate)), rel=0.2)  # M/D/1
    assert found.hops == 1
    assert found.stable
    assert found.accepted == pytest.approx(rate, rel=0.02)


def test_links_behind_the_first_add_a_cycle_each():
    """What leaves a link comes one a cycle, and never waits again where no other joins."""
    slice = Slice.parse("4x4x8")
    first, fourth = (np.flatnonzero(slice.coordinates[:, 2] == z) for z in (0, 3))
    found = measure(slice, dimension_order(slice), flows(slice, first, fourth), 0.5, cycles=3000)
    assert found.hops == 3
    assert found.latency == pytest.approx(3 + 5 / 6 * 0.5, rel=0.03)


@pytest.mark.parametrize("name", ["4x4x4", "4x4x8_twisted", "2x4x4"])
def test_without_load_the_latency_is_the_hops(name):
    slice = Slice.parse(name)
    traffic = traffic_of(slice, "uniform")
    found = measure(slice, dimension_order(slice), traffic, 0.03, cycles=1500)
    N = slice.num_chips
    assert found.hops == pytest.approx(slice.mean_distance, rel=0.05)
    assert found.hops <= found.latency <= found.hops * 1.04
    assert found.offered == pytest.approx(0.03 * (N - 1) / N, rel=0.1)


def by_hand(slice, routing, rate, cycles, seed):
    """Mean latency of uniform traffic, packet by packet, in lists; ways in their shares."""
    rng, N = np.random.default_rng(seed), slice.num_chips
    ways = [routes(slice, routing, w, np.arange(N)) for w in range(len(routing.shares))]
    order, under_way, own, times = itertools.count(), [], {}, []
    for now in range(cycles):
        for source in range(N):
            for _ in range(rng.binomial(TRIES, rate / TRIES)):
                to = int(rng.integers(N))
                open_to = [w for w in ways if w[source, to, 0] >= 0]
                if to == source:
                    continue
                path = open_to[rng.integers(len(open_to))][source, to]
                path = [int(link) for link in path if link >= 0]
                own.setdefault(path[0], []).append([next(order), now, path, 0])
        taken, on = {}, []
        for packet in under_way + [queue[0] for queue in own.values() if queue]:
            taken.setdefault(packet[2][packet[3]], packet)
        for link, packet in taken.items():
            if packet[3] == 0:
                own[link].pop(0)
            else:
                under_way.remove(packet)
            packet[3] += 1
            if packet[3] == len(packet[2]):
                if packet[1] > cycles // 4:
                    times.append(now + 1 - packet[1])
            else:
                on.append(packet)
        under_way += on
    return np.mean(times)


def test_it_is_as_a_plain_simulation():
    slice = Slice.parse("2x2x2")
    routing = dimension_order(slice)
    found = measure(slice, routing, traffic_of(slice, "uniform"), 1.5, cycles=4000, seed=3)
    assert found.latency == pytest.approx(by_hand(slice, routing, 1.5, 1500, 4), rel=0.08)


def test_it_saturates_below_the_bound():
    slice = Slice.parse("4x4x4")
    routing, traffic = dimension_order(slice), traffic_of(slice, "uniform")
    bound = 1 / link_loads(slice, routing, traffic).max()
    over = measure(slice, routing, traffic, 1.2 * bound, cycles=600)
    assert not over.stable
    assert over.accepted <= bound * 1.01
    tight = measure(slice, routing, traffic, 1.2 * bound, places=1, cycles=600)
    assert tight.accepted < over.accepted  # fewer places hold packets up, and never for good
    assert tight.accepted > 0.3 * bound


def test_a_curve_rises_to_saturation():
    slice = Slice.parse("4x4x4")
    routing, traffic = dimension_order(slice), traffic_of(slice, "tornado")
    told = []
    curve = latency_curve(
        slice, routing, traffic, 1.0, cycles=500, steps=5, halvings=2, places=2, told=told.append
    )
    low, high = curve.saturation
    stable = [point for point in curve.points if point.stable and point.rate <= low]
    assert [p.rate for p in curve.points] == sorted(p.rate for p in told)
    assert all(a.latency < b.latency for a, b in itertools.pairwise(stable))
    assert 0 < low < high <= 1
    assert curve.points[-1].rate == pytest.approx(1.1)
    assert not curve.points[-1].stable
    assert curve.points[-1].accepted <= 1
    assert curve.points[0].hops == 3  # one along each dimension of 4


def test_what_is_no_traffic_is_refused():
    slice = Slice.parse("2x2x1")
    routing = dimension_order(slice)
    for traffic in (np.zeros((3, 3)), np.full((4, 4), 0.5), -np.eye(4)):
        with pytest.raises(ValueError, match="traffic: "):
            measure(slice, routing, traffic, 0.5)
    with pytest.raises(ValueError, match="rate 7"):
        measure(slice, routing, np.eye(4), 7)
    with pytest.raises(ValueError, match="places 0"):
        measure(slice, routing, np.eye(4), 1, places=0)
