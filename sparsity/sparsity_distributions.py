"""Distributions of a total sparsity among parameters.

A distribution maps a tree of parameters to a tree of sparsities, with None for a parameter that is
not pruned. It looks at keys and shapes only.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sparsity.ranges import Count, NonNegative, Whole, check_number
from sparsity.utils import key_of

FilterFnType = Callable[[tuple[Any, ...], Any], bool]
"""(keys on the way to a parameter, the parameter) -> whether it is pruned."""

CustomSparsityMapType = Mapping[tuple[Any, ...], float | None]
"""Sparsity by keys; None leaves a parameter dense."""


def KERNEL_FILTER_FN(key: tuple[Any, ...], param: Any) -> bool:
    """Tells whether a parameter is named "kernel"."""
    del param
    return bool(key[-1] == "kernel")


def NOT_DIM_ONE_FILTER_FN(key: tuple[Any, ...], param: Any) -> bool:
    """Parameters of two axes or more: embeddings too, biases and norm scales not."""
    del key
    return bool(param.ndim > 1)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Shape of one layer of a parameter that stacks layers: all that a distribution sees of it.

    Attributes:
      shape: of one layer.
      copies: the number of layers.
    """

    shape: tuple[int, ...]
    dtype: Any
    copies: int

    @property
    def ndim(self) -> int:
        """Number of axes of one layer."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights of one layer."""
        return math.prod(self.shape)


