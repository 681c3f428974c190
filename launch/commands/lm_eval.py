"""`torsion lm_eval`: lm-evaluation-harness, with Torsion's models."""

import argparse
import importlib.util
import sys

from launch.commands.common import add_command
from pjit_train.errors import UserError


def add(commands) -> None:
    lm_eval = add_command(
        commands,
        run,
        "lm_eval",
        "lm-evaluation-harness, with the model torsion",
        "Every argument is lm-eval's own, such as --model torsion --model_args model=RUN_OR_FOLDER "
        "--tasks arc_easy.",
        # No argument is an option of this command.
        prefix_chars="\0",
        add_help=False,
    )
    lm_eval.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG")


def run(args, began: float) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm_eval: lm-eval is not installed; pip install 'torsion[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    # By name, so that JAX is imported by what computes only.
    if "torsion" not in model_registry:
        model_registry.register("torsion", target="launch.lm_eval:Torsion")
    sys.argv = ["lm-eval", *args.arguments]  # where its parser looks
    cli_evaluate()
    return 0
