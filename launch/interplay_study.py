"""`torsion study interplay`: sparsity and quantization of one model, in both orders, compared.

A study is a gin file: a dense run as `torsion train` takes one, and the parameters of
`interplay_study.InterplayStudy`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from launch.study import (
    Member,
    check_member,
    final_loss,
    is_done,
    read_study,
    stopped,
    train_members,
)
from launch.study_files import write
from pjit_train.errors import UserError
from pjit_train.files import write_whole
from pjit_train.huggingface.compressed_tensors import export
from pjit_train.interplay_study import (
    BOTH,
    DENSE,
    ORDERS,
    PRETRAINED,
    SMALL,
    SMALL_FORMAT,
    SPARSE,
    InterplayStudy,
    Loss,
    Measures,
    check,
    model_of_equal_bytes,
    sparsified,
    stored_bytes,
)
from pjit_train.interplay_table import draw, make_table
from pjit_train.run import Run
from pjit_train.tasks.language_modelling import language_model

SIZES = {
    "small": "configs/studies/interplay_small.gin",
    "overnight": "configs/studies/interplay.gin",
}
FIGURES = "figures.json"  # in a run directory: what was measured of it in formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Member):
    """Run of the study; `recipe` is one of `interplay_study.KINDS`.

    Attributes:
      format, order: of a run that is trained quantized.
    """

    format: str | None = None
    order: str | None = None

    @property
    def name(self) -> str:
        """Name of the run directory."""
        parts = [self.recipe, self.pattern, self.format, self.order, f"seed{self.seed}"]
        return "-".join(part for part in parts if part)


def plan(file: str, study: InterplayStudy, run: Run, out: Path) -> list[Part]:
    """The runs of a study: of all seeds those that are quantized after training, then the others.

    Raises:
      UserError: a pattern or a format does not fit a kernel, or a smaller model cannot be made.
    """
    check(study, run)
    parts = [part for seed in range(study.seeds) for part in _of_seed(file, study, run, seed, out)]
    return sorted(parts, key=lambda part: part.recipe == BOTH)


def _of_seed(file, study, run, seed: int, out: Path) -> Iterator[Part]:
    def part(kind, bindings, **what):
        texts = tuple(f"{name} = {value}" for name, value in bindings.items())
        return Part(recipe=kind, seed=seed, files=(file,), bindings=texts, **what)

    yield (start := part(PRETRAINED, {"run.Run.seed": seed}, pattern=None))
    finetuned = {
        "run.Run.seed": 1000 + seed,  # other text than before
        "run.Run.initial_weights": repr(str(out / start.name / "huggingface")),
        "run.Run.steps": study.finetune_steps,
        "optimizers.AdamW.learning_rate": study.finetune_learning_rate,
        "optimizers.Schedule.warmup_steps": study.finetune_steps // 10,
    }
    yield part(DENSE, finetuned, pattern=None)
    shapes = set()
    for pattern in study.patterns:
        recipe = sparsified(pattern, study.layers)
        names = ("algorithm", "sparsity", "sparsity_type", "layers", "start_fraction")
        sparse = finetuned | {
            "run.Run.sparsity": "@pruning.Pruning()",
            **{f"pruning.Pruning.{n}": repr(getattr(recipe, n)) for n in names},
            "pruning.Pruning.end_fraction": recipe.end_fraction,
        }
        yield part(SPARSE, sparse, pattern=pattern)
        for format in study.trained_formats or study.formats:
            for order in ORDERS:
                quantized = sparse | {
                    "run.Run.quantization": "@quantized.Quantization()",
                    "quantized.Quantization.layers": repr({study.layers: format}),
                    "quantized.Quantization.order": repr(order),
                }
                yield part(BOTH, quantized, pattern=pattern, format=format, order=order)
        small = model_of_equal_bytes(language_model(run), pattern, study.layers)
        if small in shapes:
            continue
        shapes.add(small)
        shape = {
            f"transformer.TransformerConfig.{name}": getattr(small, name)
            for name in ("d_model", "d_ff", "head_dim")
        }
        steps = {"run.Run.seed": seed, "run.Run.steps": run.steps + study.finetune_steps}
        yield part(SMALL, shape | steps, pattern=pattern)


def finish(study: InterplayStudy):
    """Makes the function that measures a trained run, or writes it for others to start from."""
    measures = Measures(study)

    def finish(part: Part, run: Run, directory: Path) -> None:
        if part.recipe == PRETRAINED and not (directory / "huggingface").exists():
            export(directory / "huggingface", run, directory)
        if part.recipe not in (DENSE, SMALL, SPARSE):
            return
        figures = read_figures(directory)
        if set(measures.formats(run)) - set(figures.get("losses", {})):
            figures["losses"] = measures.losses(run, directory)
            write_figures(directory, figures)
        if part.recipe == SPARSE and part.seed == 0 and "errors" not in figures:
            figures["errors"] = measures.errors(run, directory, part.pattern)
            write_figures(directory, figures)

    return finish


def read_figures(directory: Path) -> dict:
    """Reads what was measured of a run; {} where nothing was."""
    path = directory / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_figures(directory: Path, figures: dict) -> None:
    write_whole(directory / FIGURES, json.dumps(figures) + "\n")


def done(parts: list[Part], out: Path) -> list[tuple[Part, Run]]:
    """The runs that are done, of those of a study."""
    found = []
    for part in parts:
        directory = out / part.name
        if (directory / "config.gin").exists():
            run, text = part.build()
            check_member(directory, run, text)
            if is_done(directory, run):
                found.append((part, run))
    return found


def losses(part: Part, run: Run, directory: Path, study: InterplayStudy) -> Iterator[Loss]:
    """Yields the losses of a run that is done."""
    kept = None if part.recipe == SMALL else part.pattern

    def loss(value, format, order):
        return Loss(
            kind=part.recipe,
            pattern=part.pattern,
            format=format,
            order=order,
            seed=part.seed,
            loss=value,
            bytes=stored_bytes(run.blocks, format, kept, study.layers),
        )

    yield loss(final_loss(directory, run), part.format, part.order)
    for format, orders in read_figures(directory).get("losses", {}).items():
        if format in study.formats:
            for order, value in orders.items():
                yield loss(value, format, order)


def study_interplay(
    file: str, out: Path, *, seeds: int | None = None, only_table: bool = False
) -> int:
    """The command: trains and measures what is left, then reports. Returns its exit code.

    It is 1 where runs are missing in the end, or what `study.stopped` returns.
    """
    out = out.resolve()  # its runs name it
    study, run = read_study(file, seeds, kind=InterplayStudy, example=SIZES["overnight"])
    if run.quantization is not None:
        raise UserError(f"{file}: run.Run.quantization is set; a study chooses the formats itself")
    parts = plan(file, study, run, out)
    if not only_table and not train_members(parts, out, finish(study)):
        return stopped(out)
    if missing := len(parts) - report(file, study, run, parts, out):
        print(f"{missing} of {len(parts)} runs are missing; the same command trains them")
    return 0 if only_table or not missing else 1


def report(file: str, study: InterplayStudy, run: Run, parts: list[Part], out: Path) -> int:
    """Prints and writes table.md, results.json and interplay.png of what is done.

    Returns how many runs are.
    """
    finished = done(parts, out)
    if not finished:
        raise UserError(f"{out} has no finished run of {file}; train them without --table")
    found = [
        loss
        for part, of in finished
        if part.recipe != PRETRAINED
        for loss in losses(part, of, out / part.name, study)
    ]
    errors = {
        part.pattern: rows
        for part, _ in finished
        if part.recipe == SPARSE and (rows := read_figures(out / part.name).get("errors"))
    }
    small = {
        pattern: model_of_equal_bytes(language_model(run), pattern, study.layers)
        for pattern in study.patterns
    }
    notes = [
        f"The smaller dense model for {pattern}, of its bytes in {SMALL_FORMAT}: d_model "
        f"{model.d_model}, d_ff {model.d_ff}."
        for pattern, model in small.items()
    ]
    table = make_table(study, found, errors, notes)
    document = {
        "study": dataclasses.asdict(study),
        "notes": notes,
        "losses": [loss._asdict() for loss in found],
        "errors": errors,
    }
    write(out, table, document, {"interplay.png": lambda _, path: draw(study, found, path)})
    print(table, end="")
    return len(finished)
