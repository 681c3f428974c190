"""Steps compiled for slices that are not there, each in a time-limited subprocess, and kept.

JAX's own cache cannot read what a compiler without a TPU wrote, so programs are kept as text, by
the hash of what was lowered, the slice, the options and the versions of JAX and libtpu. What asks
for a program is hashed too, with the sources that lower it, so that asking again starts nothing.
"""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pjit_train.compiler.target import Target, environment
from pjit_train.data.cache import default_cache_dir
from pjit_train.errors import UserError

INSTALL = "pip install 'torsion[plan]'"
CHILD = ["-m", "pjit_train.compiler.child"]
_ROOT = Path(__file__).parents[2]


class CompilerError(UserError):
    """Reason why there is no program."""


class DoesNotFit(CompilerError):
    """A program that needs more memory than a chip has.

    Attributes:
      needed, limit: bytes, as the compiler says them; None where it does not.
    """

    def __init__(self, message: str, needed: int | None, limit: int | None):
        super().__init__(message)
        self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A step to compile.

    Attributes:
      function: "module:function", called as function(devices, **arguments) in the subprocess; it
        gives a `jax.stages.Lowered`.
      arguments: JSON values.
      options: compiler options.
    """

    target: Target
    function: str
    arguments: dict[str, Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A scheduled program for one chip.

    Attributes:
      text: HLO.
      peak_bytes: of a chip's memory, the arguments included.
      partitions: [slice, x, y, z] of the chip that runs each partition.
      seconds: that the compiler took.
      cached: whether it did so earlier.
    """

    text: str
    peak_bytes: int
    partitions: list[list[int]]
    seconds: float
    cached: bool


def libtpu_version() -> str:
    """The version of libtpu. CompilerError where there is none."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise CompilerError(
            f"libtpu, Google's compiler for TPU, is not installed; {INSTALL} "
            "(Linux on x86-64; it needs no TPU), or give a compiled program with --hlo"
        ) from None


def compile_job(
    job: Job,
    *,
    seconds: float = 1500,
    cache: Path | None = None,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Compiled:
    """Compiles a step, or takes it from the cache.

    Args:
      seconds: after which the compiler is ended.
      cache: a folder; by default Torsion's.
      progress: called about once a second with the seconds gone by.

    Raises:
      DoesNotFit: it needs more memory than a chip has.
      CompilerError: there is no libtpu, it does not take the slice or an option, or time is up.
    """
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    versions["libtpu"] = libtpu_version()
    cache = cache or default_cache_dir() / "plan"
    described = {
        "topology": job.target.topology,
        "keywords": job.target.keywords,
        "options": job.options,
        "function": job.function,
        "arguments": job.arguments,
        "versions": versions,
    }
    asked = _digest(described | {"sources": _sources()})
    request = cache / "requests" / f"{asked}.json"
    if request.is_file():
        answer = json.loads(request.read_text())
        if "fits" in answer:
            raise DoesNotFit(**answer["fits"])
        if (found := _stored(cache, answer["hash"])) is not None:
            return found
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "programs").mkdir(exist_ok=True)
    (cache / "requests").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="job-") as folder:
        try:
            digest, cached = _run(
                Path(folder), described | {"cache": str(cache)}, seconds, progress
            )
        except DoesNotFit as error:
            fits = {"message": str(error), "needed": error.needed, "limit": error.limit}
            _write(request, {"fits": fits})
            raise
        home = cache / "programs" / digest
        if not cached and not home.exists():
            made = Path(tempfile.mkdtemp(dir=cache, prefix="program-"))
            for name in ("program.txt.gz", "memory.json"):
                shutil.move(str(Path(folder) / name), made / name)
            made.rename(home)
    _write(request, {"hash": digest})
    found = _stored(cache, digest)
    if found is None:
        raise CompilerError(f"{cache / 'programs' / digest}: is damaged; delete it")
    return dataclasses.replace(found, cached=cached)


def _run(folder: Path, job: dict, seconds: float, progress) -> tuple[str, bool]:
    """Runs the subprocess; (hash of the program, whether it was in the cache)."""
    file = folder / "job.json"
    _write(file, job)
    paths = [str(_ROOT), *filter(None, sys.path)]
    settings = environment() | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    log = folder / "log"
    command = [sys.executable, *CHILD, str(file)]
    began = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdin=subprocess.PIPE,  # which ends where this process does, and the child with it
            stdout=out,
            stderr=out,
            cwd=folder,
        )
        try:
            while child.poll() is None:
                gone = time.monotonic() - began
                if gone > seconds:
                    raise CompilerError(
                        f"the compiler took longer than {seconds:.0f} s; give it more with "
                        "--time-limit, or plan a program with fewer kinds of layers"
                    )
                progress(gone)
                try:
                    child.wait(min(1.0, seconds))
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            assert child.stdin is not None
            child.stdin.close()
    if child.returncode == 0:
        answer = json.loads((folder / "lowered.json").read_text())
        return answer["hash"], not (folder / "memory.json").exists()
    raise _explained(log.read_text(errors="replace"), job, child.returncode)


def _explained(log: str, job: dict, code: int) -> CompilerError:
    """The one line that says why the subprocess failed."""
    number = r"([\d.]+)([KMGT]?)"
    fits = re.search(
        rf"[Uu]sed {number} of {number} hbm|required[^(]*\({number}\)[^(]*\({number}\)", log
    )
    if fits:
        parts = [x for x in fits.groups() if x is not None]
        needed, limit = (_bytes(*parts[:2]), _bytes(*parts[2:]))
        over = (needed - limit) / 2**30
        return DoesNotFit(
            f"the step does not fit: it needs {needed / 2**30:.2f} GiB on each chip of "
            f"{job['topology']}, {over:.2f} GiB more than there are",
            needed,
            limit,
        )
    if re.search(r"RESOURCE_EXHAUSTED|out of memory", log, re.IGNORECASE):
        return DoesNotFit(f"the step does not fit a chip of {job['topology']}", None, None)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [x for x in lines if re.match(r"[\w.]*(Error|Exception|NotModelled)\b.*:", x)]
    option = re.search(r"No such compile option: '([^']*)'", log)
    if option:
        return CompilerError(f"the compiler knows no option {option[1]}; leave it out")
    if code < 0 or not errors:
        last = next((x for x in lines if re.match(r"F\d{4}|Check fail|Fatal", x)), lines[-1:] or "")
        return CompilerError(
            f"the compiler ended its process on {job['topology']} ({code}): {str(last)[:300]}"
        )
    return CompilerError(f"{job['topology']}: {errors[-1][:600]}")


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _stored(cache: Path, digest: str) -> Compiled | None:
    home = cache / "programs" / digest
    try:
        memory = json.loads((home / "memory.json").read_text())
        with gzip.open(home / "program.txt.gz", "rt") as file:
            text = file.read()
    except (OSError, ValueError, EOFError):
        return None
    return Compiled(
        text=text,
        peak_bytes=memory["peak_memory_in_bytes"],
        partitions=memory["partitions"],
        seconds=memory["compile_seconds"],
        cached=True,
    )


@functools.cache
def _sources() -> str:
    """A hash of the sources that a step is lowered from."""
    found = hashlib.sha256()
    for package in ("pjit_train", "sparsity", "launch"):
        for path in sorted((_ROOT / package).glob("**/*.py")):
            if "reports" not in path.parts and "commands" not in path.parts:
                found.update(path.read_bytes())
    return found.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(value))
    part.replace(path)
