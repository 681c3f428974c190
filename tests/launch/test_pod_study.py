"""`torsion study pod`: the published figures beside ours, and what else it finds."""

import itertools
import json
import math

import numpy as np
import pytest

from launch.cli import main
from launch.reports import pod_study
from launch.reports.pod_figures import FIGURES
from launch.reports.pod_study import PodStudy, compared, study_pod
from launch.reports.pod_table import make_table
from pjit_train.errors import UserError
from topology.torus.slices import Slice

SMALL = PodStudy(
    rerouted=("4x4x4", "4x4x8"), larger=("4x8x8",), twist_blocks=4, trials=20_000, years=0.1
)


@pytest.fixture(scope="module")
def results():
    return pod_study.find(SMALL)


def shown(results, *words):
    """The comparisons that have all the words."""
    return [row for row in results["comparisons"] if all(word in row["what"] for word in words)]


def test_the_twisted_gains_and_the_efficiency_that_explains_both(results):
    bounds = [row for row in shown(results, "twisted over regular")]
    # The optimum of a twisted slice by its closed form: all distances over six links loaded alike.
    for row, (name, regular), measured in zip(
        bounds, (("4x4x8", 128), ("4x8x8", 256)), (1.63, 1.31), strict=True
    ):
        assert row["published"] == measured
        least = Slice.parse(f"{name}_twisted").hop_distances().sum() / 6
        assert row["ours"] == pytest.approx(regular / least, rel=1e-4)
        assert row["difference"] == pytest.approx(row["ours"] - measured)
    e = results["efficiency"]
    gains = [128 / (220 / 3), 256 / 184]
    errors = {
        f: sum((f * g - m) ** 2 for g, m in zip(gains, (1.63, 1.31), strict=True))
        for f in (e - 1e-3, e, e + 1e-3)
    }
    assert min(errors, key=errors.get) == e
    assert 0.93 < e < 0.945
    for row in shown(results, "the same, times"):
        assert abs(row["difference"]) < 0.01


@pytest.mark.parametrize(("name", "gain"), [("4x4x8", 1.48), ("4x8x8", 1.25)])
def test_one_tie_rule_for_both_slices_gives_the_naive_gains(results, name, gain):
    (row,) = shown(results, f"{name}_twisted over regular")
    assert f"{gain}" in row["why"]

    def largest_load(slice):
        """By counting: of the shortest vectors to each chip, the one first in the alphabet."""
        vectors = {}
        for vector in itertools.product(*(range(-k, k + 1) for k in slice.shape)):
            rank = sum(map(abs, vector)), tuple(-v for v in vector)
            chip = int(slice.index(slice.reduce(vector)))
            vectors[chip] = min(vectors.get(chip, rank), rank)
        hops = -np.array([minus for _, minus in vectors.values()])
        return max(np.maximum(hops, 0).sum(axis=0).max(), np.maximum(-hops, 0).sum(axis=0).max())

    loads = [largest_load(Slice.parse(n)) for n in (name, f"{name}_twisted")]
    assert loads[0] / loads[1] == pytest.approx(gain, abs=0.005)


def test_what_is_kept_without_a_switch(results):
    kept = {(row["slice"], row["dimension"]): row for row in results["failed_switch"]}
    # One of 16 columns loses its links: 15/16 where these links are the smallest cut.
    optima = {
        ("4x4x4", "x"): 31 / 32,
        ("4x4x8", "x"): 1,
        ("4x4x8", "z"): 15 / 16,
        ("4x8x8", "x"): 1,
        ("4x8x8", "y"): 15 / 16,
    }
    assert kept.keys() == optima.keys()
    for key, value in optima.items():
        assert kept[key]["optimum"] == pytest.approx(value, rel=1e-4)
        if "wild_first" in kept[key]:
            assert kept[key]["wild_first"] == pytest.approx(value, rel=1e-3)
    for row in shown(results, "kept without", "wild-first"):
        assert row["published"] == (0.922, 1.017)
        assert row["difference"] == 0


