"""Every public function of `topology` that takes numbers, given numbers that are none.

The walk below calls each with one argument at a time put out of its meaning. It answers rightly
(infinite where the limit is infinite) or raises a ValueError that names the argument; nothing else.
"""

import inspect
import math
import types

import numpy as np
import pytest

import topology
from topology import (
    Cost,
    FailureRates,
    Groups,
    Job,
    Network,
    Outage,
    Part,
    Policy,
    Slice,
    Switch,
    Traffic,
    fabric,
)
from topology.accelerator.workloads import Attention
from topology.fabric import Changes, light
from topology.fleet import availability, checkpoint_interval, workload
from topology.fleet.progress import Costs
from topology.numbers import number, shown, whole
from topology.routing import throughput

BLOCKS = Slice.parse("4x4x8")
ONE = Slice.parse("4x4x4")
POD = fabric.place(topology.Fabric(), "it", BLOCKS, (0, 1))
BLOCK = Part("block", (1,))
COST = Cost(3, 0.5)
DEVICES = np.arange(64).reshape(8, 8)

# Function and good arguments. Of these, numbers and tuples of numbers are put out of their meaning.
CALLS = [
    (checkpoint_interval.young_interval, {"save": 30.0, "mtbf": 1e5}),
    (checkpoint_interval.daly_interval, {"save": 30.0, "mtbf": 1e5}),
    (checkpoint_interval.best_interval, {"save": 30.0, "mtbf": 1e5}),
    (
        checkpoint_interval.efficiency,
        {"work": 3000.0, "save": 30.0, "restore": 300.0, "mtbf": 1e5},
    ),
    (availability.block_availability, {"host_availability": 0.999}),
    (availability.ocs_goodput, {"host_availability": 0.999, "slice_blocks": 8}),
    (availability.static_goodput, {"host_availability": 0.999, "block_shape": (4, 4, 4)}),
    (
        availability.sample_goodput,
        {"host_availability": 0.999, "block_shape": (2, 2, 2), "trials": 9, "seed": 1},
    ),
    (Costs, {"save": 1.0, "restore": 1.0, "reconfigure": 1.0, "reroute": 1.0}),
    (FailureRates, {"host": 1e-3, "cable": 1e-4, "switch": 1e-4, "host_repair": 9.0}),
    (Policy, {"spares": 1, "interval": 60.0}),
    (
        Job,
        {"name": "a", "slice": ONE, "arrival": 0.0, "work": 9.0, "priority": 1, "slowdown": 0.1},
    ),
    (Outage, {"start": 1.0, "end": 2.0, "part": BLOCK}),
    (topology.simulate_pod, {"jobs": [], "outages": [], "horizon": 9.0}),
    (
        workload.generate_jobs,
        {
            "horizon": 1e5,
            "load": 0.5,
            "mean_work": 1e4,
            "urgent": 0.1,
            "opt_in": 0.5,
            "slowdown": (0.01, 0.02),
            "seed": 1,
        },
    ),
    (workload.generate_outages, {"horizon": 1e5, "seed": 1}),
    (workload.generate_maintenance, {"horizon": 1e5, "every": 1e4, "lasts": 10.0}),
    (Network, {"bandwidth": 1e9, "hop_latency": 1e-6}),
    (COST.seconds, {"bytes": 8.0, "network": Network()}),
    (Traffic, {"kind": "all_reduce", "axes": ("data",), "bytes": 8.0, "count": 2.0}),
    (topology.lay_mesh, {"slice": ONE, "mesh": {"data": 64}, "traffic": []}),
    (
        topology.traffic_seconds,
        {"slice": ONE, "mesh": {"data": 8, "tensor": 8}, "devices": DEVICES, "traffic": []},
    ),
    (topology.groups_of_axes, {"slice": ONE, "devices": DEVICES, "axes": (0,)}),
    (topology.collective_cost, {"kind": "all_gather", "groups": Groups(ONE, DEVICES)}),
    (
        topology.degraded_cost,
        {"kind": "all_gather", "groups": Groups(ONE, DEVICES), "failed_links": [0]},
    ),
    (Slice, {"shape": (4, 4, 8), "twist": ((0, 0, 4), (0, 0, 4), (0, 0, 0))}),
    (BLOCKS.hop_distances, {"chip": 5}),
    (
        topology.all_to_all,
        {
            "slice": ONE,
            "failed_links": (0, 1),
            "tolerance": 1e-3,
            "max_rounds": 5,
            "time_limit": 9.0,
        },
    ),
    (throughput.all_to_all_kept, {"slice": ONE, "failed_links": (0, 1)}),
    (throughput.is_cut, {"slice": ONE, "failed_links": (0, 1)}),
    (throughput.both_ways, {"slice": ONE, "link": 7}),
    (throughput.switch_links, {"slice": BLOCKS, "dimension": 0, "i": 1, "j": 2}),
    (
        throughput.bytes_per_second_per_chip,
        {"slice": ONE, "max_link_load": 64.0, "bandwidth": 1e9},
    ),
    (topology.legal_shapes, {"max_blocks": 8}),
    (topology.nearest_shape, {"shape": (4, 4, 7)}),
    (topology.shipped_twist, {"shape": (4, 4, 8)}),
    (topology.all_twists, {"shape": (4, 4, 8)}),
    (topology.any_torus, {"link_bandwidth": (1e9, 2e9, 1e9)}),
    (topology.ranked_twists, {"shape": (4, 4, 8)}),
    (fabric.Placement, {"slice": BLOCKS, "blocks": (2, 3)}),
    (fabric.boxes, {"block_shape": (1, 1, 2), "grid": (4, 4, 4)}),
    (fabric.place, {"fabric": POD, "name": "b", "slice": BLOCKS, "blocks": (2, 3)}),
    (fabric.replace_block, {"fabric": POD, "name": "it", "old": 1, "new": 5}),
    (Changes({}, {}).seconds, {"switch": topology.TPU_V4.switch, "at_a_time": 2}),
    (Attention, {"batch": 2, "heads": 4, "rows": 8, "head_dim": 16, "columns": 8, "kv_heads": 2}),
    (whole, {"name": "value", "value": 3}),
    (number, {"name": "value", "value": 3.0}),
]

