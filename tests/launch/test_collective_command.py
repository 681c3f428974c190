"""`torsion collective`: times of collectives on slices, beside their bounds."""

import json

import numpy as np
import pytest
from helpers.mistakes import mistake

from launch.cli import main
from topology import Network, Slice, groups_of_axes, replay, schedule


def found(capsys, *arguments):
    assert main(["collective", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_torus_of_any_sides_with_links_of_its_own(capsys):
    what = found(
        capsys, "all_gather", "--bytes", "9MB", "--slice", "5x7", "--pod", "torus", "--links",
        "100,50,50",
    )  # fmt: skip
    assert what["members"] == 35
    least = 34 / 35 * 9e6 / (2 * 100e9 + 2 * 50e9)
    assert what["bounds"]["chip"] == pytest.approx(least + 1e-6)
    assert what["seconds"] >= what["bound_seconds"]
    for arguments, message in (
        (["--links", "1"], "--links 1: those of TPU v4 are known; give --pod torus"),
        (["--pod", "torus", "--links", "1,2"], "--links 1,2: link_bandwidth: 2; one for all links"),
        (["--pod", "torus", "--links", "fast"], "--links fast: 'fast': want a number from"),
    ):
        command = ["collective", "all_gather", "--bytes", "1", "--slice", "4x4x4", *arguments]
        assert message in mistake(command, capsys)


def test_over_several_slices(capsys):
    what = found(capsys, "all_reduce", "--bytes", "1GB", "--slice", "4x4x8", "--slices", "4")
    assert (what["slices"], what["members"]) == (4, 512)
    between = 2 * 3 / 4 * 1e9 / 128 / (25e9 / 4)  # a host's 25 GB/s for four chips
    within = 127 / 128 / 6 * 1e9 / 45e9
    assert [s["seconds"] for s in what["stages"]] == pytest.approx([within, between, within])
    assert what["bounds"]["between"] == pytest.approx(between)
    whole = found(
        capsys, "all_reduce", "--bytes", "1GB", "--slice", "4x4x8", "--slices", "4",
        "--pieces", "1", "--dcn", "12.5",
    )  # fmt: skip
    assert whole["pieces"] == 1
    latency = sum(s["latency_seconds"] for s in whole["stages"])
    assert whole["seconds"] == pytest.approx(2 * within + between / 2 + latency)
    assert main(["collective", "all_gather", "--bytes", "1GB", "--slice", "8x8", "--pod", "v5e",
                 "--slices", "2"]) == 0  # fmt: skip
    page = capsys.readouterr().out
    assert "all_gather of 953.7 MiB on 2 slices 8x8 of TPU v5e" in page
    assert "all_gather between slices" in page
    for more, message in (
        (["--pieces", "4"], "they are of several slices; give --slices"),
        (["--slices", "2", "--pod", "torus"], "pod own design: the host is not published"),
    ):
        command = ["collective", "all_gather", "--bytes", "1", "--slice", "4x4x4", *more]
        assert message in mistake(command, capsys)


@pytest.mark.parametrize("slice", ["2x2x4", "4x4x4"])
@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "all_to_all"])
def test_times_are_those_of_a_replayed_schedule(kind, slice, capsys):
    what = found(capsys, kind, "--bytes", "6MB", "--slice", slice, "--axes", "y,z")
    of = Slice.parse(slice)
    groups = groups_of_axes(of, np.arange(of.num_chips).reshape(of.shape), [1, 2])
    played = replay(schedule(kind, groups), 6e6, Network.of(of.pod))
    assert played.correct
    assert what["seconds"] == pytest.approx(played.seconds, rel=0.02)
    assert what["bound_seconds"] <= what["seconds"] * (1 + 1e-9)
    assert what["bound_seconds"] == max(what["bounds"].values())
    assert what["members"] == of.shape[1] * of.shape[2]
    assert what["groups"] * what["members"] == of.num_chips
    assert what["seconds"] == pytest.approx(what["latency_seconds"] + what["transfer_seconds"])


def test_a_ring_takes_what_the_formula_says(capsys):
    """Eight chips of a ring, both ways at once: 2 (n - 1) / n of the bytes over two links."""
    what = found(capsys, "all_reduce", "--bytes", "64MiB", "--slice", "4x4x8", "--axes", "z")
    assert what["transfer_seconds"] == pytest.approx(2 * 7 / 8 * 2**26 / (2 * 45e9), rel=1e-6)
    assert what["bytes"] == 2**26


