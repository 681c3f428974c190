"""Published measurements of collectives beside what is computed here, as in docs/architects.md."""

import numpy as np
import pytest

from topology import TPU_V5E, TPU_V6E, Network, Slice, collective_cost, groups_of_axes
from topology.collectives.collectives import lower_bounds


def gather(shape, axis, bytes):
    """(seconds, bound) of an all-gather along one axis of a slice of TPU v5e."""
    slice = Slice(shape=shape, pod=TPU_V5E)
    groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), [axis])
    network = Network.of(TPU_V5E)
    bounds = lower_bounds("all_gather", groups, bytes, network)
    return collective_cost("all_gather", groups).seconds(bytes, network), max(bounds.values())


def test_a_ring_of_16_reaches_its_measured_part_of_a_links_bandwidth():
    seconds, _ = gather((8, 16), 1, 10e6)
    reached = 10e6 * 15 / 16 / 2 / seconds / 45e9  # of one link, both used
    assert reached == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("bytes", "formula", "measured"), [(2**25, 560e-6, 680e-6), (2**17, 3e-6, 8e-6)]
)
def test_a_line_of_4_lies_between_the_formula_and_the_measurement(bytes, formula, measured):
    seconds, bound = gather((4, 8), 0, bytes)
    assert formula * 0.99 <= seconds <= measured
    assert bound <= seconds
    assert bound == pytest.approx(formula, rel=0.07)


@pytest.mark.parametrize("pod", [TPU_V5E, TPU_V6E])
def test_the_bisection_of_a_pod_is_the_published_one(pod):
    slice = Slice(shape=(16, 16), pod=pod)
    assert slice.bisection_links * pod.chip.link_bandwidth == pod.bisection_bandwidth


def test_what_sends_by_all_links_at_once_is_below_every_schedule():
    """8x8x8: N k / 8 units are on a link; b / 6 B for all a chip sends would be 6 times less."""
    slice = Slice.parse("8x8x8")
    groups = groups_of_axes(slice, np.arange(512).reshape(8, 8, 8), [0, 1, 2])
    free = Network(bandwidth=1.0, hop_latency=0.0)
    bound = max(lower_bounds("all_to_all", groups, 1.0, free).values())
    assert bound / (511 / 512 / 6) == pytest.approx(6.3, rel=0.06)
    assert collective_cost("all_to_all", groups).load == pytest.approx(bound, rel=2e-3)
