"""Interface of sparse training to a trainer: a `Sparsity` is built into an `Updater` for a run.

The trainer wraps its optimizer with `Updater.wrap_optax`, whose state holds the inner optimizer's
as `inner_state`; the forward pass reads `Updater.weights`. States are named tuples of arrays.
"""

import abc
from collections.abc import Callable
from typing import Any, Protocol

import jax
import optax

from sparsity.masks.validity import Validity
from sparsity.recipes.autoswitch import AutoSwitch
from sparsity.recipes.kernel_plan import Contraction

Scored = Callable[[Any], Any]
"""Parameters -> a tree like them, which masks are made of; `Quantizer.scored` is one."""


class Updater(Protocol):
    """Sparsity for the parameters of one model and one run.

    Trees are like the parameters; states are those of the optimizer that `wrap_optax` returns, or,
    wherever it is not updated, the same without its `inner_state`.
    """

    @property
    def variance(self) -> AutoSwitch | None:
        """The switch that the optimizer's second moments are to be frozen by; None for none."""
        return None

    @property
    def packs_at(self) -> int | None:
        """The step before which a trainer is to `pack`; None for not at all."""
        return None

    @property
    def scores_training(self) -> bool:
        """Tells whether masks are made of gradients or moments of the parameters."""
        return False

    def wrap_optax(
        self,
        inner: optax.GradientTransformation,
        learning_rate: optax.ScalarOrSchedule | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the sparsity around it; its state has a field `inner_state`.

        Args:
          learning_rate: of `inner`, for what is scaled by it.
        """
        ...

    def weights(self, params: Any, state: Any) -> Any:
        """The parameters that a forward pass reads: arrays, and kernels of `recipes.kernels`."""
        ...

    def post_gradient_update(self, params: Any, state: Any) -> Any:
        """The parameters to keep after an update."""
        ...

    def skip(self, params: Any, state: Any) -> Any:
        """The state after a step whose update is left out."""
        ...

    def masks(self, state: Any, params: Any) -> Any:
        """A tree of masks, not 0 where a weight is kept; None for what is not pruned."""
        ...

    def validity(self, weights: Any) -> dict[str, Validity]:
        """Counts the sparsity of `weights`, by the name of each kernel, or of "all"."""
        ...

    def describe(self) -> str:
        """Says in one line which kernels are pruned, by what, and in which steps (from 1)."""
        ...

    def global_norm(self, grads: Any, count: jax.Array) -> jax.Array:
        """`optax.tree.norm` of the gradients of the kept parameters, packed or not.

        Args:
          count: int32 [], updates done.
        """
        del count
        norm: jax.Array = optax.tree.norm(grads)
        return norm

    def pack(self, params: Any, state: Any) -> tuple[Any, Any]:
        """The parameters and the state, of which only kept weights are held, from `packs_at` on.

        Raises:
          ValueError: the updater packs nothing.
        """
        raise ValueError(f"{type(self).__name__} packs nothing; call pack only where packs_at says")


class Sparsity(abc.ABC):
    """Base class of recipes and the like, which say as data how `run.Run.sparsity` prunes."""

    @abc.abstractmethod
    def build(
        self,
        params: Any,
        *,
        steps: int,
        contraction: Contraction | None = None,
        scored: Scored | None = None,
    ) -> Updater:
        """The updater for a model and a run.

        Args:
          params: tree of arrays or of `jax.ShapeDtypeStruct`.
          steps: of the run.
          contraction: None for kernels [..., in, out].
          scored: what masks are made of; None for the parameters themselves.

        Raises:
          ValueError: this does not fit the parameters or the run.
        """
