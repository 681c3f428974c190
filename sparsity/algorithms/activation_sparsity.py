"""Sparse activations: context managers that prune what flax.linen functions and layers return."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from sparsity.mask_calculator import get_topk_fn
from sparsity.sparsity_types import NByM, SparsityType, Unstructured, parse_sparsity_type


def get_activation_context(
    sparsity_string: Any, allowlist: Sequence[str] = ("relu",)
) -> contextlib.AbstractContextManager[None]:
    """Reads a text such as "2:4" and returns the context of `add_activation_sparsity`.

    Args:
      sparsity_string: a fraction for unstructured sparsity, "nm_2,4" or "2:4", "block_4,4_0.8".

    Raises:
      ValueError: none of these.
    """
    text, sparsity = str(sparsity_string), None
    with contextlib.suppress(ValueError):
        return add_activation_sparsity(Unstructured(), float(text), allowlist)
    if text.startswith("block") and text.count("_") == 2:
        text, _, fraction = text.rpartition("_")
        sparsity = float(fraction)
    return add_activation_sparsity(parse_sparsity_type(text), sparsity, allowlist)


@contextlib.contextmanager
def add_activation_sparsity(
    sparsity_type: SparsityType, sparsity: float | None = None, allowlist: Sequence[str] = ("relu",)
) -> Iterator[None]:
    """Makes the named activation functions of `flax.linen` return their largest values only.

    Args:
      sparsity: fraction of zeros; None for N:M.
      allowlist: names of functions.
    """
    from flax import linen  # of users of flax only

    originals = {name: getattr(linen, name) for name in allowlist}

    def sparse(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda x: _pruned(function(x), sparsity_type, sparsity)

    try:
        for name, function in originals.items():
            setattr(linen, name, sparse(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(linen, name, function)


@contextlib.contextmanager
def add_activation_sparsity_layers(
    sparsity_fn: Callable[
        [tuple[Any, ...], tuple[int, ...]], tuple[SparsityType | None, float | None]
    ],
    allowlist: Sequence[str] = ("Dense",),
    score_fn: Callable[[Any], Any] = lambda x: x,
    getter_fn: Callable[[str], Any] | None = None,
    setter_fn: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """Makes the named layers of `flax.linen` return their largest outputs only.

    Args:
      sparsity_fn: (path of the module, shape of its output) -> (type, sparsity); a type of None
        leaves the output dense.
      allowlist: names of layers.
      score_fn: output -> scores of which the largest are kept.
      getter_fn: name -> layer class, where they are not those of `flax.linen`.
      setter_fn: (name, layer class) -> None, to put one in its place.
    """
    from flax import linen

    get = getter_fn or (lambda name: getattr(linen, name))
    put = setter_fn or (lambda name, layer: setattr(linen, name, layer))
    originals = {name: get(name) for name in allowlist}

    def sparse(layer: Any) -> Any:
        class Sparse(layer):  # type: ignore[misc]  # a class that is not known here
            def __call__(self, inputs: Any) -> Any:
                output = super().__call__(inputs)
                sparsity_type, sparsity = sparsity_fn(self.scope.path, output.shape)
                if sparsity_type is None:
                    return output
                return _pruned(output, sparsity_type, sparsity, score_fn)

        return Sparse

    try:
        for name, layer in originals.items():
            put(name, sparse(layer))
        yield
    finally:
        for name, layer in originals.items():
            put(name, layer)


def _pruned(
    x: jax.Array,
    sparsity_type: SparsityType,
    sparsity: float | None,
    score_fn: Callable[[Any], Any] = lambda x: x,
) -> jax.Array:
    if sparsity is None and isinstance(sparsity_type, NByM):
        sparsity = 1 - sparsity_type.n / sparsity_type.m
    return get_topk_fn(sparsity_type)(score_fn(x), sparsity).astype(x.dtype) * x
