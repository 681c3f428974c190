"""Pruning a trained kernel in one shot, by magnitude, Wanda or SparseGPT, and keeping it pruned.

A power of two that multiplies the weights or the inputs changes no mask, whatever they are in
float32; and the number of cores changes no bit.

A kernel is seen as a matrix [inputs, outputs], y = x W. A pattern is "N:M", N weights kept of every
M consecutive inputs of an output, or a number or its text such as "0.5", the fraction to prune.
(Wanda's and SparseGPT's own programs count the zeros of a group; here N counts what is kept.)

Letters in names: I inputs, O outputs.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsity.masks.layers import assign, listed
from sparsity.masks.nm import check_nm, nm_mask
from sparsity.masks.topk import keep_count, topk_mask
from sparsity.masks.transposable import transposable_mask
from sparsity.masks.validity import Validity, by_name, nm_validity, zeros
from sparsity.post_training.hessian import (
    Hessian,
    check_block_size,
    check_kernel,
    check_norms,
    factored,
    to_unit,
    transposed_product,
)
from sparsity.recipes.kernel_plan import Contraction
from sparsity.recipes.kernels import dense_tree
from sparsity.sparsity_types import NByM
from sparsity.updater import Scored, Sparsity, Updater

Pattern = str | float | NByM


def parse_pattern(pattern: Pattern) -> NByM | float:
    """A pattern as a type of `sparsity_types` along the inputs, or as the fraction to prune.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(pattern, NByM):
        return pattern
    if groups := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", str(pattern)):
        n, m = map(int, groups.groups())
        if not 1 <= n <= m:
            raise ValueError(
                f"pattern {pattern}: cannot keep {n} of every {m}; use N:M with 1 <= N <= M, "
                "such as 2:4"
            )
        return NByM(n, m, axis=-2)
    is_number = re.fullmatch(r"[-+.0-9eE]+", str(pattern))  # float() takes "1_0" and other digits
    try:
        fraction = float(pattern) if is_number else -1.0
    except (OverflowError, ValueError):
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise ValueError(
            f"pattern {pattern!r} is unknown; use N:M, kept of every so many inputs, such as 2:4, "
            "or the fraction to prune, from 0 to below 1, such as 0.5"
        )
    return fraction


def check_pattern(
    pattern: Pattern, inputs: int, outputs: int, *, transposable: bool = False, name: str = ""
) -> None:
    """Raises a ValueError, begun with `name`, where a kernel cannot have the pattern."""
    pattern = parse_pattern(pattern)
    if isinstance(pattern, NByM):
        check_nm(pattern.n, pattern.m, inputs, name=name)
    if transposable:
        if not isinstance(pattern, NByM):
            raise ValueError("transposable: only N:M is kept along both axes; use pattern 2:4")
        check_nm(pattern.n, pattern.m, outputs, name=f"{name} (its outputs)" if name else "")


def magnitude_mask(
    kernel_IO: jax.Array, pattern: Pattern, *, transposable: bool = False
) -> jax.Array:
    """The mask of the largest weights: of each group of M, or of the whole kernel.

    At 2:4 it is the mask of ASP (Mishra et al., 2021), the best by total magnitude of the six
    patterns of a group.

    Args:
      transposable: N:M along inputs and outputs at once, so that the transposed kernel of the
        backward pass is N:M too; see `transposable_mask`.

    Returns:
      bool [inputs, outputs], True = kept.

    Raises:
      ValueError: the pattern is unknown or does not fit the kernel, or this is no finite matrix.
    """
    check_kernel(kernel_IO)
    mask: jax.Array = _magnitude_mask(jnp.asarray(kernel_IO), pattern, transposable)
    return mask


@functools.partial(jax.jit, static_argnums=(1, 2))
def _magnitude_mask(kernel_IO: jax.Array, pattern: Pattern, transposable: bool) -> jax.Array:
    return _select(jnp.abs(kernel_IO), pattern, transposable)


