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
    export.set_defaults(mesh=None, devices=None)


def run(args, began: float) -> int:
    run = trained_run(args)

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
