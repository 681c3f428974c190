"""A run planned for a slice that is not there: its step lowered, compiled, priced and replayed."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from launch.bindings import parse_bindings
from pjit_train.compiler.compile import Compiled, Job, compile_job
from pjit_train.compiler.target import target_of
from pjit_train.errors import UserError
from topology.torus.shapes import shipped_twist
from topology.torus.slices import Slice

STEP = "launch.plan:lowered"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A run as it is planned.

    Attributes:
      text: gin text of the run, complete.
      tokens: of a step; flops: of a step, all chips together; params: of the model.
      mesh: sizes by axis, on one slice.
      assumed: what no configuration says, in words.
      head_flops: of `flops`, those of the head, which are not computed again.
      residuals: numbers of the residual stream in all layers of a step, all chips together.
      state_bytes: of weights, and of AdamW's moments where all are kept; at least.
    """

    text: str
    tokens: int
    flops: float
    params: int
    mesh: dict[str, int]
    assumed: tuple[str, ...]
    head_flops: float = 0.0
    residuals: float = 0.0
    state_bytes: float = 0.0


def planned_run(files: Sequence[str], bindings: Sequence[str], chips: int) -> Planned:
    """The run of gin files and bindings, on so many chips.

    Where they say no batch, it is one row of the model's longest sequence for each part of the
    mesh that has rows of its own; the defaults are for a laptop.

    Raises:
      UserError: as `configure.build_run`, or the mesh is not of so many chips.
    """
    import gin
    import jax.numpy as jnp

    from launch.configure import build_run
    from pjit_train.optimizers import AdamW

    run, text = build_run(files, bindings)
    sizes = run.mesh.sizes(chips)
    if math.prod(sizes.values()) != chips:
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"
        raise UserError(
            f"mesh: {shown} is {math.prod(sizes.values())} devices and the slice has {chips} "
            "chips; give one whose product is that, or one axis as -1"
        )
    said = {
        key.parameter
        for key in parse_bindings(gin.config_str()).values
        if str(key.configurable).endswith("TextData")
    }
    rows = math.prod(sizes[axis] for axis in run.rules.batch) * run.accumulate
    assumed, more = [], []
    for name, value in (("seq_len", getattr(run.model, "max_len", None)), ("batch_size", rows)):
        if name not in said and hasattr(run.data, name) and value is not None:
            assumed.append(f"{name} = {value}")
            more.append(f"text.TextData.{name} = {value}")
    if more:
        run, text = build_run(files, [*bindings, *more])
    run.check_mesh(sizes)
    model, tokens = run.model, run.units_per_step
    width = getattr(model, "d_model", 0)
    kept = 3 if isinstance(run.optimizer, AdamW) and run.sparsity is None else 1
    itemsize = jnp.dtype(getattr(model, "param_dtype", "float32")).itemsize
    return Planned(
        text=text,
        tokens=tokens,
        head_flops=6.0 * tokens * width * getattr(model, "vocab_size", 0),
        residuals=float(tokens) * width * getattr(model, "num_layers", 0),
        state_bytes=float(kept * itemsize * model.num_params),
        flops=run.flops_per_step,
        params=run.model.num_params,
        mesh=sizes,
        assumed=tuple(assumed),
    )


def lowered(devices: Sequence[Any], text: str, packed: bool = False):
    """The step of a run, lowered for devices; what `compile_job` calls in its subprocess."""
    from launch.configure import build_run
    from pjit_train.program import Program
    from pjit_train.sharding import make_mesh

    run, _ = build_run([], text=text)
    program = Program(run, make_mesh(run.mesh, devices))
    return program.lower_step(run.steps if packed else 1)


def is_compiled_for(slice: Slice) -> bool:
    """Tells whether the compiler takes a slice."""
    try:
        target_of(slice)
    except ValueError:
        return False
    return True


def twin_of(slice: Slice) -> Slice | None:
    """The twisted slice of a regular one's shape, or the regular one of a twisted; None where
    none ships."""
    if slice.is_twisted:
        return Slice(shape=slice.sizes, pod=slice.pod)
    twist = shipped_twist(slice.sizes, slice.pod)
    return None if twist is None else Slice(shape=slice.sizes, twist=twist, pod=slice.pod)


def compiled_twin(slice: Slice) -> Slice | None:
    """The twin of a slice; None where there is none that the compiler takes."""
    twin = twin_of(slice)
    return twin if twin is not None and is_compiled_for(twin) else None


def compile_for(
    planned: Planned,
    slices: Sequence[Slice],
    *,
    options: dict[str, Any],
    seconds: float,
    progress: Callable[[float], None] = lambda gone: None,
) -> list[Compiled | UserError]:
    """The program of a run on each slice, two compiled at a time; an error where there is none."""

    def one(slice: Slice) -> Compiled | UserError:
        job = Job(
            target=target_of(slice),
            function=STEP,
            arguments={"text": planned.text},
            options=options,
        )
        try:
            return compile_job(job, seconds=seconds, progress=progress)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, slices))
