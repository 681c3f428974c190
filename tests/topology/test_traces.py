"""Traces replayed on slices: times by formulas, links shared fairly, what is wrong in one line."""

import dataclasses

import numpy as np
import pytest
from helpers import programs
from hypothesis import given, settings
from hypothesis import strategies as st

from topology import TPU_V5E, Network, Slice, collective_cost, groups_of_axes
from topology.collectives.collectives import KINDS
from topology.collectives.degraded import degraded_cost
from topology.plan.machine import machine_of
from topology.plan.predict import predict, read
from topology.plan.pricing import Pricing
from topology.routing.throughput import switch_links
from topology.traces.alike import classes
from topology.traces.flows import fair_rates
from topology.traces.replay import replay
from topology.traces.trace import Node, Rank, Trace

MB = 1e6
RING = Slice.parse("4x4x8")
NETWORK = Network.of(RING.pod)


def along(slice, *axes):
    """Of each chip the chips that differ from it along some axes only."""
    groups = groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), axes)
    whose = {}
    for group in groups.members.tolist():
        whose |= dict.fromkeys(group, tuple(group))
    return groups, [whose[chip] for chip in range(slice.num_chips)]


def everyone(slice, program, *partners):
    """The trace in which each chip runs a program with partners[k][chip] in its k-th call."""
    ranks = [Rank(0, tuple(each[chip] for each in partners)) for chip in range(slice.num_chips)]
    return Trace([tuple(program)], ranks)


def test_a_step_takes_what_it_computes_and_what_its_collective_takes():
    """A ring of eight: (2 * 7/8 of the bytes over two links) and 8 hops, after 100 us."""
    _, rings = along(RING, 2)
    program = [
        Node("layer", "compute", seconds=1e-4),
        Node("sum", "all_reduce", (0,), bytes=8 * MB),
    ]
    found = replay(everyone(RING, program, rings), RING)
    assert found.seconds == pytest.approx(1e-4 + 8e-6 + 2 * 7 / 8 * 8e6 / (2 * 45e9))
    assert found.computing.tolist() == [1e-4]
    assert found.waiting[0] == pytest.approx(found.seconds - 1e-4)
    assert found.sizes.tolist() == [128]
    [one] = found.communications
    assert (one.kind, one.members, one.count, one.bytes) == ("all_reduce", 8, 1, 8 * MB)
    assert one.seconds == pytest.approx(one.alone)
    assert 1e-4 < found.bound <= found.seconds


def test_what_is_computed_meanwhile_hides_it():
    _, rings = along(RING, 2)
    program = [
        Node("first", "compute", seconds=1e-4),
        Node("sum", "all_reduce", (0,), bytes=8 * MB),
        Node("second", "compute", (0,), seconds=1e-3),
        Node("last", "compute", (1, 2), seconds=1e-4),
    ]
    assert replay(everyone(RING, program, rings), RING).seconds == pytest.approx(1.2e-3)


@pytest.mark.parametrize(("axes", "times"), [((2, 2), 2.0), ((0, 2), 1.0)])
def test_two_at_once_share_the_links_that_both_need(axes, times):
    """Over the same rings each has half of the links; over others all of its own."""
    each = [along(RING, axis) for axis in axes]
    program = [Node(f"sum {k}", "all_reduce", bytes=90 * MB) for k in range(2)]
    found = replay(everyone(RING, program, *(whose for _, whose in each)), RING)
    alone = [collective_cost("all_reduce", groups) for groups, _ in each]
    latency = max(cost.hops for cost in alone) * 1e-6
    longest = max(cost.load for cost in alone) * 90e6 / NETWORK.bandwidth
    assert found.seconds == pytest.approx(latency + times * longest, rel=1e-3)


def test_the_smaller_of_two_leaves_its_links_to_the_larger():
    """30 and 90 MB over the same rings: the bytes of both, whoever is done first."""
    groups, rings = along(RING, 2)
    program = [
        Node("a", "all_gather", bytes=30 * MB / 8),
        Node("b", "all_gather", bytes=90 * MB / 8),
    ]
    found = replay(everyone(RING, program, rings, rings), RING)
    cost = collective_cost("all_gather", groups)
    assert found.seconds == pytest.approx(cost.hops * 1e-6 + cost.load * 120e6 / 45e9)
    ends = sorted(event.begin + event.seconds for event in found.events)
    assert ends[0] == pytest.approx(cost.hops * 1e-6 + cost.load * 60e6 / 45e9)


