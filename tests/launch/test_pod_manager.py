"""The pod manager: what it switches is proved by the light, and its state outlives it."""

import json

import numpy as np
import pytest

from launch.pod.manager import Manager, smaller_shapes
from topology import TPU_V5P, Part, Placement, Slice, fabric
from topology.fabric import light
from topology.routing import throughput


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "fabric.json")


def test_a_failed_block_is_replaced_and_the_light_proves_the_slice(file):
    manager = Manager(file, 64)
    state = manager.place(Slice.parse("4x4x8_twisted"), [])
    assert state["blocks"] == [0, 1]
    assert state["free"] == 62
    assert state["changes"][:2] == (0, 96)  # two blocks, 48 cross-connects each
    assert manager.fail("host:1,5")["hit"]
    state = manager.place(Slice.parse("4x4x8_twisted"), [])
    assert state["blocks"] == [0, 2]
    # Each block has one cross-connect of each switch; those that lead to and from block 1 move.
    assert state["changes"][:2] == (96, 96)
    assert light.check(manager._fabric) == []
    assert not manager.fail("block:1")["hit"]


def test_its_state_survives_its_own_death(file):
    manager = Manager(file, 16)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail("block:0")
    manager.drain("host:5,1")
    manager.place(Slice.parse("4x4x8"), [])
    again = Manager(file, 16)
    assert again.state() == manager.state()
    assert again._fabric == manager._fabric
    assert again.place(Slice.parse("4x4x8"), [])["changes"] == (0, 0, 0.0)


def test_what_is_half_written_is_not_read(file, tmp_path):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x4"), [])
    (tmp_path / "fabric.json.new").write_text('{"slice": "4x')
    assert Manager(file, 64).state() == manager.state()
    assert json.loads((tmp_path / "fabric.json").read_text()) == manager.state()


def test_a_pod_of_another_generation_begins_anew_and_knows_no_switches(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail("ocs:x,0,0")
    other = Manager(file, 140, TPU_V5P)
    assert (other.state()["slice"], other.state()["failed"]) == (None, [])
    slice = Slice.parse("16x16x24_wrap:z", TPU_V5P)
    state = other.place(slice, [])
    assert (state["pod"], state["free"], state["changes"]) == ("TPU v5p", 140 - 96, (0, 0, 0.0))
    assert other.fail("host:3,5")["hit"]
    assert other.place(slice, [])["blocks"] == [0, 1, 2, 96, *range(4, 96)]
    with pytest.raises(ValueError, match="wired is not published"):
        other.fail("ocs:x,0,0")
    again = Manager(file, 140, TPU_V5P)
    assert again.placement() == other.placement()
    assert again.placement().slice.pod == TPU_V5P


def test_without_blocks_it_refuses_or_takes_a_smaller_slice(file):
    manager = Manager(file, 2)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail("block:1")
    with pytest.raises(ValueError, match=r"4x4x8.*needs 2 blocks|no free|free and healthy"):
        manager.place(Slice.parse("4x4x8"), [])
    state = manager.place(Slice.parse("4x4x8"), smaller_shapes(Slice.parse("4x4x8")))
    assert state["slice"] == "4x4x4"
    assert state["blocks"] == [0]
    assert manager.placement() == Placement(Slice.parse("4x4x4"), (0,))
    manager.fail("block:0")
    with pytest.raises(ValueError, match="free and healthy"):
        manager.place(Slice.parse("4x4x8"), smaller_shapes(Slice.parse("4x4x8")))


def test_smaller_shapes_are_legal_and_descend():
    found = [slice.num_chips for slice in smaller_shapes(Slice.parse("4x8x8"))]
    assert found == sorted(found, reverse=True)
    assert found[0] == 192
    assert all(n < 256 for n in found)


def test_a_failed_switch_is_gone_around(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8_twisted"), [])
    state = manager.fail("ocs:z,1,2")
    slice = Slice.parse("4x4x8_twisted")
    kept = throughput.all_to_all_kept(slice, throughput.switch_links(slice, 2, 1, 2))
    assert state["hit"]
    assert state["kept"] == pytest.approx(kept, rel=1e-6)
    assert state["blocks"] == [0, 1]
    assert Manager(file, 64).fail("ocs:z,1,2")["kept"] == pytest.approx(kept, rel=1e-6)


def test_a_part_of_a_block_passes_no_switch(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("2x2x2"), [])
    assert not manager.fail("ocs:x,0,0")["hit"]


def test_a_switch_hits_only_slices_with_links_in_it(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8_wrap:z"), [])
    before = manager.state()["failed"]
    state = manager.fail("ocs:x,0,0")  # no wraparound in x, so no link there
    assert (state["hit"], state["kept"]) == (False, 1.0)
    assert state["failed"] == [*before, "ocs:x,0,0"]
    state = manager.fail("ocs:z,0,0")
    assert state["hit"]
    assert 0.9 < state["kept"] <= 1


def test_switches_that_cut_the_slice_in_two_keep_nothing(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    for i, j in np.ndindex(4, 4):
        manager._fabric = fabric.fail(manager._fabric, Part("ocs", (2, i, j)))
    state = manager.fail("ocs:z,3,3")
    assert state["hit"]
    assert state["kept"] == 0


def test_a_part_that_is_not_there_leaves_the_state_as_it_was(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    before = manager.state()
    with pytest.raises(ValueError, match="'9' is no place in a face"):
        manager.fail("ocs:x,9,0")
    assert Manager(file, 64).state() == before
