"""`torsion traffic`: loads of patterns and files, their tables and pictures."""

import csv
import json

import numpy as np
import pytest
from helpers.mistakes import mistake

from launch.cli import main
from topology import TPU_V4, Slice, all_to_all
from topology.routing.throughput import switch_links


def found(capsys, *arguments):
    assert main(["traffic", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_uniform_is_all_to_all_over_the_chips(capsys):
    what = found(capsys, "--pattern", "uniform", "--slice", "4x4x8_twisted")
    flow = all_to_all(Slice.parse("4x4x8_twisted"))
    assert what["routings"]["best"]["max_load"] == pytest.approx(flow.max_link_load / 128, rel=1e-3)
    assert what["bound"] == pytest.approx(flow.lower_bound / 128, rel=1e-3)


def test_the_best_routing_of_tornado_meets_the_bound(capsys):
    """All a chip's unit goes one way round by dimension order: k / 2 - 1. The best sends some the
    long way, x of it: (1 - x) (k / 2 - 1) = x (k / 2 + 1) were it a ring alone."""
    what = found(capsys, "--pattern", "tornado", "--slice", "4x4x4", "--time-limit", "3")
    ordered, best = what["routings"]["dimension_order"], what["routings"]["best"]
    assert ordered["max_load"] == pytest.approx(1)
    assert best["max_load"] == pytest.approx(what["bound"], rel=1e-3)
    assert best["max_load"] == pytest.approx(3 / 4, rel=1e-3)  # x = 1 / 4
    assert best["of_bound"] == pytest.approx(1, rel=1e-3)
    rate = TPU_V4.chip.link_bandwidth / best["max_load"]
    assert best["bytes_per_second_per_chip"] == pytest.approx(rate)


def test_around_a_failed_switch_the_best_is_that_of_all_to_all(tmp_path, capsys):
    table = tmp_path / "loads.csv"
    what = found(
        capsys, "--pattern", "uniform", "--slice", "4x4x4", "--failed", "ocs:x,0,0",
        "--csv", str(table),
    )  # fmt: skip
    slice = Slice.parse("4x4x4")
    links = switch_links(slice, 0, 0, 0)
    flow = all_to_all(slice, links)
    assert what["lost_links"] == len(links) == 2
    best, ordered = (what["routings"][x]["max_load"] for x in ("best", "dimension_order"))
    assert best == pytest.approx(flow.max_link_load / 64, rel=1e-3)
    assert what["bound"] == pytest.approx(flow.lower_bound / 64, rel=1e-3)
    assert ordered >= best
    with table.open() as file:
        rows = list(csv.DictReader(file))
    sent = {6 * int(row["chip"]) + DIRECTIONS.index(row["direction"]): row for row in rows}
    for link in links:
        assert float(sent[link]["dimension_order"]) == float(sent[link]["best"]) == 0


DIRECTIONS = ["+x", "-x", "+y", "-y", "+z", "-z"]


def test_a_file_of_rows_and_a_matrix_say_the_same(tmp_path, capsys):
    rng = np.random.default_rng(0)
    matrix = np.round(rng.random((8, 8)) * 1e6)
    square, rows = tmp_path / "square.csv", tmp_path / "rows.csv"
    np.savetxt(square, matrix, delimiter=",", header="amounts")
    lines = [f"{s}, {d}, {matrix[s, d]}" for s in range(8) for d in range(8)]
    rows.write_text("\n".join(["source,destination,bytes", "", *lines]))
    a, b = (found(capsys, "--pattern", str(f), "--slice", "2x2x2") for f in (square, rows))
    assert a["routings"] == b["routings"]
    assert a["sent"] == pytest.approx(matrix.sum() - np.trace(matrix))
    assert a["routings"]["best"]["seconds"] == pytest.approx(
        a["routings"]["best"]["max_load"] / TPU_V4.chip.link_bandwidth
    )
    rows.write_text("0,1,100\n0,1,50\n")
    once = found(capsys, "--pattern", str(rows), "--slice", "2x2x1")
    assert once["sent"] == 150


def test_the_table_has_every_link(tmp_path, capsys):
    table, picture = tmp_path / "loads.csv", tmp_path / "loads.png"
    files = ["--csv", str(table), "--draw", str(picture)]
    assert main(["traffic", "--pattern", "hotspot", "--slice", "2x4x4", *files]) == 0
    page = capsys.readouterr().out
    assert page.startswith("hotspot on 2x4x4 of TPU v4, 32 chips\n")
    assert f"wrote {table}\nwrote {picture}\n" in page
    slice = Slice.parse("2x4x4")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == (slice.neighbours >= 0).sum()
    for row in rows:
        direction = ["+x", "-x", "+y", "-y", "+z", "-z"].index(row["direction"])
        assert slice.neighbours[int(row["chip"]), direction] == int(row["to"])
        place = [int(row[d]) for d in "xyz"]
        assert slice.coordinates[int(row["chip"])].tolist() == place
    # What arrives at chip 0, over its links: all chips' parts.
    arriving = sum(float(row["best"]) for row in rows if row["to"] == "0")
    assert arriving >= 31 * (0.1 + 0.9 / 32) - 1e-6
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_time_no_search(capsys):
    what = found(capsys, "--pattern", "tornado", "--slice", "4x4x4", "--time-limit", "0")
    assert list(what["routings"]) == ["dimension_order"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("0,1\n1,0\n", "2 rows of 2; 2x2x1 has 4 chips"),
        ("0,1,2,3\n" * 3 + "0,1,2\n", "line 4: 3 amounts; want 4"),
        ("0,1,2,3\n" * 3 + "0,1,x,3\n", "line 4: 'x': want bytes"),
        ("0,1,2,3\n" * 3 + "0,1,-2,3\n", "line 4: '-2': want bytes"),
        ("0,1,2,3\n" * 3 + "0,1,nan,3\n", "line 4: 'nan'"),
        ("0,0,0,0\n" * 4, "nothing is sent"),
        ("0,1,inf\n", "line 1: 'inf'"),
        ("source,destination,bytes\n0,4,1\n", "line 2: destination '4': want a chip, 0 .. 3"),
        ("source,destination,bytes\n-1,2,1\n", "line 2: source '-1'"),
        ("source,destination,bytes\n0,1\n", "line 2: 2 columns"),
        ("source,destination,bytes\n", "nothing is sent"),
        ("PK\x03\x04\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "wrong.csv"
    file.write_bytes(text.encode("latin-1"))
    assert main(["traffic", "--pattern", str(file), "--slice", "2x2x1"]) == 2
    out, error = capsys.readouterr()
    assert "wrong.csv: " in error
    assert message in error
    assert error.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "random", "--slice", "4x4x4"], "is no pattern; use uniform"),
        (["--pattern", "none.csv", "--slice", "4x4x4"], "none.csv: no such file"),
        (["--pattern", "transpose", "--slice", "4x4x8"], "the same read backwards"),
        (["--pattern", "uniform", "--slice", "4x4x7"], "slice 4x4x7"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--hot", "0.5"], "--hot is of --pattern"),
        (["--pattern", "hotspot", "--slice", "4x4x4", "--hot", "2"], "--hot"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--csv", "no/x.csv"], "--csv no/x.csv"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--draw", "x"], "must end in .png"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--time-limit", "nan"], "--time-limit"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--failed", "block:0"], "takes 64 of the"),
        (["--pattern", "uniform", "--slice", "4x4x4", "--failed", "rack:0"], "no such kind"),
        (
            [
                "--pattern",
                "uniform",
                "--slice",
                "2x2x1",
                "--failed",
                "link:0,0,0,0,+x",
                "link:0,0,1,0,+x",
            ],
            "the failed links cut it in two",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert message in mistake(["traffic", *arguments], capsys)
