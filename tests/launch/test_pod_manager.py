"""The pod manager: what it switches is proved by the light, and its state outlives it."""

import json

import numpy as np
import pytest

from launch.pod.manager import Manager, smaller_shapes
from topology import TPU_V4, TPU_V5P, Part, Placement, Slice, fabric
from topology.fabric import light
from topology.routing import throughput


@pytest.fixture
def file(tmp_path):
    return str(tmp_path / "fabric.json")


def part(text, pod=TPU_V4):
    return Part.parse(text, pod)


def test_a_failed_block_is_replaced_and_the_light_proves_the_slice(file):
    manager = Manager(file, 64)
    placed = manager.place(Slice.parse("4x4x8_twisted"), [])
    assert placed.placement.blocks == (0, 1)
    assert manager.state().free == 62
    assert (placed.breaks, placed.makes) == (0, 96)  # two blocks, 48 cross-connects each
    assert manager.fail(part("host:1,5")).hit
    placed = manager.place(Slice.parse("4x4x8_twisted"), [])
    assert placed.placement.blocks == (0, 2)
    # Each block has one cross-connect of each switch; those that lead to and from block 1 move.
    assert (placed.breaks, placed.makes) == (96, 96)
    assert placed.failed == manager.state().failed == (part("host:1,5"),)
    assert light.check(manager._fabric) == []
    assert not manager.fail(part("block:1")).hit


def test_its_state_survives_its_own_death(file):
    manager = Manager(file, 16)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail(part("block:0"))
    manager.drain(part("host:5,1"))
    manager.place(Slice.parse("4x4x8"), [])
    again = Manager(file, 16)
    assert again.state() == manager.state()
    assert again._fabric == manager._fabric
    placed = again.place(Slice.parse("4x4x8"), [])
    assert (placed.breaks, placed.makes, placed.seconds) == (0, 0, 0.0)


def test_what_is_half_written_is_not_read(file, tmp_path):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x4"), [])
    (tmp_path / "fabric.json.new").write_text('{"slice": "4x')
    assert Manager(file, 64).state() == manager.state()
    assert json.loads((tmp_path / "fabric.json").read_text()) == {
        "pod": "TPU v4",
        "slice": "4x4x4",
        "blocks": [0],
        "failed": [],
        "drained": [],
        "added": [],
        "free": 63,
    }


def test_a_repaired_or_new_block_makes_room_again(file):
    wanted, smaller = Slice.parse("4x4x8"), [Slice.parse("4x4x4")]
    manager = Manager(file, 2)
    manager.place(wanted, smaller)
    manager.fail(part("host:1,3"))
    manager.fail(part("block:1"))
    assert manager.would_place(wanted, smaller) == smaller[0]
    assert manager.state().placement.slice == wanted  # to ask has changed nothing
    manager.place(wanted, smaller)
    impact = manager.repair(part("block:1"))
    assert (impact.hit, impact.free, manager.state().failed) == (False, 1, ())
    assert manager.would_place(wanted, smaller) == wanted
    with pytest.raises(ValueError, match="block:1 is not out of use"):
        manager.repair(part("block:1"))
    # Another block fails, and one comes that was none of the two; its successor knows of it.
    manager.fail(part("block:0"))
    manager.repair(part("block:5"))
    again = Manager(file, 2)
    assert again.state() == manager.state()
    assert again.place(wanted, smaller).placement.blocks == (1, 5)
    assert light.check(again._fabric) == []


def test_a_repaired_switch_gives_its_links_back(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    kept = [manager.fail(part("ocs:z,0,0")).kept, manager.fail(part("ocs:z,1,1")).kept]
    assert 0 < kept[1] < kept[0] < 1
    assert manager.repair(part("ocs:z,1,1")).kept == kept[0]
    assert manager.repair(part("ocs:z,0,0")).kept == 1.0
    assert light.check(manager._fabric) == []


def test_a_pod_of_another_generation_begins_anew_and_knows_no_switches(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail(part("ocs:x,0,0"))
    other = Manager(file, 140, TPU_V5P)
    assert (other.state().placement, other.state().failed) == (None, ())
    slice = Slice.parse("16x16x24_wrap:z", TPU_V5P)
    placed = other.place(slice, [])
    assert (placed.breaks, placed.makes, placed.seconds) == (0, 0, 0.0)
    assert (other.state().pod, other.state().free) == (TPU_V5P, 140 - 96)
    assert other.fail(part("host:3,5", TPU_V5P)).hit
    assert other.place(slice, []).placement.blocks == (0, 1, 2, 96, *range(4, 96))
    with pytest.raises(ValueError, match="wired is not published"):
        other.fail(part("ocs:x,0,0"))
    again = Manager(file, 140, TPU_V5P)
    assert again.state().placement == other.state().placement
    assert again.state().placement.slice.pod == TPU_V5P


def test_without_blocks_it_refuses_or_takes_a_smaller_slice(file):
    manager = Manager(file, 2)
    manager.place(Slice.parse("4x4x8"), [])
    manager.fail(part("block:1"))
    with pytest.raises(ValueError, match=r"4x4x8.*needs 2 blocks|no free|free and healthy"):
        manager.place(Slice.parse("4x4x8"), [])
    placed = manager.place(Slice.parse("4x4x8"), smaller_shapes(Slice.parse("4x4x8")))
    assert placed.placement == Placement(Slice.parse("4x4x4"), (0,))
    assert manager.state().placement == Placement(Slice.parse("4x4x4"), (0,))
    manager.fail(part("block:0"))
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
    impact = manager.fail(part("ocs:z,1,2"))
    slice = Slice.parse("4x4x8_twisted")
    kept = throughput.all_to_all_kept(slice, throughput.switch_links(slice, 2, 1, 2))
    assert impact.hit
    assert impact.kept == pytest.approx(kept, rel=1e-6)
    assert manager.state().placement.blocks == (0, 1)
    assert Manager(file, 64).fail(part("ocs:z,1,2")).kept == pytest.approx(kept, rel=1e-6)


def test_a_part_of_a_block_passes_no_switch(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("2x2x2"), [])
    assert not manager.fail(part("ocs:x,0,0")).hit


def test_a_switch_hits_only_slices_with_links_in_it(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8_wrap:z"), [])
    before = manager.state().failed
    impact = manager.fail(part("ocs:x,0,0"))  # no wraparound in x, so no link there
    assert (impact.hit, impact.kept) == (False, 1.0)
    assert manager.state().failed == (*before, part("ocs:x,0,0"))
    impact = manager.fail(part("ocs:z,0,0"))
    assert impact.hit
    assert 0.9 < impact.kept <= 1


def test_switches_that_cut_the_slice_in_two_keep_nothing(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    for i, j in np.ndindex(4, 4):
        manager._fabric = fabric.fail(manager._fabric, Part("ocs", (2, i, j)))
    impact = manager.fail(part("ocs:z,3,3"))
    assert impact.hit
    assert impact.kept == 0


def test_a_part_that_is_not_there_leaves_the_state_as_it_was(file):
    manager = Manager(file, 64)
    manager.place(Slice.parse("4x4x8"), [])
    before = manager.state()
    with pytest.raises(ValueError, match="place in a face 9: a whole number"):
        manager.fail(Part("ocs", (0, 9, 0)))
    assert Manager(file, 64).state() == before
