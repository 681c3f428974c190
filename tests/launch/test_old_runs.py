"""Run directories of released commits: they evaluate, sample and resume as if by that commit.

`fixtures/runs_be2f83a.tar.xz` was made by commit be2f83a on two cores: runs of 20 steps that were
killed after step 13, with a checkpoint of step 12, of each kind; what that commit then printed for
`eval` and `sample`; and the rows of steps 13 to 20 that it went on to compute (KIND.later.jsonl).
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.processes import environment

KINDS = ("dense", "sparse", "packed", "quantized", "pruned")
ARCHIVE = Path(__file__).parents[1] / "fixtures" / "runs_be2f83a.tar.xz"
# The commands, one after another in one process of their own: of as many threads as that commit
# had, since XLA:CPU divides sums by their number.
COMMANDS = """
import contextlib, sys
from launch.cli import main
for kind in sys.argv[1:]:
    for name, command in (
        ("eval", ["eval", kind]),
        ("sample", ["sample", kind, "--prompt", "the ", "--tokens", "12"]),
        ("train", ["train", f"{kind}/config.gin", "--out", kind]),
    ):
        with open(f"{kind}.{name}.now", "w") as out, contextlib.redirect_stdout(out):
            assert main(command) == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The old runs, after today's commands."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    subprocess.run(
        [sys.executable, "-c", COMMANDS, *KINDS],
        cwd=folder,
        env=environment(PJRT_NPROC="2", JAX_DISABLE_MOST_OPTIMIZATIONS="0"),  # as it was then
        check=True,
    )
    return folder


# The archive was made on a processor of this vendor; others' sums differ in their last bits.
_CPUS = Path("/proc/cpuinfo")
_AS_THEN = _CPUS.is_file() and "AuthenticAMD" in _CPUS.read_text()


def rows(path):
    return {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_evaluates_and_samples_as_then(folder, kind):
    now = (folder / f"{kind}.eval.now").read_text().split()
    then = (folder / f"{kind}.eval.txt").read_text().split()
    for name in ("step", "val_loss", "val_bits_per_byte"):
        assert now[now.index(name) + 1] == then[then.index(name) + 1], name
    sample, then = (folder / f"{kind}.sample.{time}" for time in ("now", "txt"))
    assert sample.read_text() == then.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_resumes_bit_for_bit(folder, kind):
    assert "resuming after step 12" in (folder / f"{kind}.train.now").read_text()
    now, later = rows(folder / kind / "metrics.jsonl"), rows(folder / f"{kind}.later.jsonl")
    assert sorted(now) == list(range(1, 21))
    for step, row in later.items():
        for name, value in row.items():
            if name == "mask_flips" or name.startswith("sparsity/"):  # counted in integers since
                value = pytest.approx(value, rel=1e-6)
            elif not _AS_THEN:
                value = pytest.approx(value, rel=1e-4)
            assert now[step][name] == value, (step, name)
