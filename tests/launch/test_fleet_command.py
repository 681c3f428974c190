"""`torsion fleet`: workloads out of files, and the outcome by hand and by closed forms."""

import json
from pathlib import Path

import pytest

from launch.cli import main
from topology.fleet.workload import DAY, FailureRates, generate_jobs, generate_outages

QUIET = {"host": 0, "cable": 0, "switch": 0}
NONE = {"save": 30, "restore": 0, "reconfigure": 0, "reroute": 0}


@pytest.fixture
def fleet(tmp_path, capsys):
    """Runs the command on a document, and gives its JSON."""

    def run(document):
        file = tmp_path / "workload.json"
        file.write_text(json.dumps(document))
        assert main(["fleet", str(file), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def job(name, slice, arrival, work, **more):
    return {"name": name, "slice": slice, "arrival_hours": arrival, "work_hours": work, **more}


def test_jobs_by_hand(fleet):
    """Two jobs of 48 blocks each on 64: the second waits for the first; a small one passes by."""
    what = fleet(
        {
            "days": 1,
            "jobs": [
                job("first", "12x16x16", 0, 10),
                job("second", "12x16x16", 1, 5),
                job("small", "4x4x4", 2, 3),
            ],
            "failures": QUIET,
            "costs": NONE,
            "policies": [{"queue": "backfill"}, {"name": "strict", "queue": "in_order"}],
        }
    )
    assert [row["policy"] for row in what["policies"]] == ["policy 1", "strict"]
    backfill, strict = (
        {j["name"]: (j["started_hours"], j["finished_hours"]) for j in row["jobs"]}
        for row in what["policies"]
    )
    assert backfill["first"] == pytest.approx((0, 10))
    assert backfill["second"] == pytest.approx((10, 15))
    assert backfill["small"] == pytest.approx((2, 5))
    assert strict["small"] == pytest.approx((10, 13))  # held up by the second
    used = (48 * 15 + 3) / (64 * 24)
    for row in what["policies"]:
        assert row["goodput"] == pytest.approx(used)
        assert row["finished_jobs"] == 3
        assert row["interrupted_jobs"] == 0
        assert sum(row["shares"].values()) == pytest.approx(1)
    assert what["offered"] == pytest.approx(used)
    assert what["policies"][0]["mean_wait_hours"] == pytest.approx(9 / 3)
    assert what["policies"][1]["mean_wait_hours"] == pytest.approx((9 + 8) / 3)


def test_an_outage_moves_a_job_and_costs_what_is_not_saved(fleet):
    what = fleet(
        {
            "days": 1,
            "jobs": [job("a", "4x4x4", 0, 10)],
            "failures": QUIET,
            "outages": [{"part": "host:0,1", "start_hours": 3.5, "end_hours": 9}],
            "costs": NONE | {"save": 0.001, "restore": 3600},
            "policies": [{"checkpoint_hours": 1}],
        }
    )
    (row,) = what["policies"]
    assert row["interruptions"] == {"swap": 1}
    # Half an hour since the checkpoint is done again, after an hour to restore.
    assert row["jobs"][0]["finished_hours"] == pytest.approx(10 + 0.5 + 1, abs=1e-3)
    assert row["shares"]["lost"] * 64 * 24 == pytest.approx(0.5, abs=1e-3)


def test_what_is_generated_is_what_the_library_generates(fleet):
    what = fleet(
        {
            "days": 20,
            "jobs": {
                "load": 0.5,
                "mean_work_hours": 12,
                "seed": 3,
                "sizes": [
                    {"share": 1, "slices": ["4x4x4", "4x4x8"]},
                    {"share": 1, "slices": ["8x8x8"]},
                ],
            },
            "failures": {"host": 0.002, "host_repair_hours": 2, "seed": 5},
        }
    )
    sizes = [(1, ["4x4x4", "4x4x8"]), (1, ["8x8x8"])]
    jobs = generate_jobs(20 * DAY, load=0.5, mean_work=DAY / 2, sizes=sizes, seed=3)
    rates = FailureRates(host=0.002, host_repair=7200)
    assert what["jobs"] == len(jobs)
    assert what["outages"] == len(generate_outages(20 * DAY, rates, seed=5))
    assert [j["arrived_hours"] for j in what["policies"][0]["jobs"]] == pytest.approx(
        [j.arrival / 3600 for j in jobs]
    )
    assert {j["slice"] for j in what["policies"][0]["jobs"]} == {"4x4x4", "4x4x8", "8x8x8"}
    for row in what["policies"]:
        assert row["goodput"] <= min(what["offered"], row["utilisation"])
    names = ["switches", "switches, never rerouting", "static wiring", "static wiring, jobs moved"]
    assert [row["policy"] for row in what["policies"]] == names


def test_the_page_and_the_picture(tmp_path, capsys):
    picture = tmp_path / "year.png"
    example = Path(__file__).parents[2] / "docs" / "examples" / "workload.json"
    assert main(["fleet", str(example), "--draw", str(picture)]) == 0
    page = capsys.readouterr().out
    assert "TPU v4 of 64 blocks over 30 days" in page
    assert "static wiring, jobs moved" in page
    assert "no policy has more goodput" in page
    assert f"wrote {picture}" in page
    assert picture.read_bytes().startswith(b"\x89PNG")


ONE = {"slice": "4x4x4", "work_hours": 1}
WRONG = [
    ({}, "jobs is missing"),
    ([], "[]: want an object with jobs"),
    ({"jobs": []}, "jobs: []: want a list of jobs"),
    ({"jobs": "many"}, "jobs: "),
    ({"jobs": {"load": 0}}, "jobs: none arrives"),
    ({"jobs": {"load": -1}}, "jobs: load -1"),
    ({"jobs": {"load": float("nan")}}, "jobs: load nan"),
    ({"jobs": {"seed": 0.5}}, "jobs: seed 0.5"),
    ({"jobs": {"mean_work_hours": 0}}, "jobs: mean_work_hours 0"),
    ({"jobs": {"mean_work_hours": 1e-9}}, "1e+06 at most"),
    ({"jobs": {"slowdown": [0.5]}}, "jobs: slowdown [0.5]: want [least, most]"),
    ({"jobs": {"slowdown": [0.5, 0.1]}}, "the least and the most"),
    ({"jobs": {"sizes": []}}, "jobs: sizes: []"),
    ({"jobs": {"sizes": [{"share": 1, "slices": ["4x4x5"]}]}}, "sizes: entry 1: slice 4x4x5"),
    ({"jobs": {"sizes": [{"share": 0, "slices": ["4x4x4"]}]}}, "together more than 0"),
    ({"jobs": {"laod": 1}}, "did you mean load?"),
    ({"jobs": [{"slice": "4x4x4"}]}, "jobs: entry 1: work_hours is missing"),
    ({"jobs": [ONE | {"work_hours": float("inf")}]}, "entry 1: work_hours inf"),
    ({"jobs": [ONE | {"work_hours": "1"}]}, "entry 1: work_hours 1: hours"),
    ({"jobs": [ONE | {"arrival_hours": -1}]}, "entry 1: arrival_hours -1"),
    ({"jobs": [ONE | {"slice": "5x5x5"}]}, "entry 1: slice 5x5x5"),
    ({"jobs": [ONE | {"slice": 4}]}, "entry 1: slice 4: want a text"),
    ({"jobs": [ONE | {"priority": 0.5}]}, "entry 1: priority 0.5"),
    ({"jobs": [ONE | {"name": "a"}, ONE | {"name": "a"}]}, "there are two of this name"),
    ({"jobs": [ONE, 3]}, "jobs: entry 2: 3: want an object"),
    ({"jobs": [ONE], "days": 0}, "days 0"),
    ({"jobs": [ONE], "days": True}, "days True"),
    ({"jobs": [ONE], "failure": {}}, 'unknown key "failure"; did you mean failures?'),
    ({"jobs": [ONE], "failures": {"host": -1}}, "failures: host -1: failures a day"),
    ({"jobs": [ONE], "failures": {"host": 1000}}, "outages"),
    ({"jobs": [ONE], "failures": []}, "failures: []: want an object"),
    ({"jobs": [ONE], "costs": {"save": -1}}, "save -1"),
    ({"jobs": [ONE], "costs": {"save": "x"}}, "save x"),
    ({"jobs": [ONE], "outages": [{"part": "host:99,0"}]}, "outages: entry 1: start_hours"),
    (
        {"jobs": [ONE], "outages": [{"part": "host:99,0", "start_hours": 0, "end_hours": 1}]},
        "outages: entry 1: part 'host:99,0': '99' is no block",
    ),
    (
        {"jobs": [ONE], "outages": [{"part": "block:0", "start_hours": 2, "end_hours": 1}]},
        "start is before end",
    ),
    ({"jobs": [ONE], "maintenance": {"every_days": 1}}, "maintenance: lasts_hours is missing"),
    ({"jobs": [ONE], "maintenance": {"every_days": 1, "lasts_hours": 48}}, "maintenance: "),
    ({"jobs": [ONE], "policies": []}, "policies: []"),
    ({"jobs": [ONE], "policies": [{"wiring": "wires"}]}, "entry 1: wiring 'wires': one of"),
    ({"jobs": [ONE], "policies": [{"recovery": []}]}, "entry 1: recovery []: one of"),
    ({"jobs": [ONE], "policies": [{"preempt": 1}]}, "entry 1: preempt 1: true or false"),
    ({"jobs": [ONE], "policies": [{"defragment": True}]}, "defragment is of wiring static"),
    ({"jobs": [ONE], "policies": [{"name": "a"}, {"name": "a"}]}, 'entry 2: name "a"'),
    ({"jobs": [ONE], "policies": [{"spares": 64}]}, "does not fit the pod of 64 blocks, 64 of"),
    ({"jobs": [ONE], "policies": [{"checkpoint_hours": 0}]}, "entry 1: checkpoint_hours 0"),
    ({"jobs": [ONE], "policies": [{"queue": "in_order", "patience_hours": 1}]}, "queue backfill"),
]


@pytest.mark.parametrize(("document", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_workload_is_one_line(document, message, tmp_path, capsys):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(document))
    assert main(["fleet", str(file)]) == 2
    error = capsys.readouterr().err
    assert "wrong.json: " in error
    assert message in error
    assert error.count("\n") == 1


def test_a_pod_without_blocks_is_refused(tmp_path, capsys):
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"jobs": {}}))
    assert main(["fleet", str(file), "--pod", "v5e"]) == 2
    assert "is not made of blocks" in capsys.readouterr().err
