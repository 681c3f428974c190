"""A slice as embeddings see it: exchange, memory and its bandwidth, all-reduce, and hosts."""

import itertools
from dataclasses import dataclass

import numpy as np

from topology.arrays import Integers
from topology.collectives.collectives import Network, collective_cost
from topology.collectives.groups import Groups
from topology.hardware import host_of
from topology.routing.throughput import all_to_all
from topology.torus.slices import Slice

ACCESS_BYTES = 256.0
"""Bytes that memory could have moved in the time that an access to a single row takes besides its
own. Fitted to published ratios, by which rows of 128 bytes reach 0.10 to 0.43 of the bandwidth, as
one reads them; 0.33 with this (docs/embeddings_plan.md)."""

PEER_SECONDS = 0.1e-6
"""Time of a chip's SparseCores for each peer of an exchange, whatever is sent.
Fitted likewise, the scale of it assumed."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A slice as embeddings see it. Bandwidths are bytes/s, times seconds.

    Attributes:
      pair_seconds: of an all-to-all in which no chip sends more than one byte to any other: the
        load of the exact optimum's fullest link over the link's usable bandwidth. The routing is
        that of the uniform all-to-all, so chips that send less make it no longer.
      exchange_seconds: of an exchange of nothing: the way across, and a time for each peer.
      bandwidth: of a chip's memory.
      access_bytes: that an access to a single row takes besides the row's.
      reduce_seconds: of an all-reduce, for each byte of its array.
      reduce_latency: of an all-reduce of nothing.
      memory: bytes of a chip that a program may fill.
      granule: bytes of the smallest access to memory.
      hosts: int [G, n], the chips of each host; none where chips do not fill whole hosts.
    """

    name: str
    chips: int
    pair_seconds: float
    exchange_seconds: float
    bandwidth: float
    access_bytes: float
    reduce_seconds: float
    reduce_latency: float
    memory: float
    granule: int
    hosts: Integers

    @classmethod
    def of(
        cls,
        slice: Slice,
        *,
        access_bytes: float = ACCESS_BYTES,
        peer_seconds: float = PEER_SECONDS,
    ) -> "Machine":
        """The machine of a slice.

        Raises:
          ValueError: the slice's pod lacks a published figure.
        """
        chip, network, N = slice.pod.chip, Network.of(slice.pod), slice.num_chips
        load, reduce_load, hops = 0.0, 0.0, 0
        if N > 1:
            load = all_to_all(slice).max_link_load
            cost = collective_cost("all_reduce", Groups(slice, np.arange(N)[None]))
            reduce_load, hops = cost.load, cost.hops
        return cls(
            name=str(slice),
            chips=N,
            pair_seconds=load / network.bandwidth,
            exchange_seconds=slice.diameter * network.hop_latency + (N - 1) * peer_seconds,
            bandwidth=chip.hbm_bandwidth,
            access_bytes=access_bytes,
            reduce_seconds=reduce_load / network.bandwidth,
            reduce_latency=hops * network.hop_latency,
            memory=chip.hbm_usable or chip.hbm,
            granule=32,
            hosts=_hosts(slice),
        )


def _hosts(slice: Slice) -> Integers:
    """int [G, n]: the chips of each host; none where a host has one chip or is not whole."""
    chips = np.arange(slice.num_chips)
    if 1 < slice.num_chips <= host_of(slice.pod).chips:
        return chips[None]
    for shape in itertools.permutations(host_of(slice.pod).shape):
        if not np.any(np.array(slice.shape) % shape):
            _, host = np.unique(slice.coordinates // shape, axis=0, return_inverse=True)
            return np.argsort(host.ravel(), kind="stable").reshape(host.max() + 1, -1)
    return np.zeros((0, 1), int)
