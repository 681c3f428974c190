"""Accelerators as the dataflow model sees them: their parts and costs, as data.

A matrix array that multiplies and adds, vector lanes beside it, a buffer on the chip, memory off
it, and levels between the two where there are any. Bandwidths are bytes/s, sizes bytes, frequencies
Hz, energies joules. Every figure's source stands in `sources` under its name; what no public source
fixes is called an assumption there.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from topology.hardware import TPU_V4_CHIP, MiB, published
from topology.numbers import choice

KiB = 2**10

FLAT_PAPER = "Kao et al., FLAT (ASPLOS 2023, arXiv 2107.06419), platforms"
INDEPENDENT = "data of FPSG-UIUC/micro24-fusemax-artifact: platforms of its model of FLAT"
LESSONS = "Jouppi et al., Ten Lessons From Three Generations (ISCA 2021), table 2, 7 nm"
SCALING_BOOK = "How to Scale Your Model (jax-ml.github.io/scaling-book), chapter TPUs"
ASSUMED = "assumption"


@dataclass(frozen=True, kw_only=True)
class MatrixArray:
    """Processing elements, each one multiplication and addition a cycle.

    Attributes:
      rows, columns: of one array.
      count: arrays alike, which share the work evenly.
      reshapes: whether the elements of an array may be laid out as any rows x columns of powers of
        two; a systolic array cannot.
      load_cycles: to load what stays in the array; hidden behind what is streamed past it, if that
        takes as long.
    """

    rows: int
    columns: int
    count: int = 1
    reshapes: bool = False
    load_cycles: int = 0

    @property
    def elements(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of every layout, the built one first."""
        built = self.rows, self.columns
        area = self.rows * self.columns
        halves = [(2**i, area // 2**i) for i in range(area.bit_length()) if area % 2**i == 0]
        return [built, *(shape for shape in halves if self.reshapes and shape != built)]


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules: of a multiplication and addition, of a vector lane's operation, of a byte moved."""

    mac: float
    vector_operation: float
    on_chip_byte: float
    off_chip_byte: float


@dataclass(frozen=True, kw_only=True)
class Level:
    """Level of memory between the buffer and the memory off the chip.

    Attributes:
      size: bytes.
      bandwidth: bytes/s that it gives to and takes from the level inside of it.
      byte_energy: joules of a byte that enters or leaves it.
    """

    name: str
    size: int
    bandwidth: float
    byte_energy: float


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Accelerator with one matrix array, vector lanes, a buffer on the chip and memory off it.

    Attributes:
      buffer: next to the array, software-managed.
      levels: between the buffer and memory, from the inside outwards.
      vector_lanes: operations of the softmax in a cycle.
      tile_seconds: that a tile of attention costs besides its work.
    """

    name: str
    array: MatrixArray
    vector_lanes: int
    buffer: int
    on_chip_bandwidth: float
    off_chip_bandwidth: float
    frequency: float
    energy: Energy
    levels: tuple[Level, ...] = ()
    tile_seconds: float = 0.0
    sources: Mapping[str, str] = field(repr=False, compare=False)

    def replace(self, **changes: Any) -> "Accelerator":
        """Returns a copy with the given fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)


_PAPER_SOURCES = {
    "array": FLAT_PAPER + "; that it takes any shape: " + ASSUMED,
    "buffer": FLAT_PAPER,
    "on_chip_bandwidth": FLAT_PAPER,
    "off_chip_bandwidth": FLAT_PAPER,
    "frequency": INDEPENDENT,
    "levels": FLAT_PAPER + ": none",
    "vector_lanes": ASSUMED + ": as many as a side of the array, as in " + INDEPENDENT,
    "tile_seconds": ASSUMED + ": none",
    "energy": ASSUMED + ": about that of " + LESSONS + "; off-chip byte: " + INDEPENDENT,
}
# A 16-bit product 0.34 and sum 0.16 pJ, 8 bytes of SRAM 14 pJ; the rows have 32 pJ a byte.
_PAPER_ENERGY = Energy(
    mac=0.5e-12, vector_operation=0.5e-12, on_chip_byte=1.75e-12, off_chip_byte=32e-12
)

EDGE = Accelerator(
    name="edge",
    array=MatrixArray(rows=32, columns=32, reshapes=True),
    vector_lanes=32,
    buffer=512 * KiB,
    on_chip_bandwidth=1e12,
    off_chip_bandwidth=50e9,
    frequency=940e6,
    energy=_PAPER_ENERGY,
    sources=_PAPER_SOURCES,
)

CLOUD = Accelerator(
    name="cloud",
    array=MatrixArray(rows=256, columns=256, reshapes=True),
    vector_lanes=256,
    buffer=32 * MiB,
    on_chip_bandwidth=8e12,
    off_chip_bandwidth=400e9,
    frequency=940e6,
    energy=_PAPER_ENERGY,
    sources=_PAPER_SOURCES,
)

_INDEPENDENT_SOURCES = {
    **_PAPER_SOURCES,
    "array": INDEPENDENT,
    "buffer": INDEPENDENT,
    "off_chip_bandwidth": INDEPENDENT + ", in GiB/s",
    "on_chip_bandwidth": ASSUMED + ": without limit, as in " + INDEPENDENT,
}

INDEPENDENT_EDGE = EDGE.replace(
    name="independent-edge",
    array=MatrixArray(rows=32, columns=32),
    off_chip_bandwidth=50 * 2**30,
    on_chip_bandwidth=math.inf,
    sources=_INDEPENDENT_SOURCES,
)

INDEPENDENT_CLOUD = CLOUD.replace(
    name="independent-cloud",
    array=MatrixArray(rows=256, columns=256),
    off_chip_bandwidth=400 * 2**30,
    on_chip_bandwidth=math.inf,
    sources=_INDEPENDENT_SOURCES,
)

_CORES = TPU_V4_CHIP.tensor_cores

# One TensorCore: a kernel runs on one, and both of a chip share the memory off it.
TPU_V4_CORE = Accelerator(
    name="tpu-v4",
    array=MatrixArray(
        rows=TPU_V4_CHIP.matrix_size,
        columns=TPU_V4_CHIP.matrix_size,
        count=TPU_V4_CHIP.matrix_units // _CORES,
        load_cycles=TPU_V4_CHIP.matrix_size,
    ),
    vector_lanes=8 * 128,
    buffer=published("VMEM of TPU v4", TPU_V4_CHIP.vmem_per_core),
    on_chip_bandwidth=22 * TPU_V4_CHIP.hbm_bandwidth / _CORES,
    off_chip_bandwidth=TPU_V4_CHIP.hbm_bandwidth / _CORES,
    frequency=published("clock of TPU v4", TPU_V4_CHIP.clock),
    energy=Energy(
        mac=0.59e-12, vector_operation=0.38e-12, on_chip_byte=1.75e-12, off_chip_byte=44e-12
    ),
    tile_seconds=0.35e-6,
    sources={
        "array": "topology.hardware: half the chip's matrix units; that loading a weight tile takes"
        " as many cycles as it has rows: " + ASSUMED,
        "vector_lanes": SCALING_BOOK
        + ": 8 x 128; that each does one operation a cycle: "
        + ASSUMED,
        "buffer": "topology.hardware: VMEM of a TensorCore",
        "levels": ASSUMED + ": the chip's CMEM is left out, kernels are not given it",
        "on_chip_bandwidth": SCALING_BOOK + ": VMEM has about 22 times the bandwidth of HBM",
        "off_chip_bandwidth": "topology.hardware: half the chip's HBM bandwidth",
        "frequency": "topology.hardware",
        "tile_seconds": ASSUMED + ": a step of a Pallas grid, a third of a microsecond",
        "energy": ASSUMED
        + ": about that of "
        + LESSONS
        + ": bfloat16 product 0.21, float32 sum 0.38 pJ; 1 MiB SRAM 14 pJ, HBM2"
        " 350 pJ for 8 bytes",
    },
)

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (EDGE, CLOUD, INDEPENDENT_EDGE, INDEPENDENT_CLOUD, TPU_V4_CORE)
}


def accelerator(name: str) -> Accelerator:
    """Returns the accelerator of a name.

    Raises:
      ValueError: there is none of that name.
    """
    return ACCELERATORS[choice("platform", name, ACCELERATORS)]
