import dataclasses
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import SWITCHES, TPU_V4, Fabric, Part, Slice, Switch
from topology.fabric import (
    Changes,
    apply,
    boxes,
    choose,
    drain,
    fail,
    patch,
    place,
    reconfigure,
    release,
    repair,
    replace_block,
)
from topology.fabric.light import check, impact, trace, verify

SMALL_POD = dataclasses.replace(TPU_V4, num_blocks=8)


def placed(*texts, pod=TPU_V4):
    fabric = Fabric(pod=pod)
    for n, text in enumerate(texts):
        fabric = place(fabric, "abcdefgh"[n], Slice.parse(text))
    return fabric


def part(text):
    return Part.parse(text, TPU_V4)


def with_connects(fabric, switch, connects):
    return dataclasses.replace(fabric, connects={**fabric.connects, switch: connects})


def neighbour_by_hand(fabric, block, chip, d, sign):
    """(block, chip) at the other end of a link, by the wiring rule as the reference states it."""
    moved = list(chip)
    moved[d] += sign
    if 0 <= moved[d] < 4:
        return block, tuple(moved)
    i, j = (chip[e] for e in range(3) if e != d)
    for out, into in fabric.connects.get(Switch(d, i, j), {}).items():
        plus, minus = out, into - fabric.pod.num_blocks
        if (plus if sign > 0 else minus) == block:
            moved[d] = 0 if sign > 0 else 3
            return (minus if sign > 0 else plus), tuple(moved)
    return None


def chips_by_hand(fabric, blocks):
    """{(block, chip): set of neighbours} of some blocks."""
    return {
        (block, chip): {
            neighbour_by_hand(fabric, block, chip, d, sign) for d in range(3) for sign in (1, -1)
        }
        - {None}
        for block in blocks
        for chip in itertools.product(range(4), repeat=3)
    }


def isomorphic(one, other):
    """Whether two graphs {node: neighbours} with no labels are the same, by backtracking.

    Nodes are taken outwards from a first one, so each next one's image is a neighbour of an image.
    """
    if len(one) != len(other) or sum(map(len, one.values())) != sum(map(len, other.values())):
        return False
    first = next(iter(one))
    order, seen = [first], {first}
    for node in order:
        for to in sorted(one[node] - seen):
            seen.add(to)
            order.append(to)
    if len(order) < len(one):
        return False
    earlier = [[m for m in order[:n] if m in one[node]] for n, node in enumerate(order)]

    def fits(n, image, taken):
        if n == len(order):
            return True
        if n == 0:
            candidates = set(other)
        else:
            candidates = set.intersection(*(other[image[m]] for m in earlier[n]))
        for candidate in sorted(candidates - taken):
            if len(other[candidate]) != len(one[order[n]]):
                continue
            # No other edges to nodes taken already.
            if len(other[candidate] & taken) != len(earlier[n]):
                continue
            image[order[n]] = candidate
            if fits(n + 1, image, taken | {candidate}):
                return True
            del image[order[n]]
        return False

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(order) + 1000)
    try:
        return fits(0, {}, set())
    finally:
        sys.setrecursionlimit(limit)


def graph_of(slice):
    return {c: {int(to) for to in row if to >= 0} for c, row in enumerate(slice.neighbours)}


@pytest.mark.parametrize(
    "text", ["4x4x4", "4x4x8", "4x4x8_twisted", "4x4x12_twist:0,0,4/0,0,0/0,0,0", "4x4x8_wrap:"]
)
def test_the_fibres_make_the_graph_of_the_slice(text):
    slice = Slice.parse(text)
    blocks = (5, 2, 7)[: slice.num_blocks]
    fabric = place(Fabric(pod=SMALL_POD), "a", slice, blocks)
    assert isomorphic(chips_by_hand(fabric, blocks), graph_of(slice))
    assert check(fabric) == []


