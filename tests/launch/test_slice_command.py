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
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["slice", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_needs_no_jax():
    script = "import sys; sys.modules['jax'] = None; from launch.cli import main; "
    script += "sys.exit(main(['slice', '4x4x8_twisted']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a twisted torus of 128 chips in 2 blocks" in done.stdout
