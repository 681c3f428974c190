"""`torsion plan` and `torsion study plan` without libtpu: programs from files, mistakes."""

import json
import subprocess
import sys

import pytest
from helpers import programs

from launch import cli
from launch.plan import planned_run
from launch.reports import plan_study
from pjit_train.compiler import compile as compiling
from pjit_train.compiler.compile import Compiled, CompilerError, DoesNotFit, Job, compile_job
from pjit_train.compiler.target import Target, target_of
from topology.hardware import TPU_V4, TPU_V5E
from topology.torus.slices import Slice

HEADLINE = ["configs/base.gin", "configs/models/llama3_8b.gin"]
RECORD = {
    "chip": "v4",
    "chips": 64,
    "slice_topology": "4x4x4",
    "arch": {"L": 2, "D": 256, "H": 4, "K": 64, "F": 1024, "V": 512, "act": "relu"},
    "seq": 128,
    "batch_per_chip": 2,
    "mesh": {"ici_fsdp": 64},
    "remat": "full",
    "attention": "dense",
    "step_s_derived": 0.002,
}


@pytest.fixture
def hlo(tmp_path) -> str:
    file = tmp_path / "step.txt"
    file.write_text(programs.ASYNC)
    return str(file)


def test_a_program_of_a_file_is_planned(hlo, tmp_path, capsys):
    line = tmp_path / "line.json"
    command = ["plan", "--hlo", hlo, "--slice", "4x4x4", "--json", "--timeline", str(line)]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["step_seconds"]["low"] <= found["step_seconds"]["high"]
    assert {c["kind"] for c in found["collectives"]} == {"all_gather", "all_reduce"}
    assert found["memory_limit_bytes"] == int(30.75 * 2**30)
    assert found["mfu"] is None  # of a program whose work is not known
    assert json.loads(line.read_text())["traceEvents"]
    assert cli.main(["plan", "--hlo", hlo, "--slice", "4x4x4", "--what-if", "clock=2"]) == 0
    assert "s a step" in capsys.readouterr().out


ALL_TO_ALL = """HloModule step, is_scheduled=true, num_partitions=128

ENTRY %main (p: bf16[128,819200]) -> bf16[128,819200] {
  %p = bf16[128,819200]{1,0} parameter(0)
  ROOT %x = bf16[128,819200]{1,0} all-to-all(%p), channel_id=1, replica_groups=[1,128]<=[128], dimensions={0}
}
"""  # noqa: E501


def test_the_twist_says_of_each_collective_what_it_gives(tmp_path, capsys):
    file = tmp_path / "step.txt"
    file.write_text(ALL_TO_ALL)
    command = ["plan", "--hlo", str(file), "--slice", "4x4x8"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    here, there = (x["collectives"][0]["seconds"] for x in (found, found["twin"]))
    assert found["twin"]["slice"] == "4x4x8_twisted"
    # The loads of the best paths by dimension order, beside hops that both have.
    assert here / there == pytest.approx(512 / 293.4, rel=0.02)
    assert cli.main(command) == 0
    page = capsys.readouterr().out
    assert "all_to_all of 128" in page
    assert "a compiler may choose other strategies" in page
    assert cli.main([*command, "--no-twin", "--json"]) == 0
    assert "twin" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--slice", "4x4x8"], "128 chips, and the program is for 64"),
        (["--slice", "5x5"], "slice"),
        (["--slice", "4x4x4", "--what-if", "luck=2"], "--what-if luck=2"),
        (["--slice", "4x4x4", "--what-if", "links=0"], "--what-if links=0"),
        (["--slice", "4x4x4", "--mesh", "fsdp=64"], "--hlo"),
    ],
)
def test_mistakes_with_a_program_are_one_line(hlo, options, says, capsys):
    assert cli.main(["plan", "--hlo", hlo, *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["plan", "--slice", "4x4x4"], "configuration"),
        (["plan", *HEADLINE, "--slice", "4x4x12_twist:0,0,4/0,0,4/0,0,0"], "compiler takes 4x4x8"),
        (["plan", *HEADLINE, "--slice", "4x4x8"], "torsion[plan]"),
        (["plan", "--hlo", "nothing.txt", "--slice", "4x4x8"], "nothing.txt"),
        (["study", "plan", "--runs", "nothing.json"], "nothing.json"),
    ],
)
def test_mistakes_without_libtpu_are_one_line(command, says, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "libtpu_version", _none)
    monkeypatch.setattr("importlib.metadata.version", _no_libtpu)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def _none() -> str:
    raise CompilerError("libtpu is not installed; pip install 'torsion[plan]'")


def _no_libtpu(name: str) -> str:
    import importlib.metadata

    if name == "libtpu":
        raise importlib.metadata.PackageNotFoundError(name)
    return "1"


def test_the_batch_that_no_configuration_says_is_a_row_for_each_part():
    found = planned_run(
        HEADLINE, ["run.Run.mesh = @sharding.MeshShape()", "sharding.MeshShape.fsdp = 128"], 128
    )
    assert found.tokens == 128 * 8192
    assert len(found.assumed) == 2
    said = planned_run(
        HEADLINE,
        [
            "sharding.MeshShape.fsdp = 128",
            "text.TextData.batch_size = 256",
            "text.TextData.seq_len = 512",
        ],
        128,
    )
    assert (said.tokens, said.assumed) == (256 * 512, ())
    assert said.params == 8_030_261_248