def test_the_twisted_graph_is_not_the_regular_one():
    twisted = place(Fabric(pod=SMALL_POD), "a", Slice.parse("4x4x8_twisted"), (1, 0))
    assert not isomorphic(chips_by_hand(twisted, (1, 0)), graph_of(Slice.parse("4x4x8")))


def test_trace_agrees_with_the_wiring_rule():
    fabric = placed("4x4x8_twisted", "4x8x8", "8x8x8_twist:0,0,0/0,0,4/4,0,0")
    far = trace(fabric).reshape(64, 4, 4, 4, 6)
    for block, *chip in np.random.default_rng(0).integers(0, [16, 4, 4, 4], (200, 4)).tolist():
        for j in range(6):
            reached = neighbour_by_hand(fabric, block, chip, j // 2, 1 - 2 * (j % 2))
            end = far[block, chip[0], chip[1], chip[2], j]
            if reached is None:
                assert end == -1
            else:
                other, (x, y, z) = reached
                assert end == 6 * (64 * other + 16 * x + 4 * y + z) + (j ^ 1)


@pytest.mark.parametrize(
    "texts",
    [
        ["16x16x16"],
        ["8x16x16_twisted", "8x8x16_twisted", "4x4x8_twisted", "2x2x4", "4x4x4"],
        ["4x4x256"],
        ["4x8x16_twist:0,4,4/0,0,4/0,0,0", "12x12x12", "4x4x8_wrap:z", "8x4x4_twisted"],
    ],
)
def test_pods_are_proved(texts):
    fabric = placed(*texts)
    assert check(fabric) == []
    for name, placement in fabric.placements.items():
        assert verify(fabric, name) == []
        slice = placement.slice
        assert len(set(placement.chips.tolist())) == slice.num_chips


def test_every_switch_of_a_dimension_holds_the_same_permutation():
    fabric = placed("16x16x16")
    assert set(fabric.connects) == set(SWITCHES)
    for d in range(3):
        held = [fabric.connects[s] for s in SWITCHES if s.d == d]
        assert len(held) == 16
        assert all(h == held[0] for h in held)
        assert sorted(held[0]) == list(range(64))
        assert sorted(held[0].values()) == list(range(64, 128))
    one = placed("4x4x4")
    assert all(held == {0: 64} for held in one.connects.values())


# Planted errors.

SLICES = ["4x4x8_twisted", "8x8x8", "4x8x8"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SWITCHES), st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_swapped_connects_are_found(switch, a, b):
    fabric = placed(*SLICES)
    held = dict(fabric.connects[switch])
    a, b = sorted(held)[a % len(held)], sorted(held)[b % len(held)]
    held[a], held[b] = held[b], held[a]
    lines = check(with_connects(fabric, switch, held))
    # Four ends of links are wrong, and a line says of each that is in a slice what it reaches.
    assert (len(lines) >= 4) == (a != b)
    assert (lines == []) == (a == b)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SWITCHES), st.integers(0, 10**6))
def test_a_dropped_connect_is_found(switch, a):
    fabric = placed(*SLICES)
    held = dict(fabric.connects[switch])
    del held[sorted(held)[a % len(held)]]
    lines = check(with_connects(fabric, switch, held))
    assert len(lines) == 2
    assert all("reaches nothing, should reach link:" in line for line in lines)


