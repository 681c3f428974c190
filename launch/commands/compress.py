"""`torsion compress`: prunes a trained run in one shot."""

import json
from pathlib import Path

from launch.commands.common import add_command, trained_run
from pjit_train.errors import UserError


def add(commands) -> None:
    compress = add_command(
        commands,
        run,
        "compress",
        "prune a trained run in one shot",
        "Attention and feed-forward kernels are pruned, calibrated on the run's training text, and "
        "written as a new run directory: eval, sample and export read it, and train goes on from "
        "it with its zeros kept. A pattern is N:M, N weights kept of every M along the inputs, or "
        "the fraction to prune, such as 0.5.",
    )
    compress.add_argument("run", metavar="RUN", help="run directory")
    compress.add_argument(
        "--method", default="sparsegpt", metavar="NAME", help="magnitude, wanda or sparsegpt (last)"
    )
    compress.add_argument("--pattern", default="2:4", metavar="N:M", help="or a fraction (2:4)")
    compress.add_argument(
        "--layers",
        nargs="+",
        action="extend",
        default=[],
        metavar="REGEX=PATTERN",
        help="other patterns, by name of kernel, such as feed_forward=1:4 attention/out=dense",
    )
    compress.add_argument(
        "--transposable", action="store_true", help="2:4 along the outputs as well"
    )
    compress.add_argument(
        "--sequences", type=int, default=128, metavar="N", help="of calibration text (128)"
    )
    compress.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    compress.add_argument(
        "--out", metavar="DIR", help="run directory to write (default: RUN-compressed-NAME)"
    )
    compress.add_argument("--json", action="store_true", help="print one JSON object")
    compress.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    layers = {}
    for entry in args.layers:
        expression, equals, pattern = entry.rpartition("=")
        if not equals:
            raise UserError(f"--layers {entry}: want REGEX=PATTERN, such as feed_forward=1:4")
        layers[expression] = pattern
    if args.method not in (methods := ("magnitude", "wanda", "sparsegpt")):
        raise UserError(f"--method {args.method} is unknown; use {', '.join(methods)}")
    directory = Path(args.run)
    named = directory if directory.name else directory.resolve()
    out = Path(args.out or f"{named}-compressed-{args.method}")
    if out.exists():
        raise UserError(f"{out} exists; remove it, or use another --out")
    run = trained_run(args)

    import dataclasses

    from launch.configure import build_run
    from pjit_train.compress import KERNELS, compress, kernel_patterns

    layers.setdefault(KERNELS, args.pattern)
    patterns = kernel_patterns(run.model, layers, transposable=args.transposable)
    kept = {f"^{name}$": pattern for name, pattern in patterns.items()}
    binding = (
        "from sparsity import one_shot\n"
        "run.Run.sparsity = @one_shot.KeepZeros()\n"
        f"one_shot.KeepZeros.layers = {kept}"
    )
    sparse_run, config_text = build_run([str(directory / "config.gin")], [binding])
    report = compress(
        run,
        directory,
        dataclasses.replace(sparse_run, mesh=run.mesh),
        out,
        config_text=config_text,
        method=args.method,
        patterns=patterns,
        transposable=args.transposable,
        sequences=args.sequences,
        step=args.step,
    )
    if args.json:
        print(json.dumps({"out": str(out), **report}))
        return 0
    print(f"{out}: step {report['step']} of {directory}, pruned by {args.method}\n")
    print(f"{'kernel':<32} pattern  zeros    violations  error")
    for name, row in report["kernels"].items():
        violations = "-" if row["violations"] is None else row["violations"]
        figures = f"{row['sparsity']:<8.2%} {violations:<11} {row['error']:.4f}"
        print(f"{name:<32} {row['pattern']:<8} {figures}")
    print(f"\n{'':<20} before    after")
    for name, value in report["before"].items():
        print(f"{name:<20} {value:<9.5g} {report['after'][name]:.5g}")
    return 0
