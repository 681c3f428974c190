"""The keeper and the reaper, without Ray: what a driver that dies leaves, and what is let alone."""

import os
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from helpers.processes import environment

from launch.pod.reaper import cleared_directory

# Holds a directory and says its name, until it is killed.
HOLDS = """
import time
from launch.pod.reaper import cleared_directory
with cleared_directory() as directory:
    print(directory, flush=True)
    time.sleep(100)
"""
# Keeps a driver alive where every new Python ends at once with 1, reapers too.
KEEPS = """
import sys
from launch.pod.keeper import keep
sys.executable = "/bin/false"
sys.exit(keep({"out": sys.argv[1]}))
"""


@pytest.fixture
def env():
    """The environment of a Python that finds our packages, with an empty TMPDIR of a short name."""
    with tempfile.TemporaryDirectory(prefix="k-", dir="/tmp") as short:
        yield environment(TMPDIR=short)


def test_only_the_processes_of_its_ray_end_with_a_keeper(env):
    """As Ray's a process counts that writes a log there, its environment of Ray or overwritten."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDS], env=env, stdout=subprocess.PIPE)
    started = []

    def opens(file, mode, environment):
        code = f"import time; f = open({str(file)!r}, {mode!r}); print(1, flush=True)"
        started.append(
            subprocess.Popen(
                [sys.executable, "-S", "-c", code + "; time.sleep(60)"],
                env=environment,
                stdout=subprocess.PIPE,
            )
        )
        started[-1].stdout.readline()
        return started[-1]

    try:
        directory = holder.stdout.readline().decode().strip()
        assert os.path.dirname(directory) == env["TMPDIR"]
        ray = {"RAY_TMPDIR": directory}
        log = directory + "/raylet.log"
        ours = [opens(log, "a", ray), opens(log, "a", {})]
        beside = directory + "-2"  # the directory of another run may begin with the same letters
        os.mkdir(beside)
        others = [
            opens(log, "r", {"HOME": "/"}),
            opens(log, "r", {}),
            opens(log, "a", {"HOME": "/"}),
            opens(beside + "/log", "a", {}),
            opens(beside + "/log", "a", {"RAY_TMPDIR": beside}),
        ]
        [reaper] = psutil.Process(holder.pid).children()
        holder.kill()
        psutil.wait_procs([reaper], timeout=20)
        assert not reaper.is_running()
        for process in ours:
            assert process.wait(timeout=10) == -9
        assert [process.poll() for process in others] == [None] * 5
        assert os.listdir(env["TMPDIR"]) == [os.path.basename(beside)]
    finally:
        for process in [holder, *started]:
            process.kill()
            process.communicate()


def test_a_reaper_that_is_dead_harms_nothing():
    for _ in range(2):
        before = set(psutil.Process().children())
        with cleared_directory() as directory:
            [reaper] = set(psutil.Process().children()) - before
            reaper.kill()
            while reaper.is_running() and reaper.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            assert directory.is_dir()
        assert not directory.exists()
        assert not reaper.is_running()


@pytest.mark.parametrize("has_logs", [False, True])
def test_a_driver_that_dies_is_told_as_far_as_it_is_known(env, tmp_path, has_logs):
    if has_logs:
        (tmp_path / "out" / "pod").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", KEEPS, "out"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    how = "the driver left with 1 (Ray's head may be gone)"
    assert [line[9:] for line in done.stdout.splitlines()] == [how + "; another goes on"] * 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"torsion: {how}")
    assert line.endswith("; see out/pod") == has_logs
    assert ("out/pod" in line) == has_logs
    assert os.listdir(env["TMPDIR"]) == []


def test_a_driver_that_cannot_start_says_why_once(env, tmp_path):
    code = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "pod", "configs/quickstart.gin", "--slice", "2x2x1"]
    done = subprocess.run(
        [*command, "--out", "out"],
        cwd=tmp_path,
        env=env | {"JAX_ENABLE_X64": "foo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("Traceback") == 1
    assert "foo" in done.stderr.splitlines()[-1]
    assert "out/pod" not in done.stderr
    assert os.listdir(env["TMPDIR"]) == []
