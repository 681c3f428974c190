"""What the machines are made of: chips, hosts, blocks, optical switches and pods, as data.

Bandwidths are bytes/s in one direction, sizes bytes, power watts, clocks Hz. A figure that nobody
has published is None. Every figure's source stands in `sources`, under the name of the figure; one
that is "derived" follows from others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

GiB, MiB = 2**30, 2**20

CLOUD_V3 = "Cloud TPU documentation, TPU v3 (cloud.google.com/tpu/docs/v3)"
CLOUD_V4 = "Cloud TPU documentation, TPU v4 (cloud.google.com/tpu/docs/v4)"
CLOUD_V5P = "Cloud TPU documentation, TPU v5p (cloud.google.com/tpu/docs/v5p)"
ISCA23 = "Jouppi et al., TPU v4, ISCA 2023 (arXiv 2304.01433)"
SCALING_BOOK = "How to Scale Your Model (jax-ml.github.io/scaling-book), chapter TPUs"
COMPILER = "measured: libtpu 0.0.42.1 compiling for v4"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip.

    Attributes:
      matrix_units: on the whole chip; each multiplies and adds matrix_size^2 pairs a cycle.
      link_bandwidth: of one link of the interconnect (ICI), one direction, raw.
      link_efficiency: the part of it that large transfers reach.
      hbm_usable: what a compiled program may fill.
      hbm_bandwidth_usable: what the compiler prices HBM at.
      power: (least, mean, most) measured, in watts.
    """

    name: str
    tensor_cores: int
    matrix_units: int
    matrix_size: int
    clock: float
    peak_bf16: float
    peak_int8: float | None
    hbm: int
    hbm_usable: int | None
    hbm_bandwidth: float
    hbm_bandwidth_usable: float | None
    cmem: int | None
    vmem_per_core: int | None
    sparse_cores: int | None
    links: int
    link_bandwidth: float
    link_efficiency: float | None
    power: tuple[float, float, float] | None
    sources: Mapping[str, str] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host and its chips; pcie_bandwidth is of one chip, network_bandwidth of the host."""

    chips: int
    shape: tuple[int, int, int]
    pcie_bandwidth: float | None
    network_bandwidth: float | None
    sources: Mapping[str, str] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Block:
    """The electrically wired cube of chips, a rack; its optical links leave from its faces."""

    shape: tuple[int, int, int]
    chips: int
    hosts: int
    electrical_links: int
    optical_links: int
    sources: Mapping[str, str] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class OpticalSwitch:
    """An optical circuit switch (OCS).

    Attributes:
      ports: of them spare_ports carry no block's fibre.
      switching_seconds: for a mirror to settle on a new connection. Only "milliseconds" is public:
        10 ms is an upper estimate, ours.
      cost_share, power_share: of the whole system's, with the optics; at most.
    """

    ports: int
    spare_ports: int
    switching_seconds: float
    cost_share: float
    power_share: float
    sources: Mapping[str, str] = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod.

    Attributes:
      host: None where sources disagree.
      num_blocks: None where the pod is not made of blocks.
      block_grid: blocks along x, y and z where they stand for a comparison with fixed wiring.
      num_switches: optical switches; None where there are none, or none published.
      largest_slice: chips.
      all_reduce_bandwidth, bisection_bandwidth: as published, bytes/s.
    """

    name: str
    chip: Chip
    host: Host | None
    block: Block | None
    switch: OpticalSwitch | None
    num_chips: int
    num_blocks: int | None
    block_grid: tuple[int, int, int] | None
    num_switches: int | None
    dimensions: int
    largest_slice: int
    all_reduce_bandwidth: float | None
    bisection_bandwidth: float | None
    sources: Mapping[str, str] = field(repr=False, compare=False)


def _sources(names_of: dict[str, str]) -> dict[str, str]:
    """{source: "figure figure ..."} -> {figure: source}."""
    return {name: source for source, names in names_of.items() for name in names.split()}


TPU_V4_CHIP = Chip(
    name="TPU v4",
    tensor_cores=2,
    matrix_units=8,
    matrix_size=128,
    clock=1.05e9,
    peak_bf16=275e12,
    peak_int8=275e12,
    hbm=32 * GiB,
    hbm_usable=int(30.75 * GiB),
    hbm_bandwidth=1200e9,
    hbm_bandwidth_usable=983e9,
    cmem=128 * MiB,
    vmem_per_core=16 * MiB,
    sparse_cores=4,
    links=6,
    link_bandwidth=50e9,
    link_efficiency=0.9,
    power=(90, 170, 192),
    sources=_sources(
        {
            CLOUD_V4: "tensor_cores matrix_units peak_bf16 peak_int8 hbm hbm_bandwidth power",
            ISCA23: "matrix_size clock cmem vmem_per_core sparse_cores links link_bandwidth",
            COMPILER: "hbm_usable hbm_bandwidth_usable",
            "derived: the 1.1 PB/s all-reduce of a pod (" + CLOUD_V4 + ") are 45 GB/s on each of "
            "6 links of 4096 chips": "link_efficiency",
        }
    ),
)

