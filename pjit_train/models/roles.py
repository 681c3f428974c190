"""Roles of parameters in their model: the metadata `role` of each `nnx.Param`.

Whatever depends on what a parameter is (which axes its matmul sums over, weight decay, formats,
compression) reads it here; patterns over names are for users.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from flax import nnx

from pjit_train.errors import UserError
from pjit_train.sharding import Axes, Rules
from pjit_train.step import split_model

Kind = Literal["kernel", "head", "embedding", "positions", "token", "norm", "bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """Role of a parameter in its model.

    Attributes:
      kind: "kernel" of a `Dense`; "head" that is a table of its own; "embedding" of tokens;
        "positions", the table of their embeddings; "token" that is learned; scale or bias of a
        "norm"; "bias" of a `Dense`.
      inputs: axes that a matmul sums over, adjacent and counted from the end, so that they are the
        same of stacked layers; of an embedding, those that its transpose as a head does; () where
        none does.
      matmul: whether a matmul reads it: a kernel, a head, an embedding that is the head too.
      input_axes: logical axes of the activations' features that the matmul sums over, for their
        shards; `output_axes` of the features that it gives.
      norm: name of the norm, in the same block, that gives a kernel its inputs; None for another
        origin.
      attends: whether the products of attention read what the kernel gives.
      offset: of a norm's scale, what the forward pass adds to it.
      stacked: whether its leading axis counts the layers of a stack.
    """

    kind: Kind
    inputs: tuple[int, ...] = ()
    matmul: bool = False
    input_axes: Axes = ()
    output_axes: Axes = ()
    norm: str | None = None
    attends: bool = False
    offset: float = 0.0
    stacked: bool = False

    @property
    def decays(self) -> bool:
        """Tells whether weight decay applies: not to norms and biases."""
        return self.kind not in ("norm", "bias")

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(layers, inputs, outputs) of a parameter of this shape; 1 layer where none are stacked.

        Raises:
          ValueError: no matmul sums over any axis of it.
        """
        if not self.inputs:
            raise ValueError(f"a parameter of kind {self.kind} is of no matmul; it has no inputs")
        first, last = len(shape) + self.inputs[0], len(shape) + self.inputs[-1] + 1
        sizes = [1, 1, 1]
        for axis, size in enumerate(shape):
            sizes[0 if axis < first else 1 if axis < last else 2] *= size
        return sizes[0], sizes[1], sizes[2]


Roles = Mapping[str, Role]
"""The role of every parameter of a model, by its name, such as "blocks/attention/query/kernel"."""


@functools.lru_cache(maxsize=64)
def param_roles(config: Any) -> Roles:
    """The role of every parameter of a model; makes no array.

    Args:
      config: of the model, with a method `build(key, rules)`.

    Raises:
      UserError: a parameter has no role.
    """
    roles = {}
    for path, param in nnx.to_flat_state(split_model(config, Rules())[1]):
        name = "/".join(map(str, path))
        role = param.get_metadata().get("role")
        if not isinstance(role, Role):
            raise UserError(
                f"model: the parameter {name} has no role; make it by an Initializer of "
                "pjit_train.models.parameters, or as nnx.Param(..., role=Role(...))"
            )
        roles[name] = role
    return roles


def contraction(roles: Roles):
    """(name, shape) -> the axes that a parameter's matmul sums over, or None: for `sparsity`."""
    return lambda name, shape: roles[name].inputs or None
