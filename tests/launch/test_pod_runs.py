"""The real command: pods of real processes, disturbed in every way, and what they leave behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from helpers.gin_files import tiny
from helpers.processes import TORSION, environment, free_address

from launch.pod.events import AttemptBegun, AttemptFailed, AttemptOutgrown, FaultMade, RepairMade
from launch.pod.record import read_events

STEPS = 36
CONFIG = {
    "run.Run.steps": STEPS,
    "run.Run.log_every": 1,
    "run.Run.eval_every": 0,
    "checkpoint.CheckpointConfig.every_steps": 4,
    "optimizers.AdamW.learning_rate": 1e-2,
}
OPTIONS = ["--slice", "2x2x2", "--hosts-per-process", "1", "--mesh", "data=2,fsdp=4"]


HUGE = ["--slice", "16x16x16", "--mesh", "data=1,fsdp=-1"]
HUGE += ["--gin", "text.TextData.batch_size = 4096"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    temporary = Path(tempfile.mkdtemp(prefix="p-", dir="/tmp"))  # short, for sockets
    (folder / "t").symlink_to(temporary)
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat"], k=4000)
    corpus = folder / "corpus.txt"
    corpus.write_text(" ".join(words))
    (folder / "run.gin").write_text(tiny(CONFIG | {"sources.TextFiles.train": str(corpus)}))
    yield folder
    shutil.rmtree(temporary)


@pytest.fixture
def head():
    """A Ray head on the loopback interface: (its process, its address, how to reach it)."""
    directory = Path(tempfile.mkdtemp(prefix="h-", dir="/tmp"))
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text("1" * 64)
    address = free_address()
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    options = f"--head --block --node-ip-address=127.0.0.1 --port={address[10:]} --num-cpus=2"
    options += " --object-store-memory=100000000 --include-dashboard=false"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()]
    process = subprocess.Popen(
        [*command, f"--temp-dir={directory}/r"],
        env=os.environ | access | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    assert process.poll() is None
    yield psutil.Process(process.pid), address, access
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.kill()
    process.communicate()
    shutil.rmtree(directory)


def start(folder: Path, out: str, *options: str, more: dict | None = None) -> subprocess.Popen:
    pairs = zip(OPTIONS[::2], OPTIONS[1::2], strict=True)
    usual = [word for pair in pairs if pair[0] not in options for word in pair]
    env = environment(TORSION_CACHE=str(folder / "cache"))
    # Nobody answers there: what a run sends to itself goes past proxies.
    env |= dict.fromkeys(("http_proxy", "HTTPS_PROXY", "grpc_proxy"), "http://127.0.0.1:9")
    env |= {"TMPDIR": str((folder / "t").resolve())} | (more or {})
    return subprocess.Popen(
        [*TORSION, "pod", "run.gin", *usual, "--out", out, *options],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class Watched:
    """A pod's processes and the addresses they listen on, seen while it runs."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.seen, self.listening = process, {}, set()

    def look(self) -> None:
        keeper = psutil.Process(self.process.pid)
        for child in keeper.children(recursive=True):
            self.seen[child.pid] = child
            try:
                for connection in child.net_connections():
                    if connection.status == psutil.CONN_LISTEN:
                        self.listening.add(connection.laddr.ip)
            except psutil.Error:
                pass

    def left(self) -> list[psutil.Process]:
        """Of the processes seen, those that are still there."""
        found = []
        for process in self.seen.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                pass
        return found

    def until(self, folder: Path, out: str, step: int) -> None:
        """Watches until the pod's metrics reach a step, or it ends."""
        file, deadline = folder / out / "metrics.jsonl", time.monotonic() + 240
        looked = 0.0
        while not file.exists() or file.read_text().count("\n") < step:
            if self.process.poll() is not None:
                break
            assert time.monotonic() < deadline
            if time.monotonic() - looked > 1:  # it takes as much of a processor as a trainer
                self.look()
                looked = time.monotonic()
            time.sleep(0.1)


