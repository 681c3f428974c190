"""Placement of a slice's devices: the hosts of each process, and the order in which the mesh takes
their chips."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pjit_train.errors import UserError
from pjit_train.run import Run
from topology import Part, Placement, Slice, Traffic, lay_mesh
from topology.fabric.parts import host_in_block

_TILES = ((2, 2, 1), (2, 1, 2), (1, 2, 2))  # of a slice that the chips of a host take


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts of a slice, `hosts_per_process` of them in a process, one after another.

    Hosts count block by block, row-major over the slice, and in a block (or the part of one that
    the slice is) row-major in tiles of 2x2x1 chips, turned where the shape asks for it; a host's
    chips row-major over its tile. Devices count as JAX counts them: by process, by host, by chip.

    Raises:
      UserError: the processes would not have equally many hosts.
    """

    slice: Slice
    hosts_per_process: int

    def __post_init__(self):
        hosts, each = self.slice.num_hosts, self.hosts_per_process
        if each < 1 or hosts % each:
            divisors = [str(n) for n in range(1, hosts + 1) if hosts % n == 0]
            raise UserError(
                f"--hosts-per-process {each}: slice {self.slice} has {hosts} hosts; use a divisor "
                f"of that: {', '.join(divisors)}"
            )

    @property
    def processes(self) -> int:
        return self.slice.num_hosts // self.hosts_per_process

    @property
    def devices_per_process(self) -> int:
        return self.hosts_per_process * self._chips

    @property
    def _chips(self) -> int:
        return self.slice.pod.host.chips

    def hosts_of(self, process: int) -> range:
        first = process * self.hosts_per_process
        return range(first, first + self.hosts_per_process)

    @cached_property
    def device_of_chip(self) -> np.ndarray:
        """int [N]: of each chip, row-major over the slice, the device that stands for it."""
        box = np.minimum(self.slice.shape, self.slice.pod.block.side)
        tile = next(t for t in _TILES if not (box % t).any())
        block, place = np.divmod(self.slice.coordinates, box)
        there, inside = np.divmod(place, tile)
        block = np.ravel_multi_index(tuple(block.T), self.slice.block_shape)
        host = np.ravel_multi_index(tuple(there.T), tuple(box // tile))
        host += block * (box.prod() // self._chips)
        return host * self._chips + np.ravel_multi_index(tuple(inside.T), tile)

    @property
    def coordinates(self) -> np.ndarray:
        """int [N, 3]: for each device the coordinates of its chip in the slice."""
        return self.slice.coordinates[np.argsort(self.device_of_chip)]

    def device_order(self, mesh: Mapping[str, int], traffic: list[Traffic]) -> np.ndarray:
        """int, in the mesh's shape: the devices as `topology.lay_mesh` puts their chips."""
        return self.device_of_chip[lay_mesh(self.slice, mesh, traffic).devices]

    def part(self, placement: Placement, host: int) -> Part:
        """The host of the pod on which a host of the slice is."""
        of = self.slice.pod.block
        chip = int(np.flatnonzero(self.device_of_chip == host * self._chips)[0])
        block, inside = divmod(int(placement.chips[chip]), of.chips)
        return Part("host", (block, host_in_block(of, inside)))

    def processes_on(self, placement: Placement, part: Part) -> list[int]:
        """The processes that have a host on a block of the pod, or are on this very host."""
        found = []
        for process in range(self.processes):
            parts = [self.part(placement, host) for host in self.hosts_of(process)]
            if any(p == part if part.kind == "host" else p.block == part.block for p in parts):
                found.append(process)
        return found


def traffic_of(run: Run, mesh: Mapping[str, int]) -> list[Traffic]:
    """Traffic of a step of a run over each mesh axis, to first order and in bytes of a float32.

    Parameters are gathered over `fsdp` for the forward and the backward pass and their gradients
    scattered back; gradients are added over `data`, activations twice a layer and pass over
    `tensor`, keys and values gathered over `sequence`.
    """
    model, rows = run.blocks, run.data.batch_size / (mesh["data"] * mesh["fsdp"])
    parameters = 4 * model.num_params / mesh["tensor"]
    activations = 4 * rows * run.positions / mesh["sequence"] * model.d_model
    entries = [
        ("all_gather", "fsdp", parameters, 2),
        ("reduce_scatter", "fsdp", parameters, 1),
        ("all_reduce", "data", parameters / mesh["fsdp"], 1),
        ("all_reduce", "tensor", activations, 4 * model.num_layers),
        ("all_gather", "sequence", 2 * activations * mesh["sequence"], 2 * model.num_layers),
    ]
    return [
        Traffic(kind=kind, axes=(axis,), bytes=size, count=count)
        for kind, axis, size, count in entries
        if mesh[axis] > 1
    ]


def check_mesh(run: Run, slice: Slice) -> dict[str, int]:
    """The sizes of the run's mesh on a slice. UserError where it does not take all its chips."""
    try:
        sizes = run.mesh.sizes(slice.num_chips)
    except UserError as error:
        raise UserError(f"--slice {slice}: {error}") from error
    if math.prod(sizes.values()) != slice.num_chips:
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"
        raise UserError(
            f"--slice {slice}: has {slice.num_chips} chips and the mesh {shown} takes "
            f"{math.prod(sizes.values())}; let one axis of --mesh be -1, or take another slice"
        )
    if run.mesh.slices > 1:
        raise UserError(
            f"--slice {slice}: the mesh spans slices={run.mesh.slices}, and a pod trains on one; "
            "use slices=1"
        )
    run.check_mesh(sizes)
    return sizes
