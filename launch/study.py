"""`torsion study recipes`: trains every run of a study, each in a run directory, and compares them.

A study is a gin file: a run as `torsion train` takes one, and the parameters of
`study.RecipeStudy`. Its runs are that one with a recipe of configs/recipes, a pattern and a seed.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
import jax

from launch.bindings import Configurable, parse_bindings
from launch.configure import build_run
from launch.directory import check_directory, steps_before
from launch.study_files import write
from pjit_train import signals
from pjit_train import study as core
from pjit_train.checkpoint import Checkpoints
from pjit_train.errors import TrainingError, UserError
from pjit_train.loop import train
from pjit_train.metrics import read_rows
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh
from pjit_train.study import DENSE, EQUAL_BYTES, EQUAL_FLOPS, RecipeStudy, Result

SIZES = {"small": "configs/studies/recipes_small.gin", "overnight": "configs/studies/recipes.gin"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """Run of a study.

    Attributes:
      recipe: a name of `core.RECIPES`, or one of the dense ones.
      pattern: None for the dense run that all are compared with.
      files, bindings: that it is built from.
    """

    recipe: str
    pattern: str | None
    seed: int
    files: tuple[str, ...]
    bindings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run directory."""
        parts = [self.recipe, self.pattern, f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    def build(self) -> tuple[Run, str]:
        """Builds the run, and the text of its operative configuration."""
        return build_run(self.files, self.bindings)


def read_study(
    file: str, seeds: int | None = None, *, kind: type = RecipeStudy, example: str | None = None
) -> tuple[Any, Run]:
    """The study of a gin file, and the dense run that it is about.

    Args:
      kind: of study.
      example: a file of one.

    Raises:
      UserError: the file is wrong, or describes no study.
    """
    run, _ = build_run([file])
    bound = {key.configurable for key in parse_bindings(gin.config_str()).values}
    name = Configurable(kind.__module__, kind.__name__)
    if name not in bound:
        raise UserError(
            f"{file}: binds nothing of {name}; begin from {example or SIZES['overnight']}"
        )
    if run.sparsity is not None:
        raise UserError(f"{file}: run.Run.sparsity is set; a study chooses the recipes itself")
    study = gin.get_configurable(kind)()
    return study if seeds is None else dataclasses.replace(study, seeds=seeds), run


def plan(file: str, study: RecipeStudy, run: Run) -> tuple[list[Member], list[str]]:
    """The runs of a study, all of a seed before the next, and notes for its table.

    Raises:
      UserError: a pattern does not divide a kernel, or a layer pattern matches none.
    """
    members, notes = [], []

    def add(recipe, pattern=None, files=(), **bindings):
        texts = [f"{name.replace('__', '.')} = {value!r}" for name, value in bindings.items()]
        imports = "from sparsity.recipes import patterns\nfrom sparsity.recipes import recipes\n"
        members.append(
            Member(
                recipe=recipe,
                pattern=pattern,
                seed=0,
                files=(file, *files),
                bindings=tuple(imports + text for text in texts),
            )
        )

    add(DENSE)
    for pattern in study.patterns:
        layers = {study.layers: pattern}
        sparse = dataclasses.replace(run, sparsity=core.Recipe(layers=layers))
        add(EQUAL_FLOPS, pattern, run__Run__steps=core.steps_of_equal_flops(sparse))
        small = core.model_of_equal_bytes(sparse)
        add(
            EQUAL_BYTES,
            pattern,
            **{
                f"transformer__TransformerConfig__{name}": getattr(small, name)
                for name in ("d_model", "d_ff", "head_dim")
            },
        )
        for recipe in study.recipes:
            bindings: dict[str, Any] = {"recipes__Recipe__layers": layers}
            if recipe == "sdgf_geometric":
                k = core.largest_geometric(sparse)
                bindings["patterns__Geometric__k"] = k
                if k < 16:
                    notes.append(
                        f"SdGf-geometric at {pattern} begins with k = {k}: groups of "
                        f"{2 * k * int(pattern.split(':')[1])} do not divide every kernel."
                    )
            add(recipe, pattern, files=(f"configs/recipes/{recipe}.gin",), **bindings)
    return [
        dataclasses.replace(
            member, seed=seed, bindings=(*member.bindings, f"run.Run.seed = {seed}")
        )
        for seed in range(study.seeds)
        for member in members
    ], notes


def check_member(directory: Path, run: Run, text: str) -> None:
    """Raises a UserError where a run directory was begun with another configuration."""
    check_directory(directory, text)
    before = steps_before(directory)
    if before not in (None, run.steps):
        raise UserError(
            f"{directory} was begun for {before} steps, now it is {run.steps}; use another --out"
        )


def is_done(directory: Path, run: Run) -> bool:
    """Tells whether a run has come to its end: its last row and its last checkpoint are there."""
    saved = (directory / "checkpoints" / str(run.steps)).is_dir()
    return saved and final_loss(directory, run) is not None


def final_loss(directory: Path, run: Run) -> float | None:
    """The validation loss after the last step of a run, nats a token; None where there is none."""
    rows = read_rows(directory / "metrics.jsonl")
    return next((row.get("val_loss") for row in rows if row["step"] == run.steps), None)


def train_members(
    members: Sequence[Member],
    out: Path,
    finish: Callable[[Member, Run, Path], None] = lambda member, run, directory: None,
) -> bool:
    """Trains what is not done yet. Returns False where it was asked to stop.

    A run that fails is reported in a line, and the others go on.

    Args:
      finish: called for each run that is done, with its directory, before the next is begun.
    """
    spent, trained = 0.0, 0
    for number, member in enumerate(members, 1):
        directory = out / member.name
        run, text = member.build()
        began = time.monotonic()
        try:
            check_member(directory, run, text)
            if is_done(directory, run):
                finish(member, run, directory)
                continue
            left = spent / max(trained, 1) * (len(members) - number + 1)
            about = f", about {_hours(left)} left" if trained else ""
            print(f"run {number} of {len(members)}{about}: {member.name}", flush=True)
            train(run, directory, config_text=text, steps_before=steps_before(directory))
            if not is_done(directory, run) or signals.obeyed() is not None:
                return False
            finish(member, run, directory)
        except (UserError, TrainingError) as error:
            print(f"torsion: {member.name}: {' '.join(str(error).splitlines())}", flush=True)
            continue
        spent, trained = spent + time.monotonic() - began, trained + 1
        if trained % 8 == 0:  # a run's programs are of no use to the next, but small ones are
            jax.clear_caches()
            gc.collect()
    return True


def results(members: list[Member], out: Path) -> Iterator[Result]:
    """Yields the results of the runs that are done, from their directories."""
    costs: dict[tuple, float] = {}  # of runs that differ in their seed only
    for member in members:
        directory = out / member.name
        if not (directory / "config.gin").exists():
            continue
        run, text = member.build()
        check_member(directory, run, text)
        if not is_done(directory, run):
            continue
        key = member.recipe, member.pattern
        switched = isinstance(run.sparsity, core.Recipe) and run.sparsity.variance is not None
        if switched:
            costs[key] = core.training_flops(run, switched_at=_switched_at(run, directory))
        elif key not in costs:
            costs[key] = core.training_flops(run)
        yield Result(
            recipe=member.recipe,
            pattern=member.pattern,
            seed=member.seed,
            steps=run.steps,
            loss=final_loss(directory, run),
            flops=costs[key],
            bytes=core.parameter_bytes(run),
            d_model=run.blocks.d_model,
            d_ff=run.blocks.d_ff,
        )


def _switched_at(run: Run, directory: Path) -> int:
    """The first masked step of a run with an AutoSwitch, of its last checkpoint."""
    program = Program(run, make_mesh(run.mesh))
    with Checkpoints(directory / "checkpoints", run.checkpoints) as checkpoints:
        _, state = checkpoints.restore(
            program.abstract_state_after, step=run.steps, only=["sparsity"]
        )
    return int(state["sparsity"].masked_from)


def study_recipes(
    file: str,
    out: Path,
    *,
    seeds: int | None = None,
    only_table: bool = False,
) -> int:
    """The command: trains what is left to train, then reports. Returns its exit code.

    It is 1 where runs are missing in the end, or what `stopped` returns.
    """
    study, run = read_study(file, seeds)
    members, notes = plan(file, study, run)
    if not only_table and not train_members(members, out):
        return stopped(out)
    table, found = report(file, study, members, notes, out)
    print(table, end="")
    if missing := len(members) - len(found):
        print(f"{missing} of {len(members)} runs are missing; the same command trains them")
    return 0 if only_table or not missing else 1


def stopped(out: Path) -> int:
    """Says that a study goes on in `out`; returns 128 + the signal that stopped it, if one did."""
    print(f"stopped; the same command goes on in {out}")
    number = signals.obeyed()
    return 1 if number is None else 128 + number


def report(file: str, study: RecipeStudy, members: list[Member], notes: list[str], out: Path):
    """Writes table.md, results.json and recipes.png of what is done; returns (table, results)."""
    found = list(results(members, out))
    if not found:
        raise UserError(f"{out} has no finished run of {file}; train them without --table")
    table = core.make_table(study, found, notes)
    document = {
        "study": dataclasses.asdict(study),
        "notes": notes,
        "runs": [result._asdict() for result in found],
    }
    write(out, table, document, {"recipes.png": lambda _, path: core.draw(study, found, path)})
    return table, found


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
