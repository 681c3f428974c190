"""`torsion availability`: goodput against binomials and enumerations of a pod's blocks."""

import json
import math

import numpy as np
import pytest
from helpers.mistakes import mistake

from launch.cli import main


def found(capsys, *arguments):
    assert main(["availability", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("up", [0.99, 0.999])
def test_switches_give_the_binomial_sum(up, capsys):
    """A block of 16 hosts is up with a^16; k blocks up make floor(k / n) slices."""
    what = found(capsys, "--slice", "2048,4x4x12", "--hosts-up", str(up), "--trials", "1000")
    p = up**16
    for row, n in zip(what["rows"], (32, 3), strict=True):
        chances = [math.comb(64, k) * p**k * (1 - p) ** (64 - k) for k in range(65)]
        slices = sum(chance * (k // n) for k, chance in enumerate(chances))
        assert row["blocks"] == n
        assert row["block_up"] == pytest.approx(p)
        assert row["switches"]["slices"] == pytest.approx(slices)
        assert row["switches"]["goodput"] == pytest.approx(slices * n / 64)
        assert row["static"]["goodput"] <= row["switches"]["goodput"] <= row["block_up"]


def test_static_slices_of_half_a_pod_have_a_closed_form(capsys):
    """2x4x4 blocks in 4x4x4: the slabs at 0, 1 or 2 of each of three dimensions."""
    what = found(capsys, "--slice", "2048", "--hosts-up", "0.999")["rows"][0]["static"]
    rng = np.random.default_rng(5)
    up = rng.random((40_000, 4, 4, 4)) < 0.999**16
    most = np.zeros(len(up), int)
    for axis in (1, 2, 3):
        planes = up.all(axis=tuple({1, 2, 3} - {axis}))
        pairs = planes[:, :-1] & planes[:, 1:]
        both = (pairs[:, 0] & pairs[:, 2]) * 2
        most = np.maximum(most, np.maximum(both, pairs.any(axis=1)))
    error = most.std() / len(up) ** 0.5
    assert what["method"] == "closed form"
    assert what["slices"] == pytest.approx(most.mean(), abs=4 * error)


def test_a_slice_of_one_block_needs_no_neighbour(capsys):
    row = found(capsys, "--slice", "64", "--hosts-up", "0.9")["rows"][0]
    assert row["static"] == row["switches"]
    assert row["switches"]["goodput"] == pytest.approx(0.9**16)


def test_samples_say_their_error_and_that_they_are_a_lower_bound(capsys):
    row = found(capsys, "--slice", "128", "--hosts-up", "0.99", "--trials", "20000")["rows"][0]
    static = row["static"]
    assert static["method"] == "sampled"
    assert not static["exact"]
    assert 0 < static["standard_error"] < 0.01
    assert row["slice"] == "4x4x8"


def test_what_is_not_known_is_said(capsys):
    arguments = ["--slice", "16x16x24", "--hosts-up", "0.99", "--pod", "v5p"]
    assert found(capsys, *arguments)["rows"][0]["static"] is None
    assert main(["availability", *arguments]) == 0
    assert "static wiring of more than 64 blocks is not computed" in capsys.readouterr().out


def test_it_draws(tmp_path, capsys):
    file = tmp_path / "up.png"
    what = ["availability", "--slice", "1024,2048", "--hosts-up", "0.99", "--draw", str(file)]
    assert main(what) == 0
    page = capsys.readouterr().out
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {file}" in page
    assert "0.74736" in page  # docs/pod.md: 0.747 with switches
    assert "0.20437" in page  # and 0.204 with static wiring


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slice", "2048", "--hosts-up", "99"], "--hosts-up 99: want parts of the time"),
        (["--slice", "2048", "--hosts-up", "nan"], "--hosts-up nan"),
        (["--slice", "2048", "--hosts-up", "0.9,"], "want parts of the time"),
        (["--slice", "2048", "--hosts-up=-0.1"], "--hosts-up -0.1"),
        (["--slice", "100", "--hosts-up", "1"], "no slice of whole blocks has 100 chips"),
        (["--slice", "2x2x1", "--hosts-up", "1"], "--slice 2x2x1: is a part of a block"),
        (["--slice", "4x4x5", "--hosts-up", "1"], "slice 4x4x5"),
        (["--slice", "64", "--hosts-up", "1", "--pod", "v5e"], "is not made of blocks"),
        (["--slice", "64", "--hosts-up", "1", "--draw", "x.gif"], "must end in .png, .svg, .pdf"),
        (["--slice", "64", "--hosts-up", "1", "--trials", "1"], "--trials"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in mistake(["availability", *arguments], capsys)
