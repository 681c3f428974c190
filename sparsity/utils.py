"""Trees of masks beside trees of parameters, and summaries of how sparse a tree is."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def is_none(x: Any) -> bool:
    """True for None: as `is_leaf`, it makes the None of an unpruned parameter a leaf."""
    return x is None


def key_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The keys on the way to a leaf, such as ("blocks", "query", "kernel").

    Dictionary keys as they are, attribute names, indices of sequences; ("kernel",) at the root.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]  # the array within an nnx.Variable
    return tuple(_entry(entry) for entry in path) or ("kernel",)


def name_of(path: tuple[Any, ...]) -> str:
    """The keys on the way to a leaf, joined by "/"."""
    return "/".join(map(str, key_of(path)))


def map_entries(f: Callable[..., Any], params: Any, *trees: Any, what: str = "masks") -> Any:
    """f(path, leaf, *entries) for every leaf of `params` and what the other trees have there.

    Args:
      trees: like `params`, where an entry may be None (or any tree).
      what: the name of the other trees, for the error.

    Raises:
      ValueError: a tree has another structure; the line names the first place.
    """
    structure: Any
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    columns = [_entries(structure, tree, leaves, what) for tree in trees]
    rows = zip(*columns, strict=True) if columns else [()] * len(leaves)
    return structure.unflatten(
        [f(path, leaf, *row) for (path, leaf), row in zip(leaves, rows, strict=True)]
    )


def summarize_sparsity(param_tree: Any, only_total_sparsity: bool = False) -> dict[str, Any]:
    """The fraction of zeros of each array, and of all of them.

    Args:
      param_tree: parameters or masks; None leaves count for nothing.
      only_total_sparsity: leave out the entries of single arrays.

    Returns:
      float32 scalars "_total_sparsity", "_nparams_nnz" and "_nparams", and by name ("block/kernel")
      the sparsity of each array, None for None.
    """
    named = jax.tree_util.tree_leaves_with_path(param_tree, is_leaf=is_none)
    arrays = {name_of(path): leaf for path, leaf in named}
    # float32 sums, relative error 1e-7: an int32 overflows at two billion parameters.
    zeros = {k: jnp.float32(jnp.sum(x == 0)) for k, x in arrays.items() if x is not None}
    sizes = {k: jnp.float32(jnp.size(x)) for k, x in arrays.items() if x is not None}
    total_zeros = jnp.float32(sum(zeros.values()))
    total = jnp.float32(sum(sizes.values()))
    summary = {}
    if not only_total_sparsity:
        summary = {k: zeros[k] / sizes[k] if k in zeros else None for k in arrays}
    return summary | {
        "_total_sparsity": total_zeros / jnp.maximum(total, 1),
        "_nparams_nnz": total - total_zeros,
        "_nparams": total,
    }


def summarize_intersection(
    mask_tree1: Any, mask_tree2: Any, only_total_intersection: bool = False
) -> dict[str, Any]:
    """The fraction of the first masks' ones that are ones in the second masks too.

    Args:
      mask_tree1: masks; an entry may be None, and then counts for nothing.
      mask_tree2: masks of the same shapes.
      only_total_intersection: leave out the entries of single masks.

    Returns:
      float32 scalars: "_total_intersection", and the fraction of each mask by name, None where
      either mask is None. The fraction of a mask without ones is 0.
    """
    common, ones, summary = [jnp.float32(0)], [jnp.float32(0)], {}

    def count(path: tuple[Any, ...], first: jax.Array | None, second: jax.Array | None) -> None:
        if first is None or second is None:
            summary[name_of(path)] = None
            return
        common.append(jnp.float32(jnp.sum((first == 1) & (second == 1))))
        ones.append(jnp.float32(jnp.sum(first == 1)))
        summary[name_of(path)] = common[-1] / jnp.maximum(ones[-1], 1)

    named, structure = jax.tree_util.tree_flatten_with_path(mask_tree1, is_leaf=is_none)
    for (path, first), second in zip(
        named, _entries(structure, mask_tree2, named, "mask_tree2"), strict=True
    ):
        count(path, first, second)
    if only_total_intersection:
        summary = {}
    return summary | {"_total_intersection": sum(common) / jnp.maximum(sum(ones), 1)}


def _entry(entry: Any) -> Any:
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return getattr(entry, field)
    return str(entry)


def _entries(
    structure: jax.tree_util.PyTreeDef, tree: Any, named: Sequence[tuple[Any, Any]], what: str
) -> list[Any]:
    """Lists the entries of `tree` at the leaves of `structure`, whose paths are in `named`."""
    if tree is None:
        return [None] * len(named)
    try:
        entries: list[Any] = structure.flatten_up_to(tree)
        return entries
    except ValueError:
        places = [name_of(path) for path, _ in named]
        given = [
            name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_none)
        ]
        missing = [place for place in places if place not in given]
        beyond = [place for place in given if place not in places]
        wrong = f"nothing at {missing[0]!r}" if missing else f"an entry {beyond[0]!r} too many"
        if not missing and not beyond:
            wrong = "containers of another type"
        raise ValueError(
            f"{what}: {wrong}; the tree must be like the parameters', an entry or None for each"
        ) from None