TPU_V5P_CHIP = Chip(
    name="TPU v5p",
    tensor_cores=2,
    matrix_units=8,
    matrix_size=128,
    clock=1.75e9,
    peak_bf16=459e12,
    peak_int8=918e12,
    hbm=95 * GiB,
    hbm_usable=None,
    hbm_bandwidth=2765e9,
    hbm_bandwidth_usable=None,
    cmem=None,
    vmem_per_core=None,
    sparse_cores=4,
    links=6,
    link_bandwidth=100e9,
    link_efficiency=None,
    power=None,
    sources=_sources(
        {
            CLOUD_V5P: "tensor_cores matrix_units peak_bf16 hbm hbm_bandwidth sparse_cores links",
            SCALING_BOOK: "matrix_size peak_int8",
            "derived: peak_bf16 over the matrix units' operations a cycle": "clock",
            "derived: 1200 GB/s of both directions of six links ("
            + CLOUD_V5P
            + "), as in "
            + SCALING_BOOK: "link_bandwidth",
        }
    ),
)

TPU_V3_CHIP = Chip(
    name="TPU v3",
    tensor_cores=2,
    matrix_units=4,
    matrix_size=128,
    clock=0.94e9,
    peak_bf16=123e12,
    peak_int8=None,
    hbm=32 * GiB,
    hbm_usable=None,
    hbm_bandwidth=900e9,
    hbm_bandwidth_usable=None,
    cmem=None,
    vmem_per_core=None,
    sparse_cores=None,
    links=4,
    link_bandwidth=100e9,
    link_efficiency=None,
    power=(123, 220, 262),
    sources=_sources(
        {
            CLOUD_V3: "tensor_cores matrix_units peak_bf16 hbm hbm_bandwidth power links",
            SCALING_BOOK: "matrix_size link_bandwidth",
            "derived: peak_bf16 over the matrix units' operations a cycle": "clock",
        }
    ),
)

# v5p has the same host and block; its pod is larger.
HOST = Host(
    chips=4,
    shape=(2, 2, 1),
    pcie_bandwidth=16e9,
    network_bandwidth=25e9,
    sources=_sources(
        {
            CLOUD_V4: "chips shape",
            SCALING_BOOK + ", about": "pcie_bandwidth network_bandwidth",
        }
    ),
)

BLOCK = Block(
    shape=(4, 4, 4),
    chips=64,
    hosts=16,
    electrical_links=144,
    optical_links=96,
    sources=_sources(
        {
            ISCA23: "shape chips hosts optical_links",
            "derived: 3 x 4 x 4 x 3 links of a 4x4x4 mesh": "electrical_links",
        }
    ),
)

OPTICAL_SWITCH = OpticalSwitch(
    ports=136,
    spare_ports=8,
    switching_seconds=10e-3,
    cost_share=0.05,
    power_share=0.03,
    sources=_sources(
        {
            ISCA23: "ports spare_ports cost_share power_share",
            ISCA23 + ": milliseconds; 10 is our upper estimate": "switching_seconds",
        }
    ),
)

TPU_V4 = Pod(
    name="TPU v4",
    chip=TPU_V4_CHIP,
    host=HOST,
    block=BLOCK,
    switch=OPTICAL_SWITCH,
    num_chips=4096,
    num_blocks=64,
    block_grid=(4, 4, 4),
    num_switches=48,
    dimensions=3,
    largest_slice=4096,
    all_reduce_bandwidth=1.1e15,
    bisection_bandwidth=24e12,
    sources=_sources(
        {
            CLOUD_V4: "num_chips dimensions largest_slice all_reduce_bandwidth bisection_bandwidth",
            ISCA23: "num_blocks block_grid num_switches",
        }
    ),
)

TPU_V5P = Pod(
    name="TPU v5p",
    chip=TPU_V5P_CHIP,
    host=HOST,
    block=BLOCK,
    switch=None,
    num_chips=8960,
    num_blocks=140,
    block_grid=(4, 5, 7),
    num_switches=None,
    dimensions=3,
    largest_slice=6144,
    all_reduce_bandwidth=None,
    bisection_bandwidth=None,
    sources=_sources(
        {
            CLOUD_V5P: "num_chips dimensions largest_slice",
            "derived: 8960 chips in cubes of 64": "num_blocks",
            "derived: 16x20x28 chips (" + SCALING_BOOK + ")": "block_grid",
        }
    ),
)

TPU_V3 = Pod(
    name="TPU v3",
    chip=TPU_V3_CHIP,
    host=None,
    block=None,
    switch=None,
    num_chips=1024,
    num_blocks=None,
    block_grid=None,
    num_switches=None,
    dimensions=2,
    largest_slice=1024,
    all_reduce_bandwidth=340e12,
    bisection_bandwidth=6.4e12,
    sources=_sources(
        {
            CLOUD_V3: "num_chips dimensions largest_slice all_reduce_bandwidth bisection_bandwidth",
        }
    ),
)

PODS = {pod.name: pod for pod in (TPU_V4, TPU_V5P, TPU_V3)}