def test_other_planted_errors_are_found():
    fabric, switch = placed(*SLICES), Switch(1, 2, 3)
    held = dict(fabric.connects[switch])
    twice = {**held, 0: held[5]}
    assert f"ocs y,2,3: port {held[5]} is used twice, by 0-{held[5]} and 5-{held[5]}" in check(
        with_connects(fabric, switch, twice)
    )
    joined_to_an_idle_block = {**held, 40: 64 + 41}
    lines = check(with_connects(fabric, switch, joined_to_an_idle_block))
    assert len(lines) == 2
    assert "which is not of the same slice" in lines[0]
    plus_to_plus = {p: q for p, q in held.items() if p > 1} | {0: 1, 64: 65}
    assert len(check(with_connects(fabric, switch, plus_to_plus))) == 4
    with pytest.raises(ValueError, match="ocs y,2,3: no port 200; there are 0"):
        with_connects(fabric, switch, {**held, 200: 65})
    a, b = fabric.placements["a"], fabric.placements["b"]
    shared = dataclasses.replace(b, blocks=(a.blocks[0], *b.blocks[1:]))
    overlapping = dataclasses.replace(fabric, placements={**fabric.placements, "b": shared})
    assert any("block 0 is in slice 'b' and in another" in line for line in check(overlapping))
    other_order = dataclasses.replace(b, blocks=(b.blocks[1], b.blocks[0], *b.blocks[2:]))
    assert verify(dataclasses.replace(fabric, placements={"b": other_order}), "b")


def test_a_twist_on_regular_connects_is_found():
    fabric = placed("4x4x8")
    claim = dataclasses.replace(fabric.placements["a"], slice=Slice.parse("4x4x8_twisted"))
    lines = verify(dataclasses.replace(fabric, placements={"a": claim}), "a")
    assert len(lines) == 2 * 2 * 2 * 16  # both ends of 16 links of x and y, at each of two blocks


# Invariants over any history.


@st.composite
def histories(draw):
    fabric = Fabric()
    shapes = ["4x4x4", "4x4x8_twisted", "4x8x8_twisted", "8x8x8", "2x2x4", "8x8x12", "4x4x12"]
    steps, refusals = [], []
    for n in range(draw(st.integers(1, 8))):
        names = sorted(fabric.placements)
        action = draw(st.sampled_from(["place", "place", "place", "release", "replace", "drain"]))
        try:
            if action == "place":
                order = draw(st.randoms(use_true_random=False))
                fabric = place(
                    fabric,
                    f"s{n}",
                    Slice.parse(draw(st.sampled_from(shapes))),
                    policy=lambda _, free, count, order=order: order.sample(free, count),
                )
            elif action == "release" and names:
                fabric = release(fabric, draw(st.sampled_from(names)))
            elif action == "replace" and names:
                name = draw(st.sampled_from(names))
                blocks = fabric.placements[name].blocks
                fabric = replace_block(fabric, name, draw(st.sampled_from(blocks)))
            elif action == "drain":
                fabric = drain(fabric, Part("block", (draw(st.integers(0, 63)),))).fabric
        except ValueError as error:
            refusals.append(str(error))
        steps.append(fabric)
    return steps, refusals


@settings(max_examples=25, deadline=None)
@given(histories())
def test_fabric_invariants(history):
    steps, refusals = history
    last = steps[-1]
    assert all("are free and healthy; " in line and "\n" not in line for line in refusals)
    assert check(last) == []
    used = [b for p in last.placements.values() for b in p.blocks]
    assert len(used) == len(set(used))
    assert not set(used) & last.unhealthy_blocks
    for held in last.connects.values():
        ports = [*held, *held.values()]
        assert len(ports) == len(set(ports))
        assert set(ports) <= set(range(128))
    # The difference of two states turns one into the other, and touches nothing that both have.
    for old, new in itertools.pairwise([Fabric(), steps[0], last]):
        changes = reconfigure(old, new)
        assert apply(old, changes).connects == new.connects
        before, after = (
            {(s, a, b) for s, held in f.connects.items() for a, b in held.items()}
            for f in (old, new)
        )
        assert (changes.num_breaks, changes.num_makes) == (
            len(before - after),
            len(after - before),
        )
    for name in last.placements:
        last = release(last, name)
    assert not last.connects


def test_place_and_release_leave_nothing():
    fabric = placed("8x8x8", "4x4x8_twisted")
    assert release(place(fabric, "x", Slice.parse("8x8x16_twisted")), "x") == fabric


