"""Synthetic traffic: its closed forms on rings and tori, by dimension order and by bounds."""

import numpy as np
import pytest

from topology import TPU_V5E, Slice
from topology.routing.loads import link_loads, lower_bounds
from topology.routing.patterns import PATTERNS, destinations, traffic_of
from topology.routing.routing import dimension_order


def largest(slice, pattern):
    """float [3]: the largest load along x, y and z."""
    loads = link_loads(slice, dimension_order(slice), traffic_of(slice, pattern))
    return loads.reshape(-1, 3, 2).max(axis=(0, 2))


@pytest.mark.parametrize("name", ["4x4x4", "4x4x8", "4x8x12"])
def test_loads_are_those_of_rings(name):
    """A ring of an even k carries k / 8 of uniform traffic, k / 2 - 1 of tornado, one of
    neighbour, and k / 4 of bit-complement (Dally and Towles, chapter 3)."""
    slice = Slice.parse(name)
    k = np.array(slice.shape)
    assert largest(slice, "uniform") == pytest.approx(k / 8)
    assert largest(slice, "tornado") == pytest.approx(k / 2 - 1)
    assert largest(slice, "neighbour") == pytest.approx(1)
    assert (largest(slice, "bit-complement") <= k / 2).all()
    assert lower_bounds(slice, traffic_of(slice, "bit-complement"))["cut"] == max(k) / 4
    assert lower_bounds(slice, traffic_of(slice, "uniform"))["average"] == pytest.approx(max(k) / 8)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_chip_sends_a_unit(pattern):
    slice = Slice.parse("4x4x4")
    traffic = traffic_of(slice, pattern)
    assert traffic.sum(axis=1) == pytest.approx(1)
    assert (traffic >= 0).all()
    if pattern != "hotspot":
        assert traffic.sum(axis=0) == pytest.approx(1)


def test_destinations_are_those_of_their_definitions():
    slice = Slice.parse("8x4x8")
    at = slice.coordinates
    for pattern, wanted in {
        "transpose": at[:, ::-1],
        "bit-complement": [7, 3, 7] - at,
        "tornado": (at + np.array([3, 1, 3])) % [8, 4, 8],
        "neighbour": (at + 1) % [8, 4, 8],
    }.items():
        assert (at[destinations(slice, pattern)] == wanted).all(), pattern
    # The complement of every bit of the address, the sides being powers of two.
    assert destinations(slice, "bit-complement").tolist() == list(range(255, -1, -1))
    flat = Slice.parse("8x8", TPU_V5E)
    assert (
        flat.coordinates[destinations(flat, "transpose")][:, :2] == flat.coordinates[:, 1::-1]
    ).all()


def test_a_hot_spot_gets_its_part():
    slice = Slice.parse("4x4x4")
    traffic = traffic_of(slice, "hotspot", hot=0.25)
    assert traffic[5, 0] == pytest.approx(0.25 + 0.75 / 64)
    assert traffic[5, 1] == pytest.approx(0.75 / 64)
    # All but what chip 0 sends itself comes over its six links.
    assert lower_bounds(slice, traffic)["chip"] == pytest.approx(63 * traffic[5, 0] / 6)


def test_what_is_not_defined_is_said():
    slice = Slice.parse("4x4x8")
    with pytest.raises(ValueError, match="the same read backwards, such as 4x4x4"):
        traffic_of(slice, "transpose")
    with pytest.raises(ValueError, match="one of uniform, transpose"):
        traffic_of(slice, "random")
    with pytest.raises(ValueError, match="hot 2"):
        traffic_of(slice, "hotspot", hot=2)
