"""`torsion slice`, for people and as JSON."""

import json
import subprocess
import sys
import time

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


# Slice, pod, links of the bisection, wraparound, hosts, blocks.
OF_PODS = [
    ("16x16x24", "v5p", 512, "xyz", 1536, 96),
    ("4x4x8_twisted", "v5p", 64, "xyz", 32, 2),
    ("16x16", "v5e", 32, "xy", 32, None),
    ("8x16", "v6e", 16, "y", 16, None),
    ("4x4", "v5e", 4, "", 2, None),
    ("1x1", "v6e", 0, "", 1, None),
]


@pytest.mark.parametrize(("shape", "pod", "bisection", "wrap", "hosts", "blocks"), OF_PODS)
def test_slices_of_every_pod(shape, pod, bisection, wrap, hosts, blocks, capsys):
    assert main(["slice", shape, "--pod", pod, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pod"], found["slice"]) == (f"TPU {pod}", shape)
    assert found["shape"] == [int(k) for k in shape.removesuffix("_twisted").split("x")]
    assert (found["bisection_links"], found["wrap"]) == (bisection, wrap)
    assert (found["hosts"], found["blocks"]) == (hosts, blocks)
    each, load = (
        found["all_to_all"][name] for name in ("bytes_per_second_per_chip", "max_link_load")
    )
    sent = {"v5p": 100e9, "v5e": 50e9, "v6e": 100e9}[pod] * (found["chips"] - 1)
    assert (each or 0) * load == pytest.approx(sent)
    assert main(["slice", shape, "--pod", pod]) == 0
    assert f" of TPU {pod}" in capsys.readouterr().out.splitlines()[0]


def test_v4_is_the_pod_unless_another_is_named(capsys):
    assert main(["slice", "4x4x8", "--json"]) == 0
    unnamed = json.loads(capsys.readouterr().out)
    assert unnamed["pod"] == "TPU v4"
    assert main(["slice", "4x4x8", "--pod", "v4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == unnamed


def test_links_that_fail_on_other_pods(capsys):
    failed = ["--failed", "link:0,0,+y", "--json"]
    assert main(["slice", "2x2", "--pod", "v5e", *failed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lost_chips"], found["lost_links"], found["cut_in_two"]) == (0, 1, False)
    # A ring of four becomes a line of four: 4 pairs go over its middle, in place of 2.
    assert found["all_to_all_kept"] == pytest.approx(0.5)
    assert main(["slice", "4x4x8", "--pod", "v5p", "--failed", "link:0,0,0,3,+z"]) == 0
    assert "1 link" in capsys.readouterr().out
    assert main(["slice", "4x4", "--pod", "v6e", "--failed", "chip:0,0"]) == 0
    assert "1 chip: the slice needs other chips" in capsys.readouterr().out


def test_a_failed_switch_costs_what_it_costs(capsys):
    assert main(["slice", "4x4x8", "--failed-ocs", "z,0,0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all_to_all_kept"] == pytest.approx(0.9375)
    assert main(["slice", "4x4x8_twisted", "--failed-ocs", "x,0,0"]) == 0
    out = capsys.readouterr().out
    assert "99.39% kept" in out
    # The figures of the whole slice are told apart from those after the failure.
    lines = out.splitlines()
    before, after = lines.index("before the failure"), lines.index("after it")
    assert any("GB/s a chip" in line for line in lines[before:after])
    assert lines[after + 1 :] == [
        "  failed                ocs:x,0,0",
        "  lost                  2 links",
        "  all-to-all            99.39% kept",
    ]


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
        (["4x4x8", "--draw", "/nonexistent/x"], "no folder /nonexistent to write in"),
        (["4x4x8", "--draw", "/nonexistent/"], "no folder /nonexistent to write in"),
        (["4x4x8_twist:0,0,2/0,0,0/0,0,0", "--draw"], "in place of 2 of x take 0"),
        (["4x4x8", "--pod", "v5e"], "not a slice of TPU v5e, which has 2 dimensions"),
        (["4x4", "--pod", "v4"], "not a slice of TPU v4, which has 3 dimensions"),
        (["32x32", "--pod", "v6e"], "the nearest legal is 16x16"),
        (["16x16_twisted", "--pod", "v5e"], "no slice of TPU v5e is twisted"),
        (["16x32x32", "--pod", "v5p"], "the largest slice of TPU v5p has 96"),
        (["4x4x8", "--pod", "v5p", "--failed-ocs", "x,0,0"], "wired is not published"),
        (["4x4", "--pod", "v5e", "--failed-ocs", "x,0,0"], "neither blocks nor optical switches"),
        (["4x4", "--pod", "v5e", "--failed", "chip:9,9"], "whose chips are 0,0 .. 3,3"),
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
    assert "1 chip: the slice needs another block" in capsys.readouterr().out
    assert main(["slice", "16x16x16", "--failed", "port:x,0,0,17"]) == 0
    out = capsys.readouterr().out
    assert "1 link\n" in out
    assert "unknown: the best routing takes minutes to find" in out


@pytest.mark.parametrize(
    ("shape", "title", "rows"),
    [
        (
            "4x4x12_twist:0,0,4/0,0,8/0,0,0",
            "4x4x12_twist:0,0,4/0,0,8/0,0,0: a twisted torus of 192 chips in 3 blocks",
            [
                ["wraps around in", "x, y, z"],
                ["twist of x", "past its end also 4 along z"],
                ["twist of y", "past its end also 8 along z"],
            ],
        ),
        ("4x4x8_wrap:xy", "a mesh of 128 chips in 2 blocks, wrapped in x, y", [["x, y"]]),
        ("2x2x1", "a mesh of 4 chips in 1 block", [["no dimension"]]),
        ("4x4x8", "a torus of 128 chips in 2 blocks", [["x, y, z"]]),
    ],
)
def test_twists_and_wrapped_dimensions_are_named(shape, title, rows, capsys):
    assert main(["slice", shape]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(title)
    for words in rows:
        assert any(all(word in line for word in words) for line in lines)
    assert sum("twist of" in line for line in lines) == sum(len(words) == 2 for words in rows[1:])


def test_a_bisection_that_is_not_proved_is_at_most(capsys):
    for shape, links, exact in [
        ("4x4x16", 32, True),
        ("4x4x16_twist:0,0,4/0,0,8/0,0,0", 112, False),
    ]:
        assert main(["slice", shape]) == 0
        assert f"{'' if exact else 'at most '}{links} links" in capsys.readouterr().out
        assert main(["slice", shape, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["bisection_links"] <= links
        assert found["bisection_exact"] == exact


@pytest.mark.slow
def test_failures_without_symmetry_end_in_time_with_an_interval(capsys, monkeypatch):
    """What took minutes without a word says how far it is, and ends with bound and best found."""
    monkeypatch.setattr("topology.drawing.scene.TIME_LIMIT", 1.0)
    monkeypatch.setattr("launch.reports.slices._TELL", 0.0)
    parts = ["link:3,0,0,0,+x", "link:2,1,2,3,+y"]
    began = time.monotonic()
    assert main(["slice", "8x8x8", "--failed", *parts, "--json"]) == 0
    assert time.monotonic() - began < 60
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    # Half of the links over a plane carry all that a regular 8x8x8 has to pass: 1 of 128 is lost.
    assert 0.9 < found["all_to_all_kept"] <= found["all_to_all_kept_at_most"] <= 1
    assert "looking for the best routing around the failures" in captured.err


def test_cut_in_two_keeps_nothing_here_as_in_a_fabric(capsys, tmp_path):
    switches = [f"ocs:z,{i},{j}" for i in range(4) for j in range(4)]
    draw = ["--draw", str(tmp_path / "cut")]
    assert main(["slice", "4x4x8", "--failed", *switches, "--json", *draw]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main(["fabric", "--slices", "4x4x8", "--failed", *switches, "--json"]) == 0
    [placed] = json.loads(capsys.readouterr().out)["slices"]
    for found in (alone, placed):
        assert (found["all_to_all_kept"], found["cut_in_two"]) == (0, True)
    for command in (["slice", "4x4x8"], ["fabric", "--slices", "4x4x8"]):
        assert main([*command, "--failed", *switches]) == 0
        assert "cut in two" in capsys.readouterr().out
    assert "cut in two" in (tmp_path / "cut.html").read_text()


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
    for shape, pod in (("8x16", "v5e"), ("1x1", "v6e"), ("2x2x2", "v5p")):
        assert main(["slice", shape, "--pod", pod, "--draw", f"{shape}-{pod}"]) == 0
        assert f"of TPU {pod}" in (tmp_path / f"{shape}-{pod}.html").read_text()
        assert (tmp_path / f"{shape}-{pod}.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / "here").mkdir()
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
