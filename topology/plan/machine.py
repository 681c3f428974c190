"""The few constants that turn a program into seconds, each with its origin.

One, STRAGGLE, was fitted to published runs on several slices (docs/plan.md); the others are
published, derived, assumed, or what the compiler itself uses.
"""

import dataclasses
from dataclasses import dataclass

from topology.hardware import Pod
from topology.numbers import number

COMPILER_HBM = 0.8  # of the nominal bandwidth; what the compiler for v4 prices HBM at


@dataclass(frozen=True)
class Constant:
    """A constant of the model: its value and where that is from."""

    value: float
    origin: str


CYCLES = {
    "v4": Constant(1.0, "not fitted: the compiler's cycles as they are"),
    "v5p": Constant(1.0, "not fitted, as of v4"),
    "v5e": Constant(1.0, "not fitted, as of v4"),
    "v6e": Constant(1.0, "not fitted, and no run of v6e was looked at"),
}
CLOCKS = {
    "v6e": Constant(
        1.75e9, "derived: four matrix units of 256x256 reach the peak at it, unchecked"
    ),
}
FLASH = Constant(0.5, "assumed: part of the peak that attention kernels without cycles reach")
DCN_PART = Constant(1.0, "not fitted: part of a host's published network that gradients get")
STRAGGLE = Constant(0.02, "fitted: of a step, added for each doubling of the slices")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A chip and its networks, as a program is priced on them.

    Attributes:
      clock: cycles a second, after the chip's factor.
      peak: bf16 FLOP/s; hbm: usable bytes/s of HBM.
      link: usable bytes/s of a link in one direction; hop: seconds of latency.
      flash: part of the peak that a kernel without cycles reaches.
      dcn: bytes/s of a chip's part of its host's network.
      memory: usable bytes of HBM.
    """

    pod: Pod
    clock: float
    peak: float
    hbm: float
    link: float
    hop: float = 1e-6
    flash: float = FLASH.value
    dcn: float
    memory: int

    def __post_init__(self) -> None:
        for name in ("clock", "peak", "hbm", "link", "flash", "dcn", "memory"):
            number(f"machine: {name}", getattr(self, name), above=0)

    def what_if(self, **changes: float) -> "Machine":
        """Returns the same with fields times a factor each: `link=2` doubles the links."""
        return dataclasses.replace(
            self, **{name: getattr(self, name) * factor for name, factor in changes.items()}
        )


USABLE_HBM = {
    "v4": int(30.75 * 2**30),
    "v5p": int(95.74 * 2**30),
    "v5e": int(15.75 * 2**30),
    "v6e": int(31.25 * 2**30),
}
"""Bytes that the compiler leaves to programs: of v4 and v5p by its own errors."""


def machine_of(pod: Pod) -> Machine:
    """The machine of a pod. ValueError where it is none that programs are compiled for."""
    version, chip = pod.version, pod.chip
    if version not in CYCLES:
        raise ValueError(f"pod {pod.name}: programs are priced on {', '.join(CYCLES)}")
    clock = CLOCKS[version].value if chip.clock is None else chip.clock
    host = pod.host
    network = 25e9 if host is None or host.network_bandwidth is None else host.network_bandwidth
    return Machine(
        pod=pod,
        clock=clock / CYCLES[version].value,
        peak=chip.peak_bf16,
        hbm=chip.hbm_bandwidth_usable or COMPILER_HBM * chip.hbm_bandwidth,
        link=chip.usable_link_bandwidth,
        dcn=DCN_PART.value * network / (host.chips if host else 4),
        memory=USABLE_HBM[version],
    )
