"""Arguments of the model `torsion` of lm-evaluation-harness; reading them needs no `lm_eval`."""

import argparse
from collections.abc import Mapping
from typing import Any

from launch.commands.common import AXES, Parser, add_model, whole
from pjit_train.errors import UserError

# Arguments that lm-eval gives to every model: batches are made by length, on JAX's devices.
_OF_LM_EVAL = ("batch_size", "max_batch_size", "device")


def read_arguments(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """The options of `opened_model`, and those of `TorsionLM`, that lm-eval's `model_args` say.

    `model` (or `pretrained`, as lm-eval's other models call it) is a run directory, a Hugging Face
    folder, a .gguf file or hf:OWNER/NAME; `step`, `dtype` and `devices` are as on the command line;
    the mesh is `mesh=data=2,fsdp=2` or `data=2,fsdp=2`.

    Raises:
      UserError: an argument that is not known, or no value of it.
    """
    given = {name: x for name, x in arguments.items() if name not in _OF_LM_EVAL and x is not None}
    models = [given.pop(name) for name in ("model", "pretrained") if name in given]
    if len(models) != 1:
        raise UserError("model_args: give one model=RUN_OR_FOLDER")
    # lm-eval takes what a comma separates for arguments of their own.
    axes = [f"{axis}={given.pop(axis)}" for axis in AXES if axis in given]
    if "mesh" in given or axes:
        given["mesh"] = ",".join([str(given[name]) for name in ("mesh",) if name in given] + axes)
    options = [f"--{name}={value}" for name, value in given.items()]
    return _parser().parse_args([*options, "--", str(models[0])])


def _parser() -> Parser:
    parser = _Arguments(prog="torsion lm_eval", add_help=False, allow_abbrev=False)
    add_model(parser)
    parser.add_argument("--max_length", type=whole(2))
    parser.add_argument("--add_bos_token", type=_truth)
    parser.add_argument("--seed", type=whole(), default=0)
    return parser


class _Arguments(Parser):
    def exit(self, status: int = 0, message: str | None = None):
        text = (message or "").removeprefix("torsion: ").partition("; see ")[0].strip()
        raise UserError(f"model_args: {text.replace('--', '')}")


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: want True or False")
    return text == "True"