def test_goodput(results):
    found = shown(results, "goodput of")
    assert [row["published"] for row in found] == [0.5, 0.5, 0.75, 0.75]
    for row, a, n in zip(found, (0.99, 0.995, 0.99, 0.995), (32, 32, 48, 48), strict=True):
        p = a**16
        chances = [math.comb(64, up) * p**up * (1 - p) ** (64 - up) for up in range(65)]
        expected = sum(c * (up // n) * n / 64 for up, c in enumerate(chances))
        assert row["ours"] == pytest.approx(expected)
        assert abs(row["difference"]) < 0.01
    for row in shown(results, "hosts up so that static"):
        assert row["published"] == 0.999
        assert 0.998 < row["ours"] < 1
    for row in results["goodput"]:
        away = abs(row["sampled"] - row["closed_form"])
        assert away <= 5 * row["standard_error"] + 1e-3, row


def test_the_wiring(results):
    exact = {row["what"]: row for row in results["comparisons"] if "16x16x16" in row["what"]}
    exact |= {row["what"]: row for row in results["comparisons"] if "of a block" in row["what"]}
    assert len(exact) == 2
    for what, number in (
        ("switches that", 48),
        ("ports that it uses", 128),
        ("leaves", 8),
        ("optical links", 96),
        ("wires inside", 144),
    ):
        (row,) = shown(results, what)
        assert (row["published"], row["ours"], row["difference"]) == (number, number, 0)
    (row,) = shown(results, "bisection")
    assert (row["published"], row["ours"]) == (24, 2 * 16 * 16 * 50e9 / 1e12)


def test_generations_by_hand(results):
    found = {row["what"]: row["ours"] for row in results["comparisons"]}
    assert found["a chip of v4 over one of v3"] == 275 / 123
    assert found["the same a watt"] == pytest.approx(275 / 123 * 220 / 170)
    assert found["a pod of v4 over one of v3"] == pytest.approx(4096 * 275 / (1024 * 123))
    energy = found["energy on premises over TPU v4 in Google Cloud"]
    assert energy == pytest.approx(2 * 1.57 / 1.10)
    assert found["operational CO2e, the same"] == pytest.approx(energy * 0.475 / 0.074)


def test_twists_are_ranked_by_their_optimum(results):
    rows = {row["shape"]: row for row in results["twists"]}
    assert list(rows) == ["4x4x8", "4x4x12", "4x4x16", "4x8x8"]
    for shape in ("4x4x8", "4x8x8"):
        assert rows[shape]["best"] == f"{shape}_twisted"
        assert rows[shape]["gain"] == pytest.approx(rows[shape]["shipped_gain"])
    for shape, row in rows.items():
        slice = Slice.parse(row["best"])
        # No twist is faster than its distances allow, and 4x4x16 beats the next twist that it has.
        least = slice.hop_distances().sum() / 6
        rate = 50e9 * (slice.num_chips - 1)
        assert row["bytes_per_second_per_chip"] <= rate / least * (1 + 1e-6), shape
        regular = rate / (max(slice.shape) * slice.num_chips / 8)
        assert row["regular_bytes_per_second_per_chip"] == pytest.approx(regular, rel=1e-5)
        assert row["gain"] == pytest.approx(row["bytes_per_second_per_chip"] / regular, rel=1e-5)
    assert rows["4x4x16"]["gain"] > 2.7


def test_the_same_year_under_each_policy(results):
    year = results["year"]
    for row in year["policies"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["goodput"] == pytest.approx(row["shares"]["kept"])
        assert row["finished_jobs"] <= year["jobs"]
    switches, never, static, moved = year["policies"]
    assert static["goodput"] < switches["goodput"]
    assert moved["interruptions"]["migrate"] > 0
    assert "reroute" not in never["interruptions"]
    assert switches["interruptions"]["reroute"] > 0


def test_the_rules_for_checkpoints_find_the_best_interval(results):
    found = results["checkpoints"]
    assert found["young"] == pytest.approx(math.sqrt(2 * found["save"] * found["mtbf"]))
    # 32 blocks of 16 hosts that fail 0.08 % a day
    assert found["mtbf"] == pytest.approx(86400 / (32 * 16 * 0.0008))
    intervals, simulated = np.array(
        [(row["interval"], row["simulated"]) for row in found["intervals"]]
    ).T
    best = intervals[simulated.argmax()]
    assert 0.5 < best / found["daly"] < 2
    for row in found["intervals"]:
        assert row["simulated"] == pytest.approx(row["closed_form"], abs=0.01)


def test_the_difference_to_a_range_is_to_its_nearer_end():
    for ours, difference in ((0.9, -0.022), (0.95, 0), (1.1, 0.083)):
        row = compared("x", (0.922, 1.017), ours, "a paper")
        assert row["difference"] == pytest.approx(difference)


def test_the_table_has_every_comparison_and_stands_straight(results):
    table = make_table(results)
    for row in results["comparisons"]:
        assert row["what"] in table
        assert row["why"] in table
    widths = {}
    for number, block in enumerate(table.split("\n\n")):
        if block.startswith("|"):
            lines = block.splitlines()
            widths[number] = {(len(line), line.count("|")) for line in lines}
            assert len(lines) >= 3
    assert len(widths) == 6
    assert all(len(found) == 1 for found in widths.values())


def test_the_command_writes_all_and_prints_one_document(tmp_path, monkeypatch, capsys, results):
    monkeypatch.setattr(pod_study, "find", lambda study, tell: tell("goodput") or results)
    out = tmp_path / "some" / "study"
    assert main(["study", "pod", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    written = json.loads((out / "results.json").read_text())
    assert json.loads(printed.out) == written
    assert "goodput" in printed.err
    assert {path.name for path in out.iterdir()} == {"table.md", "results.json", *FIGURES}
    for name in FIGURES:
        picture = (out / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert 5_000 < len(picture) < 300_000


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, capsys, results):
    monkeypatch.setattr(pod_study, "find", lambda study, tell: results)
    monkeypatch.setattr(
        pod_study, "FIGURES", {"one.png": lambda results, path: path.write_text("1")}
    )
    assert study_pod(tmp_path) == 0
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out

    def break_off(results, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pod_study, "FIGURES", {"one.png": break_off})
    with pytest.raises(UserError, match="No space left"):
        study_pod(tmp_path)
    assert (tmp_path / "one.png").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "one.png"}


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["study", "pod", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert "--out" in said
    assert len(said.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"
