"""The mesh, rematerialisation and slice with which a run's step is shortest."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launch import plan
from pjit_train.compiler.compile import DoesNotFit
from pjit_train.errors import UserError
from topology.hardware import Pod
from topology.plan.bound import Bound, step_bound
from topology.plan.machine import Machine
from topology.torus.shapes import legal_shapes
from topology.torus.slices import Slice

REMATS = ("none", "dots", "full")  # from the fastest where it fits
MOST_TENSOR = 64
_NO_BOUND = Bound(0.0, 0.0)


@dataclasses.dataclass(kw_only=True)
class Trial:
    """A way to run the step, and what became of it.

    Attributes:
      bound: of its seconds, by closed forms.
      status: "planned", "does not fit", "cannot win" (its bound is above the best found), "not
        reached" (the time was up), "failed" (the compiler refused it), "impossible" (the run does
        not allow it).
      why: of the status, in words.
      report: of `launch.reports.plan`, where it was planned.
    """

    slice: Slice
    mesh: dict[str, int]
    remat: str
    bindings: list[str]
    planned: plan.Planned | None = None
    bound: Bound = _NO_BOUND
    status: str = "not reached"
    why: str = ""
    report: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of its step: the middle of the interval."""
        assert self.report is not None
        step = self.report["step_seconds"]
        return (step["low"] + step["high"]) / 2

    def __str__(self) -> str:
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        return f"{self.slice} {axes or 'data=1'} remat={self.remat}"


def slices_of(chips: int, pod: Pod) -> list[Slice]:
    """The slices of so many chips that the compiler takes, regular and twisted.

    Raises:
      UserError: there are none.
    """
    found: list[Slice] = []
    for shape in legal_shapes(pod=pod):
        if math.prod(shape) == chips:
            slice = Slice(shape=shape, pod=pod)
            found += [slice] if plan.is_compiled_for(slice) else []
            twin = plan.compiled_twin(slice)
            found += [] if twin is None else [twin]
    if not found:
        raise UserError(f"--chips {chips}: the compiler takes no slice of so many {pod.name} chips")
    return found


def trials(
    files: Sequence[str],
    bindings: Sequence[str],
    slices: Sequence[Slice],
    machine: Machine,
    *,
    mesh: dict[str, int] | None = None,
) -> list[Trial]:
    """All ways to run a step on slices of one number of chips, the most promising first.

    The batch is the same for all: where no configuration says it, one row a chip.

    Args:
      mesh: the only one to take, sizes by axis; None for all of `data`, `fsdp` and `tensor`.
    """
    chips = slices[0].num_chips
    bindings = [*bindings, *_batch(files, bindings, chips)]
    meshes = list(_meshes(chips)) if mesh is None else [mesh]
    found: list[Trial] = []
    for sizes in meshes:
        planned, why = None, ""
        bound_to = [*bindings, *_mesh_bindings(sizes)]
        try:
            planned = plan.planned_run(files, bound_to, chips)
        except UserError as error:
            why = str(error)
        for slice in slices:
            for remat in REMATS:
                more = [*bound_to, f"transformer.TransformerConfig.remat = {remat!r}"]
                trial = Trial(slice=slice, mesh=sizes, remat=remat, bindings=more, planned=planned)
                found.append(trial)
                if planned is None:
                    trial.status, trial.why = "impossible", why
                    continue
                again = (planned.flops - planned.head_flops) / 3 if remat == "full" else 0.0
                trial.bound = step_bound(
                    flops=planned.flops,
                    repeated=again,
                    params=planned.params,
                    residuals=planned.residuals,
                    mesh=planned.mesh,
                    machine=machine,
                )
                state = planned.state_bytes / (sizes.get("fsdp", 1) * sizes.get("tensor", 1))
                if state > machine.memory:
                    trial.status = "does not fit"
                    trial.why = f"weights and optimizer state take {state / 2**30:.1f} GiB a chip"
    order = {remat: i for i, remat in enumerate(REMATS)}
    return sorted(found, key=lambda t: (t.planned is None, t.bound.serial, order[t.remat]))


def search(
    files: Sequence[str],
    ways: Sequence[Trial],
    report: Callable[[Slice, Any, plan.Planned], dict[str, Any]],
    *,
    options: dict[str, Any],
    seconds: float,
    limit: float,
    say: Callable[[str], None] = lambda line: None,
) -> Trial:
    """Compiles the ways, in their order, until none that is left can win; returns the best.

    What is compiled is kept, so that the same search goes on where it was stopped.

    Args:
      report: (slice, compiled, planned) -> the report of a compiled step.
      seconds: after which no other compilation is begun; limit: of one compilation.
      say: is told each result.

    Raises:
      UserError: no way could be planned.
    """
    began, best = time.monotonic(), None
    for way in ways:
        if way.status != "not reached":
            continue
        if best is not None and way.bound.least >= best.seconds:
            way.status = "cannot win"
            way.why = f"no program of it takes less than {way.bound.least:.4g} s"
            continue
        if time.monotonic() - began > seconds:
            way.why = f"the search had {seconds:.0f} s"
            continue
        planned = plan.planned_run(files, way.bindings, way.slice.num_chips)
        [compiled] = plan.compile_for(planned, [way.slice], options=options, seconds=limit)
        if isinstance(compiled, UserError):
            way.status = "does not fit" if isinstance(compiled, DoesNotFit) else "failed"
            way.why = str(compiled)
            say(f"{way}: {way.status}")
            continue
        way.status, way.report = "planned", report(way.slice, compiled, planned)
        say(f"{way}: {way.seconds:.4g} s")
        if best is None or way.seconds < best.seconds:
            best = way
    if best is None:
        first = next((f"; {w}: {w.why}" for w in ways if w.why), "")
        raise UserError(f"--search: none of {len(ways)} ways could be planned{first}")
    for way in ways:
        if way.status == "planned" and way is not best:
            way.why = f"{way.seconds / best.seconds:.3f} times the best"
    return best


