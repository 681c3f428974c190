"""`torsion packets`: the curve as rows, JSON, a table and a picture."""

import csv
import json

import pytest
from helpers.mistakes import mistake

from launch.cli import main

SHORT = ["--slice", "2x2x2", "--cycles", "200"]


def test_the_curve_ends_at_saturation_below_the_bounds(tmp_path, capsys):
    table, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    files = ["--csv", str(table), "--draw", str(picture)]
    assert main(["packets", "--pattern", "uniform", "--places", "2", *SHORT, *files]) == 0
    page = capsys.readouterr().out
    assert page.startswith("uniform on 2x2x2 of TPU v4, 8 chips: packets a chip makes a cycle")
    assert "2 places a buffer" in page
    assert f"wrote {table}\nwrote {picture}\n" in page
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["packets", "--pattern", "uniform", "--places", "2", *SHORT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Half of the chips lie across each of x, y and z, over one link: half a unit on each.
    assert found["bound"] == pytest.approx(2)
    assert found["bound_any"] >= found["bound"] * (1 - 1e-9)
    low, high = found["saturation"]
    assert 0 < low < high <= 2
    assert found["overload"] <= 2
    rows = list(csv.DictReader(table.open()))
    assert [float(row["rate"]) for row in rows] == [p["rate"] for p in found["points"]]
    assert [float(row["latency"]) for row in rows] == [p["latency"] for p in found["points"]]
    assert found["points"][0]["of_bound"] == pytest.approx(0.1)
    assert found["points"][0]["latency"] >= found["points"][0]["hops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "random", "--slice", "4x4x4"], "is no pattern; use uniform, transpose"),
        (["--pattern", "x.csv", "--slice", "4x4x4"], "is no pattern"),
        (["--pattern", "tornado", "--slice", "2x2x2"], "no chip sends anything to another"),
        (["--pattern", "transpose", "--slice", "4x4x8"], "the same read backwards"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--places", "0"], "--places"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--cycles", "1"], "--cycles"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--hot", "0.5"], "--hot is of"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--csv", "."], "is a folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in mistake(["packets", *arguments], capsys)