# Public names that take no numbers of a caller's: data, modules, and what only holds arrays.
EXEMPT = {
    *("DIRECTIONS", "PODS", "SWITCHES", "TPU_V3", "TPU_V4", "TPU_V5E", "TPU_V5P", "TPU_V6E"),
    *("Changes", "Cost", "Fabric", "Groups", "Layout", "Part", "Switch"),
    *("dimension_rings", "hamiltonian_ring", "replay", "schedule"),
}
BAD = [math.nan, math.inf, -math.inf, -1, 0, 0.5, -0.5, 10**30, 1e300, 5e-324, 10**400, 10**5000]


def spoiled():
    """(function, arguments, name of the one that was put out of its meaning)."""
    for function, arguments in CALLS:
        for name, value in arguments.items():
            if isinstance(value, bool):
                continue
            for bad in BAD:
                if isinstance(value, int | float):
                    yield function, arguments | {name: bad}, name
                elif isinstance(value, tuple) and value and isinstance(value[0], int | float):
                    yield function, arguments | {name: (bad, *value[1:])}, name
                elif isinstance(value, dict) and value:
                    first = next(iter(value))
                    yield function, arguments | {name: value | {first: bad}}, name
            if isinstance(value, tuple) and value and isinstance(value[0], int | float):
                yield function, arguments | {name: ()}, name


def numbers_in(answer):
    if isinstance(answer, float | np.floating):
        yield float(answer)
    elif isinstance(answer, np.ndarray) and answer.dtype.kind == "f":
        yield from answer.ravel().tolist()


