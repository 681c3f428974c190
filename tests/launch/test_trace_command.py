"""`torsion trace`: traces in Chakra's format, whole and broken, on slices whole and degraded."""

import json
import re

import numpy as np
import pytest
from helpers import chakra
from helpers.chakra import ALL_GATHER, ALL_REDUCE, BARRIER, REDUCE_SCATTER, collective, node, write
from helpers.mistakes import mistake

from launch.chakra import read_trace
from launch.cli import main
from topology import Network, Slice, collective_cost, degraded_cost, groups_of_axes
from topology.routing.throughput import switch_links

CUBE = Slice.parse("8x8x8")
MIB = 2**20


def found(capsys, *arguments):
    assert main(["trace", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def groups(slice, *axes):
    return groups_of_axes(slice, np.arange(slice.num_chips).reshape(slice.shape), axes)


@pytest.fixture
def layers(tmp_path):
    """Two layers: gather weights along z, compute, scatter gradients along x and y."""
    nodes = []
    for layer in range(2):
        i = 3 * layer
        before = [i - 3] if layer else []
        z, xy = [False, False, True], [True, True, False]
        nodes.append(collective(i, ALL_GATHER, MIB // 8, before, involved_dim=z))
        nodes.append(node(i + 1, chakra.COMPUTE, [i, *([i - 2] if layer else [])], micros=500))
        nodes.append(collective(i + 2, REDUCE_SCATTER, 8 * MIB, [i + 1], involved_dim=xy))
    return write(tmp_path / "one.et", *nodes)


def test_one_file_is_that_of_all_chips_around_a_failed_switch(layers, tmp_path, capsys):
    page = tmp_path / "timeline.json"
    what = found(capsys, layers, "--slice", "8x8x8", "--failed", "ocs:x,0,0", "--timeline", page)
    assert (what["ranks"], what["operations"], what["lost_links"]) == (512, 6 * 512, 16)
    failed, network = switch_links(CUBE, 0, 0, 0), Network()
    gather = collective_cost("all_gather", groups(CUBE, 2)).seconds(MIB, network)
    scatter = min(
        degraded_cost("reduce_scatter", groups(CUBE, 0, 1), failed, longer=n).seconds(
            8 * MIB, network
        )
        for n in (0, 2)
    )
    # The second gather hides behind the first layer, the first scatter behind the second.
    assert what["seconds"] == pytest.approx(gather + 2 * 500e-6 + scatter)
    assert what["bound_seconds"] <= what["seconds"]
    assert what["classes"] == [
        {
            "rank": 0,
            "ranks": 512,
            "computing_seconds": pytest.approx(1e-3),
            "waiting_seconds": pytest.approx(gather + scatter),
        }
    ]
    kinds = {one["kind"]: one for one in what["communications"]}
    assert kinds["reduce_scatter"]["seconds"] == pytest.approx(2 * scatter)
    assert kinds["all_gather"]["count"] == 2
    events = json.loads(page.read_text())["traceEvents"]
    computed = [event for event in events if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in computed] == [
        (pytest.approx(gather * 1e6), pytest.approx(500)),
        (pytest.approx(gather * 1e6 + 500), pytest.approx(500)),
    ]
    assert sum(event["ph"] == "b" for event in events) == 4


def test_the_page_says_time_bound_and_what_holds_it_up(layers, capsys):
    assert main(["trace", str(layers), "--slice", "8x8x8"]) == 0
    page = capsys.readouterr().out
    for said in (
        "trace of 512 ranks, 3,072 operations",
        "no schedule takes less",
        "held up by the",
    ):
        assert said in page


def test_partners_are_each_files_however_they_are_told(tmp_path):
    """Files alike but for whom they send to, told by other types, and a name that looks like it."""
    told = {0: 1, 1: "2", 2: 3.0, 3: 0, 4: 300, 300: 5}
    for r in range(301):
        peer = told.get(r, (r + 1) % 301)
        sly = "\n\x08comm_dst\x48\x07" if r % 2 else "plain"
        sends = node(1, chakra.SEND, name=sly, comm_dst=peer, comm_size=8)
        write(
            tmp_path / f"t.{r}.et", sends, node(2, chakra.COMPUTE, [1] if r != 9 else [], micros=3)
        )
    trace = read_trace([tmp_path], Slice.parse("2x2x1"))
    for r, rank in enumerate(trace.ranks):
        assert rank.partners == ((int(told.get(r, (r + 1) % 301)),),)
        assert trace.programs[rank.program][1].after == (() if r == 9 else (0,))


def test_files_of_a_rank_each_with_groups_sends_and_a_barrier(tmp_path, capsys):
    """Rank 0 sends to rank 1 what both then sum with ranks 2 and 3."""
    names = tmp_path / "groups.json"
    names.write_text('{"7": [0, 1], "8": [2, 3]}')
    for rank in range(4):
        nodes = [node(10, chakra.COMPUTE, micros=100 * (rank + 1))]
        if rank == 0:
            nodes.append(node(20, chakra.SEND, [10], comm_dst=1, comm_size=MIB, comm_tag=3))
        if rank == 1:
            nodes.append(node(20, chakra.RECEIVE, [10], comm_src=0, comm_size=MIB, comm_tag=3))
        before = [20] if rank < 2 else [10]
        group = "7" if rank < 2 else "8"
        nodes.append(collective(30, ALL_REDUCE, MIB, before, pg_name=group))
        nodes.append(collective(40, BARRIER, 0, [30]))
        write(tmp_path / f"step.{rank}.et", *nodes)
    what = found(capsys, tmp_path, "--slice", "2x2x1", "--groups", names)
    assert what["ranks"] == 4
    assert [one["rank"] for one in what["classes"]] == [0, 1, 2, 3]
    lines = Slice.parse("2x2x1")
    pair = collective_cost("all_reduce", groups(lines, 1)).seconds(MIB, Network())
    # Chips 2 and 3 are the later ones; the barrier over all four ends it, in two hops and back.
    assert what["seconds"] == pytest.approx(400e-6 + pair + 4e-6, abs=1e-6)
    send = next(one for one in what["communications"] if one["kind"] == "send")
    assert send["alone_seconds"] == pytest.approx(1e-6 + MIB / 45e9)


def test_what_is_not_timed_goes_by_the_chip(tmp_path, capsys):
    """275 TFLOP/s of TPU v4, or 1.2 TB/s."""
    file = write(tmp_path / "a.et", node(1, chakra.COMPUTE, num_ops=275 * 10**9, tensor_size=1))
    assert found(capsys, file, "--slice", "2x2x1")["seconds"] == pytest.approx(1e-3)


def good(tmp_path):
    return write(tmp_path / "good.et", node(1, chakra.COMPUTE, micros=5))


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([node(1, 4, [2]), node(2, 4, [1])], "in a cycle of dependencies"),
        ([node(1, 4, [9])], r"node 'node 1' \(1\): waits for node 9, which is not there"),
        ([node(1, 4, micros=-5)], r"node 'node 1' \(1\): lasts -5 us"),
        ([node(1, 12)], "is of type 12, which Chakra does not have"),
        ([node(1, 4), node(1, 4)], "has the id 1 of another one"),
        ([collective(1, chakra.BROADCAST, 8)], "is a broadcast; schedules are of all_gather"),
        ([node(1, chakra.COLLECTIVE, comm_size=8)], "has no comm_type"),
        ([collective(1, ALL_REDUCE, -8)], "its comm_size is -8"),
        ([collective(1, ALL_REDUCE, 8, pg_name="x")], "process group 'x': give --groups"),
        ([collective(1, ALL_REDUCE, 8, involved_dim=[True] * 4)], "involved_dim of 4 dimensions"),
        ([node(1, chakra.SEND, comm_dst=77, comm_size=8)], "peer 77"),
        ([node(1, chakra.SEND, comm_size=8)], "has no comm_dst"),
        ([b"\xff\xff"], "message 1 is no node"),
    ],
)
def test_a_node_that_is_wrong_is_named_in_one_line(nodes, says, tmp_path, capsys):
    file = write(tmp_path / "bad.et", *nodes)
    error = mistake(["trace", file, "--slice", "4x4x4"], capsys)
    assert re.search(says, error), error
    assert "bad.et" in error or "involved_dim" in error


def test_files_that_are_none_are_named(tmp_path, capsys):
    file = good(tmp_path)
    whole = file.read_bytes()
    cases = {
        "empty.et": b"",
        "cut.et": whole[:-1],
        "text.et": b"this is no trace at all",
        "long.et": whole + b"\xff\xff\xff\xff\x07",
        "endless.et": b"\xff" * 20,
    }
    for name, body in cases.items():
        (tmp_path / name).write_bytes(body)
        assert name in mistake(["trace", tmp_path / name, "--slice", "4x4x4"], capsys)
    for files, says in (
        ([tmp_path / "none.et"], "No such file"),
        ([tmp_path / "a.0.et", tmp_path / "a.2.et"], "rank 1 is missing of 2 files"),
        ([tmp_path / "a.0.et", tmp_path / "b.0.et"], "rank 0 is"),
        ([tmp_path / "a.et", tmp_path / "b.et"], "no rank in its name"),
    ):
        assert says in mistake(["trace", *files, "--slice", "4x4x4"], capsys)
    empty = tmp_path / "folder"
    empty.mkdir()
    assert "has no traces" in mistake(["trace", empty, "--slice", "4x4x4"], capsys)
    for groups, says in (
        ("[1]", "a JSON object"),
        ('{"0": [0, 0]}', "no rank twice"),
        ("{", "want"),
    ):
        (tmp_path / "groups.json").write_text(groups)
        options = ["--slice", "4x4x4", "--groups", tmp_path / "groups.json"]
        assert says in mistake(["trace", file, *options], capsys)


def test_a_timeline_that_cannot_be_written_is_one_line(tmp_path, capsys):
    options = ["--slice", "4x4x4", "--timeline", tmp_path / "none" / "t.json"]
    assert "t.json" in mistake(["trace", good(tmp_path), *options], capsys)
