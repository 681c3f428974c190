"""Runs that are killed, whose disk fills up or turns read-only, whose clock jumps; then resumed."""

import contextlib
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import campaign_runs as runs


class Report:
    """Counts cases and keeps what went wrong, each with what repeats it."""

    def __init__(self):
        self.cases, self.notes, self.wrong = 0, {}, []

    def count(self, note: str) -> None:
        self.notes[note] = self.notes.get(note, 0) + 1

    def failure(self, what: str) -> None:
        self.wrong.append(what)
        print("WRONG", what, flush=True)


def undisturbed(folder: Path, kind: str) -> tuple[dict, float]:
    """What a run computes that nothing disturbs, and the seconds it takes with all compiled."""
    for out in ("first", "second"):
        began = time.monotonic()
        process = runs.start(folder, kind, f"{kind}-{out}")
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    first, second = (runs.computed(folder / f"{kind}-{out}") for out in ("first", "second"))
    assert first == second
    return first, time.monotonic() - began


def disturbed(report, folder, kind, out: Path, disturb, rng, seconds, limit=300) -> bool:
    """Starts a run, disturbs it at a random moment, and checks how it ended; True once it is done.

    Args:
      disturb: called with the process at the moment; says what it did, None where it came too late.
    """
    before = runs.saved(out)
    process = runs.start(folder, kind, out)
    moment = rng.uniform(0, seconds)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    did = disturb(process) if process.poll() is None else None
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        report.failure(f"{kind} {out.name}: hung {moment:.2f} s after the start ({did})")
        return False
    where = f"{kind} {out.name}, {did} after {moment:.3f} s"
    resumed = re.search(r"resuming after step (\d+)", output)
    if before and resumed and int(resumed[1]) != before[-1]:
        report.failure(f"{where}: resumed after {resumed[1]}, saved was {before[-1]}")
    if "Traceback" in output:
        report.failure(f"{where}: traceback: {output[-600:]}")
    if did is not None:
        report.cases += 1
    if process.returncode == 0 and f"done: {runs.STEPS} steps" in output:
        return True
    if process.returncode == 0 and "a larger --steps goes on" in output:
        return True
    if process.returncode not in (-9, 1, 2) or (process.returncode != -9 and did is None):
        report.failure(f"{where}: exit {process.returncode}: {output[-600:]}")
    elif process.returncode > 0:
        last = output.strip().splitlines()[-1]
        report.count(f"exit {process.returncode}: {re.sub(r'[0-9]+|/[^ ]+', 'N', last)[:90]}")
    return False


def check(report: Report, kind: str, out: Path, reference: dict) -> None:
    """Compares what a run computed in the end with what an undisturbed one did, to the last bit."""
    try:
        same = runs.computed(out) == reference
    except (AssertionError, OSError, ValueError, KeyError) as error:
        report.failure(f"{kind} {out.name}: {type(error).__name__} {error}")
        return
    if not same:
        report.failure(f"{kind} {out.name}: other bits than an undisturbed run")


def kills(report: Report, folder: Path, kind: str, cases: int, seed: int) -> None:
    """SIGKILL at uniformly random moments from the start of a process to the end of its run."""
    reference, seconds = undisturbed(folder, kind)
    rng, number, first = random.Random(f"{kind} {seed}"), 0, report.cases

    def kill(process):
        process.kill()
        return "killed"

    while report.cases - first < cases:
        out = folder / f"{kind}-killed-{number}"
        while not disturbed(report, folder, kind, out, kill, rng, seconds):
            pass
        check(report, kind, out, reference)
        shutil.rmtree(out)
        number += 1
    report.count(f"{kind}: {number} runs")


def full_disks(report: Report, folder: Path, kind: str, cases: int, seed: int) -> None:
    """A disk of 12 MiB that something else fills at a random moment, and leaves after a while."""
    reference, seconds = undisturbed(folder, kind)
    rng, number, first = random.Random(f"{kind} {seed}"), 0, report.cases
    with mounted("-t", "tmpfs", "-o", "size=12m", "none") as disk:
        filler = disk / "filler"

        def fill(process):
            left = rng.choice([0, 0, rng.randrange(1 << 18)])
            free = shutil.disk_usage(disk).free
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(max(free - left, 0)))
            threading.Timer(rng.uniform(0.5, 6), lambda: filler.unlink(missing_ok=True)).start()
            return f"disk full but for {left} bytes"

        while report.cases - first < cases:
            out = disk / f"{kind}-{number}"
            while not disturbed(report, folder, kind, out, fill, rng, seconds):
                filler.unlink(missing_ok=True)
            check(report, kind, out, reference)
            shutil.rmtree(out)
            number += 1


def read_only(report: Report, folder: Path, kind: str, cases: int, seed: int) -> None:
    """A file system (ext4) that meets an error at a random moment and makes itself read-only."""
    reference, seconds = undisturbed(folder, kind)
    rng, number, first = random.Random(f"{kind} {seed}"), 0, report.cases
    image = folder / "disk.img"
    while report.cases - first < cases:
        image.write_bytes(bytes(48 << 20))
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        done = False
        while not done:
            with mounted("-o", "loop,errors=remount-ro", str(image)) as disk:
                source = subprocess.check_output(["findmnt", "-n", "-o", "SOURCE", disk], text=True)
                trigger = Path("/sys/fs/ext4") / Path(source.strip()).name / "trigger_fs_error"

                def fail(process, trigger=trigger):
                    trigger.write_text("torsion's campaign")
                    return "read-only"

                out = disk / f"{kind}-{number}"
                done = disturbed(report, folder, kind, out, fail, rng, seconds)
                if done:
                    check(report, kind, out, reference)
            subprocess.run(
                ["e2fsck", "-y", image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        number += 1


def clocks(report: Report, folder: Path, kind: str, cases: int, seed: int) -> None:
    """The system's clock jumps back an hour at a random moment (libfaketime stands for it)."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    assert libraries, "apt-get install faketime"
    reference, seconds = undisturbed(folder, kind)
    rng = random.Random(f"{kind} {seed}")
    shift = folder / "shift"
    for number in range(cases):
        shift.write_text("+0")
        out = folder / f"{kind}-clock-{number}"
        process = runs.start(
            folder, kind, out,
            LD_PRELOAD=str(libraries[0]), FAKETIME_TIMESTAMP_FILE=str(shift),
            FAKETIME_NO_CACHE="1", DONT_FAKE_MONOTONIC="1",
        )  # fmt: skip
        time.sleep(rng.uniform(0, seconds))
        shift.write_text("-3600")
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            report.failure(f"{kind} clock {number}: hung")
            continue
        if process.returncode:
            report.failure(f"{kind} clock {number}: exit {process.returncode}: {output[-500:]}")
        else:
            check(report, kind, out, reference)
        report.cases += 1
        shutil.rmtree(out)


@contextlib.contextmanager
def mounted(*options: str) -> Iterator[Path]:
    """A file system of its own, for root."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield folder
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()
