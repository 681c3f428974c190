import dataclasses
import itertools

import pytest

from topology import PODS, TPU_V3, TPU_V4, TPU_V5P

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


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
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
    assert 2 * 32 * TPU_V3.chip.link_bandwidth == TPU_V3.bisection_bandwidth  # a 32x32 torus
