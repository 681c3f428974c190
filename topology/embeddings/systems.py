"""Steps of a recommendation model on TPU v3, v4, v4 without SparseCores, and processors.

The published figures of the TPU v4 paper are ratios of such steps. They leave open the sizes of the
model DLRM0: two numbers are fitted to the ratios (`Fit`). What sources do not say, and no ratio
decides, is a `Reading`; all are computed.

The matrix units do the dense part, the SparseCores gather, exchange and update rows, meanwhile or
in turn. Times are in units of a step of v4 on 128 chips.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from topology.hardware import TPU_V3_CHIP, TPU_V4_CHIP
from topology.routing.throughput import all_to_all, closed_form
from topology.torus.shapes import NO_TWIST, legal_shapes, shipped_twist
from topology.torus.slices import Slice

CHIPS = 128  # of the published comparison, and of the unit
SOCKET_DRAM = 128e9
"""Bytes/s of a Skylake socket's six channels of DDR4-2666; two sockets are a TPU v4 host."""
HOST_CHIPS, HOST_SOCKETS = 4, 2
LEARNERS, SERVERS = 400, 176  # sockets of the paper's cluster without TPUs
CPU_GAIN = 30.1  # of v4 over that cluster: the anchor by which a learner's speed is known
SHAPES = {64: (8, 8), 128: (8, 16), 256: (16, 16), 512: (16, 32), 1024: (32, 32)}
"""Slices of TPU v3 by their chips. By one reading only the largest, the pod, wraps around."""


@dataclass(frozen=True)
class Reading:
    """A reading of what the public facts leave open.

    Attributes:
      v3_wraps: slices of TPU v3 below a pod are tori, not meshes.
      v4_twists: slices of TPU v4 are twisted where they can be.
      rows_by: what limits rows on the chip, "hbm" or "sparsecore": its bandwidth, or the number of
        cores and their clock.
      overlaps: matrix units work while the SparseCores do; else the one waits for the other.
    """

    v3_wraps: bool = False
    v4_twists: bool = True
    rows_by: str = "sparsecore"
    overlaps: bool = True


def readings() -> Iterator[Reading]:
    """All readings. (Tables without SparseCores on 64 external servers, not in the 32 hosts of two
    sockets, would be as fast, so that this is none.)"""
    for values in itertools.product(
        (False, True), (True, False), ("sparsecore", "hbm"), (False, True)
    ):
        yield Reading(*values)


@dataclass(frozen=True)
class Fit:
    """The numbers that are fitted.

    Attributes:
      rows: the part of the SparseCores' time, on 128 chips of v4, in which rows are gathered and
        updated.
      peers: the part that other chips cost, whatever is sent to them; what remains is the exchange.
      idle: the part of the step in which the SparseCores of v4 wait: published, not fitted.
    """

    rows: float
    peers: float
    idle: float = 0.25

    @property
    def network(self) -> float:
        """The part of the SparseCores' time that is the exchange."""
        return 1 - self.rows - self.peers

    @property
    def busy(self) -> float:
        """The SparseCores' part of a step."""
        return 1 - self.idle


