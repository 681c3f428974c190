import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from topology import DIRECTIONS, Slice, legal_shapes, nearest_shape, shipped_twist
from topology.torus.shapes import times

SMALL = [
    text
    for shape in legal_shapes(6)
    for text in (
        [times(shape)]
        + [times(shape) + "_twisted"] * bool(shipped_twist(shape))
        + [times(shape) + "_wrap:", times(shape) + "_wrap:z"] * (shape[0] == 4)
    )
] + ["8x4x4_twisted", "2x4x1", "4x4x12_twist:0,0,4/0,0,4/0,0,0", "4x8x8_twist:0,4,4/0,0,4/0,0,0"]


def step(slice, chip, d, sign):
    """A neighbour as the wiring makes it, digit by digit: past an end, the shift is carried on."""
    chip = list(chip)
    moves = [(d, sign)]
    while moves:
        e, by = moves.pop()
        for _ in range(abs(by)):
            way = 1 if by > 0 else -1
            chip[e] += way
            if not 0 <= chip[e] < slice.shape[e]:
                if not slice.wrap[e]:
                    return None
                chip[e] -= way * slice.shape[e]
                moves += [(f, way * s) for f, s in enumerate(slice.twist[e])]
    return tuple(chip)


def by_hand(slice):
    """Adjacency matrix [N, N] and neighbours [N, 6], one chip at a time."""
    chips = list(itertools.product(*map(range, slice.shape)))
    number = {chip: n for n, chip in enumerate(chips)}
    neighbours = [
        [number.get(step(slice, chip, d, sign), -1) for d in range(3) for sign in (1, -1)]
        for chip in chips
    ]
    pairs = [(c, to) for c, row in enumerate(neighbours) for to in row if to >= 0]
    near, far = np.array(pairs).T
    return coo_array((np.ones(len(near)), (near, far)), (len(chips),) * 2).tocsr(), neighbours


