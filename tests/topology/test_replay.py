from dataclasses import replace

import numpy as np
import pytest

from topology import DIRECTIONS, Slice
from topology.collectives import Network
from topology.collectives.groups import Groups, groups_of_axes
from topology.collectives.replay import replay
from topology.collectives.schedules import Round, Schedule, schedule

NETWORK = Network(bandwidth=2.0, hop_latency=0.5)


def plane(kind, name="4x4x4_wrap:z"):
    slice = Slice.parse(name)
    groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), [0, 2])
    return schedule(kind, groups)


def without(round, p):
    keep = np.arange(len(round.source)) != p
    names = ("source", "destination", "item", "first", "last", "directions")
    return replace(round, **{name: getattr(round, name)[keep] for name in names})


@pytest.mark.parametrize(
    "kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute"]
)
def test_a_lost_transfer_is_noticed(kind):
    whole = plane(kind)
    assert replay(whole, 1.0).correct
    for r in range(0, len(whole.rounds), 2):
        rounds = list(whole.rounds)
        rounds[r] = without(rounds[r], len(rounds[r].source) // 2)
        played = replay(replace(whole, rounds=tuple(rounds)), 1.0)
        # In a permute what is never sent is simply not in the schedule's promise.
        assert played.correct == (kind == "permute")


def test_rounds_in_the_wrong_order_are_noticed():
    for kind in ("all_gather", "reduce_scatter"):
        whole = plane(kind)
        assert not replay(replace(whole, rounds=whole.rounds[::-1]), 1.0).correct


def test_a_part_added_twice_is_noticed():
    whole = plane("reduce_scatter")
    assert not replay(replace(whole, rounds=(whole.rounds[0], *whole.rounds)), 1.0).correct


@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all", "permute"])
def test_bytes_and_seconds_by_hand(kind):
    whole = plane(kind)
    size, slice, n = 960.0, whole.groups.slice, whole.groups.size
    item = size if kind == "permute" else size / n
    total, seconds = {}, 0.0
    for round in whole.rounds:
        loads, longest = {}, 0
        for p in range(len(round.source)):
            place = slice.coordinates[round.source[p]]
            path = [j for j in round.directions[p] if j >= 0]
            for j in path:
                key = (tuple(place.tolist()), int(j))
                part = (round.last[p] - round.first[p]) / whole.pieces
                loads[key] = loads.get(key, 0) + item * part
                place = place + DIRECTIONS[j]
                place = np.where(slice.wrap, place % slice.shape, place)
                assert ((place >= 0) & (place < slice.shape)).all()
            assert slice.index(place) == round.destination[p]
            longest = max(longest, len(path))
        seconds += 0.5 * longest + max(loads.values()) / 2.0
        total = {key: total.get(key, 0) + loads.get(key, 0) for key in {*total, *loads}}
    played = replay(whole, size, NETWORK)
    assert played.seconds == pytest.approx(seconds)
    expected = np.zeros_like(played.link_bytes)
    for (place, j), amount in total.items():
        expected[slice.index(place), j] = amount
    np.testing.assert_allclose(played.link_bytes, expected, atol=1e-9)


def test_efficiency_stretches_the_transfer_not_the_latency():
    whole = plane("all_gather")
    slow = replace(NETWORK, efficiencies={"breadth_first": 0.5})
    latency = replay(whole, 0.0, NETWORK).seconds
    ideal, real = (replay(whole, 1e3, net).seconds for net in (NETWORK, slow))
    assert real - latency == pytest.approx(2 * (ideal - latency))


def test_paths_that_are_not_there_are_refused():
    slice = Slice.parse("2x2x1")
    groups = Groups(slice, np.arange(4)[None])

    def one(destination, direction):
        columns = [np.array([v]) for v in (0, destination, 0, 0, 1)]
        round = Round(*columns, np.array([[direction]]))
        return Schedule("all_gather", groups, 1, (round,), "breadth_first")

    assert not replay(one(2, 0), 1.0).correct  # a good path, but not all of an all-gather
    with pytest.raises(ValueError, match="passes a link that is not there"):
        replay(one(2, 1), 1.0)
    with pytest.raises(ValueError, match="ends at chip 2, not at 1"):
        replay(one(1, 0), 1.0)