def test_every_public_name_is_in_the_walk():
    walked = {function for function, _ in CALLS}
    for name in topology.__all__:
        value = getattr(topology, name)
        if isinstance(value, types.ModuleType):
            continue
        assert name in EXEMPT or value in walked, f"topology.{name}: give it good arguments here"


def test_good_numbers_are_taken():
    for function, arguments in CALLS:
        function(**arguments)


@pytest.mark.parametrize(
    "function", list(dict.fromkeys(f for f, _ in CALLS)), ids=lambda f: f.__qualname__
)
def test_numbers_out_of_their_meaning_are_named(function):
    for called, arguments, name in spoiled():
        if called != function:
            continue
        answer, said = None, None
        try:
            answer = function(**arguments)
        except ValueError as error:
            said = str(error)
        except Exception as error:
            pytest.fail(f"{function} with {name} {shown(arguments[name])}: {error!r}")
        if said is not None:
            words = {name, name.rstrip("s"), name.replace("_", " "), *SAYS.get(name, ())}
            assert any(word in said for word in words), (shown(arguments[name]), said)
            assert "\n" not in said
        assert not any(map(math.isnan, numbers_in(answer))), (name, shown(arguments[name]), answer)


# Other words by which a message names an argument.
SAYS = {
    "failed_links": ("failed link", "demands"),
    "dimension": ("switch",),
    "i": ("switch",),
    "j": ("switch",),
    "start": ("outage",),
    "end": ("outage",),
    "slice_blocks": ("blocks",),
    "block_shape": ("slice_blocks", "closed form"),
    "shape": ("slice",),
    "new": ("block",),
    "old": ("block",),
}


@pytest.mark.parametrize(
    "part",
    [
        Part("block", (64,)),
        Part("block", (-1,)),
        Part("block", (0.5,)),
        Part("block", ()),
        Part("host", (0, 16)),
        Part("chip", (0, 0, 0, 4)),
        Part("link", (0, 0, 0, 0, 6)),
        Part("ocs", (3, 0, 0)),
        Part("port", (0, 0, 0, 136)),
        Part("rack", (0,)),
        Part("block", None),
        Part(["block"], (0,)),
        "block:1",
        None,
    ],
    ids=repr,
)
@pytest.mark.parametrize("function", [fabric.fail, fabric.repair, fabric.drain, light.impact])
def test_parts_that_do_not_exist_are_named(function, part):
    with pytest.raises(ValueError, match="part"):
        function(POD, part)
    with pytest.raises(ValueError, match="part"):
        topology.Fabric(failed=[part])
    with pytest.raises(ValueError, match="part"):
        topology.Fabric(drained=[part])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"placements": {"a": fabric.Placement(ONE, (64,))}}, "slice 'a': block 64: .* 0 .. 63"),
        ({"connects": {Switch(3, 0, 0): {0: 64}}}, "part ocs .3, 0, 0.: dimension 3"),
        ({"connects": {Switch(0, 0, 0): {0: 136}}}, "ocs x,0,0: no port 136; there are 0 .. 135"),
        ({"connects": {Switch(0, 0, 0): {0.5: 64}}}, "ocs x,0,0: no port 0.5"),
        ({"patches": {(Switch(0, 0, 4), 0): 128}}, "part ocs .0, 0, 4.: place in a face 4"),
        ({"patches": {(Switch(0, 0, 0), 0): math.nan}}, "ocs x,0,0: no port nan"),
        ({"pod": topology.TPU_V3}, "pod TPU v3: is not made of blocks"),
    ],
)
def test_a_fabric_of_what_does_not_exist_is_named(made, says):
    with pytest.raises(ValueError, match=says):
        topology.Fabric(**made)