def test_a_replaced_block_moves_only_its_own_connects():
    fabric = placed("8x8x8", "4x4x8")
    new = replace_block(fabric, "a", 3, 20)
    changes = reconfigure(fabric, new)
    # In each of 48 switches the block has a connect at its + and one at its - port.
    assert changes.num_breaks == changes.num_makes == 96
    assert new.placements["a"].blocks == (0, 1, 2, 20, 4, 5, 6, 7)
    assert check(new) == []
    assert changes.seconds(TPU_V4.switch) == TPU_V4.switch.switching_seconds
    slow = dataclasses.replace(TPU_V4.switch, switching_seconds=0.5)
    assert changes.seconds(slow, at_a_time=1) == 1.0
    assert reconfigure(Fabric(), fabric).seconds(slow, at_a_time=4) == 1.5  # 10 connects a switch
    assert reconfigure(fabric, fabric).seconds(slow) == 0


# Failures.


@pytest.mark.parametrize(
    ("text", "chips", "links"),
    [
        # A chip's links count in both directions; of a host's 24, 4 wires are between its chips.
        ("chip:3,0,1,2", 1, 2 * 6),
        ("host:3,5", 4, 2 * (24 - 4)),
        ("block:3", 64, 2 * (144 + 96)),
        ("link:3,1,1,2,-x", 0, 2),
        ("link:3,0,1,2,-x", 0, 2),
        ("ocs:x,0,0", 0, 2 * 8),
        ("port:x,0,0,3", 0, 2),
        ("port:x,0,0,67", 0, 2),
    ],
)
def test_what_a_failure_touches(text, chips, links):
    fabric = placed("8x8x8", "4x4x4")
    touched = impact(fabric, part(text))
    assert (len(touched["a"].chips), len(touched["a"].links)) == (chips, links)
    assert set(touched) == ({"a", "b"} if text.startswith("ocs") else {"a"})
    slice = fabric.placements["a"].slice
    for link in touched["a"].links:
        chip, direction = divmod(link, 6)
        back = 6 * slice.neighbours[chip, direction] + (direction ^ 1)
        assert back in touched["a"].links
    assert len(verify(fail(fabric, part(text)), "a")) == links
    assert repair(fail(fabric, part(text)), part(text)) == fabric


def test_a_switch_has_the_links_of_one_place_of_the_faces():
    fabric = placed("8x8x12")
    slice = fabric.placements["a"].slice
    for text, d, (i, j) in [
        ("ocs:x,1,2", 0, (1, 2)),
        ("ocs:y,3,0", 1, (3, 0)),
        ("ocs:z,0,1", 2, (0, 1)),
    ]:
        chips, directions = np.divmod(impact(fabric, part(text))["a"].links, 6)
        places = slice.coordinates[chips] % 4
        assert (np.delete(places, d, axis=1) == (i, j)).all()
        assert (places[:, d] == np.where(directions == 2 * d, 3, 0)).all()
        assert len(chips) == 2 * 12


def test_a_host_is_two_by_two_by_one():
    fabric = place(Fabric(), "a", Slice.parse("4x4x4"))
    coordinates = fabric.placements["a"].slice.coordinates
    seen = []
    for host in range(16):
        chips = impact(fabric, Part("host", (0, host)))["a"].chips
        low, high = coordinates[list(chips)].min(axis=0), coordinates[list(chips)].max(axis=0)
        assert (high - low).tolist() == [1, 1, 0]
        assert (low[:2] % 2 == 0).all()
        seen += chips
    assert sorted(seen) == list(range(64))


def test_failures_elsewhere_touch_nothing():
    fabric = placed("4x4x8", "2x2x4")
    assert impact(fabric, part("block:9")) == {}
    assert impact(fabric, part("port:x,0,0,130")) == {}
    assert impact(fabric, part("chip:2,3,3,3")) == {}  # of the block of "b", but not in the slice
    assert impact(fabric, part("chip:2,1,1,3"))["b"].chips == (15,)


