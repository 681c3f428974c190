"""Pods in which processes, hosts, switches and managers fail, also at once and at bad moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import campaign_runs as runs
import psutil

from launch.pod.events import AttemptFailed, FaultMade, Save, Step
from launch.pod.record import read_events

OPTIONS = [
    "--slice",
    "2x2x4",
    "--hosts-per-process",
    "2",
    "--mesh",
    "data=4,fsdp=4",
    "--hang-after",
    "15",
]
STEPS = 240
CHAOS = "process=0.03,host=0.025,hang=0.006,sigterm=0.012,block=0.012,ocs=0.012,manager=0.012"


def start(folder: Path, out: str, *options: str) -> subprocess.Popen:
    code = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    settings = ["--gin", f"run.Run.steps = {STEPS}", "--gin", "run.Run.eval_every = 0"]
    settings += ["--gin", "run.Samples.tokens = 0", "--gin", "text.TextData.batch_size = 16"]
    temporary = folder / "t"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code, "pod", "run.gin", *OPTIONS, *settings, "--out", out, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(out: Path) -> list[tuple]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]


class Disturber(threading.Thread):
    """Makes what `--fail` cannot say, from outside, by the events that the pod records.

    After a failure: another kill while the pod recovers. Within a save: a kill. And one process
    that is stopped for half of each second.
    """

    def __init__(self, process: subprocess.Popen, events: Path, rng: random.Random):
        super().__init__(daemon=True)
        self.process, self.events, self.rng = process, events, rng
        self.done = threading.Event()
        self.made = {"in a recovery": 0, "in a save": 0, "two at once": 0, "slow host": 0}

    def run(self) -> None:
        read, since = 0, time.monotonic()
        while not self.done.wait(0.05):
            if not self.events.exists():
                continue
            events = read_events(self.events)
            for event in events[read:]:
                read += 1
                if isinstance(event, AttemptFailed) and self.rng.random() < 0.25:
                    time.sleep(self.rng.uniform(0, 5))
                    self._kill("in a recovery", 1)
                elif isinstance(event, Save) and self.rng.random() < 0.05:
                    time.sleep(self.rng.uniform(0, 0.1))
                    self._kill("in a save", 1)
                elif isinstance(event, Step) and self.rng.random() < 0.01:
                    self._kill("two at once", 2)
            if time.monotonic() - since > 40 and self.rng.random() < 0.02:
                since = time.monotonic()
                self._slow()

    def trainers(self) -> list[psutil.Process]:
        found = []
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                if "launch.pod.trainer" in " ".join(child.cmdline()):
                    found.append(child)
        except psutil.Error:
            pass
        return found

    def _kill(self, what: str, count: int) -> None:
        there = self.trainers()
        if len(there) < count:
            return
        for victim in self.rng.sample(there, count):
            try:
                victim.kill()
            except psutil.Error:
                continue
        self.made[what] += 1

    def _slow(self) -> None:
        there = self.trainers()
        if not there:
            return
        victim = self.rng.choice(there)
        for _ in range(10):
            try:
                victim.suspend()
                time.sleep(0.5)
                victim.resume()
                time.sleep(0.5)
            except psutil.Error:
                break
        self.made["slow host"] += 1


def pods(report, folder: Path, cases: int, seed: int) -> None:
    """Pods with random failures until there were so many; all lose nothing and leave nothing."""
    runs.make_folder(folder)
    quiet = start(folder, "quiet")
    output, _ = quiet.communicate(timeout=900)
    assert quiet.returncode == 0, output
    reference = rows(folder / "quiet")
    number = seed
    while report.cases < cases:
        out = folder / f"chaos-{number}"
        began = time.monotonic()
        process = start(folder, out.name, "--chaos", CHAOS, "--chaos-seed", str(number))
        disturber = Disturber(process, out / "pod" / "events.jsonl", random.Random(number))
        disturber.start()
        try:
            output, _ = process.communicate(timeout=3000)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            report.failure(f"seed {number}: not done after 3000 s")
            break
        finally:
            disturber.done.set()
        faults = [
            event.fault.split("@")[0].split(":")[0]
            for event in read_events(out / "pod" / "events.jsonl")
            if isinstance(event, FaultMade)
        ]
        for kind in faults:
            report.count(kind)
        for what, count in disturber.made.items():
            for _ in range(count):
                report.count(what)
        report.cases += len(faults) + sum(disturber.made.values())
        if process.returncode or "Traceback" in output:
            report.failure(f"seed {number}: exit {process.returncode}: {output[-1500:]}")
        elif rows(out) != reference:
            report.failure(f"seed {number}: other losses than the quiet pod")
        time.sleep(2)
        left = list((folder / "t").iterdir())
        if left:
            report.failure(f"seed {number}: left {left}")
        print(
            f"seed {number}: {len(faults)} + {disturber.made}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
        shutil.rmtree(out, ignore_errors=True)
        number += 1
