"""Cost of a dataflow on an accelerator, and a lower bound of that of every dataflow."""

import math
from dataclasses import dataclass
from typing import TypeVar

from topology.accelerator.accelerator import Accelerator
from topology.accelerator.workloads import Attention
from topology.arrays import Floats
from topology.numbers import choice

SOFTMAX = ("free", "overlapped", "in-turn")
_SUMS = ("off_chip_bytes", "on_chip_bytes", "array_cycles", "vector_cycles")
_SUMS += ("cycles", "seconds", "energy")
SOFTMAX_OPERATIONS = 4  # of a logit: largest, exponential of the difference, sum, quotient
SOFTMAX_ACCESSES = 5  # of a logit in the buffer: the first reads; the others read, two also write


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a computation on an accelerator.

    Attributes:
      macs: multiplications and additions.
      live_buffer: bytes in use at once; what the buffer does not hold of them is spilled.
      off_chip_bytes, on_chip_bytes: moved from and to the memory off the chip, and the buffer.
      array_cycles, vector_cycles: that the matrix array and the vector lanes work.
      seconds, energy: of all of it, joules.
      utilisation: of the matrix array: macs over what it could do in these seconds.
      mapping: how, in words.
    """

    macs: int
    live_buffer: float
    off_chip_bytes: float
    on_chip_bytes: float
    array_cycles: float
    vector_cycles: float
    cycles: float
    seconds: float
    energy: float
    utilisation: float
    mapping: str = ""


Amount = TypeVar("Amount", float, Floats)


def check_softmax(softmax: str) -> None:
    choice("softmax", softmax, SOFTMAX)


def vector_cycles(accelerator: Accelerator, work: Attention, softmax: str) -> float:
    """Cycles that the vector lanes take for the softmax of an attention; 0 where it is "free"."""
    check_softmax(softmax)
    operations = 0 if softmax == "free" else SOFTMAX_OPERATIONS * work.logits
    return operations / accelerator.vector_lanes


def softmax_bytes(work: Attention, softmax: str) -> float:
    """Bytes that the softmax of an attention moves to and from the buffer; 0 where it is "free"."""
    return 0 if softmax == "free" else SOFTMAX_ACCESSES * work.logits * work.bytes_per_logit


def energy_of(
    accelerator: Accelerator, macs: float, vector: float, on_chip: Amount, off_chip: Amount
) -> Amount:
    """Joules of so many macs, cycles of all vector lanes, and bytes."""
    joules = accelerator.energy
    return (
        macs * joules.mac
        + vector * accelerator.vector_lanes * joules.vector_operation
        + on_chip * joules.on_chip_byte
        + off_chip * joules.off_chip_byte
    )


def lower_bound(accelerator: Accelerator, work: Attention, softmax: str = "free") -> Cost:
    """Lower bound of the cost of an attention by any dataflow, with a buffer of any size.

    Every processing element busy in every cycle; Q, K and V read once and the output written once;
    the vector lanes busy with the softmax; the longest of the three hides the others.
    """
    vector = vector_cycles(accelerator, work, softmax)
    array = work.macs / accelerator.array.elements
    moved = work.compulsory_bytes
    cycles = max(array, vector, moved / accelerator.off_chip_bandwidth * accelerator.frequency)
    return Cost(
        macs=work.macs,
        live_buffer=0,
        off_chip_bytes=moved,
        on_chip_bytes=moved,
        array_cycles=array,
        vector_cycles=vector,
        cycles=cycles,
        seconds=cycles / accelerator.frequency,
        energy=energy_of(accelerator, work.macs, vector, moved, moved),
        utilisation=array / cycles,
        mapping="lower bound",
    )


def add(costs: list[Cost], mapping: str = "") -> Cost:
    """Total cost of phases that run one after another."""
    total = {name: math.fsum(getattr(cost, name) for cost in costs) for name in _SUMS}
    ideal = sum(cost.utilisation * cost.seconds for cost in costs)
    return Cost(
        macs=sum(cost.macs for cost in costs),
        live_buffer=max(cost.live_buffer for cost in costs),
        utilisation=ideal / total["seconds"],
        mapping=mapping,
        **total,
    )