def test_around_a_failed_switch_it_takes_what_the_collective_does_and_names_the_links():
    slice = Slice.parse("8x8x8")
    groups, rings = along(slice, 2)
    failed = switch_links(slice, 2, 0, 0).tolist()
    program = [Node("sum", "all_reduce", bytes=900 * MB)]
    found = replay(everyone(slice, program, rings), slice, failed_links=failed)
    assert found.seconds == pytest.approx(
        degraded_cost("all_reduce", groups, failed).seconds(900 * MB, NETWORK)
    )
    [one] = found.communications
    assert not set(one.links) & set(failed)
    assert sum(one.links.values()) == pytest.approx(one.seconds, rel=1e-2)


def test_a_pipeline_takes_its_stages_and_its_batches():
    """p stages of a chip each, m batches of t seconds: (p - 1) sends and (m + p - 1) t."""
    slice, p, m, t = Slice.parse("2x2x4"), 4, 6, 1e-3
    send = 1e-6 + MB / 45e9
    programs, ranks = [], []
    for stage in range(p):
        program, partners = [], []
        for _ in range(m):
            before = ()
            if stage:
                program.append(Node("from", "receive", bytes=MB))
                partners.append((stage - 1,))
                before = (len(program) - 1,)
            program.append(Node("work", "compute", before, seconds=t))
            if stage < p - 1:
                program.append(Node("to", "send", (len(program) - 1,), bytes=MB))
                partners.append((stage + 1,))
        programs.append(tuple(program))
        ranks.append(Rank(stage, tuple(partners)))
    found = replay(Trace(programs, ranks), slice)  # chips 0 .. 3 are a line along z
    assert found.seconds == pytest.approx((m + p - 1) * t + (p - 1) * send)
    assert found.sizes.tolist() == [1] * p


def test_ranks_alike_run_as_one_and_come_to_the_same():
    """The same steps with one rank slower, and with all ranks kept apart by what they compute."""
    slice = Slice.parse("2x2x4")
    _, lines = along(slice, 2)
    program = (Node("w", "compute", seconds=1e-3), Node("s", "all_reduce", (0,), bytes=MB))
    slow = (Node("w", "compute", seconds=2e-3), Node("s", "all_reduce", (0,), bytes=MB))
    ranks = [Rank(int(chip == 5), (lines[chip],)) for chip in range(16)]
    trace = Trace([program, slow], ranks)
    of = classes(trace)
    # The slow rank, those of its line, and all others.
    assert len(set(of.tolist())) == 3
    assert sorted(np.bincount(of).tolist()) == [1, 3, 12]
    apart = [
        tuple(dataclasses.replace(node, seconds=node.seconds * (1 + 1e-9 * chip)) for node in each)
        for chip, each in enumerate(slow if chip == 5 else program for chip in range(16))
    ]
    other = Trace(apart, [Rank(chip, (lines[chip],)) for chip in range(16)])
    assert len(set(classes(other).tolist())) == 16
    assert replay(trace, slice).seconds == pytest.approx(replay(other, slice).seconds, rel=1e-6)


def test_groups_that_are_no_translations_of_each_other_go_by_rings():
    """Chips 0, 1, 2 of a line of four and chip 3 with others: unequal groups, one after another."""
    slice = Slice.parse("4x4x4")
    program = (Node("sum", "all_reduce", bytes=MB),)
    three, five = (0, 1, 2), (3, 7, 11, 15, 19)
    ranks = [Rank(0, ((three if r in three else five if r in five else (r,)),)) for r in range(64)]
    found = replay(Trace([program], ranks), slice)
    # Who is in a ring of n sends 2 (n - 1) / n of its bytes, half each way, a hop or more apart.
    assert found.seconds > 2 * 4 / 5 / 2 * MB / 45e9
    assert found.bound < found.seconds


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rates_are_max_min_fair(data):
    F, L = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    part = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0])
    busy = np.array(
        data.draw(st.lists(st.lists(part, min_size=L, max_size=L), min_size=F, max_size=F))
    )
    rates, limits = fair_rates(busy)
    load = rates @ busy
    assert (load <= 1 + 1e-9).all()
    assert ((rates > 0) & (rates <= 1 + 1e-12)).all()
    for f in range(F):
        if rates[f] < 1 - 1e-9:  # a full link of its own on which nobody is faster
            link = limits[f]
            assert busy[f, link] > 0
            assert load[link] == pytest.approx(1)
            assert rates[f] >= max(rates[busy[:, link] > 0]) - 1e-9


