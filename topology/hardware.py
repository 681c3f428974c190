"""Machines as data: chips, hosts, blocks, optical switches and pods.

Bandwidths are bytes/s in one direction, sizes bytes, power watts, clocks Hz. A figure that nobody
has published is None. Every figure's source stands in `sources`, under the name of the figure; one
that is "derived" follows from others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from topology.numbers import number

T = TypeVar("T")

GiB, MiB = 2**30, 2**20

CLOUD_V3 = "Cloud TPU documentation, TPU v3 (cloud.google.com/tpu/docs/v3)"
CLOUD_V4 = "Cloud TPU documentation, TPU v4 (cloud.google.com/tpu/docs/v4)"
CLOUD_V5P = "Cloud TPU documentation, TPU v5p (cloud.google.com/tpu/docs/v5p)"
CLOUD_V5E = "Cloud TPU documentation, TPU v5e (cloud.google.com/tpu/docs/v5e)"
CLOUD_V6E = "Cloud TPU documentation, TPU v6e (cloud.google.com/tpu/docs/v6e)"
CACM20 = "Jouppi et al., A Domain-Specific Supercomputer, CACM 63(7), 2020"
ISCA23 = "Jouppi et al., TPU v4, ISCA 2023 (arXiv 2304.01433)"
SCALING_BOOK = "How to Scale Your Model (jax-ml.github.io/scaling-book), chapter TPUs"
JAX_INFO = "JAX 0.10.2, jax/_src/pallas/mosaic/tpu_info.py"
COMPILER = "measured: libtpu 0.0.42.1 compiling for v4"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Chip of an accelerator, as data.

    Attributes:
      matrix_units: on the whole chip; each multiplies and adds matrix_size^2 pairs a cycle.
      clock: None where it is not published and sources of the matrix units disagree.
      links: of the interconnect (ICI), two for each dimension of the pod.
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
    clock: float | None
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

    @property
    def usable_link_bandwidth(self) -> float:
        """Bytes/s that large transfers reach over a link in one direction; raw where unknown."""
        return self.link_bandwidth * (self.link_efficiency or 1.0)


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

    @property
    def side(self) -> int:
        """Chips along a side of the cube."""
        return self.shape[0]


@dataclass(frozen=True, kw_only=True)
class OpticalSwitch:
    """An optical circuit switch (OCS).

    Attributes:
      ports: of them spare_ports carry no block's fibre.
      switching_seconds: for a mirror to settle on a new connection. Only "milliseconds" is public:
        10 ms is this project's upper estimate.
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
    """Pod of an accelerator's generation, as data; one made of blocks is a `BlockPod`.

    Attributes:
      host: None where sources disagree.
      block: None where the pod is not made of blocks.
      switch: None where there is none, or its wiring is not published.
      num_blocks: None where the pod is not made of blocks.
      block_grid: blocks along x, y and z where they stand for a comparison with fixed wiring.
      num_switches: optical switches; None where there are none, or none published.
      dimensions: of the torus, 2 or 3.
      largest_slice: chips.
      shapes: slices smaller than a block; of a pod without blocks all that there are. Chips along
        each dimension, ascending. None where they are not published.
      ring: chips along a dimension of a pod without blocks that wraps around; shorter ones do not.
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
    shapes: tuple[tuple[int, ...], ...] | None
    ring: int | None
    all_reduce_bandwidth: float | None
    bisection_bandwidth: float | None
    sources: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def version(self) -> str:
        """The name of the pod on the command line, and Ray's and Google Cloud's: "v4"."""
        return self.name.removeprefix("TPU ")


@dataclass(frozen=True, kw_only=True)
class BlockPod(Pod):
    """Pod made of blocks, which slices of whole blocks are made of."""

    block: Block
    num_blocks: int
    block_grid: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class SwitchedPod(BlockPod):
    """Pod whose blocks are joined by optical switches, of published wiring."""

    switch: OpticalSwitch
    num_switches: int


@dataclass(frozen=True, kw_only=True)
class AnyTorus(Pod):
    """Network of one's own, of which any box of chips is a slice: `any_torus` makes one.

    A dimension of three chips or more wraps around unless a slice says otherwise; one of two where
    it says so (two links then join its chips). A twist shifts by any number of chips.

    Attributes:
      link_rates: of links along x, y and z, in parts of the chip's `link_bandwidth`.
    """

    link_rates: tuple[float, float, float] = (1.0, 1.0, 1.0)


def of_blocks(pod: Pod) -> BlockPod:
    """Returns a pod that is made of blocks. ValueError where it is not."""
    if not isinstance(pod, BlockPod):
        raise ValueError(f"pod {pod.name}: is not made of blocks; take {_those_of(BlockPod)}")
    return pod


def switched(pod: Pod) -> SwitchedPod:
    """Returns a pod that has optical switches. ValueError where it has none, or none whose wiring
    is public."""
    if not isinstance(pod, SwitchedPod):
        why = "it has no optical switches, its wiring is fixed"
        if isinstance(pod, BlockPod):
            why = "how its optical switches are wired is not published"
        raise ValueError(f"pod {pod.name}: {why}; take {_those_of(SwitchedPod)}")
    return pod


def block_of(pod: Pod) -> Block:
    """The block that a pod is made of. ValueError where it is made of none."""
    return of_blocks(pod).block


def switch_of(pod: Pod) -> OpticalSwitch:
    """The optical switch of a pod. ValueError where it has none, or none whose wiring is public."""
    return switched(pod).switch


def host_of(pod: Pod) -> Host:
    """The host of a pod. ValueError where sources disagree about it."""
    return published(f"pod {pod.name}: the host", pod.host)


def published(name: str, figure: T | None) -> T:
    """A figure that some source gives. ValueError, which begins with its name, where it is None."""
    if figure is None:
        raise ValueError(f"{name} is not published")
    return figure


def _those_of(kind: type[Pod]) -> str:
    return " or ".join(pod.name for pod in PODS.values() if isinstance(pod, kind))


def _sources(names_of: dict[str, str]) -> dict[str, str]:
    """Turns {source: "figure figure ..."} into {figure: source}."""
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
    vmem_per_core=64 * MiB,
    sparse_cores=4,
    links=6,
    link_bandwidth=100e9,
    link_efficiency=0.9,
    power=None,
    sources=_sources(
        {
            CLOUD_V5P: "tensor_cores matrix_units peak_bf16 hbm hbm_bandwidth sparse_cores links",
            SCALING_BOOK: "matrix_size peak_int8",
            JAX_INFO: "vmem_per_core",
            "derived: peak_bf16 over the matrix units' operations a cycle": "clock",
            f"derived: 1200 GB/s of both directions of six links ({CLOUD_V5P})": "link_bandwidth",
            SCALING_BOOK + ": 90 GB/s reach one link": "link_efficiency",
        }
    ),
)

TPU_V5E_CHIP = Chip(
    name="TPU v5e",
    tensor_cores=1,
    matrix_units=4,
    matrix_size=128,
    clock=1.5e9,
    peak_bf16=197e12,
    peak_int8=393e12,
    hbm=16 * GiB,
    hbm_usable=None,
    hbm_bandwidth=819e9,
    hbm_bandwidth_usable=None,
    cmem=None,
    vmem_per_core=128 * MiB,
    sparse_cores=0,
    links=4,
    link_bandwidth=50e9,
    link_efficiency=0.9,
    power=None,
    sources=_sources(
        {
            CLOUD_V5E: "tensor_cores matrix_units peak_bf16 peak_int8 hbm hbm_bandwidth links",
            CLOUD_V6E + ", where the two are compared": "sparse_cores",
            SCALING_BOOK: "matrix_size clock vmem_per_core",
            f"derived: 400 GB/s of both directions of four links ({CLOUD_V5E})": "link_bandwidth",
            SCALING_BOOK + ": 45 GB/s reach one link": "link_efficiency",
        }
    ),
)

# The documentation of v6e has said 4 matrix units of 256x256, and now says 2, as JAX does. They
# reach the peak at 1.75 or at 3.5 GHz, so the clock is unknown.
TPU_V6E_CHIP = Chip(
    name="TPU v6e",
    tensor_cores=1,
    matrix_units=2,
    matrix_size=256,
    clock=None,
    peak_bf16=918e12,
    peak_int8=1836e12,
    hbm=32 * GiB,
    hbm_usable=None,
    hbm_bandwidth=1638e9,
    hbm_bandwidth_usable=None,
    cmem=None,
    vmem_per_core=128 * MiB,
    sparse_cores=2,
    links=4,
    link_bandwidth=100e9,
    link_efficiency=0.9,
    power=None,
    sources=_sources(
        {
            CLOUD_V6E: "tensor_cores matrix_units matrix_size peak_bf16 peak_int8 hbm "
            "hbm_bandwidth links",
            JAX_INFO: "vmem_per_core sparse_cores",
            f"derived: 800 GB/s of both directions of four links ({CLOUD_V6E})": "link_bandwidth",
            SCALING_BOOK + ": 90 GB/s reach one link": "link_efficiency",
        }
    ),
)

V3_LINKS = {
    ISCA23 + ", table 4": 70e9,
    CACM20 + ": 656 Gbit/s": 82e9,
    f"derived: the 340 TB/s all-reduce of 1024 chips with 4 links ({CLOUD_V3})": 83e9,
    f"derived: the bisection of 6.4 TB/s over 64 links ({CLOUD_V3})": 100e9,
    SCALING_BOOK: 100e9,
}
"""Bytes/s in one direction of a link of TPU v3, as sources have it; they do not agree.

