"""Where the devices of a slice are, against coordinates worked out chip by chip."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.configure import build_run
from launch.pod.hosts import Hosts, check_mesh, traffic_of
from launch.pod.plan import default_hosts_per_process
from pjit_train.errors import UserError
from pjit_train.sharding import MeshShape
from topology import Part, Placement, Slice, Traffic

SHAPES = ["2x2x1", "1x2x2", "2x1x2", "2x2x2", "2x4x1", "2x2x4", "4x4x4", "4x4x8_twisted", "8x4x4"]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.data())
def test_every_host_has_four_neighbouring_chips(text, data):
    slice = Slice.parse(text)
    each = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if slice.num_hosts % n == 0]))
    hosts = Hosts(slice=slice, hosts_per_process=each)
    devices = hosts.device_of_chip
    assert sorted(devices) == list(range(slice.num_chips))
    for host in range(slice.num_hosts):
        chips = slice.coordinates[devices // 4 == host]
        assert sorted(np.ptp(chips, axis=0)) == [0, 1, 1]
    assert hosts.processes * hosts.devices_per_process == slice.num_chips
    assert [h for p in range(hosts.processes) for h in hosts.hosts_of(p)] == list(
        range(slice.num_hosts)
    )


def test_hosts_of_a_slice_are_hosts_of_its_blocks():
    """Chip by chip: host (x // 2, y // 2, z) of the block, row-major, as `Part` numbers them."""
    slice = Slice.parse("4x4x8")
    hosts = Hosts(slice=slice, hosts_per_process=4)
    placement = Placement(slice, (7, 30))
    found = set()
    for (x, y, z), device in zip(slice.coordinates.tolist(), hosts.device_of_chip, strict=True):
        block = (7, 30)[z // 4]
        expected = Part("host", (block, (x // 2) * 8 + (y // 2) * 4 + z % 4))
        assert hosts.part(placement, int(device) // 4) == expected
        found.add(expected)
    assert len(found) == 32
    on_7 = [
        p for p in range(8) if any(hosts.part(placement, h).block == 7 for h in hosts.hosts_of(p))
    ]
    assert hosts.processes_on(placement, Part("block", (7,))) == on_7
    third = hosts.part(placement, 9)
    assert hosts.processes_on(placement, third) == [2]


def test_the_mesh_takes_chips_as_the_layout_says():
    """The inner axis of traffic is laid on neighbours: its devices are chips one hop apart."""
    slice = Slice.parse("4x4x4")
    hosts = Hosts(slice=slice, hosts_per_process=16)
    mesh = {"data": 4, "fsdp": 4, "sequence": 1, "tensor": 4}
    traffic = [Traffic(kind="all_gather", axes=("fsdp",), bytes=1e9)]
    order = hosts.device_order(mesh, traffic)
    assert order.shape == (4, 4, 1, 4)
    assert sorted(order.ravel()) == list(range(64))
    chip_of_device = np.argsort(hosts.device_of_chip)
    ring = chip_of_device[order[0, :, 0, 0]]
    for chip, after in zip(ring, np.roll(ring, -1), strict=True):
        assert after in slice.neighbours[chip]


@pytest.mark.parametrize(("text", "each"), [("4x4x4", 3), ("4x4x4", 0), ("2x2x2", 4)])
def test_processes_have_equally_many_hosts(text, each):
    with pytest.raises(UserError, match=r"--hosts-per-process .*use a divisor"):
        Hosts(slice=Slice.parse(text), hosts_per_process=each)


def test_by_default_there_are_at_most_four_processes():
    assert [default_hosts_per_process(Slice.parse(s)) for s in ("2x2x1", "2x2x4", "4x4x4")] == [
        1,
        1,
        4,
    ]


def test_all_parameters_are_gathered_and_their_gradients_scattered():
    """Of Llama 3 8B, the 8,030,261,248 float32 numbers, over two `tensor` parts."""
    run, _ = build_run(["configs/base.gin", "configs/models/llama3_8b.gin"])
    traffic = traffic_of(run, {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 2})
    over_fsdp = {one.kind: (one.bytes, one.count) for one in traffic if one.axes == ("fsdp",)}
    half = 4 * 8_030_261_248 / 2
    assert over_fsdp == {"all_gather": (half, 2), "reduce_scatter": (half, 1)}


class FakeRun:
    def __init__(self, **sizes):
        self.mesh = MeshShape(**sizes)

    def check_mesh(self, sizes):
        assert set(sizes) == {"data", "fsdp", "sequence", "tensor"}


def test_a_mesh_takes_all_chips_of_the_slice():
    slice = Slice.parse("2x2x2")
    assert check_mesh(FakeRun(fsdp=4), slice)["data"] == 2
    for sizes in ({"data": 4}, {"data": 16}, {"fsdp": 3}):
        with pytest.raises(UserError, match="2x2x2"):
            check_mesh(FakeRun(**sizes), slice)
    with pytest.raises(UserError, match="spans slices=2, and a pod trains on one"):
        check_mesh(FakeRun(fsdp=4, slices=2), slice)