@pytest.mark.parametrize("text", SMALL)
def test_graph_and_distances_agree_with_one_made_by_hand(text):
    slice = Slice.parse(text)
    matrix, neighbours = by_hand(slice)
    assert slice.neighbours.tolist() == neighbours
    hops = shortest_path(matrix, unweighted=True)
    for chip in {0, slice.num_chips // 3, slice.num_chips - 1}:
        assert slice.hop_distances(chip).tolist() == hops[chip].tolist()
    assert slice.diameter == hops.max()
    N = slice.num_chips
    assert slice.mean_distance == pytest.approx(hops.sum() / (N * (N - 1)))
    assert slice.num_links == matrix.nnz // 2


@pytest.mark.parametrize(
    ("text", "diameter", "mean"),
    [
        ("4x4x8", 8, 4.031),
        ("4x4x8_twisted", 6, 3.465),
        ("4x8x8", 10, 5.020),
        ("4x8x8_twisted", 6, 4.329),
    ],
)
def test_reference_distances(text, diameter, mean):
    slice = Slice.parse(text)
    assert slice.diameter == diameter
    assert slice.mean_distance == pytest.approx(mean, abs=5e-4)


def test_the_whole_pod():
    pod = Slice.parse("16x16x16")
    assert (pod.num_chips, pod.num_hosts, pod.num_blocks) == (4096, 1024, 64)
    assert (pod.diameter, pod.num_links, pod.bisection_links) == (24, 3 * 4096, 512)
    assert pod.mean_distance == 3 * 4 * 4096 / 4095  # a ring of 16 has a mean of 4 with itself


# A slice of whole blocks, with shifts along an order of the dimensions.
@st.composite
def tori(draw):
    shape = draw(st.sampled_from([s for s in legal_shapes(12) if s[0] % 4 == 0]))
    shape = draw(st.permutations(shape))
    order = draw(st.permutations(range(3)))
    twist = np.zeros((3, 3), int)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        d, e = order[i], order[j]
        twist[d, e] = 4 * draw(st.integers(-shape[e] // 4, 2 * shape[e] // 4))
    return Slice(shape=tuple(shape), twist=tuple(map(tuple, twist.tolist())))


@settings(max_examples=40, deadline=None)
@given(tori())
def test_a_twisted_torus_is_a_cayley_graph(slice):
    to, chips = slice.neighbours, np.arange(slice.num_chips)
    for j in range(6):
        assert sorted(to[:, j]) == list(chips)
        assert (to[to[:, j], j ^ 1] == chips).all()
    assert all(len(set(row)) == 6 for row in to.tolist())
    for i, j in itertools.combinations(range(6), 2):
        assert (to[to[:, i], j] == to[to[:, j], i]).all()
    for d in range(3):
        around = 0
        for _ in range(slice.shape[d]):
            around = to[around, 2 * d]
        shift = 0
        for e in range(3):
            for _ in range(slice.twist[d][e]):
                shift = to[shift, 2 * e]
        assert around == shift
    assert (slice.hop_distances(0) < slice.num_chips).all()


@settings(max_examples=40, deadline=None)
@given(tori())
def test_text_names_the_slice(slice):
    again = Slice.parse(str(slice))
    assert again == slice
    assert hash(again) == hash(slice)


@pytest.mark.parametrize("text", SMALL)
def test_text_round_trip(text):
    assert str(Slice.parse(text)) == text


def test_a_shift_beyond_the_end_names_the_same_network():
    # 12 beyond an end of 8 carries once: 4 more along z, and one shift of z.
    far = Slice(shape=(4, 4, 8), twist=((0, 0, 12), (0, 0, 0), (0, 0, 0)))
    assert str(far) == "4x4x8_twist:0,0,4/0,0,0/0,0,0"
    carried = Slice(shape=(4, 8, 8), twist=((0, 8, 0), (0, 0, 4), (0, 0, 0)))
    assert carried.twist == ((0, 0, 4), (0, 0, 4), (0, 0, 0))


def test_index_and_coordinates():
    slice = Slice.parse("4x8x12")
    assert slice.coordinates[1].tolist() == [0, 0, 1]
    assert slice.coordinates[12].tolist() == [0, 1, 0]
    assert slice.index([3, 7, 11]) == slice.num_chips - 1
    assert (slice.index(slice.coordinates) == np.arange(slice.num_chips)).all()
    assert slice.reduce([-1, 8, 25]).tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="outside the slice 4x8x12"):
        slice.index([4, 0, 0])
    with pytest.raises(ValueError, match="read-only"):
        slice.neighbours[0, 0] = 1


def crossing(slice, half):
    to = slice.neighbours
    return int(((to >= 0) & (half[to] != half[:, None])).sum()) // 2


@pytest.mark.parametrize("text", ["2x2x1", "2x2x2", "2x4x1", "4x4x1", "2x2x4"])
def test_bisection_of_small_meshes_is_the_least_over_all_halves(text):
    slice = Slice.parse(text)
    N = slice.num_chips
    least = 3 * N
    for rest in itertools.combinations(range(1, N), N // 2 - 1):
        half = np.zeros(N, bool)
        half[[0, *rest]] = True
        least = min(least, crossing(slice, half))
    assert slice.bisection_links == least


@pytest.mark.parametrize(
    ("text", "links", "all_to_all"),
    [
        ("4x4x8", 32, 128),
        ("4x4x8_twisted", 64, 73.33),
        ("4x8x8", 64, 256),
        ("4x8x8_twisted", 128, 184),
    ],
)
def test_bisection_lies_between_its_bounds(text, links, all_to_all):
    slice = Slice.parse(text)
    N = slice.num_chips
    assert slice.bisection_links == links
    # All-to-all sends N/2 * N/2 units each way through any halves, over links that carry at most
    # the reference's optimum.
    assert slice.bisection_links >= N * N / 4 / all_to_all
    # The half of the best phase has as many chips and cuts as many links as said.
    phases = slice.phases
    least = np.minimum(phases, N - phases).sum(axis=1) * 2
    best = phases[np.flatnonzero(least == links)[0]]
    half = slice.coordinates @ best % N < N / 2
    assert half.sum() == N / 2
    assert crossing(slice, half) == links


def test_no_descent_finds_a_smaller_cut_of_a_twisted_slice():
    slice, rng = Slice.parse("4x4x8_twisted"), np.random.default_rng(0)
    joined = np.zeros((128, 128), int)
    np.add.at(joined, (np.arange(128)[:, None], slice.neighbours), 1)
    for _ in range(20):
        side = np.where(rng.permutation(128) < 64, 1, -1)
        while True:  # swap the pair that helps most
            gain = -side * (joined @ side)
            a, b = np.flatnonzero(side > 0), np.flatnonzero(side < 0)
            both = gain[a][:, None] + gain[b] - 2 * joined[np.ix_(a, b)]
            i, j = np.unravel_index(both.argmax(), both.shape)
            if both[i, j] <= 0:
                break
            side[a[i]], side[b[j]] = -1, 1
        assert crossing(slice, side > 0) >= slice.bisection_links


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("4x4x16_twist:0,0,4/0,0,8/0,0,0", 112),  # no plane cuts fewer than 128
        ("8x8x32_twist:0,0,8/0,0,16/0,0,0", 448),  # the same, of twice the size: four times
        ("4x4x12_twist:0,0,4/0,0,4/0,0,0", 94),
    ],
)
def test_bisection_of_a_twisted_slice_is_no_more_than_a_cut_that_exists(text, links):
    slice = Slice.parse(text)
    assert slice.bisection_links <= links
    # Every half of the chips is cut as often at least as all-to-all needs.
    load = all_to_all_load(slice)
    assert slice.bisection_links >= slice.num_chips**2 / 4 / load


def all_to_all_load(slice):
    from topology.routing.throughput import all_to_all

    return all_to_all(slice).max_link_load


def test_bisection_without_all_wraparounds():
    assert Slice.parse("4x4x8_wrap:").bisection_links == 16
    assert Slice.parse("4x4x8_wrap:z").bisection_links == 32  # 2 x 16 across z, 32 across x or y
    assert Slice.parse("4x4x16_wrap:z").bisection_links == 32


@settings(max_examples=25, deadline=None)
@given(tori())
def test_phases_are_the_dual_of_the_lattice(slice):
    N = slice.num_chips
    assert (slice.phases @ slice.lattice.T % N == 0).all()
    assert len(np.unique(slice.phases, axis=0)) == N


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8x8x8", 48),
        ("4x4x8", 16),
        ("4x8x12", 8),
        ("4x4x8_twisted", 48),
        ("4x8x8_twisted", 48),
        ("4x4x12_twist:0,0,4/0,0,4/0,0,0", 12),
        ("2x2x4", 16),
        ("4x4x8_wrap:z", 16),
        ("4x4x4_wrap:z", 16),
    ],
)
def test_point_symmetries_move_links_to_links(text, count):
    slice = Slice.parse(text)
    symmetries = slice.point_symmetries
    assert len(symmetries) == len({P.tobytes() for P in symmetries}) == count
    for P in symmetries:
        action = slice.symmetry_action(P)
        assert sorted(action) == list(range(slice.num_chips))
        for j, direction in enumerate(DIRECTIONS):
            image = (P @ direction == DIRECTIONS).all(axis=1).argmax()
            to = slice.neighbours[:, j]
            moved = np.where(to >= 0, action[to], -1)
            assert (slice.neighbours[action, image] == moved).all()
        if slice.is_torus:
            assert action[0] == 0


