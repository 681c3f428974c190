import dataclasses
import itertools
import math

import pytest

from topology import PODS, TPU_V3, TPU_V4, TPU_V5E, TPU_V5P, TPU_V6E, Slice
from topology.hardware import V3_LINKS, block_of, switch_of

ROWS = [
    row
    for pod in PODS.values()
    for row in (pod, pod.chip, pod.host, pod.block, pod.switch)
    if row is not None
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_every_published_figure_has_a_source(row):
    others = {"name", "sources", "chip", "host", "block", "switch"}
    figures = {f.name for f in dataclasses.fields(row)} - others
    assert set(row.sources) == {name for name in figures if getattr(row, name) is not None}


@pytest.mark.parametrize("pod", [p for p in PODS.values() if p.chip.clock], ids=lambda p: p.name)
def test_matrix_units_and_clock_give_the_peak(pod):
    chip = pod.chip
    peak = 2 * chip.matrix_units * chip.matrix_size**2 * chip.clock
    assert peak == pytest.approx(chip.peak_bf16, rel=2e-3)


def test_published_figures_of_a_v4_pod_agree_with_each_other():
    chip = TPU_V4.chip
    usable = chip.link_bandwidth * chip.link_efficiency
    assert usable == 45e9
    assert TPU_V4.num_chips * chip.links * usable == pytest.approx(
        TPU_V4.all_reduce_bandwidth, rel=0.01
    )
    wraps = 2 * 16 * 16  # links that a cut of the 16x16x16 torus crosses
    assert wraps * usable < TPU_V4.bisection_bandwidth < wraps * chip.link_bandwidth
    assert TPU_V4.num_chips / TPU_V4.host.chips == TPU_V4.num_blocks * TPU_V4.block.hosts == 1024
    assert TPU_V4.num_blocks * TPU_V4.block.chips == TPU_V4.num_chips
    assert TPU_V4.num_switches == TPU_V4.block.optical_links / 2
    assert TPU_V4.switch.ports == 2 * TPU_V4.num_blocks + TPU_V4.switch.spare_ports


def test_links_of_a_block():
    places = list(itertools.product(range(4), repeat=3))
    apart = [
        sum(abs(i - j) for i, j in zip(a, b, strict=True))
        for a, b in itertools.combinations(places, 2)
    ]
    assert apart.count(1) == TPU_V4.block.electrical_links
    assert 6 * 64 - 2 * apart.count(1) == TPU_V4.block.optical_links


def test_other_pods():
    assert TPU_V5P.num_blocks * 64 == TPU_V5P.num_chips == 16 * 20 * 28
    assert TPU_V5P.num_chips / TPU_V5P.host.chips == 2240


@pytest.mark.parametrize("pod", [TPU_V5E, TPU_V6E], ids=lambda pod: pod.name)
def test_published_figures_of_a_pod_of_two_dimensions_agree_with_each_other(pod):
    raw, side = pod.chip.link_bandwidth, pod.ring
    assert side**2 == pod.num_chips == max(math.prod(shape) for shape in pod.shapes)
    assert pod.chip.links == 2 * pod.dimensions
    assert pod.num_chips * pod.chip.links * raw == pod.all_reduce_bandwidth
    assert 2 * side * raw == pod.bisection_bandwidth
    assert pod.num_chips // pod.host.chips == 32  # hosts, as the documentation has it
    slice = Slice(shape=(side, side), pod=pod)
    assert slice.bisection_links * raw == pod.bisection_bandwidth


def test_what_sources_say_of_the_links_of_v3():
    """The paper on v4 has the same measure for both; the pod's own figures mean two others."""
    values = list(V3_LINKS.values())
    assert TPU_V3.chip.link_bandwidth == values[0] == 70e9
    assert values[1] == 656e9 / 8
    assert TPU_V3.all_reduce_bandwidth / 1024 / 4 == pytest.approx(values[2], rel=1e-3)
    assert TPU_V3.bisection_bandwidth / (2 * 32) == values[3]  # a 32x32 torus


def test_what_is_not_known_of_a_pod_is_said_with_the_pods_of_which_it_is():
    assert block_of(TPU_V5P).side == 4
    with pytest.raises(ValueError, match="TPU v5e: is not made of blocks; take TPU v4 or TPU v5p"):
        block_of(TPU_V5E)
    with pytest.raises(ValueError, match=r"TPU v5p: how its optical switches.*; take TPU v4$"):
        switch_of(TPU_V5P)
    with pytest.raises(
        ValueError, match="TPU v6e: it has no optical switches, its wiring is fixed"
    ):
        switch_of(TPU_V6E)
