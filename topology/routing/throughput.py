"""Uniform all-to-all on a slice: the optimum over all routings, also with links that failed.

The load T here is that of the most loaded link when every chip sends one unit to every other. A
link that carries `bandwidth` bytes/s then takes T / bandwidth seconds for units of a byte.

Why one source is enough on a torus: translate a best routing by all N chips and average. The load
of the most loaded link does not grow (it is convex), and now all links of one direction carry the
same load and every source does the same. What is left is the routing of one source over six classes
of links; symmetries that fix the source merge classes further. A failure breaks some symmetries,
and those that remain do the same with what they leave: an optical switch serves one in-face
position of every block, so translations by whole blocks remain.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from topology.arrays import Integers
from topology.hardware import AnyTorus, switched
from topology.numbers import number, whole
from topology.routing.flows import Flow, least_max_load
from topology.torus.shapes import shipped_twist
from topology.torus.slices import DIRECTIONS, Slice

_WORK = 2**18  # sources x chips up to which the optimum around failures takes seconds


def all_to_all(
    slice: Slice,
    failed_links: Iterable[int] = (),
    *,
    tolerance: float = 1e-6,
    max_rounds: int = 200,
    time_limit: float = np.inf,
    progress: Callable[[float, float], object] | None = None,
) -> Flow:
    """The exact optimum of uniform all-to-all over all routings: `max_link_load` is T.

    A few milliseconds on any torus; about a second with a failed optical switch on 4096 chips; with
    one failed link (few symmetries remain) a second on 128 chips, seconds on 512. With failures
    that leave no symmetry it can take minutes: bound the time, and `lower_bound` <= T <=
    `max_link_load` holds, within a few percent after seconds.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing.
      time_limit: seconds after which it stops; the first round is always done.
      progress: called with (lower_bound, max_link_load) after every round.

    Raises:
      ValueError: a link does not exist, chips cannot reach each other any more, or links have
        other bandwidths than others.
    """
    if (slice.link_rates != 1).any():
        raise ValueError(
            f"slice {slice}: the best routing of all-to-all is searched for links alike; give one "
            "bandwidth"
        )
    neighbours, failed = _without(slice, failed_links)
    N = slice.num_chips
    chips, links = orbits(slice, failed)
    _, sources, counts = np.unique(chips, return_index=True, return_counts=True)
    return least_max_load(
        neighbours,
        np.ones((len(sources), N)),
        sources=sources,
        source_counts=counts,
        link_classes=links.reshape(N, 6),
        start=all_to_all(slice).prices if failed.size else None,
        tolerance=tolerance,
        max_rounds=max_rounds,
        time_limit=time_limit,
        progress=progress,
    )


def closed_form(slice: Slice) -> float | None:
    """T of uniform all-to-all where a formula is known, else None.

    Without a twist, T = max over d of floor(k_d^2 / 4) N / k_d, halved where dimension d wraps
    around: dimension order with antipodes split loads no link more, and no routing does better,
    because so much must pass the d-links of the middle cut (without wraparound) or so many hops
    along d are needed (with it).
    The shipped twists: (7 n^4 - 2 n^2) / 24 on n x n x 2n and (35 n^4 - 8 n^2) / 48 on n x 2n x 2n:
    the sum of all distances from a chip over its six links, which are loaded alike.
    """
    if not slice.is_twisted:
        return float(
            max(
                k**2 // 4 * (slice.num_chips // k) / (1 + wraps)
                for k, wraps in zip(slice.shape, slice.wrap, strict=True)
            )
        )
    if slice.twist != shipped_twist(slice.shape, slice.pod):
        return None
    n, middle, _ = sorted(slice.shape)
    return (7 * n**4 - 2 * n**2) / 24 if middle == n else (35 * n**4 - 8 * n**2) / 48


def is_cut(slice: Slice, failed_links: Iterable[int]) -> bool:
    """Tells whether some chip cannot reach another without the failed links."""
    neighbours, _ = _without(slice, failed_links)
    tails, directions = np.nonzero(neighbours >= 0)
    N = slice.num_chips
    graph = coo_array((np.ones(len(tails)), (tails, neighbours[tails, directions])), (N, N))
    return int(connected_components(graph, connection="strong")[0]) > 1


def is_quick(slice: Slice, failed_links: Iterable[int] = ()) -> bool:
    """Tells whether the first routing that `all_to_all` finds takes seconds, and not minutes.

    It takes minutes around failures of a large slice that leave few of its symmetries, such as a
    single link's; one optical switch leaves enough.
    """
    failed = np.unique(np.array(list(failed_links), int))
    sources = len(np.unique(orbits(slice, failed)[0])) if failed.size else 1
    return sources * slice.num_chips <= _WORK


def all_to_all_kept(
    slice: Slice, failed_links: Iterable[int], *, time_limit: float = np.inf
) -> float:
    """The part of uniform all-to-all's throughput that is left without some links.

    0 where they cut the slice in two. Where the time limit (seconds) ends the search, the part that
    the best routing found by then keeps.
    """
    failed = list(failed_links)
    if is_cut(slice, failed):
        return 0.0
    around = all_to_all(slice, failed, time_limit=time_limit)
    return all_to_all(slice).max_link_load / around.max_link_load


def bisection_is_least(slice: Slice, lower_bound: float) -> bool:
    """Tells whether no cut into halves is smaller than `slice.bisection_links`.

    Known of regular tori and meshes of TPUs; of others where all-to-all proves it: N^2 / 4 units go
    from one half to the other over c links, none of which has to carry more than T, so
    c >= N^2 / 4 T.

    Args:
      lower_bound: of T, proved; the optimum of all-to-all.
    """
    if not slice.is_twisted and not isinstance(slice.pod, AnyTorus):
        return True
    half = slice.num_chips // 2
    least = half * (slice.num_chips - half) / lower_bound if lower_bound else 0.0
    return slice.bisection_links <= math.ceil(least * (1 - 1e-6))


def bytes_per_second_per_chip(slice: Slice, max_link_load: float, bandwidth: float) -> float:
    """bytes/s that every chip sends, and receives, in uniform all-to-all: bandwidth (N - 1) / T.

    Args:
      max_link_load: T.
      bandwidth: of a link in one direction, bytes/s.
    """
    number("max_link_load", max_link_load, above=0)
    number("bandwidth", bandwidth)
    return bandwidth * ((slice.num_chips - 1) / max_link_load)


def switch_links(slice: Slice, dimension: int, i: int, j: int) -> Integers:
    """int: ids of the directed links of a slice that pass the optical switch OCS(d, i, j).

    They leave their block through the face +d or -d at the in-face position (i, j): the chip's
    other two coordinates, in the order x, y, z, are i and j modulo 4.

    Raises:
      ValueError: there is no such switch, its wiring is not published, or the slice has no optical
        links in that dimension.
    """
    side = switched(slice.pod).block.side
    dimension = whole("switch: dimension", dimension, most=2)
    i, j = whole("switch: i", i, most=side - 1), whole("switch: j", j, most=side - 1)
    place = np.delete(slice.coordinates % side, dimension, axis=1)
    last = slice.coordinates[:, dimension] % side == side - 1
    chips = np.flatnonzero(last & (place == (i, j)).all(axis=1))
    ahead = slice.neighbours[chips, 2 * dimension]
    chips, ahead = chips[ahead >= 0], ahead[ahead >= 0]
    if not chips.size:
        raise ValueError(
            f"switch ({dimension}, {i}, {j}): {slice} has no optical link in dimension "
            f"{'xyz'[dimension]}; slices of whole blocks do"
        )
    return np.sort(np.concatenate([6 * chips + 2 * dimension, 6 * ahead + 2 * dimension + 1]))


def both_ways(slice: Slice, link: int) -> Integers:
    """int [2]: the ids of a link and of its reverse, which fail together."""
    chip, direction = divmod(whole("link", link, most=6 * slice.num_chips - 1), 6)
    if not 0 <= chip < slice.num_chips or slice.neighbours[chip, direction] < 0:
        raise ValueError(f"link {link}: {slice} has none of that id, which is 6 * chip + direction")
    return np.array([link, 6 * slice.neighbours[chip, direction] + (direction ^ 1)])


def _without(slice: Slice, failed_links: Iterable[int]) -> tuple[Integers, Integers]:
    """(neighbours [N, 6] with -1 for failed links, the failed ids in order)."""
    ids = [whole("failed link", link, most=6 * slice.num_chips - 1) for link in failed_links]
    failed = np.unique(np.array(ids, int))
    neighbours: Integers = slice.neighbours.copy()
    missing = neighbours.ravel()[failed] < 0
    if missing.any():
        raise ValueError(
            f"failed link {failed[missing][0]}: {slice} has none of that id, "
            "which is 6 * chip + direction"
        )
    neighbours.ravel()[failed] = -1
    return neighbours, failed


def orbits(
    slice: Slice, *link_sets: Integers, reflections_only: bool = False
) -> tuple[Integers, Integers]:
    """Labels [N] of chips and [6 N] of links: equal where a symmetry takes one to the other.

    The symmetries are the translations and point symmetries, and their products, that keep each
    of the sets of links (sorted ids).

    Args:
      reflections_only: leaves out symmetries that exchange dimensions.
    """
    kept = [links for links in link_sets if len(links)]
    chips, links = list[Integers](), list[Integers]()
    for P in slice.point_symmetries:
        if reflections_only and not P.diagonal().all():
            continue
        direction = np.argmax(DIRECTIONS @ P.T @ DIRECTIONS.T, axis=1)  # to which each one goes
        action = slice.symmetry_action(P)
        identity = P.trace() == 3
        for vector in _translations(slice, action, direction, kept, identity):
            moved = slice.translation(vector)[action]
            chips.append(moved)
            links.append((6 * moved[:, None] + direction).ravel())
            if not identity:  # with all translations that remain, one of the coset is enough
                break
    return _components(chips), _components(links)


def _translations(
    slice: Slice,
    action: Integers,
    direction: Integers,
    link_sets: list[Integers],
    identity: bool,
) -> Iterator[Integers]:
    """Vectors by which a translation, after `action`, keeps every set of links."""
    if not link_sets:
        units = np.eye(3, dtype=int)[list(slice.wrap)]
        yield from units if identity else np.zeros((1, 3), int)
        return
    first = link_sets[0]
    images = 6 * action[first // 6] + direction[first % 6]
    targets = first[first % 6 == images[0] % 6]
    vectors = slice.coordinates[targets // 6] - slice.coordinates[images[0] // 6]
    for vector in vectors[~vectors[:, ~np.array(slice.wrap)].any(axis=1)]:

        def kept(links: Integers, vector: Integers = vector) -> bool:
            chip = slice.coordinates[action[links // 6]] + vector
            image = 6 * slice.index(slice.reduce(chip)) + direction[links % 6]
            return np.array_equal(np.sort(image), links)

        if all(kept(links) for links in link_sets):
            yield vector


def _components(permutations: list[Integers]) -> Integers:
    """Labels the orbits of permutations: two entries share one where some of these join them."""
    here = np.tile(np.arange(len(permutations[0])), len(permutations))
    there = np.concatenate(permutations)
    n = len(permutations[0])
    graph = coo_array((np.ones(len(here), np.int8), (here, there)), (n, n))
    labels: Integers = connected_components(graph, directed=False)[1]
    return labels