@jax.jit
def wanda_scores(kernel_IO: jax.Array, input_norms_I: jax.Array) -> jax.Array:
    """|W_ij| * |X_i|_2, float32 [inputs, outputs] (Sun et al., 2024, equation 1).

    Args:
      input_norms_I: 2-norm of each input over the tokens of the calibration text, [inputs].
    """
    return jnp.abs(kernel_IO.astype(jnp.float32)) * input_norms_I[:, None]


def wanda_mask(
    kernel_IO: jax.Array,
    input_norms_I: jax.Array,
    pattern: Pattern,
    *,
    transposable: bool = False,
) -> jax.Array:
    """The mask of the largest `wanda_scores`: of each group of M, or of the inputs of each output.

    Arguments besides and result are those of `magnitude_mask`.

    Raises:
      ValueError: as `magnitude_mask`, or the norms are not one to an input, finite and from 0.
    """
    check_kernel(kernel_IO)
    check_norms("input_norms_I", input_norms_I, kernel_IO.shape[0])
    norms_I = jnp.asarray(input_norms_I, jnp.float32)
    mask: jax.Array = _wanda_mask(jnp.asarray(kernel_IO), norms_I, pattern, transposable)
    return mask


@functools.partial(jax.jit, static_argnums=(2, 3))
def _wanda_mask(
    kernel_IO: jax.Array, norms_I: jax.Array, pattern: Pattern, transposable: bool
) -> jax.Array:
    unit_IO, _ = to_unit(kernel_IO.astype(jnp.float32))  # products neither over- nor underflow
    scores = wanda_scores(unit_IO, to_unit(norms_I)[0])
    return _select(scores, pattern, transposable, per_output=True)