@pytest.mark.parametrize("blocks", [(0,), (0, 0), (0, 1, 2), (-1, 0), (0.5, 1), (math.nan, 0)])
def test_blocks_of_a_placement_are_named(blocks):
    with pytest.raises(ValueError, match="blocks"):
        fabric.Placement(BLOCKS, blocks)
    assert fabric.Placement(BLOCKS, (0.0, np.int64(1))).blocks == (0, 1)


def test_members_of_groups_are_whole_numbers():
    assert Groups(ONE, DEVICES.astype(float)).steps.tolist() == Groups(ONE, DEVICES).steps.tolist()
    wrong = np.where(DEVICES == 1, math.nan, DEVICES)
    for members in (DEVICES + 0.5, wrong, DEVICES > 0, DEVICES.astype(str), [[0, 1], [2]], None):
        with pytest.raises(ValueError, match="members"):
            Groups(ONE, members)
    with pytest.raises(ValueError, match="axes"):
        topology.groups_of_axes(ONE, DEVICES, [0, 0])


def test_shifts_that_no_integer_holds_are_no_floats():
    with pytest.raises(ValueError, match="shift of the twist"):
        Slice(shape=(4, 4, 8), twist=((0, 0, 2**63), (0, 0, 4), (0, 0, 0)))
    for wrap in ("xyz", 5, (math.nan, 0, 0), (True, True)):
        with pytest.raises(ValueError, match="wrap"):
            Slice(shape=(4, 4, 8), wrap=wrap)


@pytest.mark.parametrize("digit", ["\u0664", "\uff14"])  # 4 in Arabic, and at full width
def test_other_digits_are_none(digit):
    with pytest.raises(ValueError, match="not a slice"):
        Slice.parse(f"4x4x{digit}")
    with pytest.raises(ValueError, match="no block"):
        Part.parse(f"block:{digit}", topology.TPU_V4)


def test_an_empty_pod_does_nothing():
    report = topology.simulate_pod([], [], horizon=1.0)
    assert (report.goodput, report.utilisation, report.mean_wait) == (0, 0, 0)
    assert set(report.block_seconds) >= {"kept", "lost", "slowed", "saving", "paused", "stalled"}


@pytest.mark.parametrize("ratio", [1e-300, 1e-100, 1e-20, 1e-12, 1e-8, 1e-4, 1e-3, 1e-2, 1, 1e3])
def test_the_best_interval_keeps_its_digits(ratio):
    """Against the same equation in 60 digits, where nothing cancels."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        r = Decimal(ratio)
        low, high = Decimal(0), Decimal(1)
        for _ in range(600):  # (1 - u) e^(u + r) = 1
            u = (low + high) / 2
            # From the equation's logarithm, which has the series u^2 / 2 + u^3 / 3 + ... = r.
            series = u * u / 2 + u**3 / 3
            more = series > r if ratio < 1e-15 else (1 - u) * (u + r).exp() < 1
            low, high = (low, u) if more else (u, high)
        exact = float(low)
    for scale in (1.0, 1e-5, 1e5):
        found = checkpoint_interval.best_interval(ratio * scale, scale)
        assert found == pytest.approx(exact * scale, rel=1e-10)


def test_intervals_at_the_ends_of_floats():
    for save, mtbf in [(1e-300, 1e300), (1e300, 1e300), (1e-300, 1e-300), (1e150, 1e300)]:
        for rule in ("young_interval", "daly_interval", "best_interval"):
            found = getattr(checkpoint_interval, rule)(save, mtbf)
            assert 0 < found < math.inf, (rule, save, mtbf)
        assert 0 <= checkpoint_interval.efficiency(mtbf / 10, save, 0.0, mtbf) <= 1
    # Work and pauses so short beside the time between failures that none comes.
    assert checkpoint_interval.efficiency(1e-300, 1e-300, 0.0, 1e300) == pytest.approx(0.5)


def test_signatures_are_walked_by_name():
    """Every argument that the table gives is one of the function's."""
    for function, arguments in CALLS:
        inspect.signature(function).bind(**arguments)
