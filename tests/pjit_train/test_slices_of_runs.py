"""Meshes over several slices: only `data` goes across, whatever the order of the devices."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from helpers.tiny_models import T, make_batch, make_run
from jax.sharding import AxisType, Mesh

from pjit_train.errors import UserError
from pjit_train.program import Program
from pjit_train.sharding import MeshShape, make_mesh
from topology.plan.replica_groups import groups_of

AXES, KINDS = ("data", "fsdp", "sequence", "tensor"), (AxisType.Explicit,) * 4
pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that says its slice, as those of TPUs do."""

    id: int
    slice_index: int
    platform: str = "tpu"
    process_index: int = 0
    device_kind: str = "none"
    client: None = None


def slice_of(device) -> int:
    """Devices 0, 2, 4, .. are one slice and the others the second: their order does not tell."""
    return device.id % 2


@pytest.fixture
def interleaved(monkeypatch):
    """Emulated devices that say their slice."""
    from pjit_train import sharding

    def by_slice(devices, slices):
        chips = {device.id: device for device in devices}
        said = [Chip(id=device.id, slice_index=slice_of(device)) for device in devices]
        return [[chips[chip.id] for chip in part] for part in real(said, slices)]

    real = sharding._by_slice
    monkeypatch.setattr(sharding, "_by_slice", by_slice)


def test_data_goes_across_slices_and_no_other_axis(interleaved):
    mesh = make_mesh(MeshShape(data=4, fsdp=1, tensor=2, slices=2))
    slices = np.vectorize(slice_of)(mesh.devices)
    assert mesh.shape == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert slices.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert len({device.id for device in mesh.devices.flat}) == 8


def crossing(program) -> list[tuple[str, list[int]]]:
    """(kind, sizes of its axes) of arrays in collectives between devices of both slices."""
    text = program.compile_step(make_batch(program, 0)).as_text()
    slices = np.array([slice_of(device) for device in program.mesh.devices.flat])
    found = []
    for line in text.splitlines():
        if match := re.search(r" = (.*?) ([a-z-]+)\(.*replica_groups=", line):
            groups = groups_of(line, len(slices))
            if any(len(set(slices[group])) > 1 for group in groups):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
                found += [(match[2], [int(n) for n in shape.split(",") if n]) for shape in shapes]
    return found


def test_only_sums_of_gradients_cross(interleaved):
    """No activation does: arrays with an axis of T tokens, by which these models' sizes tell."""
    run = make_run(mesh={"data": 2, "fsdp": 2, "tensor": 2, "slices": 2})
    found = crossing(Program(run, make_mesh(run.mesh)))
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(math.prod(shape) for _, shape in found) > 1000
    assert not any(T in shape for _, shape in found)
    # In their own order, which says nothing of the slices, they would.
    plain = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 1, 2), AXES, axis_types=KINDS)
    assert any(T in shape for _, shape in crossing(Program(run, plain)))


def test_a_step_is_that_of_one_slice():
    losses = []
    for more in ({}, {"slices": 2}):
        run = make_run(mesh={"data": 4, "fsdp": 2, **more})
        program = Program(run, make_mesh(run.mesh))
        batch = make_batch(program, 0)
        state, step = program.new_state(), program.compile_step(batch)
        for _ in range(3):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "slices", "says"),
    [
        ({"data": 3, "slices": 2}, [0] * 3, "data=3 is laid across slices=2; use a multiple"),
        ({"data": 4}, [0, 0, 1, 1], "of 2 slices and slices=1; use sharding.MeshShape.slices = 2"),
        ({"data": 4, "slices": 2}, [0] * 4, "of 1 slices and slices=2"),
        ({"data": 4, "slices": 2}, [0, 0, 0, 1], "takes 3, 1 devices of the slices"),
    ],
)
def test_mistakes_are_one_line(shape, slices, says):
    chips = [Chip(id=i, slice_index=index) for i, index in enumerate(slices)]
    with pytest.raises(UserError, match=says):
        make_mesh(MeshShape(**shape), chips)


def test_emulated_slices_are_runs_of_devices():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, slices=2), jax.devices()[:4])
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