def uniform(
    params: Any,
    sparsity: float,
    filter_fn: FilterFnType = NOT_DIM_ONE_FILTER_FN,
    custom_sparsity_map: CustomSparsityMapType | None = None,
) -> Any:
    """Gives every pruned parameter the same sparsity.

    Args:
      params: a tree of parameters, of their shapes, or of `Stacked`; a single one has the key
        ("kernel",).
      sparsity: fraction of zeros, in [0, 1).
      filter_fn: which parameters are pruned.
      custom_sparsity_map: sparsities of single parameters, whatever the filter says.

    Returns:
      A tree like `params` of floats and None.

    Raises:
      ValueError: a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    custom = _checked(custom_sparsity_map)

    def share(path: tuple[Any, ...], param: Any) -> float | None:
        key = key_of(path)
        if key in custom:
            return custom[key]
        return sparsity if filter_fn(key, param) else None

    return jax.tree.map_with_path(share, params)


def erk(
    param_tree: Any,
    sparsity: float,
    filter_fn: FilterFnType = NOT_DIM_ONE_FILTER_FN,
    custom_sparsity_map: CustomSparsityMapType | None = None,
) -> Any:
    """Erdos-Renyi-Kernel: larger parameters are sparser (Evci et al., 2020, RigL, section 3).

    Args and errors are those of `uniform`, but a single parameter, or none to prune, is an error.
    `sparsity` is that of all pruned parameters together, without those of the custom map.

    Returns:
      A tree like `param_tree` of floats and None; see `get_sparsities_erdos_renyi`.
    """
    named = jax.tree_util.tree_leaves_with_path(param_tree)
    if len(named) == 1 and not named[0][0]:
        # "paramater": users' tests look for this line as JaxPruner spells it.
        raise ValueError("Single parameter is provided. Please provide a paramater tree.")
    pruned = {
        path: param
        for path, param in named
        if filter_fn(key_of(path), param) or key_of(path) in (custom_sparsity_map or {})
    }
    sparsities = get_sparsities_erdos_renyi(
        {key_of(path): tuple(param.shape) for path, param in pruned.items()},
        sparsity,
        custom_sparsity_map,
        copies={key_of(path): getattr(param, "copies", 1) for path, param in pruned.items()},
    )
    return jax.tree.map_with_path(lambda path, _: sparsities.get(key_of(path)), param_tree)


def get_n_zeros(size: int, sparsity: float) -> int:
    """Number of zeros at a sparsity: floor(size * sparsity)."""
    return math.floor(sparsity * size)


def get_sparsities_erdos_renyi(
    var_shape_dict: Mapping[Any, tuple[int, ...]],
    default_sparsity: float,
    custom_sparsity_map: Mapping[Any, float | None] | None = None,
    include_kernel: bool = True,
    erk_power_scale: float = 1.0,
    copies: Mapping[Any, int] | None = None,
) -> dict[Any, float | None]:
    """The sparsities of layers whose densities are proportional to sum(shape) / prod(shape).

    The densities are epsilon * p_i, with epsilon such that all layers together, without those of
    the custom map, keep as many weights as with `default_sparsity` each. A layer whose density
    would exceed 1 is dense, and epsilon is found again for the others.

    Args:
      var_shape_dict: shapes by key.
      default_sparsity: fraction of zeros, in [0, 1).
      custom_sparsity_map: sparsities that are given; other keys in it are ignored.
      include_kernel: False takes (n_in + n_out) / (n_in * n_out) of the last two axes instead:
        Erdos-Renyi (Mocanu et al., 2018).
      erk_power_scale: exponent of sum / prod; below 1 it is nearer to uniform.
      copies: how many layers of the shape there are, by key; 1 where not given.

    A parameter without entries has nothing to prune: its sparsity is 0. One of a single entry, and
    so of no axes, counts as of an axis of 1; without `include_kernel` a lone axis is n_out, n_in 1.

    Raises:
      ValueError: no shapes, a size that is no whole number from 0, a sparsity outside [0, 1), or a
        power or a number of copies out of its meaning.
    """
    if not var_shape_dict:
        raise ValueError("Variable shape dictionary is empty: no parameter passes the filter")
    check_sparsity(default_sparsity, "Default sparsity")
    custom = {k: s for k, s in _checked(custom_sparsity_map).items() if k in var_shape_dict}
    copies = copies or {}
    check_number("erk_power_scale", erk_power_scale, NonNegative)
    for key, shape in var_shape_dict.items():
        check_number(f"copies[{key!r}]", copies.get(key, 1), Count)
        for size in shape:
            check_number(f"var_shape_dict[{key!r}]={shape}: size", size, Whole)
    sizes = {k: math.prod(shape) * copies.get(k, 1) for k, shape in var_shape_dict.items()}

    def kept(key: Any) -> int:
        size = math.prod(var_shape_dict[key])
        return (size - get_n_zeros(size, default_sparsity)) * copies.get(key, 1)

    def proportion(shape: tuple[int, ...]) -> float:
        if include_kernel:
            shape = shape or (1,)
            return math.pow(sum(shape) / math.prod(shape), erk_power_scale)
        n_in, n_out = (1, 1, *shape)[-2:]
        return (n_in + n_out) / (n_in * n_out)

    dense = {k for k in var_shape_dict if not sizes[k] and k not in custom}
    others = [k for k in var_shape_dict if k not in custom and k not in dense]
    free = {k: proportion(var_shape_dict[k]) for k in others}
    budget = sum(map(kept, free))
    while free:
        epsilon = budget / sum(p * sizes[k] for k, p in free.items())
        largest = max(free.values())
        if epsilon * largest <= 1:
            break
        full = [k for k, p in free.items() if p == largest]
        dense.update(full)
        budget -= sum(sizes[k] for k in full)
        for k in full:
            del free[k]
    return {
        k: custom[k] if k in custom else 0.0 if k in dense else 1.0 - epsilon * free[k]
        for k in var_shape_dict
    }


def check_sparsity(sparsity: Any, what: str = "sparsity") -> None:
    """Raises a ValueError where what should be a number from 0 to below 1 is none."""
    is_number = (
        isinstance(sparsity, numbers.Real | jax.Array | np.ndarray)
        and getattr(sparsity, "ndim", 0) == 0
    )
    if not is_number or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise ValueError(f"{what}={sparsity!r}; use a fraction of zeros in [0, 1)")


def _checked(custom_sparsity_map: Mapping[Any, float | None] | None) -> Mapping[Any, float | None]:
    if custom_sparsity_map is not None and not hasattr(custom_sparsity_map, "items"):
        raise ValueError(
            f"custom_sparsity_map={custom_sparsity_map!r}; use a mapping of keys to sparsities"
        )
    for key, sparsity in (custom_sparsity_map or {}).items():
        if sparsity is not None:
            check_sparsity(sparsity, f"custom_sparsity_map[{key!r}]")
    return custom_sparsity_map or {}
