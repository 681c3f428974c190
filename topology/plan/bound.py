"""Seconds that no program of a step can be faster than, by closed forms."""

from collections.abc import Mapping
from typing import NamedTuple

from topology.plan.machine import Machine


class Bound(NamedTuple):
    """Seconds of a step by closed forms.

    Attributes:
      least: no program is faster: computing and sending hide each other.
      serial: where neither hides; by it ways are compared before anything is compiled.
    """

    least: float
    serial: float


def step_bound(
    *,
    flops: float,
    repeated: float,
    params: float,
    residuals: float,
    mesh: Mapping[str, int],
    machine: Machine,
) -> Bound:
    """Bounds of the seconds of a training step of a transformer on a mesh that fills a slice.

    Computing takes its matmuls at the chip's peak. Every chip sends, over six links in all at most,
    in two bytes a number at least: its part of two gathers of the parameters and one
    reduce-scatter of their gradients over `fsdp`; of one all-reduce of the gradients over `data`;
    and over `tensor` of two all-reduces of the residual stream for each layer forward, and as many
    backward.

    Args:
      flops: of the step's matmuls, all chips together; repeated: those computed again besides.
      params: number of parameters.
      residuals: layers x tokens x width of the residual stream.
      mesh: sizes by axis, `data`, `fsdp`, `sequence` and `tensor`.
    """
    data, fsdp, tensor = (mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    chips = data * fsdp * tensor * mesh.get("sequence", 1)
    computing = (flops + repeated) / (chips * machine.peak)
    gathered = 3 * (fsdp - 1) / fsdp * params / tensor
    summed = 2 * (data - 1) / data * params / (tensor * fsdp)
    activations = 4 * 2 * (tensor - 1) / tensor * residuals / (chips / tensor)
    sending = 2 * (gathered + summed + activations) / (6 * machine.link)
    return Bound(max(computing, sending), computing + sending)
