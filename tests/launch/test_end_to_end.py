"""The real command in processes of its own: killed, stopped, resumed, moved to another mesh."""

import fcntl
import json
import os
import random
import signal
import subprocess
import tempfile
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.gin_files import tiny
from helpers.processes import TORSION, environment

from pjit_train import signals

STEPS = 40
CONFIG = {
    "run.Run.steps": STEPS,
    "run.Run.log_every": 1,
    "run.Run.eval_every": 10,
    "run.Run.eval_batches": 2,
    "run.Samples.tokens": 8,
    "transformer.TransformerConfig.max_len": 64,
    "transformer.TransformerConfig.d_model": 32,
    "transformer.TransformerConfig.num_layers": 2,
    "transformer.TransformerConfig.num_heads": 4,
    "transformer.TransformerConfig.num_kv_heads": 2,
    "transformer.TransformerConfig.d_ff": 64,
    "checkpoint.CheckpointConfig.every_steps": 3,
    "optimizers.AdamW.learning_rate": 1e-2,
    "optimizers.Schedule.warmup_steps": 4,
    "text.TextData.seq_len": 32,
}
# What a step computes; the other figures are times.
COMPUTED = ("loss", "grad_norm", "learning_rate", "val_loss", "val_bits_per_byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=8000)
    corpus = folder / "corpus.txt"
    corpus.write_text(" ".join(words))
    (folder / "run.gin").write_text(tiny(CONFIG | {"sources.TextFiles.train": str(corpus)}))
    return folder


def start(folder: Path, out: str, *options: str, **of_process) -> subprocess.Popen:
    """`torsion train run.gin --out OUT` as its own process."""
    command = [*TORSION, "train", "run.gin", "--out", out, *options]
    env = environment(TORSION_CACHE=str(folder / "cache"))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **(streams | of_process))


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def rows(folder: Path, out: str) -> dict[int, dict]:
    """The computed figures of each step; checks that a step stands once."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    read = [json.loads(line) for line in lines]
    steps = [row["step"] for row in read]
    assert len(set(steps)) == len(steps)
    return {row["step"]: {k: row[k] for k in COMPUTED if k in row} for row in read}


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The output and the figures of a run that nothing disturbed."""
    output = finish(start(folder, "undisturbed"))
    return output, rows(folder, "undisturbed")


def until_step(folder: Path, out: str, step: int, process: subprocess.Popen) -> None:
    """Waits until the metrics of the running process reach a step."""
    metrics = folder / out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_a_run_trains_validates_samples_and_says_so(undisturbed):
    output, figures = undisturbed
    assert sorted(figures) == list(range(1, STEPS + 1))
    assert figures[STEPS]["loss"] < 0.6 * figures[1]["loss"]
    assert [s for s in figures if "val_loss" in figures[s]] == [10, 20, 30, 40]
    for said in ("parameters", "first step", "validation after step 10", "sample after step 40"):
        assert said in output
    assert f"done: {STEPS} steps" in output
    assert "Traceback" not in output
    assert "Warning" not in output


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_bit_for_bit(folder, undisturbed):
    """SIGKILL at moments that fall between steps, in steps and in saves, again and again."""
    moments = random.Random(1)
    for kill in (2, 11, 22):
        process = start(folder, "killed")
        resumed_rows = len(rows(folder, "killed")) if kill > 2 else 0
        until_step(folder, "killed", max(kill, resumed_rows - 3), process)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
    output = finish(start(folder, "killed"))
    assert "resuming after step" in output
    assert rows(folder, "killed") == undisturbed[1]


@pytest.mark.slow
# SIGHUP is in the test of the terminal, below.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_saves_exits_cleanly_and_says_how_to_resume(folder, undisturbed, number):
    out = f"stopped{number}"
    process = start(folder, out)
    until_step(folder, out, 5, process)
    process.send_signal(number)
    process.send_signal(number)  # as a terminal and a program that passes it on do
    output = finish(process)
    [said] = [line for line in output.splitlines() if line.startswith("stopped after step")]
    assert "the same command resumes" in said
    step = int(said.split()[3].rstrip(";"))
    assert (folder / out / "checkpoints" / str(step)).is_dir()
    assert f"resuming after step {step}" in finish(start(folder, out))
    assert rows(folder, out) == undisturbed[1]


COMMANDS = (
    "train run.gin --out ended",
    "train run.gin --out undisturbed --steps 4000",
    "eval undisturbed",
    "sample undisturbed --tokens 50",
    "export undisturbed exported",
    "compress undisturbed --out compressed",
    "study pod --out studied",
    "study recipes --out trained",
    "slice 8x16x16_twisted --draw drawn",
    "fabric --slices 4x4x8,8x8x8 --draw drawn",
    "dataflow BERT --draw drawn.png",
    "tokenizer corpus.txt --vocab-size 400 --out tokenizer.json",
    "pod run.gin --slice 2x2x1 --out ended-pod",
)