def test_other_signed_permutations_are_no_symmetries():
    slice = Slice.parse("4x4x12_twist:0,0,4/0,0,4/0,0,0")
    found = {P.tobytes() for P in slice.point_symmetries}
    others = 0
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            P = np.eye(3, dtype=int)[list(order)] * np.array(signs)[:, None]
            if P.tobytes() not in found:
                # A linear map is an automorphism if it is one to one on the chips.
                moved = slice.index(slice.reduce(slice.coordinates @ P.T))
                kept = slice.reduce(slice.lattice @ P.T).any()
                assert kept or len(set(moved.tolist())) < slice.num_chips
                others += 1
    assert others == 48 - 12


def test_translations():
    slice = Slice.parse("4x4x8_twisted")
    for vector in ([1, 0, 0], [3, 2, 5], [-1, -7, 11]):
        action = slice.translation(vector)
        assert sorted(action) == list(range(128))
        assert (action[slice.neighbours] == slice.neighbours[action]).all()
    partly = Slice.parse("4x4x8_wrap:z")
    assert (partly.translation([0, 0, 8]) == np.arange(128)).all()
    with pytest.raises(ValueError, match="does not wrap around in x; give 0 there"):
        partly.translation([1, 0, 0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3x4x4", "slice 3x4x4: inside a block .* nearest legal is 4x4x4"),
        ("4x4x6", "slice 4x4x6: beyond one block .* nearest legal is 4x4x8"),
        ("2x8x8", "slice 2x8x8: .* nearest legal is 4x8x8"),
        ("32x32x32", "slice 32x32x32: takes 512 blocks, a pod has 64; .* is 16x16x16"),
        ("1x1x1", "whole hosts .* nearest legal is 1x2x2"),
        ("0x4x4", "three positive sizes"),
        ("8x8", "not a slice of TPU v4, which has 3 dimensions; write for example 4x4x8"),
        ("4x4x8_twistd", "not a slice"),
        ("4x4x8_twist:0,0,4", "not a slice"),
        ("4x4x8_twist:0,0,4/0,-/0,0,0", "not a slice"),
        ("4x4x4_twisted", "only n x n x 2n and n x 2n x 2n ship .* nearest is 4x4x8_twisted"),
        ("4x4x16_twisted", "nearest is 4x4x8_twisted"),
        ("12x24x24_twisted", "takes 108 blocks"),
        ("2x2x4_twisted", "nearest is 4x4x8_twisted"),
        ("2x2x2_wrap:z", "wraparound needs .* nearest that wraps is 4x4x4"),
        ("4x4x8_twist:0,0,3/0,0,0/0,0,0", "a multiple of 4; in place of 3 of x take 4"),
        ("4x8x8_twist:0,0,0/0,0,4/0,4,0", "shift each other in a circle"),
        ("4x8x8_twist:0,0,0/0,4,0/0,0,0", "shift each other in a circle"),
        ("4x4x8_twisted_wrap:xy", "wraps around in x, y and z"),
    ],
)
def test_a_wrong_slice_is_one_line_with_the_nearest_legal(text, says):
    with pytest.raises(ValueError, match=says) as error:
        Slice.parse(text)
    assert "\n" not in str(error.value)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="three positive sizes"):
        Slice(shape=(4, 4))
    with pytest.raises(ValueError, match="three rows of three shifts"):
        Slice(shape=(4, 4, 8), twist=((0, 0, 4),))


def test_legal_shapes_are_all_that_slices_take():
    legal = set(legal_shapes())
    assert {(2, 2, 4), (4, 4, 256), (16, 16, 16), (12, 12, 24)} <= legal
    for shape in itertools.combinations_with_replacement(range(1, 21), 3):
        taken = True
        try:
            Slice(shape=shape)
        except ValueError:
            taken = False
        assert taken == (shape in legal)


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 3))
def test_nearest_shape_is_legal_and_in_order(shape):
    nearest = nearest_shape(shape)
    Slice(shape=nearest)
    for d, e in itertools.permutations(range(3), 2):
        assert shape[d] >= shape[e] or nearest[d] <= nearest[e]
    if tuple(sorted(shape)) in legal_shapes():
        assert nearest == shape