def test_a_twisted_slice_has_the_faster_all_to_all(capsys):
    times = [
        found(capsys, "all_to_all", "--bytes", "64MiB", "--slice", name)["transfer_seconds"]
        for name in ("4x4x8", "4x4x8_twisted")
    ]
    assert times[0] / times[1] == pytest.approx(128 / (7 * 4**4 - 2 * 4**2) * 24, rel=1e-3)


def test_around_a_failed_switch_an_all_gather_takes_what_the_poorest_chip_needs(capsys):
    """511 of 512 shards come to a chip over the five links that it has left, and no faster."""
    arguments = ["all_gather", "--bytes", "512MB", "--slice", "8x8x8"]
    what = found(capsys, *arguments, "--failed", "ocs:x,0,0")
    assert what["transfer_seconds"] == pytest.approx(511e6 / (5 * 45e9), rel=1e-6)
    assert what["bounds"]["chip"] == pytest.approx(1e-6 + what["transfer_seconds"])
    assert what["lost_links"] == 16  # of four rings along x, two links each, both directions
    assert what["whole_seconds"] == found(capsys, *arguments)["seconds"] < what["seconds"]


def test_a_link_may_fail_one_way(capsys):
    """Who sends to the next of a ring of four goes round it backwards, where nobody else sends."""
    arguments = ["permute", "--bytes", "1GB", "--slice", "4x4x4", "--axes", "x"]
    there, back = (
        found(capsys, *arguments, "--failed-one-way", f"link:0,0,0,0,{direction}")
        for direction in ("+x", "-x")
    )
    assert (there["lost_links"], back["lost_links"]) == (1, 1)
    assert back["seconds"] == back["whole_seconds"] == there["whole_seconds"]
    assert there["seconds"] == pytest.approx(there["whole_seconds"] + 2e-6, abs=1e-9)
    both = found(capsys, *arguments, "--failed", "link:0,0,0,0,-x")  # and chip 3's link +x to it
    assert (both["lost_links"], both["seconds"]) == (2, there["seconds"])


def test_few_bytes_take_short_detours(capsys):
    few, many = (
        found(capsys, "all_gather", "--bytes", size, "--slice", "4x4x8", "--failed", "ocs:z,0,0")
        for size in ("1kB", "1GB")
    )
    assert few["latency_seconds"] < many["latency_seconds"]


def test_the_page_says_time_rate_and_bounds(capsys):
    assert (
        main(["collective", "all_gather", "--bytes", "1GB", "--slice", "8x8", "--pod", "v5e"]) == 0
    )
    page = capsys.readouterr().out
    assert "all_gather of 953.7 MiB on 8x8 of TPU v5e, 1 group of 64 chips along x, y" in page
    assert "no schedule takes less" in page
    assert "GB/s" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gather", "--bytes", "1", "--slice", "4x4x4"], "collective 'gather': one of all_gather"),
        (["permute", "--bytes", "much", "--slice", "4x4x4"], "--bytes much: no size"),
        (["permute", "--bytes", "-1", "--slice", "4x4x4"], "--bytes"),
        (["permute", "--bytes", "9" * 50, "--slice", "4x4x4"], "--bytes"),
        (["permute", "--bytes", "1", "--slice", "4x4x5"], "slice 4x4x5"),
        (
            ["permute", "--bytes", "1", "--slice", "4x4x4", "--axes", "w"],
            "no axis 'w'; use x, y",
        ),
        (["permute", "--bytes", "1", "--slice", "4x4x4", "--axes", "x,x"], "names an axis twice"),
        (["permute", "--bytes", "1", "--slice", "8x8", "--pod", "v5e", "--axes", "z"], "use x, y"),
        (["permute", "--bytes", "1", "--slice", "4x4x4", "--failed", "chip:0,0,0,0"], "takes 1 of"),
        (["permute", "--bytes", "1", "--slice", "4x4x4", "--failed", "link:9"], "part 'link:9'"),
        (
            ["permute", "--bytes", "1", "--slice", "4x4x4", "--failed-one-way", "ocs:x,0,0"],
            "only a link fails one way",
        ),
        (
            [
                *("permute", "--bytes", "1", "--slice", "2x2x1"),
                *("--failed", "link:0,0,0,0,+x", "link:0,0,0,0,+y"),
            ],
            "cut it in two",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in mistake(["collective", *arguments], capsys)
