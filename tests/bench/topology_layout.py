"""How long it takes to lay meshes on slices, and what is gained over JAX's own choice.

python tests/bench/topology_layout.py

Times are of the processor, for one process on a fresh cache; the bound is 5 s for 4096 chips.
"""

import os
import time
from types import SimpleNamespace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from jax.experimental import mesh_utils

from topology import Slice
from topology.collectives.layout import Traffic, lay_mesh, traffic_seconds

TRAFFIC = (
    Traffic(kind="all_reduce", axes=("data",), bytes=1e8),
    Traffic(kind="all_gather", axes=("fsdp",), bytes=3e8),
    Traffic(kind="reduce_scatter", axes=("fsdp",), bytes=3e8),
    Traffic(kind="all_to_all", axes=("fsdp",), bytes=1e8),
    Traffic(kind="all_reduce", axes=("tensor",), bytes=5e8),
)

CASES = (
    ("4x4x8", (4, 8, 4)),
    ("4x4x8", (2, 4, 16)),
    ("4x4x8_twisted", (4, 8, 4)),
    ("4x8x8_twisted", (8, 8, 4)),
    ("8x8x16_twisted", (8, 16, 8)),
    ("8x16x16_twisted", (8, 32, 8)),
    ("16x16x16", (16, 16, 16)),
    ("16x16x16", (32, 16, 8)),
    ("16x16x16", (4, 128, 8)),
    ("8x16x32", (64, 16, 4)),
    ("16x16x16_twist:0,8,8/0,0,8/0,0,0", (16, 32, 8)),
)


def jax_devices(slice, sizes):
    devices = [
        SimpleNamespace(id=i, platform="tpu", device_kind="TPU v4", coords=tuple(c), core_on_chip=0)
        for i, c in enumerate(slice.coordinates.tolist())
    ]
    mesh = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.vectorize(lambda device: device.id)(mesh)


def main():
    print(f"{'slice':36}{'data, fsdp, tensor':22}{'seconds to lay':>15}{'of the time of JAX':>20}")
    for name, sizes in CASES:
        slice = Slice.parse(name)
        mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        start = time.process_time()
        layout = lay_mesh(slice, mesh, TRAFFIC)
        took = time.process_time() - start
        theirs = sum(traffic_seconds(slice, mesh, jax_devices(slice, sizes), TRAFFIC))
        print(f"{name:36}{sizes!s:22}{took:15.2f}{layout.seconds / theirs:20.3f}", flush=True)


if __name__ == "__main__":
    main()
