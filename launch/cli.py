"""The command `torsion`.

Whatever is slow to import (JAX, gin, the data libraries) is imported by the command that needs it.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

from pjit_train.errors import TrainingError, UserError

_AXES = ("data", "fsdp", "sequence", "tensor")

_DESCRIPTION = """\
Torsion trains sparse and quantized language models on a sharded mesh.

A first run, a few minutes on a laptop:

  torsion train configs/quickstart.gin

Stop it with Ctrl-C: it saves, and the same command goes on from there.
"""

_NO_CONFIG = """\
torsion train: give it a configuration. A first run, a few minutes on a laptop:

  torsion train configs/quickstart.gin

It trains a tiny model on the text of Python's standard library, in runs/quickstart; stopped, it
goes on where it was when run again. Any parameter can be changed:

  torsion train configs/quickstart.gin --steps 50 --out runs/short \\
    --gin 'optimizers.AdamW.learning_rate = 1e-3'

Another model, and the shared defaults: torsion train configs/base.gin configs/models/gpt2.gin
All options: torsion train --help
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (training failed), 2 (a mistake), 130 (^C)."""
    began = time.monotonic()
    args = parser().parse_args(argv)
    try:
        trains = args.command is _study or (args.command is _train and args.configs)
        if argv is None and trains:
            from launch.process import use_huge_pages

            use_huge_pages()
        return args.command(args, began)
    except (UserError, TrainingError) as error:
        print("torsion:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # whoever read the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as if by SIGPIPE
    except KeyboardInterrupt:
        print("torsion: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; the function of a command is `args.command`."""
    top = argparse.ArgumentParser(
        prog="torsion",
        description=_DESCRIPTION,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32
        ),
        epilog="torsion COMMAND --help tells the options of a command.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command, name: str, help: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}. {description}",
        )
        sub.set_defaults(command=command)
        return sub

    train = add(
        _train,
        "train",
        "train a model, or go on with its training",
        "The run is what the gin files describe, in their order, changed by --gin, changed by the "
        "other options. Files are looked for here, then in the checkout and its configs/. "
        "Run again with the same --out, it resumes from its newest checkpoint.",
    )
    train.add_argument("configs", nargs="*", metavar="CONFIG.gin", help="what to train")
    train.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="BINDING",
        help="change a parameter, such as 'run.Run.eval_every = 50'; may be repeated",
    )
    train.add_argument("--steps", type=int, metavar="N", help="updates of the whole run")
    train.add_argument("--log-every", type=int, metavar="N", help="steps between rows of metrics")
    train.add_argument("--seed", type=int, metavar="N", help="of parameters, data and samples")
    _add_machine(train)
    train.add_argument(
        "--out",
        metavar="DIR",
        help="run directory (default: runs/ and the name of the last CONFIG)",
    )
    group = train.add_argument_group("several processes, started by hand, alike but for their id")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")

    evaluate = add(_eval, "eval", "validation loss of a trained run")
    evaluate.add_argument("run", metavar="RUN", help="run directory")
    evaluate.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    _add_machine(evaluate, "one device")

    sample = add(_sample, "sample", "text from a trained run")
    sample.add_argument("run", metavar="RUN", help="run directory")
    sample.add_argument(
        "--prompt", nargs="+", default=[""], metavar="TEXT", help="texts to continue (default: '')"
    )
    sample.add_argument("--tokens", type=int, default=200, metavar="N", help="how many (200)")
    sample.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest (0.8)"
    )
    sample.add_argument("--top-k", type=int, metavar="K", help="of the K likeliest tokens only")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="other seed, other text")
    sample.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    _add_machine(sample, "one device")

    export = add(_export, "export", "write a trained run as a Hugging Face folder (safetensors)")
    export.add_argument("run", metavar="RUN", help="run directory")
    export.add_argument("folder", metavar="FOLDER", help="to write; new, or empty")
    export.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    export.set_defaults(mesh=None, devices=None)

    compress = add(
        _compress,
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

    study = add(
        _study,
        "study",
        "train and compare the published N:M recipes",
        "Each run of the study is a run directory in --out, named by recipe, pattern and seed. Run "
        "again with the same --out, it goes on where it was; several such commands at once share "
        "the runs. At the end, table.md, results.json and recipes.png are in --out.",
    )
    study.add_argument("what", choices=("recipes",), help="which study")
    study.add_argument(
        "--size",
        default="small",
        metavar="SIZE",
        help="small (default), overnight, or a gin file like those in configs/studies",
    )
    study.add_argument("--seeds", type=int, metavar="N", help="runs of each kind (as configured)")
    study.add_argument(
        "--table", action="store_true", help="train nothing: table and figure of what is there"
    )
    study.add_argument(
        "--out", metavar="DIR", help="of the runs (default: runs/study- and the gin file's name)"
    )

    tokenizer = add(
        _tokenizer, "tokenizer", "train a byte-level BPE tokenizer on .txt and .jsonl files"
    )
    tokenizer.add_argument("files", nargs="+", metavar="FILE", help="paths, or globs in quotes")
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens")
    tokenizer.add_argument(
        "--out", default="tokenizer.json", metavar="PATH", help="where to write (tokenizer.json)"
    )

    slice = add(
        _slice,
        "slice",
        "say what the interconnect of a TPU v4 slice gives",
        "Distances, bisection, and all-to-all throughput as an exact optimum with its proof.",
    )
    slice.add_argument("shape", metavar="SHAPE", help="such as 4x4x8 or 4x4x8_twisted")
    slice.add_argument(
        "--failed-ocs",
        metavar="D,I,J",
        help="an optical switch that fails, such as x,0,0: dimension and in-face position",
    )
    slice.add_argument("--json", action="store_true", help="print one JSON document")

    completion = add(
        _completion,
        "completion",
        "print the completion script of a shell",
        'For bash: eval "$(torsion completion bash)"',
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    return top


def _add_machine(sub: argparse.ArgumentParser, default: str = "as configured") -> None:
    sub.add_argument(
        "--mesh",
        metavar="AXES",
        help=f"such as data=2,fsdp=2,tensor=2; -1 takes what is left (default: {default})",
    )
    sub.add_argument("--devices", type=int, metavar="N", help="emulate N CPU devices")


def _train(args, began: float) -> int:
    if not args.configs:
        print(_NO_CONFIG, end="", file=sys.stderr)
        return 2
    from launch import process

    mesh = _mesh_bindings(args.mesh)
    processes = args.coordinator, args.process_id, args.num_processes
    process.check_processes(*processes)
    process.prepare(args.devices)

    from launch.configure import build_run
    from launch.directory import check_directory, steps_before

    options = {"steps": args.steps, "log_every": args.log_every, "seed": args.seed}
    short = [f"run.Run.{name} = {value}" for name, value in options.items() if value is not None]
    run, config_text = build_run(args.configs, args.gin + short + mesh)
    directory = Path(args.out or Path("runs") / Path(args.configs[-1]).stem)
    check_directory(directory, config_text)
    before = steps_before(directory)
    process.join(*processes)

    from pjit_train.loop import train

    train(run, directory, config_text=config_text, steps_before=before, began=began)
    return 0


def _eval(args, began: float) -> int:
    run = _trained_run(args)

    from pjit_train.evaluate import evaluate

    figures = evaluate(run, Path(args.run), step=args.step)
    if args.json:
        print(json.dumps(figures))
        return 0
    kernels = figures.pop("kernels", {})
    for name, value in figures.items():
        print(f"{name:<20} {value:.6g}" if isinstance(value, float) else f"{name:<20} {value}")
    if kernels:
        print(f"\n{'kernel':<36} pattern  zeros    groups with too many nonzeros")
    for name, row in kernels.items():
        wrong = "-" if row["groups"] is None else f"{row['violations']} of {row['groups']}"
        print(f"{name:<36} {row['pattern']:<8} {row['sparsity']:<8.2%} {wrong}")
    return 0


def _sample(args, began: float) -> int:
    run = _trained_run(args)

    from pjit_train.sample import sample

    texts = sample(
        run,
        Path(args.run),
        prompts=args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        step=args.step,
    )
    print("\n\n".join(texts))
    return 0


def _export(args, began: float) -> int:
    run = _trained_run(args)

    from pjit_train.evaluate import restore_weights
    from pjit_train.huggingface import save
    from pjit_train.program import Program
    from pjit_train.sharding import make_mesh
    from sparsity.kernels import dense_tree

    program = Program(run, make_mesh(run.mesh))
    step, weights = restore_weights(program, Path(args.run), args.step)
    save(args.folder, run.model, dense_tree(weights))
    print(f"{args.folder}: the parameters after step {step}")
    return 0


def _compress(args, began: float) -> int:
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
    run = _trained_run(args)

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


def _study(args, began: float) -> int:
    from launch import process

    process.prepare()

    from launch import study

    file = study.SIZES.get(args.size, args.size)
    out = Path(args.out or Path("runs") / f"study-{Path(file).stem}")
    return study.study_recipes(file, out, seeds=args.seeds, only_table=args.table)


def _slice(args, began: float) -> int:
    from launch.slices import describe, report

    found = report(args.shape, args.failed_ocs)
    print(json.dumps(found) if args.json else describe(found))
    return 0


def _trained_run(args):
    """The run of a run directory, on the mesh that the options say."""
    from launch.directory import config_file

    path = config_file(Path(args.run))
    mesh = _mesh_bindings(",".join(f"{axis}=1" for axis in _AXES)) + _mesh_bindings(args.mesh)

    from launch import process

    process.prepare(args.devices)

    from launch.configure import build_run

    return build_run([str(path)], mesh)[0]


def _mesh_bindings(mesh: str | None) -> list[str]:
    """Bindings for `data=2,fsdp=2`."""
    if mesh is None:
        return []
    sizes = {}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--mesh {mesh}: {part!r} is no AXIS=SIZE, such as fsdp=2") from None
        if axis not in _AXES:
            raise UserError(f"--mesh {mesh}: no axis {axis!r}; use {', '.join(_AXES)}")
    bindings = [f"sharding.MeshShape.{axis} = {size}" for axis, size in sizes.items()]
    return ["run.Run.mesh = @sharding.MeshShape()", *bindings]


def _tokenizer(args, began: float) -> int:
    from pjit_train.data import TextFiles, train_tokenizer

    if Path(args.out).exists():
        raise UserError(f"{args.out} exists; remove it, or use another --out")
    # With validation files of its own, even none, a source has all of its text in "train".
    texts = TextFiles(train=args.files, validation=()).documents("train")
    trained = train_tokenizer(texts, vocab_size=args.vocab_size, path=args.out)
    print(
        f"{args.out}: {trained.vocab_size} tokens; to train with it: "
        "--gin 'text.TextData.tokenizer = @tokenizers.TokenizerJson()' "
        f"--gin 'tokenizers.TokenizerJson.path = \"{args.out}\"'"
    )
    return 0


def _completion(args, began: float) -> int:
    import shtab

    top = parser()
    [commands] = [action for action in top._actions if isinstance(action.choices, dict)]
    kinds = {"configs": shtab.FILE, "files": shtab.FILE}
    kinds |= {"run": shtab.DIRECTORY, "folder": shtab.DIRECTORY}
    for name, sub in commands.choices.items():
        for action in sub._actions:
            if action.dest == "out":
                folder = name in ("train", "compress", "study")
                action.complete = shtab.DIRECTORY if folder else shtab.FILE
            elif action.dest in kinds:
                action.complete = kinds[action.dest]
    print(shtab.complete(top, args.shell))
    return 0