def rows(folder: Path, out: str) -> list[tuple]:
    """(step, loss, gradient norm) of each row, in the order of the file."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


@pytest.fixture(scope="module")
def undisturbed(folder):
    process = start(folder, "quiet")
    watched = Watched(process)
    watched.until(folder, "quiet", STEPS)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output, rows(folder, "quiet"), watched


@pytest.mark.slow
def test_a_pod_trains_into_a_run_directory_and_leaves_nothing_else(folder, undisturbed):
    output, found, watched = undisturbed
    assert [row[0] for row in found] == list(range(1, STEPS + 1))
    assert found[-1][1] < 0.9 * found[0][1]
    for name in ("config.gin", "checkpoints", "tensorboard", "checkpoints/run.json"):
        assert (folder / "quiet" / name).exists()
    assert "goodput" in output
    assert "processes (grpc_proxy, http_proxy, HTTPS_PROXY set: own addresses go past" in output
    assert "Traceback" not in output
    assert len(watched.seen) > 6  # Ray's, the agents and the trainers
    assert watched.listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert watched.listening
    assert watched.left() == []
    assert list((folder / "t").iterdir()) == []


@pytest.mark.slow
def test_whatever_fails_the_losses_are_those_of_a_quiet_run(folder, undisturbed):
    faults = ["process:1@step:6", "host:0@step:10", "hang:1@step:14", "sigterm:0@step:18"]
    faults += ["manager@step:26", "ocs:x,0,0@step:27", "block:0@step:28", "driver@step:32"]
    options = [option for fault in faults for option in ("--fail", fault)]
    process = start(folder, "disturbed", *options, "--hang-after", "8")
    watched = Watched(process)
    watched.until(folder, "disturbed", STEPS)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert rows(folder, "disturbed") == undisturbed[1]
    events = read_events(folder / "disturbed" / "pod" / "events.jsonl")
    assert [e.fault for e in events if isinstance(e, FaultMade)] == faults
    attempts = [e.attempt for e in events if isinstance(e, AttemptBegun)]
    assert attempts == list(range(1, len(attempts) + 1))
    assert len(attempts) >= 7
    for said in (
        "process 1 (host 1) was killed by SIGKILL",
        "lost process 0 (host 0)",
        "process 1 (host 1) gave no sign of life",
        "given notice",
        "the pod manager died and is back",
        "the slice does not pass it",
        "the driver was killed by SIGKILL; another goes on",
    ):
        assert said in output, said
    made, found = {}, {}
    for event in events:
        if isinstance(event, FaultMade):
            last = event.fault.split("@")[0]
            made[last] = event.time
        elif isinstance(event, AttemptFailed):
            found.setdefault(last, event.time - made[last])
    assert found["process:1"] < 5
    assert found["host:0"] < 5
    assert found["hang:1"] < 8 + 5
    assert (folder / "disturbed" / "pod" / "timeline.html").read_text().count("<rect") > 20
    assert watched.left() == []
    assert list((folder / "t").iterdir()) == []


@pytest.mark.slow
def test_a_pod_that_went_on_smaller_grows_back_when_its_block_is_repaired(folder):
    options = ["--slice", "4x4x8", "--hosts-per-process", "32", "--mesh", "data=-1,fsdp=4"]
    options += ["--gin", "text.TextData.batch_size = 128", "--steps", "10"]
    lost = ["--blocks", "2", "--elastic", "--fail", "block:1@step:4", "--repair", "block:1@step:6"]
    output, _ = (process := start(folder, "grown", *options, *lost)).communicate(timeout=400)
    assert process.returncode == 0, output
    events = read_events(folder / "grown" / "pod" / "events.jsonl")
    attempts = [event for event in events if isinstance(event, AttemptBegun)]
    assert [event.slice for event in attempts] == ["4x4x8", "4x4x4", "4x4x8"]
    assert [event.blocks for event in attempts] == [(0, 1), (0,), (0, 1)]
    [repaired] = [event for event in events if isinstance(event, RepairMade)]
    assert repaired.text == "block:1 is back: 1 blocks are free"
    [outgrown] = [event for event in events if isinstance(event, AttemptOutgrown)]
    assert outgrown.attempt == 2
    assert "1 failures" in output  # growing is none
    page = (folder / "grown" / "pod" / "timeline.html").read_text()
    assert page.index(">1 4x4x8<") < page.index(">2 4x4x4<") < page.index(">3 4x4x8<")
    # No step is computed twice for growing, and a quiet run on one device has the same losses.
    steps = [row[0] for row in rows(folder, "grown")]
    assert steps == list(range(1, 11))
    alone = [*TORSION, "train", "run.gin", *options[6:], "--out", "alone"]
    env = environment(TORSION_CACHE=str(folder / "cache"))
    subprocess.run(alone, cwd=folder, env=env, check=True, capture_output=True, timeout=200)
    for mine, other in zip(rows(folder, "grown"), rows(folder, "alone"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_interrupted_on_a_cluster_it_saves_and_killed_it_goes_on(folder, undisturbed, head):
    ray, address, access = head
    process = start(folder, "stopped", "--address", address, more=access)
    watched = Watched(process)
    watched.until(folder, "stopped", 2)
    ours = [p for p in ray.children(recursive=True) if "ray::Agent" in p.name()]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    saved = rows(folder, "stopped")
    assert saved == undisturbed[1][: len(saved)]
    assert len(saved) < STEPS
    assert (folder / "stopped" / "checkpoints" / str(len(saved))).is_dir()
    assert watched.left() == []
    psutil.wait_procs(ours, timeout=20)
    names = {p.name() for p in ray.children(recursive=True)}
    assert len(ours) >= 2
    assert not {name for name in names if name.startswith(("ray::Agent", "ray::Manager"))}
    assert not {p for p in ray.children(recursive=True) if "launch.pod" in " ".join(p.cmdline())}

    process = start(folder, "stopped")
    watched = Watched(process)
    watched.until(folder, "stopped", len(saved) + 3)
    watched.look()
    children = psutil.Process(process.pid).children()
    [driver] = (child for child in children if "launch.pod.driver" in child.cmdline())
    process.send_signal(signal.SIGSTOP)
    driver.kill()
    process.kill()  # both at once: nobody is left to clear up but the reaper
    process.wait()
    end = time.monotonic() + 30  # Ray's helpers would take a minute
    while watched.left() and time.monotonic() < end:
        time.sleep(0.1)
    assert watched.left() == []
    assert list((folder / "t").iterdir()) == []

    process = start(folder, "stopped")
    watched = Watched(process)
    watched.until(folder, "stopped", len(saved) + 6)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert watched.left() == []
    assert rows(folder, "stopped") == undisturbed[1][: len(rows(folder, "stopped"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--slice", "4x4x4"], "4x4x4"),
        (["--slice", "3x3x3"], "--slice 3x3x3"),
        (["--pod", "v5e"], "TPU v5e: is not made of blocks"),
        (["--address", "127.0.0.1:1"], "nobody answers"),
        ([*HUGE, "--hosts-per-process", "1"], "GiB are free"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_process(folder, options, says):
    process = start(folder, "mistake", *options)
    watched = Watched(process)
    while process.poll() is None:
        watched.look()
        time.sleep(0.05)
    output, _ = process.communicate()
    assert process.returncode == 2, output
    [line] = output.strip().splitlines()
    assert line.startswith("torsion: ")
    assert says in line
    assert watched.left() == []
