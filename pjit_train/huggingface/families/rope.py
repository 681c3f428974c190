"""Rotary positions in config.json, as `transformers` 5 and those before it spell them."""

from collections.abc import Mapping
from typing import Any

from pjit_train.errors import UserError
from pjit_train.huggingface.families.table import Derived, Key

_THETA = 10_000.0
_PARTIAL = "partial_rotary_factor"


def _kinds(prefix: str) -> dict[str, tuple[Key, ...] | None]:
    """Values of `TransformerConfig.rope_scaling` by rope_type."""
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "default": None,
        "linear": (Key(f"{prefix}.factor", float),),
        "llama3": tuple(
            Key(f"{prefix}.{name}", int if name.startswith("original") else float)
            for name in llama3
        ),
    }


def standard(
    document: Mapping[str, Any], given: Any, prefix: str, theta: float = _THETA
) -> dict[str, Any]:
    """Rotary parameters of an object in the spelling of `transformers` 5.

    Args:
      given: the object; what it leaves out is taken from the document.
      prefix: its name, for messages.
      theta: where neither says it.

    Raises:
      UserError: it is no object, or says what we do not do.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{prefix}={given!r} must be an object or null")
    rope = {key: value for key, value in given.items() if value is not None}
    kind = rope.pop("type", "default")
    rope = {"rope_type": kind, "rope_theta": theta} | rope
    kinds = _kinds(prefix)
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{prefix}.rope_type={kind!r} is not supported; {', '.join(kinds)} are")
    if kind == "llama3":
        name = "original_max_position_embeddings"
        outside, within = document.get(name), rope.get(name)
        if None not in (outside, within) and outside != within:
            raise UserError(f"{name} is {outside!r}, and {within!r} within {prefix}; remove one")
        length = document.get("max_position_embeddings") if outside is None else outside
        rope = {name: length} | rope
    known = {"rope_type", "rope_theta", _PARTIAL}
    known |= {key.name.removeprefix(f"{prefix}.") for key in kinds[kind] or ()}
    if odd := sorted(rope.keys() - known):
        raise UserError(f"{prefix}: {', '.join(odd[:3])} is not supported where rope_type={kind!r}")
    return rope


def _read(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of rotary positions that are alike in all layers."""
    theta = Key("rope_theta", float, _THETA).read(document)
    found = [
        (name, standard(document, document[name], name, theta))
        for name in ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
        if document.get(name)
    ]
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise UserError("rope_scaling and rope_parameters do not say the same; remove one")
    if not found:
        found = [("rope_parameters", standard(document, {}, "rope_parameters", theta))]
    name, rope = found[-1]
    partial = {_PARTIAL: document.get(_PARTIAL)} | rope
    return {
        "rope_theta": Key(f"{name}.rope_theta", float).read({name: rope}),
        "rope_scaling": scaling(rope, name),
        "partial_rotary_factor": Key(_PARTIAL, float, 1.0).read(partial),
    }


def parameters(theta: float, scaled: tuple | None) -> dict[str, Any]:
    """An object of rotary parameters, as `transformers` 5 has it."""
    written = Key("rope.rope_type", _kinds("rope")).write(scaled)
    named = {name.removeprefix("rope."): value for name, value in written.items()}
    return named | {"rope_theta": theta}


def scaling(rope: Mapping[str, Any], name: str = "rope_parameters") -> tuple | None:
    """`TransformerConfig.rope_scaling` of an object that `standard` made, of this name."""
    return Key(f"{name}.rope_type", _kinds(name)).read({name: rope})


def _write(config: Any) -> dict[str, Any]:
    rope, more = parameters(config.rope_theta, config.rope_scaling), {}
    if config.partial_rotary_factor != 1:
        more[_PARTIAL] = config.partial_rotary_factor
    written = {"rope_parameters": rope | more, "rope_theta": config.rope_theta, **more}
    if config.rope_scaling is not None:  # where transformers 4 looks for it
        written["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return written


_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings")


def _whole(document: Mapping[str, Any]) -> dict[str, Any]:
    fields = _read(document)
    if (share := fields.pop("partial_rotary_factor")) != 1:
        raise UserError(f"{_PARTIAL}={share!r} is not supported; only 1.0 is")
    return fields


def _unscaled(document: Mapping[str, Any]) -> dict[str, Any]:
    fields = _read(document)
    if fields.pop("rope_scaling") is not None:
        raise UserError("rope_scaling is not supported here; only rope_type='default' is")
    return fields


ROPE = Derived(("rope_theta", "rope_scaling"), (*_KEYS, _PARTIAL), _whole, _write)
PARTIAL_ROPE = Derived(("rope_theta", _PARTIAL), (*_KEYS, _PARTIAL), _unscaled, _write)
