"""Names of formats in compressed-tensors: the arguments of quantization of its checkpoints."""

from typing import Any, NamedTuple


class Layout(NamedTuple):
    """Layout in which compressed-tensors stores the weights of a format.

    Attributes:
      name: of the layout.
      weights: the arguments of quantization of the weights.
    """

    name: str
    weights: dict[str, Any]


def _arguments(bits: int, kind: str, strategy: str, size: int | None = None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": size,
        "dynamic": False,
    }


def weights(bits: int, kind: str, block: int | None = None) -> dict[str, Any]:
    """Arguments with a scale to an output, or to a block of its inputs.

    Args:
      kind: "int" or "float".
    """
    return _arguments(bits, kind, "channel" if block is None else "group", block)


def tiles(bits: int, kind: str, outputs: int, inputs: int) -> dict[str, Any]:
    """Arguments with a scale to a tile of outputs and inputs."""
    return _arguments(bits, kind, "block") | {"block_structure": [outputs, inputs]}


def per_token(bits: int, kind: str) -> dict[str, Any]:
    """Arguments of activations with a scale to a token, taken as it comes."""
    return _arguments(bits, kind, "token") | {"dynamic": True}