The paper on the chip gives the rate of the wire, 82 GB/s, which the published all-reduce means
too. The paper on TPU v4 gives 70 GB/s for v3 in the table that gives 50 GB/s for v4, so these two
are measured alike, and a comparison of v3 with v4 takes them: `TPU_V3_CHIP` has 70. The 100 GB/s
of the scaling book stand in neither paper; they are what the published bisection comes to.
"""

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
    sparse_cores=2,
    links=4,
    link_bandwidth=70e9,
    link_efficiency=None,
    power=(123, 220, 262),
    sources=_sources(
        {
            CLOUD_V3: "tensor_cores matrix_units peak_bf16 hbm hbm_bandwidth power links",
            SCALING_BOOK: "matrix_size",
            ISCA23 + ", table 4; others in V3_LINKS": "link_bandwidth",
            ISCA23 + ", table 4": "sparse_cores",
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

HOST_V5E = Host(
    chips=8,
    shape=(2, 4, 1),
    pcie_bandwidth=16e9,
    network_bandwidth=25e9,
    sources=_sources(
        {
            CLOUD_V5E: "chips network_bandwidth",
            SCALING_BOOK: "shape",
            SCALING_BOOK + ", about": "pcie_bandwidth",
        }
    ),
)

HOST_V6E = Host(
    chips=8,
    shape=(2, 4, 1),
    pcie_bandwidth=32e9,
    network_bandwidth=100e9,
    sources=_sources(
        {
            CLOUD_V6E: "chips network_bandwidth",
            SCALING_BOOK: "shape",
            SCALING_BOOK + ", about": "pcie_bandwidth",
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

_INSIDE_A_BLOCK = ((1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_OF_ONE_RING = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))

TPU_V4 = SwitchedPod(
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
    shapes=_INSIDE_A_BLOCK,
    ring=None,
    all_reduce_bandwidth=1.1e15,
    bisection_bandwidth=24e12,
    sources=_sources(
        {
            CLOUD_V4: "num_chips dimensions largest_slice all_reduce_bandwidth bisection_bandwidth",
            ISCA23: "num_blocks block_grid num_switches",
            "derived: whole hosts inside a block": "shapes",
        }
    ),
)

TPU_V5P = BlockPod(
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
    shapes=_INSIDE_A_BLOCK,
    ring=None,
    all_reduce_bandwidth=None,
    bisection_bandwidth=None,
    sources=_sources(
        {
            CLOUD_V5P: "num_chips dimensions largest_slice",
            "derived: 8960 chips in cubes of 64": "num_blocks",
            "derived: 16x20x28 chips (" + SCALING_BOOK + ")": "block_grid",
            "derived: whole hosts inside a block": "shapes",
        }
    ),
)

TPU_V5E = Pod(
    name="TPU v5e",
    chip=TPU_V5E_CHIP,
    host=HOST_V5E,
    block=None,
    switch=None,
    num_chips=256,
    num_blocks=None,
    block_grid=None,
    num_switches=None,
    dimensions=2,
    largest_slice=256,
    shapes=_OF_ONE_RING,
    ring=16,
    all_reduce_bandwidth=51.2e12,
    bisection_bandwidth=1.6e12,
    sources=_sources(
        {
            CLOUD_V5E: "num_chips dimensions largest_slice shapes all_reduce_bandwidth "
            "bisection_bandwidth",
            SCALING_BOOK: "ring",
        }
    ),
)

TPU_V6E = Pod(
    name="TPU v6e",
    chip=TPU_V6E_CHIP,
    host=HOST_V6E,
    block=None,
    switch=None,
    num_chips=256,
    num_blocks=None,
    block_grid=None,
    num_switches=None,
    dimensions=2,
    largest_slice=256,
    shapes=_OF_ONE_RING,
    ring=16,
    all_reduce_bandwidth=102.4e12,
    bisection_bandwidth=3.2e12,
    sources=_sources(
        {
            CLOUD_V6E: "num_chips dimensions largest_slice shapes all_reduce_bandwidth "
            "bisection_bandwidth",
            SCALING_BOOK: "ring",
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
    shapes=None,
    ring=None,
    all_reduce_bandwidth=340e12,
    bisection_bandwidth=6.4e12,
    sources=_sources(
        {
            CLOUD_V3: "num_chips dimensions largest_slice all_reduce_bandwidth bisection_bandwidth",
        }
    ),
)


def any_torus(link_bandwidth: float | Sequence[float] | None = None) -> AnyTorus:
    """A network of one's own, whose slices are boxes of up to 65,536 chips of any sides.

    Args:
      link_bandwidth: bytes/s of a link in one direction that transfers reach; three where links
        along x, y and z have their own. By default those of TPU v4.

    Raises:
      ValueError: there are two of them or more than three, or one is not positive.
    """
    given = () if link_bandwidth is None else link_bandwidth
    bandwidths = tuple(given) if isinstance(given, Sequence) else (given,)
    if link_bandwidth is not None and len(bandwidths) not in (1, 3):
        raise ValueError(f"link_bandwidth: {len(bandwidths)}; one for all links, or of x, y and z")
    for bandwidth in bandwidths:
        number("link_bandwidth", bandwidth, above=0, unit="bytes a second")
    chip, fastest = TPU_V4_CHIP, max(bandwidths, default=0.0)
    if bandwidths:
        chip = replace(chip, link_bandwidth=fastest, link_efficiency=1.0)
    x, y, z = (b / fastest for b in bandwidths) if len(bandwidths) == 3 else (1.0,) * 3
    return AnyTorus(
        name="own design",
        chip=replace(chip, name="chip of a torus"),
        host=None,
        block=None,
        switch=None,
        num_chips=2**16,
        num_blocks=None,
        block_grid=None,
        num_switches=None,
        dimensions=3,
        largest_slice=2**16,
        shapes=None,
        ring=None,
        all_reduce_bandwidth=None,
        bisection_bandwidth=None,
        link_rates=(x, y, z),
        sources={},
    )


PODS: dict[str, Pod] = {pod.name: pod for pod in (TPU_V4, TPU_V5P, TPU_V5E, TPU_V6E, TPU_V3)}
