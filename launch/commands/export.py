"""`torsion export`: a trained run as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from launch.commands.common import add_command, add_step, trained_run


def add(commands) -> None:
    export = add_command(
        commands, run, "export", "write a trained run as a Hugging Face folder (safetensors)"
    )
    export.add_argument("run", metavar="RUN", help="run directory")
    export.add_argument("folder", metavar="FOLDER", help="to write; new, or empty")
    add_step(export)
    export.add_argument(
        "--dense", action="store_true", help="of a quantized run: plain numbers, not its formats"
    )
    export.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    run = trained_run(args)

    from pjit_train.huggingface.compressed_tensors import export

    done = export(args.folder, run, Path(args.run), step=args.step, plain=args.dense)
    print(f"{args.folder}: the parameters after step {done['step']}, {written(done)}")
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
