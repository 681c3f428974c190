"""Processes that SLURM and several slices start: who they are, and that they train as one."""

import json
import re
import subprocess

import pytest
from helpers.gin_files import tiny
from helpers.processes import TORSION, environment

from launch.cli import main
from launch.cluster import first_host, processes_of
from pjit_train.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],login",
}
SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080",
    "TPU_WORKER_ID": "2",
    "TPU_WORKER_HOSTNAMES": "a,b,c,d",
}
SMALL = {"run.Run.steps": 4, "run.Run.log_every": 1, "run.Run.eval_every": 0}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[001-015],x", "node001"),
        ("node[4,7-9]", "node4"),
        ("rack[0-1]node[2-3]-ib,y", "rack0node2-ib"),
        ("a.b.c,node[1-2]", "a.b.c"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_job_step_says_who_its_tasks_are():
    assert processes_of(SLURM) == (f"gpu007:{61440 + 70003 % 4096}", 3, 4)
    assert processes_of(SLURM, "here:1234") == ("here:1234", 3, 4)
    assert processes_of(SLURM, "here:1234", 3, 4) == ("here:1234", 3, 4)


def test_hosts_of_slices_are_numbered_slice_after_slice():
    assert processes_of(SLICES) == ("job-slice-0-0.job:8482", 1 * 4 + 2, 8)


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        without(SLURM, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        SLICES | {"MEGASCALE_NUM_SLICES": "1"},
        SLICES | {"MEGASCALE_NUM_SLICES": ""},
    ],
)
def test_one_process_is_one(environ):
    assert processes_of(environ) == (None, None, None)
    assert processes_of(environ, "a:1", 0, 2) == ("a:1", 0, 2)


@pytest.mark.parametrize(
    ("environ", "options", "says"),
    [
        (SLURM, (None, None, 8), "--num-processes 8 contradicts SLURM_STEP_NUM_TASKS, by which"),
        (SLURM, ("a:1", 0, 4), "--process-id 0 contradicts SLURM_PROCID, by which it is 3"),
        (SLICES, (None, None, 2), "contradicts MEGASCALE_NUM_SLICES and TPU_WORKER_HOSTNAMES"),
        (SLURM | {"SLURM_PROCID": "4"}, (), "SLURM_PROCID=4 of 4, by SLURM_STEP_NUM_TASKS: want 0"),
        (SLURM | {"SLURM_PROCID": "x"}, (), "SLURM_PROCID=x: is no number"),
        (without(SLURM, "SLURM_STEP_NODELIST"), (), "SLURM_STEP_NODELIST is not set, and other"),
        (SLICES | {"MEGASCALE_SLICE_ID": "2"}, (), "MEGASCALE_SLICE_ID=2 of 2"),
        (SLICES | {"MEGASCALE_NUM_SLICES": "many"}, (), "MEGASCALE_NUM_SLICES=many: is no number"),
        (without(SLICES, "TPU_WORKER_HOSTNAMES"), (), "TPU_WORKER_HOSTNAMES is not set"),
    ],
)
def test_what_contradicts_is_one_line(environ, options, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        processes_of(environ, *options)
    assert "\n" not in str(error.value)


def test_the_command_refuses_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.gin").write_text(tiny(SMALL))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "small.gin", "--num-processes", "2"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("torsion: --num-processes 2 contradicts SLURM_STEP_NUM_TASKS")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def losses(directory) -> list[float]:
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


def started(folder, out, mesh, variables):
    """Runs two processes on two devices each, with variables of each."""
    argv = ["train", "small.gin", "--devices", "2", "--mesh", mesh, "--out", out]
    processes = [
        subprocess.Popen(
            [*TORSION, *argv],
            env=environment(**variables(i)),
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, process in enumerate(processes):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert f"process {i} of 2 meets the others at " in err


@pytest.mark.slow
def test_tasks_and_slices_train_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.gin").write_text(tiny(SMALL))
    (tmp_path / "corpus.txt").write_text(" ".join(map(str, range(2000))))

    def task(i):
        return SLURM | {
            "SLURM_JOB_ID": "1234",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(i),
            "SLURM_STEP_NODELIST": "localhost",
        }

    def host(i):
        return SLICES | {
            "MEGASCALE_SLICE_ID": str(i),
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
            "TPU_WORKER_ID": "0",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }

    started(tmp_path, "tasks", "data=2,fsdp=2", task)
    started(tmp_path, "slices", "data=-1,fsdp=2,slices=2", host)
    assert main(["train", "small.gin", "--mesh", "data=1", "--out", "one"]) == 0
    for name in ("tasks", "slices"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