CHAIN = (Node("a", "compute", (1,)), Node("b", "compute", (0,)))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Trace([CHAIN], [Rank(0, ())]), "node 'a': waits for itself, in a cycle"),
        (lambda: Trace([(Node("a", "compute", (7,)),)], [Rank(0, ())]), "waits for node 7"),
        (
            lambda: Trace([(Node("a", "compute", seconds=-1.0),)], [Rank(0, ())]),
            "node 'a': seconds",
        ),
        (lambda: Trace([(Node("a", "all_reduce", bytes=np.nan),)], [Rank(0, ((0,),))]), "bytes"),
        (lambda: Trace([(Node("a", "gossip"),)], [Rank(0, ((0,),))]), "gossip"),
        (lambda: Trace([(Node("a", "all_reduce"),)], [Rank(0, ((0, 9),))]), "ranks 0 .. 0"),
        (lambda: Trace([], []), "has no ranks"),
    ],
)
def test_a_trace_that_is_none_says_which_node(made, says):
    with pytest.raises(ValueError, match=says):
        made()


def pair(first, second, partners=((1,), (0,))):
    return Trace([(first,), (second,)], [Rank(0, (partners[0],)), Rank(1, (partners[1],))])


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (pair(Node("a", "send"), Node("b", "send")), "a send with .* that rank . does not have"),
        (
            pair(
                Node("a", "all_reduce", bytes=1.0),
                Node("b", "all_reduce", bytes=2.0),
                ((0, 1), (0, 1)),
            ),
            "2 bytes, where rank 0 has 'a', all_reduce of 1",
        ),
        (pair(Node("a", "send", tag=1), Node("b", "receive", tag=2)), "does not have"),
    ],
)
def test_ranks_that_do_not_fit_each_other_are_named(trace, says):
    with pytest.raises(ValueError, match=says):
        replay(trace, Slice.parse("2x2x1"))


def test_ranks_that_wait_for_each_other_are_named():
    receive = (Node("from", "receive"), Node("to", "send", (0,)))
    trace = Trace([receive], [Rank(0, ((1,), (1,))), Rank(0, ((0,), (0,)))])
    with pytest.raises(ValueError, match="wait"):
        replay(trace, Slice.parse("2x2x1"))


def test_a_slice_that_is_too_small_or_cut_is_named():
    trace = Trace([(Node("a", "all_reduce", bytes=1.0),)], [Rank(0, (tuple(range(4)),))] * 4)
    with pytest.raises(ValueError, match="trace of 4 ranks: 1x1 has 1 chips"):
        replay(trace, Slice.parse("1x1", TPU_V5E))
    slice = Slice.parse("2x2x1")
    out = np.flatnonzero(slice.neighbours[0] >= 0).tolist()
    with pytest.raises(ValueError, match="cut it in two"):
        replay(trace, slice, failed_links=out)
    with pytest.raises(ValueError, match="chips: give one for each of the 4 ranks"):
        replay(trace, slice, chips=[0, 1, 2, 2])


def as_trace(text, slice):
    """A compiled program without loops as the trace of every chip, by the prices of a plan."""
    tree, machine = read(text), machine_of(slice.pod)
    pricing = Pricing(tree.module, slice, machine)
    dones = {op.of: op.instruction for op in tree.nodes if op.role == "done"}
    everyone = tuple(range(slice.num_chips))
    program, partners, started, last = [], [], {}, ()
    for op in tree.nodes:
        name = op.instruction.name
        if op.role == "done":
            program.append(Node(name, "compute", (*last, *started[op.of])))
            last = (len(program) - 1,)
            continue
        price = pricing.price(op, dones.get(name))
        if op.kind not in KINDS:  # a copy within the chip is no work of what computes
            seconds = 0.0 if op.kind == "dma" else price.seconds
            node = Node(name, "compute", last, seconds=seconds)
        else:
            assert price.members == slice.num_chips
            size = price.bytes / price.members if op.kind == "all_gather" else price.bytes
            node = Node(name, op.kind, last, bytes=size)
            partners.append(everyone)
        program.append(node)
        if op.role == "start":
            started[name] = (len(program) - 1,)
        else:
            last = (len(program) - 1,)
    return Trace([tuple(program)], [Rank(0, tuple(partners))] * slice.num_chips)


def test_a_compiled_program_takes_as_long_as_its_plan_says():
    """A gather and a copy that a computation hides, and an all-reduce, on a cube."""
    slice = Slice.parse("4x4x4")
    trace = as_trace(programs.ASYNC, slice)
    kinds = [node.kind for node in trace.programs[0]]
    assert {"all_gather", "all_reduce", "compute"} <= set(kinds)
    planned = predict(programs.ASYNC, slice)
    found = replay(trace, slice)
    assert found.seconds == pytest.approx(planned.low, rel=1e-6)
    hidden = sum(c.hidden for c in planned.interval.low.collectives.values())
    assert hidden > 0
    network = sum(one.seconds for one in found.communications)
    assert network == pytest.approx(planned.interval.low.network, rel=1e-6)
