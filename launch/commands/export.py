"""`torsion export`: a trained run, or another folder, as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from launch.commands.common import add_command, add_step, is_folder, trained_run
from pjit_train.errors import UserError


def add(commands) -> None:
    export = add_command(
        commands,
        run,
        "export",
        "write a trained run as a Hugging Face folder (safetensors)",
        "Of a Hugging Face folder, the values of its weights as plain float32 numbers: also of one "
        "that is stored in compressed-tensors formats.",
    )
    export.add_argument("run", metavar="RUN_OR_FOLDER", help="run directory, or a folder")
    export.add_argument("folder", metavar="FOLDER", help="to write; new, or empty")
    add_step(export)
    export.add_argument(
        "--dense", action="store_true", help="of a quantized run: plain numbers, not its formats"
    )
    export.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with adapters: these alone, as a folder of the library PEFT",
    )
    export.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    if is_folder(Path(args.run)):
        return _folder(args)
    run = trained_run(args)
    if args.adapter:
        return _adapter(args, run)

    from pjit_train.huggingface.compressed_tensors import export

    done = export(args.folder, run, Path(args.run), step=args.step, plain=args.dense)
    print(f"{args.folder}: the parameters after step {done['step']}, {written(done)}")
    return 0


def _adapter(args, run) -> int:
    """Writes the adapters of a run."""
    if run.adapters is None:
        raise UserError(f"--adapter: {args.run} was trained without adapters; leave it out")
    if run.sparsity is not None or run.quantization is not None:
        raise UserError(
            "--adapter: PEFT has no adapters under a recipe or formats; export the merged model"
        )

    from pjit_train.evaluate import restore_state
    from pjit_train.huggingface import peft, weights
    from pjit_train.program import Program
    from pjit_train.sharding import make_mesh

    weights.check_new(args.folder)
    program = Program(run, make_mesh(run.mesh))
    step, state = restore_state(program, Path(args.run), args.step)
    peft.save(
        Path(args.folder), run.blocks, program.adapters, state["adapters"], run.initial_weights
    )
    print(f"{args.folder}: the adapters after step {step}")
    return 0


def _folder(args) -> int:
    """Writes a folder's weights as plain numbers."""
    if args.adapter:
        raise UserError(f"--adapter is of a run directory; {args.run} is a Hugging Face folder")
    if args.step is not None:
        raise UserError(f"--step is of a run directory; {args.run} is a Hugging Face folder")

    from pjit_train.huggingface import weights
    from pjit_train.huggingface.conventions import read_conventions
    from pjit_train.huggingface.sources import folder_of

    weights.check_new(args.folder)
    source = folder_of(args.run)
    config, params = weights.load(source)
    tokenizer = None
    if (source / "tokenizer.json").is_file():
        tokenizer, _ = read_conventions(source)
    weights.save(args.folder, config, params, tokenizer=tokenizer, like=source)
    print(f"{args.folder}: the weights of {args.run} as float32 numbers")
    return 0


def written(done: dict[str, Any]) -> str:
    """Says in words what `compressed_tensors.export` wrote."""
    text = f"{done['bytes']:,} bytes"
    if done["quantized"]:
        text += " in compressed-tensors formats"
    if counted := done["violations"]:
        text += f"; read back, {sum(counted.values())} groups of {len(counted)} N:M kernels have "
        text += "too many nonzeros"
    return text
