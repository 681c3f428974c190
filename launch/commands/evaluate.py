"""`torsion eval`: validation metrics of a trained run, perplexity of a text, tasks of the field."""

import json
from pathlib import Path
from typing import Any

from launch.commands.common import (
    add_command,
    add_model,
    is_folder,
    opened_model,
    shown_progress,
    trained_run,
    whole,
)
from pjit_train.errors import UserError


def add(commands) -> None:
    evaluate = add_command(
        commands,
        run,
        "eval",
        "figures of a trained run or a Hugging Face folder",
        "Without --perplexity and --tasks, the validation figures of a run, on its own data.",
    )
    add_model(evaluate)
    evaluate.add_argument(
        "--perplexity", metavar="FILE", help="of this text, in windows of --sequence tokens"
    )
    evaluate.add_argument(
        "--sequence", type=whole(2), metavar="N", help="tokens of a window (default: the longest)"
    )
    evaluate.add_argument(
        "--stride",
        type=whole(1),
        metavar="N",
        help="windows begin so many tokens apart, each token counted once (default: --sequence)",
    )
    evaluate.add_argument(
        "--bos", action="store_true", help="the token of begin before each window"
    )
    evaluate.add_argument(
        "--tasks",
        metavar="TASK,...",
        help="lambada, piqa, arc_easy, or files of JSON lines (question, choices, answer; or text)",
    )
    evaluate.add_argument(
        "--data", metavar="DIR", default=".", help="folder of the files of named tasks (.)"
    )
    evaluate.add_argument(
        "--limit", type=whole(1), metavar="N", help="use the first N windows, or rows of each task"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")


def run(args, began: float) -> int:
    windows = {"--sequence": args.sequence, "--stride": args.stride, "--bos": args.bos or None}
    if args.perplexity is None:
        if odd := [name for name, value in windows.items() if value is not None]:
            raise UserError(f"{odd[0]} is of --perplexity FILE")
        if args.tasks is None:
            return _validation(args)
    elif not Path(args.perplexity).is_file():
        raise UserError(f"--perplexity {args.perplexity}: there is no such file")
    tasks = {} if args.tasks is None else _task_files(args.tasks, Path(args.data))
    model = opened_model(args)
    found: dict[str, Any] = {}
    if args.perplexity is not None:
        from pjit_train.evaluation.perplexity import perplexity

        with shown_progress("windows", count=True) as progress:
            found |= perplexity(
                model,
                Path(args.perplexity),
                sequence=args.sequence or model.config.max_len,
                stride=args.stride,
                bos=args.bos,
                limit=args.limit,
                progress=progress,
            )
        if not args.json:
            _print(found)
    if tasks:
        from pjit_train.evaluation.choices import run_task

        found["tasks"] = {}
        for name, file in tasks.items():
            with shown_progress(name, count=True) as progress:
                done = run_task(model, file, limit=args.limit, progress=progress)
            found["tasks"][name] = done
        if not args.json:
            _print_tasks(found["tasks"])
    if args.json:
        print(json.dumps(found))
    return 0


def _task_files(tasks: str, folder: Path) -> dict[str, Path]:
    """The file of each task that the option names, by the task's name.

    Raises:
      UserError: there is no such task or file, or two have one name.
    """
    from pjit_train.evaluation.choices import KNOWN

    files: dict[str, Path] = {}
    for task in tasks.split(","):
        file = folder / KNOWN[task] if task in KNOWN else Path(task)
        if not file.is_file():
            raise UserError(
                f"--tasks {task}: there is no file {file}; give its folder with --data"
                if task in KNOWN
                else f"--tasks {task}: is no file, and no task of {', '.join(KNOWN)}"
            )
        name = task if task in KNOWN else file.stem
        if name in files:
            raise UserError(f"--tasks {tasks}: two are named {name}; give them one at a time")
        files[name] = file
    return files


def _print(figures: dict) -> None:
    for name, value in figures.items():
        print(f"{name:<20} {value:.6g}" if isinstance(value, float) else f"{name:<20} {value}")


def _print_tasks(tasks: dict[str, dict]) -> None:
    width = max(len("task"), *map(len, tasks))
    print(f"{'task':<{width}}  rows    accuracy         normalized       perplexity")
    for name, row in tasks.items():
        cells = [
            _with_error(row["accuracy"], row["stderr"]),
            _with_error(row["accuracy_normalized"], row.get("stderr_normalized")),
            "-" if "perplexity" not in row else f"{row['perplexity']:.3f}",
        ]
        print(f"{name:<{width}}  {row['rows']:<6}  {cells[0]:<15}  {cells[1]:<15}  {cells[2]}")


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" + ("" if stderr is None else f" +- {stderr:.2%}")


def _validation(args) -> int:
    """Prints the validation figures of a run."""
    path = Path(args.run)
    if is_folder(path):
        raise UserError(
            f"{path} is a Hugging Face folder, which has no validation text of its own; use "
            "--perplexity FILE or --tasks"
        )
    if args.limit is not None:
        raise UserError("--limit is of --perplexity and --tasks")
    if args.dtype is not None:
        raise UserError(f"--dtype is of a Hugging Face folder; {path} says its own")
    run = trained_run(args)

    from pjit_train.evaluate import evaluate

    figures = evaluate(run, path, step=args.step)
    if args.json:
        print(json.dumps(figures))
        return 0
    kernels, classes = figures.pop("kernels", {}), figures.pop("classes", {})
    _print(figures)
    if classes:
        print(f"\n{'class':<20} images  accuracy")
    for name, row in classes.items():
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        print(f"{name:<20} {row['images']:<7} {accuracy}")
    if kernels:
        print(f"\n{'kernel':<36} pattern  zeros    groups with too many nonzeros")
    for name, row in kernels.items():
        wrong = "-" if row["groups"] is None else f"{row['violations']} of {row['groups']}"
        print(f"{name:<36} {row['pattern']:<8} {row['sparsity']:<8.2%} {wrong}")
    return 0
