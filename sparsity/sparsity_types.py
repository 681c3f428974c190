"""The structures of sparsity that JaxPruner (Lee et al., 2023) knows, under its names."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Sparsity of any entries of an array, without groups."""


@dataclasses.dataclass(frozen=True)
class NByM:
    """N:M: n entries kept of every m consecutive ones.

    Attributes:
      n, m: 1 <= n <= m (checked where a mask is made).
      axis: the default is JaxPruner's, the last axis, which is the *output* axis of a Flax kernel
        [in, out]. Hardware wants the contraction axis, which is -2 there.
    """

    n: int
    m: int
    axis: int = -1


@dataclasses.dataclass(frozen=True)
class Block:
    """Sparsity of rectangles of weights, each kept or pruned whole.

    Attributes:
      block_shape: (height, width) over the first two axes, as in JaxPruner's code.
      use_avg_pooling: a block's score is the mean of its scores, else the greatest.
    """

    block_shape: tuple[int, int]
    use_avg_pooling: bool = True


@dataclasses.dataclass(frozen=True)
class Channel:
    """Whole slices along an axis; a slice's score is the sum of its scores."""

    axis: int = -1


SparsityType = Unstructured | NByM | Block | Channel


def is_sparsity_type(instance_to_check: object) -> bool:
    """Tells whether an object is of one of the sparsity types."""
    return isinstance(instance_to_check, SparsityType)


def parse_sparsity_type(text: str) -> SparsityType:
    """The type that a text names: 'unstructured', 'nm_2,4' or '2:4', 'block_4,4', 'channel_0'.

    Raises:
      ValueError: it names none.
    """
    kind, _, numbers = text.strip().partition("_")
    if ":" in kind and not numbers:
        kind, numbers = "nm", kind.replace(":", ",")
    try:
        values = [int(number) for number in numbers.split(",")] if numbers else []
    except ValueError:
        values = None
    match kind, values:
        case "unstructured", []:
            return Unstructured()
        case "nm", [n, m] if 1 <= n <= m:
            return NByM(n, m)
        case "block", [height, width] if height > 0 and width > 0:
            return Block((height, width))
        case "channel", [axis]:
            return Channel(axis)
    raise ValueError(
        f"sparsity type {text!r} is unknown; use unstructured, N:M with N from 1 to M (as 2:4 or "
        "nm_2,4), block_HEIGHT,WIDTH (as block_4,4) or channel_AXIS (as channel_-1)"
    )