def test_unhealthy_blocks_are_not_chosen():
    fabric = Fabric()
    for text in ("chip:0,1,1,1", "host:1,3", "link:3,0,0,0,-x", "ocs:x,0,0", "port:y,1,1,4"):
        fabric = fail(fabric, part(text))
    assert choose(fabric, Slice.parse("4x4x8")) == (2, 4)
    with pytest.raises(ValueError, match=r"block 1 is not healthy \(host:1,3 failed\)"):
        place(fabric, "a", Slice.parse("4x4x8"), (1, 2))


def test_a_failed_port_is_patched_until_the_spares_are_used():
    fabric = placed("8x8x16_twisted")
    for port in range(8):
        bad = Part("port", (0, 1, 2, port))
        fabric = fail(fabric, bad)
        assert len(verify(fabric, "a")) == 2
        fabric = patch(fabric, bad)
        assert check(fabric) == []
    assert sorted(fabric.patches.values()) == list(range(128, 136))
    with pytest.raises(ValueError, match=r"port:x,1,2,8: no spare port of ocs x,1,2 is left"):
        patch(fail(fabric, part("port:x,1,2,8")), part("port:x,1,2,8"))
    with pytest.raises(ValueError, match="no fibre is at this port"):
        patch(fabric, part("port:x,1,2,0"))
    moved = replace_block(fabric, "a", 3)  # patched fibres are found again
    assert check(moved) == []
    assert check(release(moved, "a")) == []
    # A spare that fails is patched in turn.
    one = fail(patch(placed("4x4x8"), part("port:x,0,0,0")), part("port:x,0,0,128"))
    assert verify(one, "a")
    assert check(patch(one, part("port:x,0,0,128"))) == []


@pytest.mark.parametrize("name", ["a", "b"])
def test_any_block_of_a_slice_can_be_drained(name):
    fabric = placed("4x8x8", "4x4x8")
    for block in fabric.placements[name].blocks:
        done = drain(fabric, Part("block", (block,)))
        assert done.moves == {name: (block, 6)}
        assert block not in done.fabric.placements[name].blocks
        assert check(done.fabric) == []


def test_drain_of_a_block():
    fabric = placed("8x8x8", "4x4x8")
    done = drain(fabric, part("host:3,1"))
    assert done.moves == {"a": (3, 10)}
    assert not done.reroutes
    assert check(done.fabric) == []
    assert 3 not in done.fabric.free_blocks
    assert 3 in repair(done.fabric, part("block:3")).free_blocks
    idle = drain(fabric, part("block:30"))
    assert not idle.moves
    assert idle.fabric.connects == fabric.connects
    with pytest.raises(ValueError, match="needs 1 block, 0 of 64 are free and healthy"):
        drain(placed("16x16x16"), part("block:3"))


def test_drain_of_a_switch():
    fabric = placed("8x8x8", "4x4x8_twisted", "2x2x4")
    done = drain(fabric, part("ocs:z,1,1"))
    assert done.reroutes == ("a", "b")
    assert Switch(2, 1, 1) not in done.fabric.connects
    assert len(verify(done.fabric, "a")) == 2 * 8
    later = place(done.fabric, "d", Slice.parse("4x4x8"))
    assert Switch(2, 1, 1) not in later.connects
    assert check(repair(later, part("ocs:z,1,1"))) == []
    assert check(release(done.fabric, "a"))  # "b" has links fewer still
    assert check(release(release(done.fabric, "a"), "b")) == []
    ported = drain(fabric, part("port:z,1,1,0"))
    assert ported.fabric.patches == {(Switch(2, 1, 1), 0): 128}


# Choice and fixed wiring.


def test_too_many_blocks_names_the_nearest_that_fits():
    fabric = placed("8x16x16", "4x8x16")
    with pytest.raises(
        ValueError,
        match=r"slice 8x8x32: needs 32 blocks, 24 of 64 are free and healthy; .* fits is 8x8x24",
    ):
        choose(fabric, Slice.parse("8x8x32"))
    with pytest.raises(ValueError, match="0 of 64 are free and healthy; release a slice first"):
        choose(placed("16x16x16"), Slice.parse("2x2x1"))


