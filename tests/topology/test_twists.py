import itertools

import numpy as np
import pytest

from topology import Slice, all_twists, ranked_twists


def classes_by_hand(box):
    """Classes of lattices of Z^3 by which a box (in blocks) tiles it, from all lattices of its
    index n. Each is a set of points of [0, n)^3, for n Z^3 lies in it."""
    n = int(np.prod(box))
    points = np.indices((n,) * 3).reshape(3, -1).T
    cells = np.indices(box).reshape(3, -1).T
    found = set()
    for a, b in itertools.product(range(1, n + 1), repeat=2):
        if n % (a * b):
            continue
        c = n // (a * b)
        for p, q, r in itertools.product(range(b), range(c), range(c)):
            # Rows (a p q), (0 b r), (0 0 c).
            def rest(v, a=a, b=b, c=c, p=p, q=q, r=r):
                i = v[:, 0] // a
                v = v - i[:, None] * (a, p, q)
                j = v[:, 1] // b
                v = v - j[:, None] * (0, b, r)
                return v % (n + 1, n + 1, c)  # the first two are less than n already

            if len(np.unique(rest(cells), axis=0)) < n:
                continue
            inside = points[~rest(points).any(axis=1)]
            images = []
            for order in itertools.permutations(range(3)):
                for signs in itertools.product((1, -1), repeat=3):
                    image = inside[:, order] * signs % n
                    images.append(tuple(sorted(image @ (n * n, n, 1))))
            found.add(min(images))
    return found


@pytest.mark.parametrize("box", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 1, 3), (1, 2, 3), (2, 2, 2)])
def test_twists_are_all_lattices_that_the_box_tiles_by(box):
    shape = tuple(4 * k for k in box)
    n = int(np.prod(box))
    points = np.indices((n,) * 3).reshape(3, -1).T
    mine = set()
    for slice in all_twists(shape):
        inside = points[~slice.reduce(4 * points).any(axis=1)]
        images = []
        for order in itertools.permutations(range(3)):
            for signs in itertools.product((1, -1), repeat=3):
                image = inside[:, order] * signs % n
                images.append(tuple(sorted(image @ (n * n, n, 1))))
        mine.add(min(images))
    assert len(mine) == len(all_twists(shape))  # no two are equivalent
    assert mine == classes_by_hand(box)


@pytest.mark.parametrize("shape", [(4, 4, 8), (4, 8, 8), (8, 8, 16), (8, 16, 16)])
def test_the_shipped_twist_is_the_best(shape):
    (best, first), (_, second), *_ = ranked_twists(shape)
    assert str(best) == f"{'x'.join(map(str, shape))}_twisted"
    assert first < second


def test_regular_torus_is_among_them_and_never_better():
    for shape in [(4, 4, 4), (4, 4, 12), (4, 8, 16), (8, 8, 8)]:
        ranked = dict(ranked_twists(shape))
        regular = Slice(shape=shape)
        assert ranked[regular] == max(ranked.values())
    assert [str(s) for s in all_twists((4, 4, 4))] == ["4x4x4"]


def test_another_measure_ranks_otherwise():
    by_bisection = ranked_twists((4, 4, 16), lambda slice: -slice.bisection_links)
    assert [m for _, m in by_bisection] == sorted(
        -s.bisection_links for s in all_twists((4, 4, 16))
    )
    worst_first = ranked_twists((4, 4, 8), lambda slice: -slice.mean_distance)
    assert str(worst_first[0][0]) == "4x4x8"


def test_permuted_shapes_have_the_same_networks():
    def distances(shape):
        return sorted(round(m[0], 9) for _, m in ranked_twists(shape))

    assert distances((8, 4, 4)) == distances((4, 4, 8))
    assert distances((8, 4, 12)) == distances((4, 8, 12))


def test_a_mesh_has_no_twists():
    with pytest.raises(ValueError, match=r"twists of 2x4x4: .* nearest is 4x4x4"):
        all_twists((2, 4, 4))
