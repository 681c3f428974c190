"""Files of runs that are damaged: a bit flipped, an end cut off, a file removed or put for another.

Each case damages one file of a copy of a stopped run, of its token cache or of a folder exported
from it, and reads it as its user would: the run is resumed or evaluated, the folder is loaded.
Right is what was computed without damage, or one line that names what is wrong.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import time
from pathlib import Path

import campaign_runs as runs
import numpy as np

AREAS = ("checkpoints", "config.gin", "metrics.jsonl", "cache", "export")
WAYS = ("flip", "truncate", "remove", "swap")


def damage(files: list[Path], rng: random.Random) -> str | None:
    """Damages one of the files; says how, or None where this one cannot be damaged so."""
    file, way = rng.choice(files), rng.choice(WAYS)
    data = file.read_bytes()
    if way in ("flip", "truncate") and not data:
        return None
    match way:
        case "flip":
            at, bit = rng.randrange(len(data)), rng.randrange(8)
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            return f"{file.name}: bit {bit} of byte {at}"
        case "truncate":
            size = rng.randrange(len(data))
            file.write_bytes(data[:size])
            return f"{file.name}: cut to {size} of {len(data)}"
        case "remove":
            file.unlink()
            return f"{file.name}: removed"
    others = [other for other in files if other != file and other.read_bytes() != data]
    if not others:
        return None
    other = rng.choice(others)
    file.write_bytes(other.read_bytes())
    return f"{file.name}: replaced by {other.name}"


class Case:
    """A stopped run, its cache and its export, each time anew; and what they give undamaged."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.out, self.cache, self.export = (folder / name for name in ("case", "cache", "export"))
        process = runs.start(folder, kind, self.out, TORSION_CACHE=str(self.cache))
        metrics = self.out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < runs.STEPS // 2:
            time.sleep(0.005)
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        assert "stopped after step" in output, output
        os.environ["TORSION_CACHE"] = str(self.cache)
        os.chdir(folder)
        code, said = self.command("export", str(self.out), str(self.export))
        assert code == 0, said
        self.renew()
        code, said = self.train()
        assert code == 0, said
        self.resumed = runs.computed(self.out)
        self.renew()
        self.evaluated = self.command("eval", str(self.out), "--json")
        assert self.evaluated[0] == 0, self.evaluated
        self.loaded = self.load()
        self.renew()

    def renew(self) -> None:
        """Puts back what a case has damaged; the first time it keeps a copy."""
        for path in (self.out, self.cache, self.export):
            kept = path.with_name(path.name + ".kept")
            if not kept.exists():
                shutil.copytree(path, kept)
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(kept, path)

    def files(self, area: str) -> list[Path]:
        """The files of an area."""
        match area:
            case "checkpoints":
                folders = sorted((self.out / "checkpoints").glob("[0-9]*"))
                return [path for folder in folders for path in folder.rglob("*") if path.is_file()]
            case "config.gin":
                return [self.out / "config.gin", self.out / "checkpoints" / "run.json"]
            case "metrics.jsonl":
                return [self.out / "metrics.jsonl", self.out / "config.gin"]
            case "cache":
                return [path for path in self.cache.glob("tokens-*/*") if path.is_file()]
        return [path for path in self.export.iterdir() if path.is_file()]

    def command(self, *words: str) -> tuple[int, str]:
        from launch.cli import main

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(list(words))
        return code, out.getvalue()

    def train(self) -> tuple[int, str]:
        return self.command("train", "run.gin", *runs.KINDS[self.kind], "--out", str(self.out))

    def load(self):
        from pjit_train.huggingface import weights as huggingface

        return huggingface.load(self.export)[1]


def damages(report, folder: Path, kind: str, cases: int, seed: int) -> None:
    """Damages a file so many times, and judges what reading it comes to."""
    case, rng = Case(folder, kind), random.Random(f"{kind} {seed}")
    first = report.cases
    while report.cases - first < cases:
        area = rng.choice(AREAS)
        action = {"export": "load", "metrics.jsonl": "train"}.get(
            area, rng.choice(["train", "eval"])
        )
        what = damage(case.files(area), rng)
        if what is None:
            continue
        report.cases += 1
        where = f"{kind}, {area}, {what}, {action}"
        try:
            verdict = _judge(case, action)
        except Exception as error:
            verdict = f"WRONG {type(error).__name__}: {str(error)[:200]}"
        if verdict.startswith("WRONG"):
            report.failure(f"{where}: {verdict[6:]}")
        else:
            report.count(f"{area}: {verdict}")
        case.renew()


def _judge(case: Case, action: str) -> str:
    """ "harmless", "named", or "WRONG" and why."""
    from pjit_train.errors import UserError

    if action == "load":
        try:
            loaded = case.load()
        except UserError as error:
            return _named(case, str(error))
        same = _same(loaded, case.loaded)
        return "harmless" if same else "WRONG loaded other weights without a word"
    code, said = (
        case.train() if action == "train" else case.command("eval", str(case.out), "--json")
    )
    if "Traceback" in said:
        return f"WRONG traceback: {said[-300:]}"
    warned = [line for line in said.splitlines() if line.startswith("torsion: ")]
    if code:
        return _named(case, " ".join(warned)) if warned else f"WRONG exit {code}: {said[-300:]}"
    if action == "eval":
        same = said.splitlines()[-1:] == case.evaluated[1].splitlines()[-1:]
    else:
        computed = runs.computed(case.out, complete=False)
        same = computed == case.resumed
        if not same and computed["state"] != case.resumed["state"]:
            return "WRONG resumed to another state"
    if same:
        return "named, the same result" if warned else "harmless"
    return _named(case, " ".join(warned)) if warned else "WRONG another result without a word"


def _named(case: Case, text: str) -> str:
    known = (case.out.name, case.cache.name, case.export.name)
    return "named" if any(name in text for name in known) else f"WRONG names nothing: {text}"


def _same(a, b) -> bool:
    flat = [dict(_leaves(tree)) for tree in (a, b)]
    return flat[0].keys() == flat[1].keys() and all(
        np.array_equal(flat[0][name], flat[1][name]) for name in flat[0]
    )


def _leaves(tree, name=""):
    for key, value in tree.items():
        path = f"{name}/{key}"
        if isinstance(value, dict):
            yield from _leaves(value, path)
        else:
            yield path, np.asarray(value)
