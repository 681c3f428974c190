"""`torsion fabric`, for people and as JSON; the wiring is followed again by other means here."""

import json
import os
import subprocess

import numpy as np
import pytest
from helpers.processes import TORSION

from launch.cli import main
from topology import Slice


def fabric(capsys, *arguments):
    assert main(["fabric", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_empty_pod(capsys):
    found = fabric(capsys)
    assert found["blocks"] == ["free"] * 64
    assert len(found["switches"]) == 48
    for switch in found["switches"]:
        assert (switch["free"], switch["used"], switch["spare"], switch["failed"]) == (128, 0, 8, 0)
    assert found["cost"]["place"] == {"breaks": 0, "makes": 0, "seconds": 0}
    assert found["checked"] == []


def test_cross_connects_make_the_slices(capsys):
    names = ["4x4x8_twisted", "8x8x8", "4x4x12_twist:0,0,4/0,0,8/0,0,0", "2x2x4"]
    found = fabric(capsys, "--slices", ",".join(names[:2]), *names[2:])
    assert [row["slice"] for row in found["slices"]] == names
    blocks = [row["blocks"] for row in found["slices"]]
    assert [len(b) for b in blocks] == [2, 8, 3, 1]
    assert sorted(block for row in blocks for block in row) == list(range(14))
    for block, state in enumerate(found["blocks"]):
        owner = [row["name"] for row in found["slices"] if block in row["blocks"]]
        assert state == (owner[0] if owner else "free")
    # The + face of a block meets the - face of the block one step on, alike in all 16 switches.
    expected = [set() for _ in range(3)]
    for row in found["slices"][:3]:
        slice = Slice.parse(row["slice"])
        shape = [k // 4 for k in row["shape"]]
        for place in np.ndindex(*shape):
            for d in range(3):
                to = np.array(place)
                to[d] += 1
                if to[d] == shape[d]:
                    to = (to + np.array(slice.twist[d]) // 4) % shape
                    to[d] = 0
                here, there = (int(np.ravel_multi_index(p, shape)) for p in (place, to))
                expected[d].add((row["blocks"][here], 64 + row["blocks"][there]))
    for n, switch in enumerate(found["switches"]):
        d, i, j = switch["ocs"].split(",")
        assert n == "xyz".index(d) * 16 + 4 * int(i) + int(j)
        assert {tuple(pair) for pair in switch["cross_connects"]} == expected["xyz".index(d)]
        assert switch["used"] == 2 * 13
        assert sum(switch[s] for s in ("used", "free", "spare", "failed")) == 136
    assert found["cross_connects"] == found["cost"]["place"]["makes"] == 48 * 13
    assert found["cost"]["place"]["seconds"] == pytest.approx(0.01)
    assert found["checked"] == []


def test_failures_cost_as_little_as_they_can(capsys):
    slices = ["--slices", "4x4x8_twisted,8x8x8"]
    found = fabric(capsys, *slices, "--failed", "host:1,3", "chip:20,0,0,0")
    assert found["blocks"][1] == found["blocks"][20] == "failed"
    first, second = found["slices"]
    assert (first["blocks"], second["blocks"]) == ([0, 10], list(range(2, 10)))
    cost = found["cost"]["failures"]
    assert cost["moves"] == [{"slice": "1", "from": 1, "to": 10}]
    # Both cross-connects of a slice of two blocks lead to the one that moved; in all 48 switches.
    assert (cost["breaks"], cost["makes"]) == (96, 96)
    assert cost["seconds"] == pytest.approx(0.01)
    assert found["checked"] == []

    found = fabric(capsys, *slices, "--failed", "ocs:z,0,0", "port:y,1,2,3")
    cost = found["cost"]["failures"]
    assert cost["moves"] == []
    assert cost["fibres_moved"] == 1
    assert (cost["breaks"], cost["makes"]) == (1, 1)
    assert [row["dark_links"] for row in found["slices"]] == [2, 8]
    assert found["slices"][1]["all_to_all_kept"] == pytest.approx(0.9375, rel=1e-5)
    by_name = {switch["ocs"]: switch for switch in found["switches"]}
    assert by_name["z,0,0"]["failed"] == 136
    assert by_name["y,1,2"]["failed"] == 1
    assert by_name["y,1,2"]["spare"] == 7
    assert [3, 64 + 5] not in by_name["y,1,2"]["cross_connects"]
    assert [128, 64 + 5] in by_name["y,1,2"]["cross_connects"]
    assert found["checked"] == []


def test_a_slice_that_is_cut_in_two_keeps_nothing(capsys):
    switches = [f"ocs:z,{i},{j}" for i in range(4) for j in range(4)]
    found = fabric(capsys, "--slices", "4x4x8", "--failed", *switches)
    assert found["slices"][0]["all_to_all_kept"] == 0
    assert found["slices"][0]["dark_links"] == 32


def test_ports_that_find_no_spare_one_stay_dark(capsys):
    ports = [f"port:x,0,0,{p}" for p in range(9)]
    found = fabric(capsys, "--slices", "8x8x8,4x4x4", "--failed", *ports)
    assert found["cost"]["failures"]["fibres_moved"] == 8
    assert [row["dark_links"] for row in found["slices"]] == [0, 1]
    assert found["checked"] == []


def test_it_is_shown_for_people(capsys):
    slices = ["--slices", "4x4x8_twisted,4x4x4@63"]
    assert main(["fabric", *slices, "--failed", "block:1", "ocs:x,0,0"]) == 0
    out = capsys.readouterr().out
    assert "64 blocks of 4x4x4 chips, 3 in slices, 60 free, 1 failed" in out
    grid = [line.split()[1:] for line in out.splitlines()[1:9]]
    assert grid[0] == ["1", "✗", "1", "·", "·", "·", "·", "·"]
    assert grid[7] == ["·"] * 7 + ["2"]
    assert sum(row.count("·") for row in grid) == 60
    assert "4x4x8_twisted  0, 2" in out
    assert "✗    6    6    6" in out
    assert f"{47 * 6:,} are used" in out
    assert "slice 1 (4x4x8_twisted): block 2 in the place of 1" in out
    assert "the failures: 96 cross-connects broken and 96 made, 10 ms at most" in out
    assert "checked: the light, followed from port to port, makes these slices" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slices", "4x4x7"], "the nearest legal is 4x4x8"),
        (["--slices", "4x4x4_twisted"], "the nearest is 4x4x8_twisted"),
        (["--slices", "4x4x8_twist:0,0,2/0,0,0/0,0,0"], "in place of 2 of x take 0"),
        (["--slices", "8x16x16,8x16x16,4x4x4"], "0 of 64 are free and healthy; release a slice"),
        (
            ["--slices", "16x16x16", "--failed", "link:3,0,0,0,+x"],
            "63 of 64 are free and healthy; the nearest that fits is 12x16x16",
        ),
        (["--slices", "4x4x8@0,1,4x4x4@1"], "block 1 is in slice 1 (4x4x8@0,1); free and healthy"),
        (["--slices", "4x4x4@5", "--failed", "host:5,0"], "(host:5,0 failed); free and healthy"),
        (["--slices", "4x4x4@64"], "block 64 is none of the blocks 0 .. 63"),
        (["--slices", "4x4x8@3,3"], "takes 2 different blocks"),
        (["--slices", "4x4x8@x"], "such as 4x4x8@0,1"),
        (["--failed", "ocs:x,4,0"], "'4' is no place in a face; there are 0 .. 3"),
        (["--failed", "port:x,0,0,136"], "'136' is no port; there are 0 .. 135"),
        (["--draw", "fabric.pdf"], "give it as NAME.html"),
        (["--pod", "v5p"], "TPU v5p: how its optical switches are wired is not published"),
        (["--pod", "v5p", "--slices", "4x4x8", "--failed", "ocs:x,0,0"], "is not published"),
        (["--pod", "v5e"], "TPU v5e: it has no optical switches, its wiring is fixed"),
        (["--pod", "v6e", "--slices", "16x16", "--draw"], "it has no optical switches"),
        (["--draw", "/nonexistent/x"], "no folder /nonexistent to write in"),
        (["--slices", ","], "no slice; write for example 4x4x8_twisted,8x8x8"),
        (["--slices", ""], "no slice; write for example"),
        (["--slices", "4x4x8,,8x8x8"], "not a slice"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fabric", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_draw_writes_a_page_and_a_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fabric", "--slices", "4x4x8", "--draw"]) == 0
    assert capsys.readouterr().out.endswith("wrote fabric.html and fabric.png\n")
    assert {p.name for p in tmp_path.iterdir()} == {"fabric.html", "fabric.png"}


@pytest.mark.parametrize("columns", [None, "40"])
def test_nothing_is_cut_off_when_piped_or_narrow(columns):
    """What a reader, or a pipe, gets has every name and figure whole."""
    twist = "4x4x12_twist:0,0,4/0,0,8/0,0,0"
    command = [
        *TORSION,
        "fabric",
        "--slices",
        twist,
        "8x16x16",
        "--failed",
        "port:x,0,0,130",
        "ocs:y,1,1",
    ]
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    env |= {} if columns is None else {"COLUMNS": columns}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "\u2026" not in done.stdout
    for words in (twist, "0-2", "8x16x16", "cross-connects", "all-to-all", "ports used, OCS z,i,j"):
        assert words in done.stdout


def test_the_page_calls_slices_by_their_shapes_and_counts_one_link(tmp_path, capsys):
    page = tmp_path / "pod"
    arguments = ["fabric", "--slices", "4x4x4", "--failed", "ocs:x,0,0", "--draw", str(page)]
    assert main(arguments) == 0
    capsys.readouterr()
    text = page.with_suffix(".html").read_text()
    assert "slice 1 (4x4x4)" in text
    assert "1 link dark" in text