def test_a_signal_in_a_commands_last_moments_is_not_the_kernels():
    """After its line of a mistake it ends with 2, or is told to end; nothing kills it."""
    codes = set()
    for case in range(6):
        command = [*TORSION, "slice", "4x4x5"]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        assert process.stderr.readline().startswith("torsion: slice 4x4x5")
        time.sleep(0.003 * case)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        codes.add(process.returncode)
    assert codes <= {2, 130}


@pytest.mark.slow
def test_any_command_ends_at_once_at_any_moment_of_its_start(folder, undisturbed, monkeypatch):
    """With one line, the signal's exit code, and nothing that is half-written."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORSION_CACHE", str(folder / "ended-cache"))
    monkeypatch.setenv("TMPDIR", str(Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    moments, numbers = random.Random(2), signals.NUMBERS

    def end(case: int) -> tuple[str, int, int, str]:
        command, number = COMMANDS[case // 2], numbers[case % len(numbers)]
        process = subprocess.Popen(
            [*TORSION, *command.split()],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_hangups,
        )
        while process.poll() is None and not takes_signals(process.pid):
            time.sleep(0.001)
        time.sleep(delays[case])
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return command, number, process.returncode, said

    def hear_hangups():
        """Undoes nohup, under which the tests may run: a command does not end by SIGHUP then."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def takes_signals(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGHUP - 1) & 1)

    delays = [moments.uniform(0, 2.5) for _ in range(2 * len(COMMANDS))]
    with ThreadPoolExecutor(2) as pool:  # one command after the other in one directory
        pairs = list(pool.map(lambda c: (end(2 * c), end(2 * c + 1)), range(len(COMMANDS))))
    found = [one for pair in pairs for one in pair]
    for command, number, code, said in found:
        if code != 0:  # it was done before
            text = {2: "interrupted", 15: "terminated", 1: "hung up"}[number]
            assert code == 128 + number, (command, said)
            assert said.endswith(f"torsion: {text}\n"), (command, said)  # a study says what it does
            assert "Traceback" not in said, (command, said)
    assert sum(code != 0 for *_, code, _ in found) > len(found) // 2
    assert os.listdir(os.environ["TMPDIR"]) == []
    os.rmdir(os.environ["TMPDIR"])
    left = {p for p in folder.rglob("*") if p.is_file()} - set(before)
    half = (".saving", ".tmp", ".new", ".gone", "-tmp")
    assert not [p for p in left if any(mark in str(p) for mark in half) or p.suffix.isdecimal()]
    assert not (folder / "compressed").exists()
    begun = ("config.gin", "run.json")  # written at the start of every training
    assert {p: p.stat().st_mtime_ns for p in before if p.name not in begun} == {
        p: t for p, t in before.items() if p.name not in begun
    }


@pytest.mark.slow
def test_when_its_terminal_is_gone_it_saves(folder, undisturbed):
    """As where ssh drops: the kernel sends SIGHUP, and to write there is an error from then on."""
    ours, its = os.openpty()

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": its, "stdout": its, "stderr": its}
    process = start(folder, "dropped", start_new_session=True, preexec_fn=take_terminal, **streams)
    ssh = subprocess.Popen(["cat"], stdin=ours, stdout=subprocess.DEVNULL)
    os.close(ours)
    os.close(its)
    until_step(folder, "dropped", 5, process)
    ssh.kill()
    ssh.wait()
    assert process.wait(timeout=60) == 0
    steps = max(rows(folder, "dropped"))
    assert 5 <= steps < STEPS
    assert (folder / "dropped" / "checkpoints" / str(steps)).is_dir()
    finish(start(folder, "dropped"))
    assert rows(folder, "dropped") == undisturbed[1]


@pytest.mark.slow
def test_a_run_moves_to_another_mesh(folder, undisturbed):
    process = start(folder, "moved")
    until_step(folder, "moved", 12, process)
    process.terminate()
    finish(process)
    options = ("--devices", "8", "--mesh", "fsdp=2,sequence=2,tensor=2")
    assert "fsdp 2 x sequence 2 x tensor 2" in finish(start(folder, "moved", *options))
    for step, want in undisturbed[1].items():
        got = rows(folder, "moved")[step]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5), step


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used(folder, undisturbed):
    process = start(folder, "broken")
    until_step(folder, "broken", 12, process)
    process.terminate()
    finish(process)
    newest = max((folder / "broken/checkpoints").glob("[0-9]*"), key=lambda p: p.name.zfill(9))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    output = finish(start(folder, "broken"))
    warnings = [line for line in output.splitlines() if "is broken" in line]
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert rows(folder, "broken") == undisturbed[1]
