"""Slices of every pod: shapes, wiring and limits are those of the pod that they are of."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from topology import (
    PODS,
    TPU_V3,
    TPU_V4,
    TPU_V5E,
    TPU_V5P,
    TPU_V6E,
    Fabric,
    Groups,
    Job,
    Network,
    Part,
    Placement,
    Policy,
    Slice,
    Switch,
    Traffic,
    all_to_all,
    all_twists,
    collective_cost,
    fabric,
    hamiltonian_ring,
    lay_mesh,
    legal_shapes,
    nearest_shape,
    replay,
    schedule,
    simulate_pod,
)
from topology.collectives.collectives import lower_bounds
from topology.collectives.schedules import dimension_rings
from topology.fabric.light import check, impact, trace
from topology.fabric.losses import lost
from topology.fleet.availability import block_availability, sample_goodput
from topology.fleet.policies import ContiguousBox
from topology.fleet.workload import generate_jobs, generate_maintenance, generate_outages
from topology.routing.deadlock import is_deadlock_free
from topology.routing.loads import least_load, link_loads
from topology.routing.loads import lower_bounds as traffic_bounds
from topology.routing.routing import dimension_order
from topology.routing.simulate import all_to_all_packets, simulate
from topology.routing.throughput import closed_form, is_cut
from topology.torus.shapes import times

FLAT = [TPU_V5E, TPU_V6E]
ALL_FLAT = [(pod, shape) for pod in FLAT for shape in pod.shapes]
PUBLISHED = {  # chips and hosts, of Google Cloud's tables of configurations
    TPU_V5E.name: "1x1 1 1, 2x2 4 1, 2x4 8 1, 4x4 16 2, 4x8 32 4, 8x8 64 8, 8x16 128 16, "
    "16x16 256 32",
    TPU_V5P.name: "2x2x1 4 1, 2x2x2 8 2, 2x4x4 32 8, 4x4x4 64 16, 4x4x8 128 32, 4x8x8 256 64, "
    "8x8x8 512 128, 8x8x16 1024 256, 8x16x16 2048 512, 16x16x16 4096 1024, 16x16x24 6144 1536",
}


@pytest.mark.parametrize(
    ("pod", "text"),
    [(PODS[name], row) for name, rows in PUBLISHED.items() for row in rows.split(", ")],
    ids=str,
)
def test_published_slices_have_their_chips_and_hosts(pod, text):
    name, chips, hosts = text.split()
    slice = Slice.parse(name, pod)
    assert (str(slice), slice.num_chips, slice.num_hosts) == (name, int(chips), int(hosts))
    assert slice.pod is pod
    if pod.block is not None and slice.is_whole_blocks:
        assert 64 * slice.num_blocks == slice.num_chips


def test_twisted_slices_of_v5p_are_those_that_are_published():
    twisted = {"4x4x8", "4x8x8", "8x8x16", "8x16x16"}
    for row in PUBLISHED[TPU_V5P.name].split(", "):
        name = row.split()[0]
        if name in twisted:
            slice = Slice.parse(f"{name}_twisted", TPU_V5P)
            assert slice.twist == Slice.parse(f"{name}_twisted").twist
        else:
            with pytest.raises(ValueError, match=r"only n x n x 2n and n x 2n x 2n ship twisted"):
                Slice.parse(f"{name}_twisted", TPU_V5P)


def test_a_slice_is_of_one_pod():
    v4, v5p = Slice.parse("4x4x8"), Slice.parse("4x4x8", TPU_V5P)
    assert v4 != v5p
    assert v4 == Slice(shape=(4, 4, 8), pod=TPU_V4)
    assert len({v4, v5p, Slice(shape=(4, 4, 8))}) == 2
    with pytest.raises(ValueError, match="is one of TPU v5p, the pod is TPU v4"):
        fabric.place(Fabric(), "it", v5p)
    with pytest.raises(ValueError, match="is one of TPU v5p, the pod is TPU v4"):
        Fabric(placements={"it": Placement(v5p, (0, 1))})


@pytest.mark.parametrize("pod", [p for p in PODS.values() if p.shapes], ids=lambda p: p.name)
def test_legal_shapes_are_all_that_slices_take(pod):
    legal = set(legal_shapes(pod=pod))
    assert max(map(math.prod, legal)) == pod.largest_slice
    for shape in itertools.combinations_with_replacement(range(1, 26), pod.dimensions):
        if shape in legal:
            assert Slice(shape=shape, pod=pod).sizes == shape
            continue
        with pytest.raises(ValueError, match=f"{times(nearest_shape(shape, pod=pod))}$"):
            Slice(shape=shape, pod=pod)


@pytest.mark.parametrize(
    ("pod", "text", "says"),
    [
        (TPU_V5P, "16x16x32", "takes 128 blocks, the largest slice of TPU v5p has 96; .* 12x16x32"),
        (TPU_V5P, "4x4x6", "every dimension is a multiple of 4"),
        (TPU_V5P, "4x4", "not a slice of TPU v5p, which has 3 dimensions; write for example 4x4x8"),
        (TPU_V5E, "4x4x4", "not a slice of TPU v5e, which has 2 dimensions; .* 8x16"),
        (TPU_V5E, "3x3", "slices of TPU v5e are 1x1, .* and 16x16; the nearest legal is 4x4"),
        (TPU_V5E, "16x32", "the nearest legal is 16x16"),
        (TPU_V5E, "0x4", "two positive sizes like 4x8"),
        (TPU_V5E, "-2x4", "not a slice"),
        (TPU_V5E, "99999x1", "the nearest legal is"),
        (TPU_V6E, "16x16_twisted", "no slice of TPU v6e is twisted, its wiring is fixed"),
        (TPU_V6E, "16x16_twist:0,8,0/0,0,0/0,0,0", "wiring of TPU v6e is fixed, without twists"),
        (TPU_V5E, "4x8_wrap:y", "on TPU v5e dimensions of 16 chips wrap .* wraps in no dimension"),
        (TPU_V5E, "8x16_wrap:x", "this one wraps in y"),
        (TPU_V5E, "8x16_wrap:z", "this one wraps in y"),
        (TPU_V3, "4x4", "TPU v3: which slices wrap around is not published; take one of TPU v4"),
    ],
)
def test_a_wrong_slice_is_one_line(pod, text, says):
    with pytest.raises(ValueError, match=says) as error:
        Slice.parse(text, pod)
    assert "\n" not in str(error.value)


def test_a_third_size_of_one_may_stand_as_coordinates_of_devices_have_it():
    assert Slice.parse("8x16x1", TPU_V5E) == Slice(shape=(8, 16), pod=TPU_V5E)
    assert Slice(shape=(8, 16, 1), pod=TPU_V5E).shape == (8, 16, 1)
    assert Slice(shape=(8, 16), pod=TPU_V5E).sizes == (8, 16)
    assert Slice.parse("16x8_wrap:", TPU_V6E).wrap == (False,) * 3
    assert Slice(shape=(16, 8), wrap=(True, False), pod=TPU_V6E) == Slice.parse("16x8", TPU_V6E)


def grid(shape):
    """Links of v5e and v6e by hand: neighbours in the grid, and around a dimension of 16."""
    links = set()
    for x, y in np.ndindex(*shape):
        for dx, dy in ((1, 0), (0, 1)):
            to = [x + dx, y + dy]
            for d in range(2):
                if to[d] == shape[d] == 16:
                    to[d] = 0
            if to[0] < shape[0] and to[1] < shape[1]:
                links.add(frozenset([(x, y), tuple(to)]))
    return links


@pytest.mark.parametrize(("pod", "shape"), ALL_FLAT, ids=str)
def test_only_a_dimension_of_16_wraps_around(pod, shape):
    slice = Slice(shape=shape, pod=pod)
    places = [tuple(place[:2]) for place in slice.coordinates.tolist()]
    found = {
        frozenset([places[c], places[to]])
        for c, row in enumerate(slice.neighbours)
        for to in row
        if to >= 0
    }
    assert found == grid(shape)
    assert slice.num_links == len(found)
    assert slice.wrap == (shape[0] == 16, shape[1] == 16, False)
    assert slice.is_torus == (shape in ((16, 16), (1, 1)))
    reach = [k // 2 if k == 16 else k - 1 for k in shape]
    assert slice.diameter == sum(reach)
    assert slice.hop_distances().max() <= slice.diameter


@pytest.mark.parametrize("shape", TPU_V5E.shapes, ids=str)
def test_bisection_and_all_to_all_are_those_of_formulas(shape):
    slice = Slice(shape=shape, pod=TPU_V5E)
    N = slice.num_chips
    rings = [2 if k == 16 else 1 for k in shape]
    planes = [r * N // k for r, k in zip(rings, shape, strict=True) if k > 1]
    assert slice.bisection_links == min(planes, default=0)
    loads = [(k // 2) ** 2 * N // k / r for r, k in zip(rings, shape, strict=True)]
    flow = all_to_all(slice)
    assert flow.max_link_load == pytest.approx(max(loads), rel=1e-5)
    assert flow.lower_bound == pytest.approx(closed_form(slice), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 4)])
def test_no_cut_into_halves_of_a_small_slice_is_smaller(shape):
    slice, N = Slice(shape=shape, pod=TPU_V6E), math.prod(shape)
    tails, directions = np.nonzero(slice.neighbours >= 0)
    heads = slice.neighbours[tails, directions]
    halves = np.zeros((math.comb(N, N // 2), N), bool)
    for row, half in enumerate(itertools.combinations(range(N), N // 2)):
        halves[row, list(half)] = True
    assert (halves[:, tails] & ~halves[:, heads]).sum(axis=1).min() == slice.bisection_links


@pytest.mark.parametrize("shape", TPU_V5E.shapes[:5], ids=str)
def test_routing_and_loads_of_a_flat_slice(shape):
    slice = Slice(shape=shape, pod=TPU_V5E)
    everyone = np.ones((slice.num_chips,) * 2)
    loads = link_loads(slice, dimension_order(slice), everyone)
    assert not loads[:, 4:].any()
    assert loads.max() == pytest.approx(closed_form(slice))
    bounds = traffic_bounds(slice, everyone)
    assert max(bounds.values()) <= loads.max() + 1e-9
    assert least_load(slice, everyone).max_link_load == pytest.approx(loads.max(), rel=1e-3)


def test_packets_of_a_flat_slice_all_arrive():
    for shape in TPU_V5E.shapes[:4]:
        slice = Slice(shape=shape, pod=TPU_V5E)
        routing = dimension_order(slice)
        assert is_deadlock_free(slice, routing)
        packets = all_to_all_packets(slice, routing)
        assert len(packets) == slice.num_chips * (slice.num_chips - 1)
        done = simulate(slice.num_chips, packets)
        assert (done.delivered, done.stuck) == (len(packets), 0)


def test_the_torus_of_two_dimensions_is_routed_as_one():
    slice = Slice(shape=(16, 16), pod=TPU_V6E)
    loads = link_loads(slice, dimension_order(slice), np.ones((256, 256)))
    assert np.unique(loads[:, :4].round(9)).tolist() == [512.0]  # 16^3 / 8, all links alike
    assert len(slice.point_symmetries) == 8 * 2  # of the square, and z the other way


@pytest.mark.parametrize("shape", TPU_V5E.shapes, ids=str)
@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "all_to_all", "permute"])
def test_no_collective_of_a_flat_slice_is_faster_than_its_bounds(kind, shape):
    slice = Slice(shape=shape, pod=TPU_V5E)
    groups, network = Groups(slice, [np.arange(slice.num_chips)]), Network.of(TPU_V5E)
    cost = collective_cost(kind, groups)
    bounds = lower_bounds(kind, groups, 1e6, network)
    assert max(bounds.values()) <= cost.seconds(1e6, network) * (1 + 1e-9)
    if slice.num_chips <= 32:
        played = replay(schedule(kind, groups), 1e6)
        assert played.correct
        assert played.seconds == pytest.approx(cost.seconds(1e6, network), rel=1e-3)


@pytest.mark.parametrize("pod", FLAT, ids=lambda pod: pod.name)
def test_an_all_reduce_of_the_pod_keeps_all_links_busy_as_published(pod):
    """All chips send over all links: as many bytes/s as the published all-reduce bandwidth."""
    slice = Slice(shape=(16, 16), pod=pod)
    cost = collective_cost("all_reduce", Groups(slice, [np.arange(256)]))
    assert cost.load == pytest.approx(2 * (255 / 256) / 4)
    sent = 256 * 2 * 255 / 256  # bytes of all chips, of an all-reduce of one byte
    seconds = cost.load / pod.chip.link_bandwidth
    assert sent / seconds == pytest.approx(pod.all_reduce_bandwidth)


def test_the_largest_slice_of_v5p_reaches_the_bound_of_its_links():
    slice = Slice.parse("16x16x24", TPU_V5P)
    assert (slice.num_chips, slice.num_blocks, slice.num_hosts) == (6144, 96, 1536)
    assert slice.bisection_links == 2 * 16 * 16
    assert all_to_all(slice).max_link_load == pytest.approx(24**2 / 4 * 256 / 2)
    groups = Groups(slice, np.arange(6144).reshape(256, 24))  # all rings along z
    network = Network.of(TPU_V5P)
    assert network.bandwidth == pytest.approx(90e9)
    reduce = collective_cost("all_reduce", groups)
    assert reduce.load == pytest.approx(2 * 23 / 24 / 2)
    assert max(lower_bounds("all_reduce", groups, 1e9, network).values()) <= reduce.seconds(
        1e9, network
    )


def test_a_mesh_on_a_flat_slice_is_laid_and_priced_by_its_own_links():
    slice = Slice(shape=(16, 16), pod=TPU_V6E)
    traffic = [Traffic(kind="all_gather", axes=("fsdp",), bytes=2**30)]
    layout = lay_mesh(slice, {"fsdp": 16, "tensor": 16}, traffic)
    ring = 2**30 * 15 / 16 / (2 * 90e9) + 8e-6
    assert layout.seconds <= ring * (1 + 1e-9)
    slow = lay_mesh(Slice(shape=(16, 16), pod=TPU_V5E), {"fsdp": 16, "tensor": 16}, traffic)
    assert slow.seconds == pytest.approx(2 * layout.seconds, rel=0.01)
    one = Slice(shape=(1, 1), pod=TPU_V6E)
    assert lay_mesh(one, {"fsdp": 1}, traffic).seconds == 0


@pytest.mark.parametrize("shape", TPU_V5E.shapes[1:], ids=str)
def test_rings_through_a_flat_slice(shape):
    slice = Slice(shape=shape, pod=TPU_V5E)
    ring = hamiltonian_ring(slice)
    assert sorted(ring) == list(range(slice.num_chips))
    for chip, after in zip(ring, np.roll(ring, -1), strict=True):
        assert after in slice.neighbours[chip]
    if slice.num_chips <= 32:
        rings = dimension_rings("all_gather", Groups(slice, [np.arange(slice.num_chips)]), shape)
        assert replay(rings, 1.0).correct


def test_twists_are_those_of_pods_of_blocks():
    assert [str(s) for s in all_twists((4, 4, 8), TPU_V5P)] == [
        str(s) for s in all_twists((4, 4, 8))
    ]
    assert {s.pod.name for s in all_twists((4, 4, 8), TPU_V5P)} == {"TPU v5p"}
    with pytest.raises(ValueError, match="TPU v5e: is not made of blocks"):
        all_twists((16, 16), TPU_V5E)


@pytest.mark.parametrize(
    ("pod", "text", "says"),
    [
        (TPU_V5P, "ocs:x,0,0", "TPU v5p: how its optical switches are wired is not published"),
        (TPU_V5P, "port:x,0,0,17", "TPU v5p: how its optical switches are wired is not published"),
        (TPU_V5P, "block:140", "'140' is no block; there are 0 .. 139"),
        (TPU_V5P, "cable:1", "no such kind; write for example block:12, .*,[+]x$"),
        (TPU_V5E, "block:1", "TPU v5e has neither blocks nor optical switches; .* chip:0,1 or"),
        (TPU_V5E, "host:1,2", "neither blocks nor optical switches"),
        (TPU_V5E, "ocs:x,0,0", "neither blocks nor optical switches"),
        (TPU_V5E, "chip:0,1,2", "write it like chip:0,1"),
        (TPU_V5E, "chip:0,16", "'16' is no coordinate of a chip; there are 0 .. 15"),
        (TPU_V5E, "link:0,1,+z", "'[+]z' is no direction; there are [+]x -x [+]y -y"),
        (TPU_V6E, "cable:1", "no such kind; write for example chip:0,1 or link:0,1,[+]x$"),
        (TPU_V3, "block:1", "neither blocks nor optical switches"),
    ],
)
def test_parts_are_those_of_the_pod(pod, text, says):
    with pytest.raises(ValueError, match=says):
        Part.parse(text, pod)


def test_parts_of_every_pod_are_read_as_they_are_written():
    for text in ("block:139", "host:12,3", "chip:12,0,1,3", "link:12,0,1,3,+x"):
        assert str(Part.parse(text, TPU_V5P)) == text
    for text in ("chip:0,15", "link:0,1,-y"):
        assert str(Part.parse(text, TPU_V5E)) == text
        assert Part.parse(text, TPU_V5E).block is None


SLICES = ["4x4x8_twisted", "4x4x8_wrap:z", "4x4x4", "2x4x4", "2x2x1"]


@pytest.mark.parametrize("text", SLICES)
def test_losses_by_the_wiring_rule_are_those_by_following_the_light(text):
    slice, rng = Slice.parse(text), np.random.default_rng(0)
    pod = fabric.place(Fabric(), "it", slice, tuple(range(slice.num_blocks)))
    kinds = {
        "block": lambda b: (b,),
        "host": lambda b: (b, rng.integers(16)),
        "chip": lambda b: (b, *rng.integers(4, size=3)),
        "link": lambda b: (b, *rng.integers(4, size=3), rng.integers(6)),
        "port": lambda b: (*rng.integers([3, 4, 4]), b + 64 * rng.integers(2)),
    }
    for kind, where in kinds.items():
        for _ in range(12):
            part = Part(kind, tuple(int(n) for n in where(rng.integers(slice.num_blocks + 1))))
            seen = impact(pod, part).get("it")
            if seen is None:
                with pytest.raises(ValueError, match="carries nothing of"):
                    lost(slice, [part])
                continue
            chips, links = lost(slice, [part])
            assert (tuple(chips), tuple(links)) == (seen.chips, seen.links)
    if slice.is_whole_blocks:
        for switch in (Part("ocs", (2, 0, 0)), Part("ocs", (2, 3, 1))):
            assert tuple(lost(slice, [switch])[1]) == impact(pod, switch)["it"].links


def test_losses_of_a_flat_slice():
    slice = Slice(shape=(8, 16), pod=TPU_V5E)
    chips, links = lost(slice, [Part.parse("chip:0,0", TPU_V5E)])
    assert chips.tolist() == [0]
    assert links.size == 2 * 3  # at the edge of x, and around y
    chips, links = lost(slice, [Part.parse("link:3,15,+y", TPU_V5E)])
    assert not chips.size
    assert {int(link) // 6 for link in links} == {3 * 16 + 15, 3 * 16}
    corner = Slice(shape=(4, 4), pod=TPU_V5E)
    two = lost(corner, [Part.parse(text, TPU_V5E) for text in ("link:0,0,+x", "link:0,0,+y")])[1]
    assert is_cut(corner, two)
    for text in ("link:0,0,-x", "chip:4,0", "link:15,15,+x"):
        with pytest.raises(ValueError, match="carries nothing of 4x4, whose chips are 0,0"):
            lost(corner, [Part.parse(text, TPU_V5E)])


def test_what_needs_blocks_or_switches_says_so():
    flat = Slice(shape=(16, 16), pod=TPU_V5E)
    calls = [
        lambda: flat.num_blocks,
        lambda: flat.block_shape,
        lambda: Placement(flat, (0,)),
        lambda: Fabric(pod=TPU_V5E),
        lambda: block_availability(0.99, TPU_V5E),
        lambda: generate_jobs(1e5, pod=TPU_V5E),
        lambda: generate_outages(1e5, pod=TPU_V5E),
        lambda: generate_maintenance(1e5, every=1e4, lasts=10, pod=TPU_V5E),
        lambda: simulate_pod([], [], horizon=1e5, pod=TPU_V5E),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="TPU v5e: is not made of blocks; take TPU v4 or"):
            call()


def test_a_slice_of_v5p_has_its_blocks_and_no_cross_connects_that_anyone_knows():
    slice = Slice.parse("16x16x24", TPU_V5P)
    pod = fabric.place(Fabric(pod=TPU_V5P), "it", slice)
    pod = fabric.replace_block(fabric.fail(pod, Part("host", (95, 3))), "it", 95)
    assert pod.placements["it"].blocks == (*range(95), 96)
    assert len(pod.free_blocks) == 140 - 97
    assert pod.connects == {}
    with pytest.raises(ValueError, match="the nearest that fits is"):
        fabric.place(pod, "more", Slice.parse("4x4x176", TPU_V5P))
    for known in (check, trace):
        with pytest.raises(ValueError, match="how its optical switches are wired is not published"):
            known(pod)
    with pytest.raises(ValueError, match="how its optical switches are wired is not published"):
        fabric.apply(pod, fabric.Changes({}, {Switch(0, 0, 0): {0: 1}}))


def test_jobs_of_a_v5p_pod_run_on_its_blocks():
    jobs = generate_jobs(5e5, seed=3, pod=TPU_V5P)
    assert {job.slice.pod.name for job in jobs} == {"TPU v5p"}
    outages = generate_outages(5e5, seed=3, pod=TPU_V5P)
    report = simulate_pod(jobs, outages, horizon=5e5, pod=TPU_V5P)
    assert report.blocks == 140
    wired = Policy(placement=ContiguousBox())
    job = Job(name="a", slice=Slice.parse("16x20x16", TPU_V5P), arrival=0, work=1e5)
    fixed = simulate_pod([job], horizon=5e5, pod=TPU_V5P, policy=wired)
    assert fixed.jobs[0].finished is not None  # a box of 4x5x4 blocks in the grid of 4x5x7
    for other in (TPU_V4, TPU_V5E):
        with pytest.raises(ValueError, match=r"is one of TPU v5p|is not made of blocks"):
            simulate_pod([job], horizon=5e5, pod=other)
    with pytest.raises(ValueError, match="140 blocks, at most 64 can be sampled"):
        sample_goodput(0.99, (1, 1, 2), pod=TPU_V5P)


def test_limits_are_data():
    small = dataclasses.replace(TPU_V4, largest_slice=128, num_blocks=2)
    with pytest.raises(ValueError, match="takes 4 blocks, a pod has 2; the nearest legal is 4x4x8"):
        Slice.parse("4x8x8", small)