def test_names_of_slices_for_the_compiler():
    assert target_of(Slice.parse("4x4x8_twisted")).topology == "v4:4x4x8_twisted"
    assert target_of(Slice(shape=(4, 4, 4), pod=TPU_V4)).keywords["wrap"] == [True] * 3
    assert target_of(Slice.parse("16x16", TPU_V5E)) == Target("v5e:16x16", {})
    with pytest.raises(ValueError, match="abort"):
        target_of(Slice.parse("4x4x12_twist:0,0,4/0,0,4/0,0,0"))


def test_a_study_has_a_status_for_each_record_in_their_order(tmp_path, capsys, monkeypatch):
    answers = {256: programs.BY_TWO, 512: DoesNotFit("too large", 2, 1), 1024: CompilerError("no")}
    asked = []

    def compile_job(job: Job, **options) -> Compiled:
        asked.append(job)
        answer = answers[job.arguments["record"]["D"]]
        if isinstance(answer, Exception):
            raise answer
        places = [[0, *c] for c in Slice(shape=(4, 4, 4)).coordinates.tolist()]
        return Compiled(text=answer, peak_bytes=1, partitions=places, seconds=1.0, cached=False)

    monkeypatch.setattr(plan_study, "compile_job", compile_job)
    other = lambda D: RECORD | {"arch": RECORD["arch"] | {"D": D}}
    records = [
        RECORD,
        {"chip": "abacus"},
        other(512),
        other(1024),
        None,
        RECORD,
        RECORD | {"chips": 128, "slices": 2},
    ]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(records))
    out = tmp_path / "out"
    assert cli.main(["study", "plan", "--runs", str(file), "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(asked) == 3  # records of one program share it
    words = [row["status"].split()[0] for row in rows]
    assert words == ["predicted", "not", "does", "not", "not", "predicted", "predicted"]
    for row, word in zip(rows, words, strict=True):
        assert (row["predicted_seconds"] is not None) == (word == "predicted")
        if word == "predicted":
            assert row["low"] <= row["predicted_seconds"] <= row["high"]
    assert (
        rows[6]["predicted_seconds"] > rows[5]["predicted_seconds"] == rows[0]["predicted_seconds"]
    )
    assert (out / "plan.png").stat().st_size > 0
    assert "90th percentile" in (out / "table.md").read_text()


@pytest.mark.parametrize("text", ["", "{}", "[", "3"])
def test_a_file_that_is_no_list_of_records_is_one_line(text, tmp_path, capsys):
    (tmp_path / "runs.json").write_text(text)
    assert cli.main(["study", "plan", "--runs", str(tmp_path / "runs.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


JOB = Job(target=Target("v4:2x2x1", {}), function="a:b", arguments={})


def _subprocess(monkeypatch, text: str) -> None:
    """Takes a program in place of the compiler's."""
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "0")
    monkeypatch.setattr(compiling, "CHILD", ["-c", text])


def test_a_program_is_compiled_once_and_kept(tmp_path, monkeypatch):
    made = """
import sys, json, gzip, pathlib
folder = pathlib.Path(sys.argv[1]).parent
(folder / "lowered.json").write_text('{"hash": "abc"}')
memory = {"peak_memory_in_bytes": 7, "partitions": [], "compile_seconds": 1}
(folder / "memory.json").write_text(json.dumps(memory))
gzip.open(folder / "program.txt.gz", "wt").write("HloModule x")
"""
    _subprocess(monkeypatch, made)
    first = compile_job(JOB, cache=tmp_path)
    assert (first.text, first.peak_bytes, first.cached) == ("HloModule x", 7, False)
    _subprocess(monkeypatch, "raise SystemExit(1)")
    assert compile_job(JOB, cache=tmp_path).cached


@pytest.mark.parametrize(
    ("program", "error", "says"),
    [
        ("import time; time.sleep(60)", CompilerError, "longer than 1 s"),
        ("import os; os.abort()", CompilerError, "ended its process"),
        ("raise ValueError('no such thing')", CompilerError, "no such thing"),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: Used 40.50G of 30.75G hbm. Exceeded')",
            DoesNotFit,
            "9.75 GiB more",
        ),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: required memory (113.70G) exceeds available "
            "HBM (95.74G)')",
            DoesNotFit,
            "113.70 GiB",
        ),
    ],
)
def test_what_the_compiler_says_is_one_line(program, error, says, tmp_path, monkeypatch):
    _subprocess(monkeypatch, program)
    with pytest.raises(error, match=says) as caught:
        compile_job(JOB, cache=tmp_path, seconds=1 if "sleep" in program else 60)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.glob("job-*")]


def test_a_compilation_ends_with_whoever_asked_for_it(tmp_path):
    """Also where that was killed: what is left is a pipe that ends."""
    program = (
        "import sys, time; import pjit_train.compiler.child as child;"
        "sys.modules['jax'] = None; print('begun', flush=True);"
        "child.json.loads = lambda text: time.sleep(60); child.main(sys.argv[1])"
    )
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-c", program, str(tmp_path / "job.json")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"begun\n"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(30) == 1
    child.stdout.close()