def sparsegpt(
    kernel_IO: jax.Array,
    hessian_II: jax.Array | Hessian,
    *,
    pattern: Pattern,
    transposable: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
) -> jax.Array:
    """The kernel pruned by SparseGPT, what it keeps moved to make up for it.

    Inputs are gone through in order. Pruning weight w of input j costs w^2 / U_jj^2, U the upper
    Cholesky factor of H^-1, and moves the later weights of its output by -w U_j,: / U_jj, the
    optimal brain surgeon's update (Frantar and Alistarh, 2023, algorithm 1).

    Args:
      hessian_II: X^T X over the calibration text, up to a factor. Weights of inputs that were
        always 0 become 0.
      pattern: an N:M mask is chosen when its group is reached; to prune a fraction, the mask of a
        whole block is chosen at its start, over all outputs together (exactly so many weights,
        where the authors' program also prunes those equal to the threshold).
      transposable: see `magnitude_mask`.
      block_size: inputs whose updates are gathered before they are applied to the inputs after
        them: for N:M a matter of speed alone; it is rounded to a multiple of M.
      damping: times the mean of the Hessian's diagonal, added to it.

    Returns:
      [inputs, outputs] in the dtype of the kernel; pruned weights are exactly 0.

    Raises:
      ValueError: the pattern is unknown or does not fit, the kernel is no finite matrix, or the
        Hessian is not finite, symmetric and of the inputs, or not positive definite when damped.
    """
    check_kernel(kernel_IO)
    check_pattern(pattern, *kernel_IO.shape, transposable=transposable)
    check_block_size(block_size)
    factor_II, dead_I = factored(hessian_II, kernel_IO.shape[0], damping)
    pattern = parse_pattern(pattern)
    group = pattern.m if isinstance(pattern, NByM) else 1
    size = max(block_size // group, 1) * group
    whole_IO = np.asarray(kernel_IO, np.float32)
    _, exponent = np.frexp(np.abs(whole_IO).max(initial=0))
    unit_IO = np.ldexp(whole_IO, -exponent)  # of which no square over- or underflows
    pruned = _sparsegpt(unit_IO, factor_II, dead_I, pattern, transposable, size)
    return jnp.asarray(np.ldexp(np.asarray(pruned), exponent), jnp.asarray(kernel_IO).dtype)


@functools.partial(jax.jit, static_argnames=("pattern", "transposable", "size"))
def _sparsegpt(
    kernel_IO: jax.Array,
    factor_II: jax.Array,
    dead_I: jax.Array,
    pattern: Pattern,
    transposable: bool,
    size: int,
) -> jax.Array:
    inputs = kernel_IO.shape[0]
    weights = jnp.where(dead_I[:, None], 0, kernel_IO)

    def block(start: int | jax.Array, size: int, weights: jax.Array) -> jax.Array:
        return _prune_block(weights, factor_II, start, size, pattern, transposable)

    whole, rest = divmod(inputs, size)
    if whole:
        weights = jax.lax.fori_loop(0, whole, lambda b, w: block(b * size, size, w), weights)
    if rest:
        weights = block(whole * size, rest, weights)
    return weights


def _prune_block(
    weights_IO: jax.Array,
    factor_II: jax.Array,
    start: int | jax.Array,
    size: int,
    pattern: Pattern,
    transposable: bool,
) -> jax.Array:
    """Prunes `size` inputs from `start` on, and moves the weights of all after them."""
    outputs = weights_IO.shape[1]
    block = jax.lax.dynamic_slice(weights_IO, (start, 0), (size, outputs))
    rows = jax.lax.dynamic_slice(factor_II, (start, 0), (size, factor_II.shape[1]))
    local = jax.lax.dynamic_slice(rows, (0, start), (size, size))
    diagonal = jnp.diagonal(local)
    group = pattern.m if isinstance(pattern, NByM) else size  # inputs whose mask is chosen at once

    def prune_input(i: jax.Array, carry: Any) -> Any:
        block, errors, kept, first = carry
        j = first + i
        error = jnp.where(kept[i], 0, block[j] / diagonal[j])
        block -= local[j][:, None] * error  # the factor is 0 for inputs before j
        block = block.at[j].set(jnp.where(kept[i], block[j], 0))
        return block, errors.at[j].set(error), kept, first

    def prune_group(g: jax.Array, carry: Any) -> Any:
        block, errors = carry
        first = g * group
        w = jax.lax.dynamic_slice(block, (first, 0), (group, outputs))
        d = jax.lax.dynamic_slice(diagonal, (first,), (group,))
        cost = jnp.abs(w / d[:, None])  # its root, where only the order counts
        kept = _select(cost**2 if transposable else cost, pattern, transposable)
        return jax.lax.fori_loop(0, group, prune_input, (block, errors, kept, first))[:2]

    carry = block, jnp.zeros_like(block)
    block, errors = jax.lax.fori_loop(0, size // group, prune_group, carry)
    after = jnp.arange(factor_II.shape[1]) >= start + size
    moved = transposed_product(jnp.where(after, rows, 0), errors)
    return jax.lax.dynamic_update_slice(weights_IO - moved, block, (start, 0))


def _select(
    scores_IO: jax.Array, pattern: Pattern, transposable: bool, *, per_output: bool = False
) -> jax.Array:
    """The mask of the best scores by a pattern; a fraction counts per output, or over all."""
    check_pattern(pattern, *scores_IO.shape, transposable=transposable)
    pattern = parse_pattern(pattern)
    if isinstance(pattern, NByM):
        if transposable:
            return transposable_mask(scores_IO, pattern.n, pattern.m)
        return nm_mask(scores_IO, pattern.n, pattern.m, axis=pattern.axis)
    if per_output:
        return topk_mask(scores_IO.T, keep_count(scores_IO.shape[0], pattern), stacked=1).T
    return topk_mask(scores_IO, keep_count(scores_IO.size, pattern))


class KeepZerosState(NamedTuple):
    """State of the optimizer that `KeepZerosUpdater.wrap_optax` makes: the inner one's alone."""

    masks: None
    inner_state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepZeros(Sparsity):
    """A recipe that trains what one-shot pruning left: weights that are 0 stay 0.

    So any pattern is kept, also one that differs by layer, without its being stored.

    Attributes:
      layers: the pattern that a kernel was given, by regular expression over the names of
        parameters; one that none matches trains as usual.
    """

    layers: Mapping[str, str]

    def build(
        self,
        params: Any,
        *,
        steps: int | None = None,
        contraction: Contraction | None = None,
        scored: Scored | None = None,
    ) -> "KeepZerosUpdater":
        """Builds the updater that keeps the zeros of a tree of parameters, in a run of any length.

        Args:
          contraction: (name, shape) -> the input axes of a kernel; see `recipes.Recipe.build`.
          scored: changes nothing; a zero is one in every number format.

        Raises:
          ValueError: an expression matches no parameter, or a pattern is unknown.
        """
        del steps, scored
        for pattern in self.layers.values():
            parse_pattern(pattern)
        return KeepZerosUpdater(assign(params, self.layers), contraction or (lambda *_: -2))


@dataclasses.dataclass(frozen=True)
class KeepZerosUpdater(Updater):
    """Keeps the zeros of some parameters.

    Attributes:
      chosen: tree like the parameters, the pattern where zeros are kept and None elsewhere.
      contraction: see `KeepZeros.build`.
    """

    chosen: Any
    contraction: Contraction

    def wrap_optax(
        self,
        inner: optax.GradientTransformation,
        learning_rate: optax.ScalarOrSchedule | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The inner transformation, which sees no gradient of a zero and cannot move it."""

        def update(grads: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
            grads = self._where_nonzero(params, grads)
            updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
            return self._where_nonzero(params, updates), KeepZerosState(None, inner_state)

        inner = optax.with_extra_args_support(inner)
        init = lambda params: KeepZerosState(None, inner.init(params))
        return optax.GradientTransformationExtraArgs(init, update)

    def _where_nonzero(self, params: Any, tree: Any) -> Any:
        masks = self.masks(None, params)
        keep = lambda m, x: x if m is None else jnp.where(m, x, 0)
        return jax.tree.map(keep, masks, tree, is_leaf=lambda x: x is None)

    def skip(self, params: Any, state: KeepZerosState) -> KeepZerosState:
        """Returns the state unchanged after a step whose update is left out."""
        return state

    def masks(self, state: KeepZerosState | None, params: Any) -> Any:
        """Tree of bool masks, True where a weight is not 0; None where zeros are not kept."""
        return jax.tree.map(
            lambda chosen, w: None if chosen is None else w != 0,
            self.chosen,
            params,
            is_leaf=lambda x: x is None,
        )

    def validity(self, weights: Any) -> dict[str, Validity]:
        """Counts, by name, the zeros of each kernel whose zeros are kept."""
        kernels, counted = by_name(dense_tree(weights)), {}
        for name, pattern in by_name(self.chosen).items():
            kind, kernel = parse_pattern(pattern), kernels[name]
            if isinstance(kind, NByM):
                axes = self.contraction(name, kernel.shape)
                if axes is None:
                    raise ValueError(f"{name}: no axis that its matmul sums over; use fractions")
                counted[name] = nm_validity(kernel, kind.n, kind.m, axes)
            else:
                counted[name] = Validity(str(kind), zeros(kernel))
        return counted

    def describe(self) -> str:
        """Says in one line which zeros are kept, and that they are in all steps."""
        return (
            f"sparse: {listed(by_name(self.chosen))}; what is 0 at the start stays 0 in all steps"
        )

    def weights(self, params: Any, state: KeepZerosState) -> Any:
        """Returns the parameters unchanged: their zeros are those of the masks."""
        return params

    def post_gradient_update(self, params: Any, state: KeepZerosState) -> Any:
        """Returns the parameters unchanged: updates of zeros were masked before."""
        return params