def test_a_policy_chooses():
    last = place(Fabric(), "a", Slice.parse("4x8x8"), policy=lambda _, free, n: free[-n:])
    assert last.placements["a"].blocks == (60, 61, 62, 63)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f: place(f, "a", Slice.parse("4x4x4")), "slice 'a': the name is taken"),
        (lambda f: place(f, "b", Slice.parse("4x4x8"), (5,)), "takes 2 different blocks, 1 given"),
        (lambda f: place(f, "b", Slice.parse("4x4x8"), (5, 5)), "2 different blocks, 1 given"),
        (lambda f: place(f, "b", Slice.parse("4x4x8"), (1, 5)), "block 1 is in slice 'a'; free"),
        (lambda f: place(f, "b", Slice.parse("4x4x4"), (64,)), "none of the blocks 0 .. 63"),
        (lambda f: release(f, "b"), "slice 'b': no such slice; there are 'a'"),
        (lambda f: verify(f, "b"), "slice 'b': no such slice; there are 'a'"),
        (lambda f: replace_block(f, "a", 9), "block 9 is not one of its blocks 0, 1"),
        (lambda f: replace_block(f, "a", 0, 1), "block 1 is in slice 'a'"),
        (
            lambda f: apply(f, Changes({}, {Switch(0, 0, 0): {0: 70}})),
            "ocs x,0,0: port 0 is already joined to 64; break that before joining it to 70",
        ),
        (
            lambda f: apply(f, Changes({}, {Switch(0, 0, 0): {7: 64}})),
            "ocs x,0,0: port 64 is already joined to 0",
        ),
        (
            lambda f: apply(f, Changes({}, {Switch(0, 0, 0): {7: 70, 8: 70}})),
            "port 70 is already joined to 7",
        ),
        (
            lambda f: apply(f, Changes({}, {Switch(0, 0, 0): {7: 136}})),
            "ocs x,0,0: no port 136; there are 0 .. 135",
        ),
        (
            lambda f: apply(f, Changes({Switch(0, 0, 0): {0: 65}}, {})),
            "ocs x,0,0: ports 0 and 65 are not joined",
        ),
        (lambda f: part("foo:1"), "part 'foo:1': no such kind; write for example block:12"),
        (lambda f: part("block:64"), "'64' is no block; there are 0 .. 63"),
        (lambda f: part("block:-1"), "'-1' is no block"),
        (lambda f: part("chip:3"), "write it like chip:12,0,1,3"),
        (lambda f: part("link:3,0,1,2,-q"), r"'-q' is no direction; there are \+x -x \+y"),
        (lambda f: part("ocs:w,0,0"), "'w' is no dimension; there are x y z"),
        (lambda f: part("port:x,0,0,136"), "'136' is no port; there are 0 .. 135"),
    ],
)
def test_mistakes_are_one_line(call, says):
    fabric = placed("4x4x8")
    with pytest.raises(ValueError, match=says) as error:
        call(fabric)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["block:12", "host:12,3", "chip:12,0,1,3", "link:12,0,1,3,+x", "ocs:x,0,0", "port:z,3,1,17"],
)
def test_part_round_trip(text):
    assert str(part(text)) == text


def test_boxes_of_fixed_wiring():
    for shape, count in [((1, 1, 1), 64), ((2, 2, 2), 27), ((1, 1, 2), 3 * 48), ((4, 4, 4), 1)]:
        found = boxes(shape, (4, 4, 4))
        assert found.shape == (count, np.prod(shape))
        for blocks in found:
            places = np.array(np.unravel_index(blocks, (4, 4, 4)))
            extent = places.max(axis=1) - places.min(axis=1) + 1
            assert sorted(extent) == sorted(shape)
            assert len(set(blocks.tolist())) == np.prod(shape)
    assert len(boxes((1, 1, 5), (4, 4, 4))) == 0
