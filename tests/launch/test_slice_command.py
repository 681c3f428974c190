"""`torsion slice`, for people and as JSON."""

import json
import subprocess
import sys

import pytest

from launch.cli import main

# Slice, load of the most loaded link, ratio to the regular slice, diameter, mean distance.
KNOWN = [
    ("4x4x8", 128, 1, 8, 4.031),
    ("4x4x8_twisted", 220 / 3, 1.745, 6, 3.465),
    ("4x8x8", 256, 1, 10, 5.020),
    ("4x8x8_twisted", 184, 1.391, 6, 4.329),
]


@pytest.mark.parametrize(("shape", "load", "ratio", "diameter", "distance"), KNOWN)
def test_figures_are_the_known_ones(shape, load, ratio, diameter, distance, capsys):
    assert main(["slice", shape, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["all_to_all"]["max_link_load"] == pytest.approx(load, rel=1e-6)
    assert found["all_to_all"]["lower_bound"] == pytest.approx(load, rel=1e-6)
    assert found["all_to_all"]["ratio_to_regular"] == pytest.approx(ratio, abs=1e-3)
    per_chip = 50e9 * (found["chips"] - 1) / load
    assert found["all_to_all"]["bytes_per_second_per_chip"] == pytest.approx(per_chip)
    assert found["diameter"] == diameter
    assert found["mean_distance"] == pytest.approx(distance, abs=1e-3)
    assert found["twisted"] == shape.endswith("twisted")
    assert found["chips"] == 64 * found["blocks"]


def test_a_failed_switch_costs_what_it_costs(capsys):
    assert main(["slice", "4x4x8", "--failed-ocs", "z,0,0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all_to_all_kept"] == pytest.approx(0.9375)
    assert main(["slice", "4x4x8_twisted", "--failed-ocs", "x,0,0"]) == 0
    assert "99.39% of the all-to-all kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["4x4x7"], "the nearest legal is 4x4x8"),
        (["4x4x4_twisted"], "the nearest is 4x4x8_twisted"),
        (["4x4"], "not a slice"),
        (["4x4x8", "--failed-ocs", "w,0,0"], "'w' is no dimension"),
        (["2x2x1", "--failed-ocs", "x,0,0"], "has no optical link in dimension x"),
        (["4x4x8", "--failed", "block:2"], "whose blocks are 0 .. 1"),
        (["4x4x8", "--failed", "cable:2"], "no such kind; write for example block:12"),
        (["4x4x8", "--draw", "slice.svg"], "give it as NAME.html"),
        (["4x4x8", "--draw", "/proc/slice"], "cannot write here"),
        (["4x4x8_twist:0,0,2/0,0,0/0,0,0", "--draw"], "in place of 2 of x take 0"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["slice", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_failed_parts_are_counted_and_named(capsys):
    parts = ["ocs:x,0,0", "ocs:y,1,2"]
    assert main(["slice", "4x4x8", "--failed", *parts, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == parts
    # A switch of x, and one of y, joins each of the two blocks with itself.
    assert (found["lost_chips"], found["lost_links"]) == (0, 4)
    assert 0.9 < found["all_to_all_kept"] <= 1
    assert main(["slice", "4x4x8", "--failed", "chip:1,0,0,0"]) == 0
    assert "chip:1,0,0,0: lost 1 chip: the slice needs another block" in capsys.readouterr().out
    assert main(["slice", "16x16x16", "--failed", "port:x,0,0,17"]) == 0
    assert "lost 1 link; the optimum around what is left takes minutes" in capsys.readouterr().out


def test_draw_writes_a_page_and_a_picture_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for shape, name in [
        ("4x4x4", "4x4x4"),
        ("4x4x8_twist:0,0,4/0,0,0/0,0,0", "4x4x8_twist-0,0,4_0,0,0_0,0,0"),
    ]:
        for _ in range(2):  # once more replaces its own
            assert main(["slice", shape, "--draw"]) == 0
            last = capsys.readouterr().out.splitlines()[-1]
            assert last == f"wrote {name}.html and {name}.png"
        assert (tmp_path / f"{name}.html").read_text().startswith("<!doctype html>")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert main(["slice", "2x2x1", "--draw", "here/", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drawn"] == ["here/2x2x1.html", "here/2x2x1.png"]
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    assert main(["slice", "2x2x1", "--draw", "notes"]) == 2
    assert "notes.html exists and is no drawing of torsion's" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    assert sorted(p.name for p in tmp_path.iterdir() if "notes" in p.name) == ["notes.html"]


def test_the_command_needs_no_jax(tmp_path):
    script = "import sys; sys.modules['jax'] = None; from launch.cli import main; "
    script += "sys.exit(main(['slice', '4x4x8_twisted', '--draw', sys.argv[1]]))"
    command = [sys.executable, "-c", script, str(tmp_path / "it")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a twisted torus of 128 chips in 2 blocks" in done.stdout
    assert (tmp_path / "it.png").exists()
