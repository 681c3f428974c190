"""Sparse from the start to the end: fixed masks, and masks that move."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from sparsity import mask_calculator
from sparsity.algorithms.pruners import as_key, generate_random_scores
from sparsity.base_updater import BaseUpdater, SparseState
from sparsity.mask_calculator import MASK_DTYPE
from sparsity.masks import nm, topk
from sparsity.ranges import NonNegative
from sparsity.sparsity_types import Block, Channel, NByM, SparsityType
from sparsity.utils import is_none, map_entries


@dataclasses.dataclass
class StaticRandomSparse(BaseUpdater):
    """Trains with masks that are drawn at initialization and never change."""

    is_sparse_gradients: bool = True

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """Returns the sparse state unchanged: masks stay."""
        del params, grads, kwargs
        return sparse_state

    def get_initial_masks(self, params: Any, target_sparsities: Any) -> Any:
        """Draws masks of the target sparsities at random."""
        return self.create_masks(generate_random_scores(params, self.rng_seed), target_sparsities)

    def instant_sparsify(self, params: Any, grads: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Refuses: this algorithm trains sparse from the start.

        Raises:
          RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__} trains sparse from the start: instant_sparsify has no meaning; "
            "use 'magnitude' or 'random' to prune at once"
        )


@dataclasses.dataclass
class SET(StaticRandomSparse):
    """Drops the smallest |w| and grows as many weights at random (Mocanu et al., 2018).

    At each update a fraction of the kept weights of a layer is dropped, and the layer grows back to
    its count; what was dropped may grow again, with its value. A weight that grows begins at zero,
    with moments of zero: see `restart_inner_state`. Of N:M, the dropped weights are the smallest of
    the layer, and each group grows back to N; of blocks and channels, whole ones drop and grow.

    Attributes:
      eps: unused; JaxPruner's users give it.
      drop_fraction_fn: step -> fraction of the kept weights to drop.
      is_debug: raise an AssertionError where a mask breaks these rules.
    """

    eps: NonNegative = 1e-5
    drop_fraction_fn: Callable[[Any], Any] = lambda _: 0.3
    is_debug: bool = False
    skip_gradients: bool = True

    def update_state(
        self, sparse_state: SparseState, params: Any, grads: Any, **kwargs: Any
    ) -> SparseState:
        """The state with weights dropped and grown, and moments of zero for the grown ones."""
        del kwargs
        drop_scores = self._get_drop_scores(sparse_state, params, grads)
        grow_scores = self._get_grow_scores(sparse_state, params, grads)
        drop_fraction = self.drop_fraction_fn(sparse_state.count)
        old_masks = self.unpack(sparse_state.masks, params)

        def update(
            path: tuple[Any, ...],
            param: jax.Array,
            mask: jax.Array | None,
            drop: jax.Array,
            grow: jax.Array,
        ) -> jax.Array | None:
            if mask is None:
                return None
            layer = functools.partial(self._update_masks, drop_fraction=drop_fraction)
            if (own := self.type_of(path, param)) != self.sparsity_type:
                layer = functools.partial(layer, sparsity_type=own)
            for _ in range(self.stacked(path, param)):
                layer = jax.vmap(layer)
            return layer(mask, drop, grow)

        masks = map_entries(update, params, old_masks, drop_scores, grow_scores)
        grown = map_entries(
            lambda path, param, old, new: None if old is None else (old == 0) & (new == 1),
            params,
            old_masks,
            masks,
        )
        inner_state = restart_inner_state(sparse_state.inner_state, grown)
        return sparse_state._replace(masks=self.pack(masks), inner_state=inner_state)

    def _get_drop_scores(self, sparse_state: SparseState, params: Any, grads: Any) -> Any:
        del sparse_state, grads
        return jax.tree.map(jnp.abs, params)

    def _get_grow_scores(self, sparse_state: SparseState, params: Any, grads: Any) -> Any:
        del grads
        key = jax.random.fold_in(as_key(self.rng_seed), sparse_state.count)
        return generate_random_scores(params, key)

    def _update_masks(
        self,
        old_mask: jax.Array,
        drop_score: jax.Array,
        grow_score: jax.Array,
        drop_fraction: Any,
        sparsity_type: SparsityType | None = None,
    ) -> jax.Array:
        """The new mask of one layer, with as many ones as the old one.

        JaxPruner's users call and override it, without `sparsity_type`: None is the updater's.
        """
        sparsity_type = self.sparsity_type if sparsity_type is None else sparsity_type
        old = old_mask == 1
        units = _units(old, sparsity_type)
        count = jnp.sum(units, dtype=jnp.int32)
        drop_score = jnp.where(old, drop_score.astype(jnp.float32), -jnp.inf)
        # Below infinity, which is what the survivors have.
        grow_score = jnp.minimum(grow_score.astype(jnp.float32), jnp.finfo(jnp.float32).max)
        stay = jnp.maximum(1, jnp.round(count * (1 - drop_fraction)).astype(jnp.int32))
        if isinstance(sparsity_type, NByM):
            survivors = topk.topk_mask(drop_score, stay)
            m = sparsity_type.m
            n = jnp.where(count == old.size, m, sparsity_type.n)  # m: a layer left dense
            score = jnp.where(survivors, jnp.inf, grow_score)
            new = nm.nm_mask(score, n, m, axis=sparsity_type.axis)
        elif self.topk_fn is mask_calculator.topk_mask_calculator:
            survivors = topk.topk_mask(drop_score, stay)
            new = topk.topk_mask(jnp.where(survivors, jnp.inf, grow_score), count)
        else:
            survivors = self.mask_fn(drop_score, 1 - stay / units.size) == 1
            score = jnp.where(survivors, jnp.inf, grow_score)
            new = self.mask_fn(score, 1 - count / units.size) == 1
        if self.is_debug:
            wrong = jnp.any(survivors & ~(old & new)) | (jnp.sum(new) != count)
            jax.debug.callback(_assert_not, wrong)
        return new.astype(MASK_DTYPE)


@dataclasses.dataclass
class RigL(SET):
    """Drops the smallest |w| and grows where the dense gradient is largest (Evci et al., 2020)."""

    scores_training: ClassVar[bool] = True

    def _get_grow_scores(self, sparse_state: SparseState, params: Any, grads: Any) -> Any:
        del sparse_state, params
        return jax.tree.map(jnp.abs, grads)


def restart_inner_state(state: Any, masks_activated: Any) -> Any:
    """The state of an optimizer with zeros for weights that were grown.

    Whatever tree within the state has the structure of the parameters is taken for theirs (moments,
    momentum, accumulated gradients, with gaps where an optimizer is masked), and its arrays of a
    parameter's shape get the zeros. Statistics of other shapes are of many weights together and
    stay: adafactor's rows and columns, and what optax.flatten or a factored optimizer keeps.

    Args:
      state: of any optax transformation.
      masks_activated: a tree like the parameters: 1 where a weight was grown; None where a
        parameter is not pruned.
    """
    structure: Any = jax.tree.structure(masks_activated, is_leaf=is_none)

    def restart(node: Any) -> Any:
        if jax.tree.structure(node, is_leaf=_is_gap) == structure:
            return _restart_using_mask(node, masks_activated)
        container: Any
        children, container = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
        if jax.tree_util.treedef_is_leaf(container):
            return node
        return container.unflatten(map(restart, children))

    return restart(state)


def _restart_using_mask(target_tree: Any, masks: Any) -> Any:
    """Zeros where the mask is 1, in arrays that have the mask's shape."""

    def zeroed(mask: Any, x: Any) -> Any:
        if mask is None or _is_gap(x) or jnp.shape(mask) != jnp.shape(x):
            return x
        if not jnp.issubdtype(jnp.result_type(x), jnp.number):
            return x
        return jnp.where(jnp.asarray(mask, bool), jnp.zeros_like(x), x)

    masks, _ = jax.tree.flatten(masks, is_leaf=is_none)
    structure: Any
    leaves, structure = jax.tree.flatten(target_tree, is_leaf=_is_gap)
    return structure.unflatten(map(zeroed, masks, leaves))


def _units(mask: jax.Array, sparsity_type: SparsityType) -> jax.Array:
    """Reduces a mask to an entry for each group (block or channel) that is kept or pruned whole."""
    match sparsity_type:
        case Block((height, width)):
            rows = jnp.atleast_2d(mask)
            return rows.reshape(*rows.shape[:2], -1)[::height, ::width, 0]
        case Channel(axis):
            return jnp.moveaxis(mask, axis, -1).reshape(-1, mask.shape[axis])[0]
    return mask


def _is_gap(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _assert_not(wrong: Any) -> None:
    if wrong:
        raise AssertionError("a dropped or grown mask keeps other weights, or another number")
