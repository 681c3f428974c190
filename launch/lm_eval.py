"""Registration of Torsion's models with lm-evaluation-harness: `import launch.lm_eval` is enough.

Then `lm_eval.simple_evaluate(model="torsion", model_args="model=FOLDER", ...)` takes them, and so
does `torsion lm_eval`.
"""

from typing import Any

from lm_eval.api.registry import register_model

from launch.commands.common import opened_model
from launch.lm_eval_arguments import read_arguments
from pjit_train.evaluation.harness import TorsionLM


@register_model("torsion")
class Torsion(TorsionLM):
    """The model of a run directory or a Hugging Face folder, by arguments of `lm-eval`.

    Args:
      arguments: see `lm_eval_arguments.read_arguments`.

    Raises:
      UserError: as `read_arguments`, `opened_model` and `TorsionLM`.
    """

    def __init__(self, **arguments: Any):
        args = read_arguments(arguments)
        super().__init__(
            opened_model(args),
            max_length=args.max_length,
            add_bos_token=args.add_bos_token,
            seed=args.seed,
        )
