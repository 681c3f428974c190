"""config.json of `transformers`, read into a configuration of Torsion and written from one."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pjit_train.errors import UserError
from pjit_train.huggingface.families import FAMILIES, REQUIRED, ROPE_SCALING, Family, Key
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.transformer import TransformerConfig

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
    document = _modern(path, document)
    for name, value in {**family.theirs, "quantization_config": None}.items():
        if (found := _get(document, name)) not in (None, value):
            raise UserError(f"{path}: {name}={found!r} is not supported; only {value!r} is")
    fields = {ours: _value(path, document, key) for ours, key in family.keys.items()}
    try:
        return family, family.config(**family.ours, **fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_config(config: BlockConfig) -> tuple[Family, dict]:
    """The family of a model, and its config.json.

    Raises:
      UserError: no family has such a model.
    """
    name = next((n for n, family in FAMILIES.items() if _is_of(config, family)), None)
    if name is None:
        shown = "; ".join(f"{n}: {_fields(f.ours)}" for n, f in FAMILIES.items())
        raise UserError(f"model: no Hugging Face family is like it; they have {shown}")
    if config.d_model % config.num_heads:
        raise UserError(
            f"model: num_heads={config.num_heads} does not divide d_model={config.d_model}, "
            "which `transformers` requires; use a divisor"
        )
    family = FAMILIES[name]
    fields = {ours: getattr(config, ours) for ours in family.keys}
    written = family.config(**family.ours, **fields)
    if field := difference(config, written):
        ours, theirs = getattr(config, field), getattr(written, field)
        raise UserError(f"model: {name} has no {field}={ours!r}; use {theirs!r}")

    values = dict(family.theirs)
    for ours, key in family.keys.items():
        values |= _written(name, ours, key, fields[ours])
    if classes := values.pop("num_labels", None):
        labels = {i: f"LABEL_{i}" for i in range(classes)}
        values |= {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    if isinstance(config, TransformerConfig):  # their defaults are tokens of released models
        values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    header = {"model_type": name, "architectures": [family.architecture]}
    document = header | {"dtype": config.param_dtype} | _nested(values)
    if rope := document.get("rope_parameters"):  # and where transformers 4 looks for it
        document["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            document["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return family, document


def difference(config: BlockConfig, other: BlockConfig) -> str | None:
    """The first field in which two configurations of one type say different models."""
    free = _FREE_FIELDS | ({"max_len"} if getattr(config, "positions", "") == "rope" else set())
    fields = (f.name for f in dataclasses.fields(config) if f.name not in free)
    return next((f for f in fields if getattr(config, f) != getattr(other, f)), None)


def read_json(path: Path) -> dict:
    """The object in a file; UserError where there is none, or one that says a thing twice."""
    try:
        return parse_json(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); a JSON object is needed") from error


def parse_json(text: str | bytes) -> dict:
    """Parses a JSON text that has to be an object.

    Raises:
      ValueError: there is none, or its brackets are too deep, or an object in it has a key twice,
        of which the `json` module takes the last without a word.
    """

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return found

    try:
        document = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("it is no object")
    return document


def _modern(path: Path | str, document: dict) -> dict:
    """The document with older and implicit spellings replaced by those of the table."""
    document = dict(document)
    match document["model_type"]:
        case "llama":
            rope: dict[str, Any] = {}
            for name in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
                if not isinstance(given := document.get(name) or {}, dict):
                    raise UserError(f"{path}: {name}={given!r} must be an object or null")
                rope |= {key: value for key, value in given.items() if value is not None}
            old_kind = rope.pop("type", "default")
            rope = {"rope_type": old_kind, "rope_theta": document.get("rope_theta")} | rope
            kind, known = rope["rope_type"], {"rope_type", "rope_theta"}
            if kind == "llama3":
                length = document.get("max_position_embeddings")
                rope = {"original_max_position_embeddings": length} | rope
                known |= {key.name.removeprefix("rope_parameters.") for key in ROPE_SCALING}
            if kind in ("default", "llama3") and (odd := sorted(rope.keys() - known)):
                raise UserError(f"{path}: rope_parameters: {some(odd)} is not supported")
            document["rope_parameters"] = rope
        case "opt":
            width = document.get("hidden_size")
            if (projected := document.get("word_embed_proj_dim")) not in (None, width):
                raise UserError(
                    f"{path}: word_embed_proj_dim={projected!r} is not supported; "
                    f"only hidden_size={width!r} is"
                )
        case "gpt2":
            if document.get("n_inner") is None and isinstance(document.get("n_embd"), int):
                document["n_inner"] = 4 * document["n_embd"]
        case "vit":
            if isinstance(labels := document.get("id2label"), dict):
                document["num_labels"] = len(labels)
            for name in ("image_size", "patch_size"):
                match document.get(name):
                    case [height, width] if height == width:
                        document[name] = height
    return document


def _get(document: dict, name: str) -> Any:
    """The value at a dotted name, None where there is none."""
    for part in name.split("."):
        document = (document or {}).get(part)
    return document


def _value(path: Path | str, document: dict, key: Key) -> Any:
    value = _get(document, key.name)
    if value is None:
        if key.default is REQUIRED:
            raise UserError(f"{path}: {key.name} is missing")
        if key.default is None:
            return None
        value = key.default
    if isinstance(key.kind, Mapping):
        if not isinstance(value, str) or value not in key.kind:
            known = ", ".join(key.kind)
            raise UserError(f"{path}: {key.name}={value!r} is not supported; {known} are")
        ours = key.kind[value]
        if isinstance(ours, tuple):
            return tuple(_value(path, document, part) for part in ours)
        return ours
    kinds = (int, float) if key.kind is float else (key.kind,)
    if type(value) not in kinds or (key.kind is int and value < 1):
        wanted = {int: "a positive integer", float: "a number", bool: "true or false"}[key.kind]
        raise UserError(f"{path}: {key.name}={value!r} must be {wanted}")
    return key.kind(value)


def _is_of(config: BlockConfig, family: Family) -> bool:
    fixed = family.ours.items()
    return type(config) is family.config and all(getattr(config, f) == v for f, v in fixed)


def _written(family: str, field: str, key: Key, value: Any) -> dict[str, Any]:
    """Returns Hugging Face's keys and values for a field of Torsion's configuration."""
    if not isinstance(key.kind, Mapping):
        return {key.name: value}
    for theirs, ours in key.kind.items():
        if isinstance(ours, tuple) and isinstance(value, tuple):
            parts = zip(ours, value, strict=True)
            return {key.name: theirs} | {part.name: x for part, x in parts}
        if ours == value:
            return {key.name: theirs}
    raise UserError(f"model: {family} has no {field}={value!r}; use {', '.join(key.kind.values())}")


def _nested(values: dict[str, Any]) -> dict:
    document: dict[str, Any] = {}
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        inner = document
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return document


def _fields(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def some(names: list[str]) -> str:
    """The first few of the names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
