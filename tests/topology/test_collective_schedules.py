import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import Slice
from topology.collectives import KINDS, Network, collective_cost
from topology.collectives.groups import Groups, groups_of_axes
from topology.collectives.replay import replay
from topology.collectives.schedules import dimension_rings, hamiltonian_ring, schedule

NETWORK = Network(bandwidth=1e9, hop_latency=1e-6)
IDEAL = Network(bandwidth=1.0, hop_latency=0.0)
SLICES = ["2x2x1", "2x2x4", "4x4x4", "4x4x4_wrap:x", "4x4x8_twisted"]


@st.composite
def cases(draw):
    slice = Slice.parse(draw(st.sampled_from(SLICES)))
    shape = []
    for k in slice.shape:
        inner = draw(st.sampled_from([f for f in (1, 2) if k % f == 0]))
        shape += [k // inner, inner]
    axes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
    return groups_of_axes(slice, np.arange(slice.num_chips).reshape(shape), sorted(axes))


@settings(max_examples=30, deadline=None)
@given(cases(), st.sampled_from(KINDS))
def test_schedules_take_what_their_cost_says_and_deliver(groups, kind):
    played = replay(schedule(kind, groups), 1e6, NETWORK)
    assert played.correct
    cost = collective_cost(kind, groups)
    seconds = cost.seconds(1e6, NETWORK)
    # Parts of all-to-all on twisted slices are rounded to sixtieths, and a round's longest move may
    # be left unused; steps of several hops may find links idle where a line ends.
    assert played.seconds <= seconds * (1 + (0.05 if kind == "all_to_all" else 1e-9))
    if (np.abs(groups.steps).sum(axis=1) == 1).all() and kind not in ("all_to_all", "permute"):
        assert played.seconds == pytest.approx(seconds, rel=1e-9)


def test_all_to_all_of_a_twisted_slice_replays_at_its_optimum():
    slice = Slice.parse("4x4x8_twisted")
    groups = Groups(slice, np.arange(128)[None])
    played = replay(schedule("all_to_all", groups), 128.0, IDEAL)
    assert played.correct
    assert 220 / 3 * (1 - 1e-9) <= played.link_bytes.max() < 220 / 3 * 1.02


def test_backwards_an_all_gather_is_a_reduce_scatter():
    groups = groups_of_axes(Slice.parse("4x4x4_wrap:z"), np.arange(64).reshape(4, 4, 4), [1, 2])
    there = schedule("all_gather", groups)
    back = [r.reversed() for r in there.rounds[::-1]]
    assert all(r.adds for r in back)
    again = back[0].reversed()
    np.testing.assert_array_equal(again.directions, there.rounds[-1].directions)
    np.testing.assert_array_equal(again.source, there.rounds[-1].source)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize(
    ("name", "axes"),
    [("4x4x4", (0, 1, 2)), ("4x4x8", (0, 1)), ("4x4x8", (2,)), ("8x8x4", (0, 1))],
)
def test_equal_rings_keep_all_links_busy(kind, name, axes):
    slice = Slice.parse(name)
    groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), axes)
    sizes = [slice.shape[d] for d in axes]
    played = replay(dimension_rings(kind, groups, sizes), 1.0, IDEAL)
    times = 2 if kind == "all_reduce" else 1
    n = groups.size
    assert played.correct
    assert played.seconds == pytest.approx(times * (n - 1) / n / (2 * len(axes)))
    used = np.repeat(np.isin(np.arange(3), axes), 2)
    np.testing.assert_allclose(played.link_bytes[:, used], played.seconds)
    assert not played.link_bytes[:, ~used].any()


def test_unequal_rings_wait_for_the_longest():
    slice = Slice.parse("4x4x8")
    groups = Groups(slice, np.arange(128)[None])
    rings = replay(dimension_rings("all_gather", groups, slice.shape), 1.0, IDEAL)
    trees = replay(schedule("all_gather", groups), 1.0, IDEAL)
    assert (rings.correct, trees.correct) == (True, True)
    assert rings.seconds > trees.seconds == pytest.approx(127 / 128 / 6)


def test_lines_of_a_mesh_and_of_a_twisted_slice():
    for name in ["4x4x4_wrap:", "4x4x8_twisted"]:
        slice = Slice.parse(name)
        groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), [0])
        played = replay(dimension_rings("all_reduce", groups, [4]), 1.0, IDEAL)
        assert played.correct
        assert played.seconds == pytest.approx(2 * 3 / 4)


@pytest.mark.parametrize("name", ["2x2x1", "2x4x4", "4x4x8_wrap:", "4x4x8_twisted", "4x12x4"])
def test_hamiltonian_ring_is_one(name):
    slice = Slice.parse(name)
    ring = hamiltonian_ring(slice)
    assert sorted(ring) == list(range(slice.num_chips))
    for chip, after in zip(ring, np.roll(ring, -1), strict=True):
        assert after in slice.neighbours[chip]


def test_one_ring_of_a_twisted_slice_uses_two_links_of_a_chip():
    slice = Slice.parse("4x4x8_twisted")
    groups = Groups(slice, hamiltonian_ring(slice)[None])
    played = replay(dimension_rings("all_gather", groups, [128]), 1.0, IDEAL)
    assert played.correct
    assert played.seconds == pytest.approx(127 / 128 / 2)
    assert ((played.link_bytes > 0).sum(axis=1) == 2).all()


def test_a_ring_along_a_direction_of_the_lattice():
    # On 4x4x8 twisted, x comes back to its chip after 8 hops: lines of 4 are halves of rings of 8.
    slice = Slice.parse("4x4x8_twisted")
    ring = [int(slice.index(slice.reduce(np.array([a, 0, 0])))) for a in range(8)]
    others = [np.array([0, y, z]) for y in range(4) for z in range(4)]
    members = [[slice.index(slice.reduce(slice.coordinates[c] + v)) for c in ring] for v in others]
    groups = Groups(slice, np.array(members))
    assert len(groups.representatives) == 1
    played = replay(dimension_rings("all_gather", groups, [8]), 1.0, IDEAL)
    assert played.correct
    assert played.seconds == pytest.approx(7 / 8 / 2)
    assert collective_cost("all_gather", groups).load == pytest.approx(7 / 8 / 2)


def test_mistakes_are_named():
    groups = Groups(Slice.parse("2x2x1"), np.arange(4)[None])
    with pytest.raises(ValueError, match="their product is not the group's 4 members"):
        dimension_rings("all_gather", groups, [2, 4])
    with pytest.raises(ValueError, match="rings of 'permute': all_gather"):
        dimension_rings("permute", groups, [4])
    with pytest.raises(ValueError, match=r"a permutation of the members 0 \.\. 3"):
        schedule("permute", groups, to=[0, 0, 1, 2])
