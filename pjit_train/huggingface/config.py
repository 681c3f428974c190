"""config.json of `transformers`, read into a configuration of Torsion and written from one."""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.files import read_json
from pjit_train.huggingface.families import ABSENT, FAMILIES, Family, find
from pjit_train.huggingface.families.keys import EMPTY, HARMLESS, MEANINGFUL
from pjit_train.huggingface.quantization_config import check_quantization
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.transformer import TransformerConfig

log = logging.getLogger("torsion")

# How a model runs or begins, not what it computes.
_FREE_FIELDS = {
    *("layers", "remat", "dtype", "param_dtype"),
    *("attention", "attention_tile_rows", "attention_measured", "attention_sequence"),
    *("init_std", "scale_residual_init", "position_init_std"),
}


def read_config(path: Path) -> tuple[Family, BlockConfig]:
    """The family and the configuration of a config.json.

    Raises:
      UserError: the file cannot be read, or says a model that we do not have.
    """
    return parse_config(path, read_json(path))


def parse_config(path: Path | str, document: dict) -> tuple[Family, BlockConfig]:
    """The family and the configuration of what a config.json says; see `read_config`.

    Args:
      path: it is named so in messages.
    """
    model_type = document.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"{path}: model_type={model_type!r} is unknown; use {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    try:
        _check_keys(path, model_type, document)
        document = family.modern(document)
        if (quantization := document.get("quantization_config")) is not None:
            check_quantization(quantization)
        for name, value in family.theirs.items():
            if (found := find(document, name)) not in (ABSENT, None, value):
                raise UserError(f"{name}={found!r} is not supported; only {value!r} is")
        fields = {ours: key.read(document) for ours, key in family.keys.items()}
        for part in family.derived:
            fields |= part.read(document)
        return family, family.config(**family.ours, **fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_keys(path: Path | str, model_type: str, document: Mapping[str, Any]) -> None:
    """Refuses keys that change what other models compute, and warns of those that nobody knows.

    Raises:
      UserError: such a key has a value that is more than nothing; or the folder is of another
        class of the family.
    """
    family = FAMILIES[model_type]
    classes = document.get("architectures") or []
    base = re.sub("(ForCausalLM|LMHeadModel|ForImageClassification)$", "Model", family.architecture)
    named = isinstance(classes, list) and (family.architecture in classes or base in classes)
    if classes and not named:
        raise UserError(
            f"architectures={classes!r} of model_type={model_type!r} is not supported; only "
            f"{family.architecture} is"
        )
    known = family.names | set(family.harmless) | HARMLESS
    odd = [name for name, value in document.items() if name not in known and value not in EMPTY]
    for name in odd:
        if name in MEANINGFUL:
            raise UserError(
                f"{name}={document[name]!r} is not supported where model_type={model_type!r}"
            )
    if odd:
        _warn(f"{path}: {some(odd)}: not known, and passed over, as `transformers` does")


@functools.lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Logs a warning once in a process, however often a file is read."""
    log.warning(message)


def write_config(config: BlockConfig) -> tuple[Family, dict]:
    """The first family that has such a model, and its config.json.

    Raises:
      UserError: no family has.
    """
    like = {n: family for n, family in FAMILIES.items() if _is_of(config, family)}
    if not like:
        shown = "; ".join(f"{n}: {_fields(f.ours)}" for n, f in FAMILIES.items())
        raise UserError(f"model: no Hugging Face family is like it; they have {shown}")
    reasons = {name: _unlike(config, name) for name in like}
    name = next((name for name, reason in reasons.items() if reason is None), None)
    if name is None:
        raise UserError(f"model: {next(iter(reasons.values()))}")
    family = FAMILIES[name]
    values = family.theirs | _values(config, family)
    if classes := values.pop("num_labels", None):
        labels = {i: f"LABEL_{i}" for i in range(classes)}
        values |= {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    if isinstance(config, TransformerConfig):  # their defaults are tokens of released models
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    header = {"model_type": name, "architectures": [family.architecture]}
    return family, header | {"dtype": config.param_dtype} | values


def _values(config: BlockConfig, family: Family) -> dict[str, Any]:
    """Keys of config.json that say a configuration, and their values."""
    values: dict[str, Any] = {}
    for ours, key in family.keys.items():
        try:
            values |= key.write(getattr(config, ours))
        except UserError as error:
            raise UserError(f"has no {ours}={getattr(config, ours)!r}; {error}") from error
    for part in family.derived:
        values |= part.write(config)
    return values


def _unlike(config: BlockConfig, name: str) -> str | None:
    """Says what of a model the family does not have; None where it has all."""
    family = FAMILIES[name]
    fields = {ours: getattr(config, ours) for ours in family.fields}
    try:
        written = family.config(**family.ours, **fields)
        if field := difference(config, written):
            ours, theirs = getattr(config, field), getattr(written, field)
            return f"{name} has no {field}={ours!r}; use {theirs!r}"
        _values(config, family)
    except UserError as error:
        return f"{name} {error}".replace(f"{name} model: ", "")
    if family.heads_divide and config.d_model % config.num_heads:
        return (
            f"num_heads={config.num_heads} does not divide d_model={config.d_model}, which "
            f"`transformers` requires of {name}; use a divisor"
        )
    return None


def difference(config: BlockConfig, other: BlockConfig) -> str | None:
    """The first field in which two configurations of one type say different models."""
    free = _FREE_FIELDS | ({"max_len"} if getattr(config, "positions", "") == "rope" else set())
    fields = (f.name for f in dataclasses.fields(config) if f.name not in free)
    return next((f for f in fields if getattr(config, f) != getattr(other, f)), None)


def _is_of(config: BlockConfig, family: Family) -> bool:
    fixed = family.ours.items()
    return type(config) is family.config and all(getattr(config, f) == v for f, v in fixed)


def _fields(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def some(names: list[str]) -> str:
    """The first few of the names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
