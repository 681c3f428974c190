"""`torsion eval`: the validation metrics of a trained run."""

import json
from pathlib import Path

from launch.commands.common import add_command, add_machine, add_step, trained_run


def add(commands) -> None:
    evaluate = add_command(commands, run, "eval", "validation figures of a trained run")
    evaluate.add_argument("run", metavar="RUN", help="run directory")
    add_step(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine(evaluate, "one device")


def run(args, began: float) -> int:
    run = trained_run(args)

    from pjit_train.evaluate import evaluate

    figures = evaluate(run, Path(args.run), step=args.step)
    if args.json:
        print(json.dumps(figures))
        return 0
    kernels, classes = figures.pop("kernels", {}), figures.pop("classes", {})
    for name, value in figures.items():
        print(f"{name:<20} {value:.6g}" if isinstance(value, float) else f"{name:<20} {value}")
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
