"""The gin file of a tiny run, which tests change by further bindings."""

from typing import Any

MODULES = (
    "pjit_train.checkpoint",
    "pjit_train.optimizers",
    "pjit_train.run",
    "pjit_train.sharding",
    "pjit_train.models.transformer",
    "pjit_train.data.sources",
    "pjit_train.data.text",
)
TINY = {
    "run.Run.model": "@transformer.TransformerConfig()",
    "run.Run.steps": 2,
    "run.Samples.tokens": 0,
    "transformer.TransformerConfig.vocab_size": 256,
    "transformer.TransformerConfig.max_len": 32,
    "transformer.TransformerConfig.d_model": 16,
    "transformer.TransformerConfig.num_layers": 1,
    "transformer.TransformerConfig.num_heads": 2,
    "transformer.TransformerConfig.d_ff": 32,
    "text.TextData.sources": "[@sources.TextFiles()]",
    "text.TextData.seq_len": 16,
    "text.TextData.batch_size": 8,
    "sources.TextFiles.train": "corpus.txt",
}


def tiny(bindings: dict[str, Any] | None = None, imports: tuple[str, ...] = ()) -> str:
    """A run of one layer over the text in `corpus.txt`, a second long.

    Args:
      bindings: instead of those of `TINY`, or besides: values, or references as gin writes them.
      imports: modules that these name beyond `MODULES`, by their full names.
    """
    lines = ["from __gin__ import dynamic_registration"]
    for module in (*MODULES, *imports):
        package, _, name = module.rpartition(".")
        lines.append(f"from {package} import {name}")
    lines.append("include 'configs/base.gin'")
    for name, value in (TINY | (bindings or {})).items():
        refers = isinstance(value, str) and "@" in value
        lines.append(f"{name} = {value if refers else repr(value)}")
    return "\n".join(lines) + "\n"