def nearest_that_fits(
    files: Sequence[str],
    bindings: Sequence[str],
    slice: Slice,
    planned: plan.Planned,
    *,
    options: dict[str, Any],
    seconds: float,
    limit: float,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Says with which change a step fits that does not: the first that does of more
    rematerialisation, then also half and a quarter of the batch, then also all chips in `fsdp`.

    Each is compiled. Arguments as of `search`.
    """
    began, tried = time.monotonic(), list[str]()
    for words, more in _smaller(planned, slice.num_chips):
        if time.monotonic() - began > seconds:
            break
        try:
            changed = plan.planned_run(files, [*bindings, *more], slice.num_chips)
        except UserError:  # another kind of model, or the batch is not of so many parts
            continue
        say(f"does not fit; compiling it with {words}")
        [compiled] = plan.compile_for(changed, [slice], options=options, seconds=limit)
        if not isinstance(compiled, UserError):
            return f"with {words} it fits and needs {compiled.peak_bytes / 2**30:.2f} GiB"
        tried.append(words)
    if not tried:
        return "take more chips, a smaller batch or a smaller model"
    return f"nor does it with {', or '.join(tried)}; take more chips or a smaller model"


def _smaller(planned: plan.Planned, chips: int) -> Iterator[tuple[str, list[str]]]:
    """(words, bindings) of changes with which a step needs less memory, the least change first."""

    def said(parameter: str) -> str | None:
        found = re.search(rf"^{parameter} = (.+)$", planned.text, re.MULTILINE)
        return None if found is None else found[1].strip("'\"")

    now = said(r"transformer\.TransformerConfig\.remat")
    remats = REMATS[REMATS.index(now) + 1 :] if now in REMATS else ()
    for remat in remats:
        yield f"remat = {remat!r}", [f"transformer.TransformerConfig.remat = {remat!r}"]
    words = ["remat = 'full'"] if remats else []
    more = ["transformer.TransformerConfig.remat = 'full'"] if remats else []
    batch = said(r"text\.TextData\.batch_size")
    rows = planned.mesh.get("data", 1) * planned.mesh.get("fsdp", 1)
    sizes = [int(batch) // n for n in (2, 4)] if batch and batch.isdigit() else []
    for size in sizes:
        if size and size % rows == 0:
            one = [f"text.TextData.batch_size = {size}", *more]
            yield " and ".join([f"batch_size = {size}", *words]), one
    if planned.mesh.get("fsdp", 1) < chips:
        yield (
            " and ".join([f"--mesh fsdp={chips}", *words]),
            [*_mesh_bindings({"fsdp": chips}), *more],
        )


def table(ways: Sequence[Trial]) -> list[dict[str, Any]]:
    """The ways as JSON: slice, mesh, remat, bound, seconds and memory, status and why."""
    return [
        {
            "slice": str(way.slice),
            "mesh": way.mesh,
            "remat": way.remat,
            "bound_seconds": None if way.planned is None else way.bound.least,
            "step_seconds": None if way.report is None else way.report["step_seconds"],
            "memory_bytes": None if way.report is None else way.report["memory_bytes"],
            "status": way.status,
            "why": way.why,
        }
        for way in ways
    ]


def _batch(files: Sequence[str], bindings: Sequence[str], chips: int) -> list[str]:
    """The binding of a batch of one row a chip, where none is said."""
    try:
        planned = plan.planned_run(files, [*bindings, *_mesh_bindings({"fsdp": chips})], chips)
    except UserError:  # a batch that is said does not fit that mesh
        return []
    names = [f"text.TextData.{said}" for said in planned.assumed]
    return [name for name in names if name.startswith("text.TextData.batch_size")]


def _meshes(chips: int) -> Iterator[dict[str, int]]:
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    for tensor in divisors:
        for data in divisors:
            if tensor <= MOST_TENSOR and chips % (tensor * data) == 0:
                yield {"data": data, "fsdp": chips // (tensor * data), "tensor": tensor}


def _mesh_bindings(sizes: dict[str, int]) -> list[str]:
    whole = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | sizes
    axes = [f"sharding.MeshShape.{axis} = {size}" for axis, size in whole.items()]
    return ["run.Run.mesh = @sharding.MeshShape()", *axes]
