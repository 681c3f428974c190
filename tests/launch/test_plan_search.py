"""`torsion plan --search`, with a compiler that stands in for libtpu's; the bound, by hand."""

import json
import re

import pytest

from launch import cli, plan, plan_search
from pjit_train.compiler import compile as compiling
from pjit_train.compiler.compile import Compiled, DoesNotFit
from topology.hardware import TPU_V4
from topology.plan.bound import step_bound
from topology.plan.machine import machine_of
from topology.torus.slices import Slice

MODEL = ["configs/base.gin", "configs/models/gpt2.gin"]
V4 = machine_of(TPU_V4)
# A program of four chips whose cycles, at v4's clock, are so many seconds.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  ROOT %dot = f32[8,128]{1,0} fusion(%p), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
}
"""  # noqa: E501
BODY = """%f (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0} parameter(0)
  ROOT %n = f32[8,128]{1,0} negate(%q)
}

"""


def test_the_bound_worked_by_hand():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    bound = step_bound(
        flops=16 * V4.peak, repeated=0, params=1e9, residuals=1e9, mesh=mesh, machine=V4
    )
    gathered, summed = 3 * 3 / 4 * 1e9 / 2, 2 * 1 / 2 * 1e9 / 8
    activations = 8 * 1 / 2 * 1e9 / 8
    sending = 2 * (gathered + summed + activations) / (6 * 45e9)
    assert bound.least == pytest.approx(1.0)
    assert bound.serial == pytest.approx(1.0 + sending)
    alone = {"flops": 0.0, "repeated": 0.0, "params": 1e9, "residuals": 1e9, "machine": V4}
    assert step_bound(mesh={"data": 1}, **alone).least == 0  # of one chip: nothing is sent


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler: seconds by (mesh, remat); all that was asked of it."""
    asked = []

    def seconds(mesh, remat):
        return 0.5 + 0.01 * mesh["tensor"] + 0.001 * mesh["data"] + (0.2 if remat == "full" else 0)

    def compile_for(planned, slices, **options):
        remat = re.search(r"TransformerConfig\.remat = '(\w+)'", planned.text)[1]
        asked.append((dict(planned.mesh), remat))
        if remat == "none":
            return [DoesNotFit("step: 2 GiB more than there are", 2, 1)]
        cycles = int(seconds(planned.mesh, remat) * V4.clock)
        text = PROGRAM.replace("CYCLES", str(cycles)).replace("ENTRY", BODY + "ENTRY")
        fields = {"text": text, "peak_bytes": 1 << 30, "partitions": None, "seconds": 1.0}
        return [Compiled(**fields, cached=False)]

    monkeypatch.setattr(plan, "compile_for", compile_for)
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "0")
    return asked


def search(*options, capsys):
    assert cli.main(["plan", *MODEL, "--search", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_fastest_of_all_meshes_is_found_and_each_other_has_a_reason(compiler, capsys):
    found = search("--slice", "2x2x1", capsys=capsys)
    best = found["search"]["best"]
    assert (best["mesh"]["data"], best["mesh"]["tensor"], best["remat"]) == (1, 1, "dots")
    assert found["step_seconds"]["high"] == pytest.approx(0.511, rel=1e-3)
    assert found["tokens_per_step"] == 4 * 1024  # a row a chip, on every mesh
    tried = found["search"]["tried"]
    assert found["search"]["complete"]
    assert len(tried) == 3 * 6  # meshes of four in three axes
    assert len(compiler) == sum(t["status"] in ("planned", "does not fit") for t in tried)
    assert all(t["why"] for t in tried if (t["mesh"], t["remat"]) != (best["mesh"], "dots"))


def test_what_the_bound_leaves_out_could_not_have_won(compiler, capsys, monkeypatch):
    """A bound that is nearly the truth prunes, and never the best."""
    true = plan_search.step_bound

    def near(**told):
        mesh = told["mesh"]
        least = 0.49 + 0.01 * mesh["tensor"] + 0.001 * mesh["data"]
        return true(**told)._replace(least=least, serial=1 / least)  # the worst come first

    monkeypatch.setattr(plan_search, "step_bound", near)
    found = search("--slice", "2x2x1", capsys=capsys)
    assert found["step_seconds"]["high"] == pytest.approx(0.511, rel=1e-3)
    kinds = {t["status"] for t in found["search"]["tried"]}
    assert kinds == {"planned", "does not fit", "cannot win"} or "cannot win" not in kinds
    for way in found["search"]["tried"]:
        if way["status"] == "cannot win":
            assert way["bound_seconds"] >= found["step_seconds"]["high"] * 0.999


def test_time_that_is_up_and_a_mesh_that_is_given(compiler, capsys, monkeypatch):
    found = search("--slice", "2x2x1", "--mesh", "fsdp=2,tensor=2", capsys=capsys)
    assert [t["mesh"] for t in found["search"]["tried"]] == [{"fsdp": 2, "tensor": 2}] * 3
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(plan_search.time, "monotonic", lambda: next(clock))
    found = search("--slice", "2x2x1", "--search-time", "450", capsys=capsys)
    assert not found["search"]["complete"]
    assert {t["status"] for t in found["search"]["tried"]} >= {"not reached", "planned"}
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("fits", "says", "compiled"),
    [
        ("remat = 'dots'", "with remat = 'dots' it fits and needs 3.00 GiB", 2),
        ("remat = 'full'", "with remat = 'full' it fits", 3),
        ("batch_size = 8", "with batch_size = 8 and remat = 'full' it fits", 4),
        ("fsdp = 4", "with --mesh fsdp=4 and remat = 'full' it fits", 6),
        ("nothing", "nor does it with remat = 'dots', or remat = 'full', or batch_size = 8", 6),
    ],
)
def test_a_step_that_does_not_fit_says_with_what_it_would(
    fits, says, compiled, monkeypatch, capsys
):
    asked = []

    def compile_for(planned, slices, **options):
        asked.append(planned)
        if fits not in planned.text:
            return [DoesNotFit("step: 2 GiB more than there are", 2, 1)] * len(slices)
        return [Compiled(text="", peak_bytes=3 << 30, partitions=[], seconds=1.0, cached=False)]

    monkeypatch.setattr(plan, "compile_for", compile_for)
    monkeypatch.setattr(compiling, "libtpu_version", lambda: "0")
    options = ["--mesh", "fsdp=2,tensor=2", "--gin", "text.TextData.batch_size = 16"]
    assert cli.main(["plan", *MODEL, "--slice", "2x2x1", *options]) == 2
    error = capsys.readouterr().err
    assert f"step: 2 GiB more than there are; {says}" in error
    assert error.count("\n") == 1
    assert len(asked) == compiled


def test_slices_of_a_number_of_chips():
    names = {str(s) for s in plan_search.slices_of(128, TPU_V4)}
    assert {"4x4x8", "4x4x8_twisted"} <= names
    assert all(Slice.parse(name).num_chips == 128 for name in names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search"], "give --slice"),
        (["--chips", "64"], "--chips: it is for --search"),
        (["--slice", "4x4x4", "--chips", "64", "--search"], "give --slice"),
        (["--search", "--slice", "4x4x4", "--slices", "2"], "leave --slices out"),
        (["--search", "--chips", "65"], "--chips 65: the compiler takes no slice"),
        (["--search", "--slice", "2x2x1", "--mesh", "fsdp=7"], "none of 3 ways could be planned"),
    ],
)
def test_mistakes_are_one_line(compiler, options, says, capsys):
    assert cli.main(["plan", *MODEL, *options]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