def v4_slice(chips: int, twisted: bool) -> Slice:
    """The most cubic slice of TPU v4, twisted where a twist ships and is asked for."""
    shape = min(
        (shape for shape in legal_shapes(chips // 64) if math.prod(shape) == chips),
        key=lambda shape: (max(shape), -min(shape)),
    )
    return Slice(shape=shape, twist=(shipped_twist(shape) if twisted else None) or NO_TWIST)


@functools.lru_cache
def exchange(version: str, chips: int, reading: Reading) -> float:
    """Seconds of an all-to-all in which each chip sends one byte in all, by the exact optimum."""
    if version == "v4":
        slice = v4_slice(chips, reading.v4_twists)
        load = closed_form(slice) or all_to_all(slice).max_link_load
        return load / chips / TPU_V4_CHIP.link_bandwidth
    shape = SHAPES[chips]
    wraps = reading.v3_wraps or chips == max(SHAPES)
    load = max(k**2 // 4 * (chips // k) for k in shape) / (1 + wraps)
    return load / chips / TPU_V3_CHIP.link_bandwidth


def sparse_rate(version: str, rows_by: str) -> float:
    """Speed at which a chip handles rows, TPU v4 being 1."""
    if version == "v4":
        return 1.0
    v3, v4 = TPU_V3_CHIP, TPU_V4_CHIP
    if rows_by == "hbm":
        return v3.hbm_bandwidth / v4.hbm_bandwidth
    return ((v3.sparse_cores or 0) * (v3.clock or 0)) / ((v4.sparse_cores or 0) * (v4.clock or 0))


def sparse_seconds(version: str, chips: int, fit: Fit, reading: Reading) -> float:
    """The SparseCores' part of a step, in units of a step of v4 on 128 chips: as many samples a
    chip as there, whatever the number of chips."""
    unit = exchange("v4", CHIPS, reading)
    network = fit.network * exchange(version, chips, reading) / unit
    rows = fit.rows / sparse_rate(version, reading.rows_by)
    peers = fit.peers * (chips - 1) / (CHIPS - 1) / sparse_rate(version, "sparsecore")
    return fit.busy * (network + rows + peers)


def dense_seconds(version: str, fit: Fit, reading: Reading) -> float:
    """The matrix units' part of a step: on v4 all of it, or the rest of it where nothing overlaps;
    on v3 longer, as the peak says."""
    on_v4 = 1.0 if reading.overlaps else fit.idle
    return on_v4 if version == "v4" else on_v4 * TPU_V4_CHIP.peak_bf16 / TPU_V3_CHIP.peak_bf16


def _together(sparse: float, dense: float, reading: Reading) -> float:
    return max(sparse, dense) if reading.overlaps else sparse + dense


def step_seconds(version: str, chips: int, fit: Fit, reading: Reading) -> float:
    """A step, in units of one of v4 on 128 chips."""
    sparse = sparse_seconds(version, chips, fit, reading)
    return _together(sparse, dense_seconds(version, fit, reading), reading)


def host_step_seconds(fit: Fit, reading: Reading) -> float:
    """A step of v4 whose tables lie in host memory: rows as fast as that memory is, with HBM's
    efficiency, and nothing exchanged by chips."""
    slower = TPU_V4_CHIP.hbm_bandwidth * HOST_CHIPS / (SOCKET_DRAM * HOST_SOCKETS)
    sparse = fit.busy * fit.rows * slower
    return _together(sparse, dense_seconds("v4", fit, reading), reading)


def network_gain(chips: int, fit: Fit, reading: Reading) -> tuple[float, float]:
    """(ratio of the all-to-all of v4 to that of v3's network, how much faster the SparseCores of v4
    are by it)."""
    ratio = exchange("v3", chips, reading) / exchange("v4", chips, reading)
    fast = sparse_seconds("v4", chips, fit, reading)
    network = (
        fit.busy * fit.network * exchange("v4", chips, reading) / exchange("v4", CHIPS, reading)
    )
    return ratio, (fast + network * (ratio - 1)) / fast


def learner_flops() -> float:
    """FLOP/s of a socket of the cluster, as the published gain of v4 means them, where both do the
    dense part at the same part of their peak."""
    return CHIPS * TPU_V4_CHIP.peak_bf16 / CPU_GAIN / LEARNERS


@dataclass(frozen=True)
class Figure:
    """A published figure with its range, and the computed one."""

    name: str
    low: float
    high: float
    computed: float

    @property
    def residual(self) -> float:
        """log of computed over the nearest of the range; 0 inside."""
        return float(np.log(self.computed / min(max(self.computed, self.low), self.high)))


def figures(fit: Fit, reading: Reading) -> list[Figure]:
    """The published figures that the fit is to give together."""
    v3 = step_seconds("v3", CHIPS, fit, reading)
    gains = {chips: network_gain(chips, fit, reading)[1] for chips in SHAPES}
    at_512 = [step_seconds(v, 512, fit, reading) for v in ("v3", "v4")]
    return [
        Figure("v4 over v3, DLRM0 on 128 chips", 3.1, 3.1, v3),
        Figure("v3 over the processors", 9.8, 9.8, CPU_GAIN / v3),
        Figure("v4 over v4 with tables in host memory", 5.0, 7.0, host_step_seconds(fit, reading)),
        Figure("least gain by the network, 64 .. 1024 chips", 1.1, 2.0, min(gains.values())),
        Figure("most gain by the network, 64 .. 1024 chips", 1.1, 2.0, max(gains.values())),
        Figure("v4 over v3, DLRM0 on slices of 512", 3.0, 3.5, at_512[0] / at_512[1]),
    ]


def fitted(reading: Reading, idle: float = 0.25) -> Fit:
    """The fit of least squares: of the figures' residuals, and of the bend at 1024 chips."""

    def fit_of(x: np.ndarray) -> Fit:
        rows, rest = 1 / (1 + np.exp(-x))
        return Fit(float(rows), float((1 - rows) * rest), idle)

    def loss(x: np.ndarray) -> float:
        fit = fit_of(x)
        residuals = [figure.residual for figure in figures(fit, reading)]
        return float(np.square([*residuals, bend(fit, reading)]).sum())

    starts = itertools.product((-1.0, 0.0), (-2.0, 0.0))
    found = [minimize(loss, start, method="Nelder-Mead") for start in starts]
    return fit_of(min(found, key=lambda solved: solved.fun).x)


def bend(fit: Fit, reading: Reading) -> float:
    """log of the exchange's time over that of peers at 1024 chips, where the paper says that the
    overheads rule; 0 where they do."""
    peers = fit.peers * 1023 / (CHIPS - 1)
    network = fit.network * exchange("v4", 1024, reading) / exchange("v4", CHIPS, reading)
    return max(float(np.log(max(network, 1e-12) / max(peers, 1e-12))), 0.0)


def gather_efficiency(fit: Fit, reading: Reading, *, row_passes: float = 7.0) -> float:
    """The part of HBM's bandwidth that rows reach, from the fit: the rows' time over the exchange's
    says it, since both move the same bytes.

    Args:
      row_passes: bytes of memory for each byte of a row that is sent: with Adagrad 1 to gather, 2
        for gradients, 4 to read and write row and slot. Sent twice, forward and backward.
    """
    at_bandwidth = row_passes / TPU_V4_CHIP.hbm_bandwidth
    usable = TPU_V4_CHIP.link_efficiency or 1.0
    sent = 2 * exchange("v4", CHIPS, reading) / usable
    return at_bandwidth / sent * fit.network / fit.rows


def root_mean_residual(found: Sequence[Figure]) -> float:
    """The root of the mean square of figures' residuals, in logarithms."""
    return float(np.sqrt(np.mean([figure.residual**2 for figure in found])))
