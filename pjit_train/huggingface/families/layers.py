"""Layers of two kinds in config.json: which of them see only a window of tokens."""

from collections.abc import Mapping
from typing import Any

from pjit_train.errors import UserError
from pjit_train.huggingface.families.table import Derived, Key

_KINDS = {"full_attention": False, "sliding_attention": True}
_MOST_LAYERS = 100_000  # before a list of so many is made


def _listed(document: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """True for each local layer, as layer_types says it; None where that is not there."""
    kinds = document.get("layer_types")
    if kinds is None:
        return None
    layers = Key("num_hidden_layers").read(document)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"layer_types must name the kind of each of num_hidden_layers={layers}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _KINDS:
            raise UserError(
                f"layer_types has {kind!r}, which is not supported; {', '.join(_KINDS)} are"
            )
    return tuple(_KINDS[kind] for kind in kinds)


def of_layers(document: Mapping[str, Any], local: tuple[bool, ...]) -> dict[str, Any]:
    """Fields of a model with a window in its local layers.

    Args:
      document: with sliding_window, or null.
    """
    if not any(local):
        return {"window": None, "local_layers": (True,)}
    window = Key("sliding_window", int, None).read(document)
    if window is None:
        raise UserError("sliding_window is null, and layer_types has sliding_attention")
    return {"window": window, "local_layers": local}


def _read_from(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Qwen2's keys: from max_window_layers on, layers have the window."""
    local = _listed(document)
    if not Key("use_sliding_window", bool, False).read(document):
        document = {**document, "sliding_window": None}
    elif "sliding_window" not in document:
        document = {**document, "sliding_window": 4096}
    if local is None:
        layers, first = Key("num_hidden_layers").read(document), document.get("max_window_layers")
        first = 28 if first is None else first
        if type(first) is not int or first < 0:
            raise UserError(f"max_window_layers={first!r} must be a whole number")
        local = (False,)
        if document["sliding_window"] is not None and first < layers:
            if layers > _MOST_LAYERS:
                raise UserError(f"num_hidden_layers={layers} is more than any model has")
            local = (False,) * first + (True,) * (layers - first)
    return of_layers(document, local)


def _write_from(config: Any) -> dict[str, Any]:
    kinds = kinds_of(config)
    first = next((i for i, kind in enumerate(kinds) if _KINDS[kind]), len(kinds))
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def kinds_of(config: Any) -> list[str]:
    """The kind of each layer, as `transformers` names it."""
    names = {local: name for name, local in _KINDS.items()}
    some = [config.window is not None and local for local in config.local_layers]
    return [names[some[i % len(some)]] for i in range(config.num_layers)]


def pattern(default: int):
    """Layers of which every so many-th sees all, by layer_types or sliding_window_pattern.

    Args:
      default: of sliding_window_pattern.
    """

    def read(document: Mapping[str, Any]) -> dict[str, Any]:
        local = _listed(document)
        if local is None:
            period = Key("sliding_window_pattern", int, default).read(document)
            layers = Key("num_hidden_layers").read(document)
            most = min(period - 1, layers)
            if most > _MOST_LAYERS:
                raise UserError(f"sliding_window_pattern={period} is more than any model has")
            local = ((True,) * most + (False,))[:layers]
        if "sliding_window" not in document:
            document = {**document, "sliding_window": 4096}
        return of_layers(document, local)

    def write(config: Any) -> dict[str, Any]:
        window = config.window or 4096  # `transformers` makes the mask even if no layer has it
        return {"sliding_window": window, "layer_types": kinds_of(config)}

    keys = ("sliding_window", "layer_types", "sliding_window_pattern")
    return Derived(("window", "local_layers"), keys, read, write)


def _read_everywhere(document: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Mistral's key: all layers have the window."""
    return {"window": Key("sliding_window", int, None).read(document)}


WINDOW = Derived(
    ("window",),
    ("sliding_window",),
    _read_everywhere,
    lambda config: {"sliding_window": config.window},
)
WINDOW_FROM = Derived(
    ("window", "local_layers"),
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    _read_from,
    _write_from,
)
