"""`torsion export`: a trained run as a Hugging Face folder."""

from pathlib import Path

from launch.commands.common import add_command, trained_run


def add(commands) -> None:
    export = add_command(
        commands, run, "export", "write a trained run as a Hugging Face folder (safetensors)"
    )
    export.add_argument("run", metavar="RUN", help="run directory")
    export.add_argument("folder", metavar="FOLDER", help="to write; new, or empty")
    export.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    export.add_argument(
        "--dense", action="store_true", help="of a quantized run: plain numbers, not its formats"
    )
    export.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    run = trained_run(args)

    from pjit_train.compressed_tensors import export

    done = export(args.folder, run, Path(args.run), step=args.step, plain=args.dense)
    what = f", {done['bytes']:,} bytes in compressed-tensors formats" if "bytes" in done else ""
    print(f"{args.folder}: the parameters after step {done['step']}{what}")
    return 0
