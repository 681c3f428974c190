"""Adapters: small trained parts beside frozen kernels, in place of training all parameters.

`Lora` is bound by gin, as `run.Run.adapters = @adapters.Lora()`; `Adapters` is what it makes of one
model: the trained parameters by name, and the kernels that the forward pass reads.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from pjit_train.errors import UserError
from pjit_train.models.adapted import AdaptedKernel
from pjit_train.models.roles import Role, Roles, param_roles
from pjit_train.sharding import Axes, Rules, out_sharding
from pjit_train.step import split_model
from sparsity.masks.layers import KERNELS, assign
from sparsity.ranges import Count, Positive, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (LoRA; Hu et al., 2021): W stays frozen, s * down @ up is trained.

    With a recipe of `sparsity` the masks are those that it makes of the frozen weights, and hold
    for the sum; s is alpha / rank.

    Attributes:
      rank: of the trained product.
      alpha: the product is scaled by alpha / rank.
      layers: regular expressions; kernels of the blocks whose name one of them is found in.
      keep_zeros: weights that are 0 stay 0: the mask-keeping form of a pruned model, which merges
        to a kernel of the same pattern.
      initial: a folder of the library PEFT to begin from; None begins with no change.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    layers: tuple[str, ...] = (KERNELS,)
    keep_zeros: bool = False
    initial: str | None = None

    def __post_init__(self):
        check_fields(self, UserError)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def build(self, config, rules: Rules, params: Any) -> "Adapters":
        """The adapters of a model.

        Args:
          config: of the model.
          params: abstract.

        Raises:
          UserError: a pattern matches no kernel, or the rank exceeds a kernel's size.
        """
        roles, kernels = param_roles(config), {}
        chosen: dict[str, bool | None] = {}
        for pattern in self.layers:
            try:
                matched = flatten_dict(assign(params, {pattern: True}), sep="/")
            except ValueError as error:
                raise UserError(f"adapters: {error}") from error
            found = {name for name, x in matched.items() if x and roles[name].kind == "kernel"}
            if not found:
                raise UserError(
                    f"adapters: layers: {pattern!r} matches no kernel of the blocks, only "
                    + ", ".join([name for name, x in matched.items() if x][:3])
                )
            chosen |= dict.fromkeys(found, True)
        for path, param in nnx.to_flat_state(split_model(config, rules)[1]):
            name = "/".join(map(str, path))
            if name not in chosen:
                continue
            _, inputs, outputs = roles[name].matrix_shape(param.shape)
            if self.rank > min(inputs, outputs):
                raise UserError(
                    f"adapters: rank={self.rank} exceeds the size of {name}, {inputs} x {outputs}; "
                    f"use a rank up to {min(inputs, outputs)}"
                )
            kernels[name] = _Placed(
                shape=param.shape, axes=tuple(param.get_metadata("axes")), role=roles[name]
            )
        if not kernels:
            raise UserError("adapters: layers=() names no kernel; give it a pattern of kernels")
        return Adapters(lora=self, rules=rules, kernels=kernels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placed:
    """A kernel that is adapted: its shape, its logical axes and its role."""

    shape: tuple[int, ...]
    axes: Axes
    role: Role

    def parts(self, rank: int) -> dict[str, tuple[tuple[int, ...], Axes]]:
        """(shape, logical axes) of "down" and of "up"."""
        first = len(self.shape) + self.role.inputs[0]
        last = len(self.shape) + self.role.inputs[-1] + 1
        shape, axes = self.shape, self.axes
        return {
            "down": ((*shape[:last], rank), (*axes[:last], None)),
            "up": ((*shape[:first], rank, *shape[last:]), (*axes[:first], None, *axes[last:])),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters of one model.

    Attributes:
      kernels: what is adapted, by name.
    """

    lora: Lora
    rules: Rules
    kernels: dict[str, _Placed]

    @property
    def roles(self) -> Roles:
        """The roles of the trained parameters, as an optimizer asks for them."""
        roles: dict[str, Role] = {}
        for name, kernel in self.kernels.items():
            outputs = len(kernel.shape) - kernel.role.stacked - len(kernel.role.inputs)
            down = dataclasses.replace(
                kernel.role, inputs=tuple(range(-len(kernel.role.inputs) - 1, -1))
            )
            up = dataclasses.replace(kernel.role, inputs=(-outputs - 1,))
            roles |= {f"{name}/down": down, f"{name}/up": up}
        return roles

    def init(self, seed: int) -> Any:
        """The trained parameters: a nested dict, by the names of the kernels; they change nothing.

        "down" is uniform within 1 / sqrt(inputs), as PEFT draws it, and "up" is 0.
        """
        key, made = jax.random.key(seed), {}
        for name, kernel in self.kernels.items():
            parts = kernel.parts(self.lora.rank)
            (shape, axes), (up_shape, up_axes) = parts["down"], parts["up"]
            bound = kernel.role.matrix_shape(kernel.shape)[1] ** -0.5
            draws = jax.random.fold_in(key, zlib.crc32(name.encode()) >> 1)
            sharding = out_sharding(self.rules.spec(axes))
            uniform = jax.random.uniform(draws, shape, jnp.float32, -1, 1, out_sharding=sharding)
            made[f"{name}/down"] = bound * uniform
            sharding = out_sharding(self.rules.spec(up_axes))
            made[f"{name}/up"] = jnp.zeros(up_shape, jnp.float32, out_sharding=sharding)
        return unflatten_dict(made, sep="/")

    def adapt(self, params: Any, trained: Any, *, sparse: bool) -> Any:
        """The parameters with an `AdaptedKernel` for each kernel that is adapted.

        Args:
          params: frozen: arrays, or what a recipe's `weights` made of them.
          trained: as `init` gives it.
          sparse: whether a recipe has pruned them, whose zeros are kept then.
        """
        frozen, trained = flatten_dict(params, sep="/"), flatten_dict(trained, sep="/")
        for name, kernel in self.kernels.items():
            frozen[name] = AdaptedKernel(
                frozen=frozen[name],
                down=trained[f"{name}/down"],
                up=trained[f"{name}/up"],
                inputs=len(kernel.role.inputs),
                scale=self.lora.scale,
                keep_zeros=self.lora.keep_zeros or sparse,
            )
        return unflatten_dict(frozen, sep="/")

    def merge(self, adapted: Any) -> Any:
        """Merges what `adapt` gave: arrays in the dtypes of the frozen kernels."""

        def merged(x):
            return x.dense().astype(x.frozen.dtype) if isinstance(x, AdaptedKernel) else x

        return jax.tree.map(merged, adapted, is_leaf=lambda x: isinstance(x, AdaptedKernel))

    def describe(self) -> str:
        """Says in one line what is trained."""
        parts = [
            x for kernel in self.kernels.values() for x in kernel.parts(self.lora.rank).values()
        ]
        count = sum(math.prod(shape) for shape, _ in parts)
        kept = ", zeros kept" if self.lora.keep_zeros else ""
        return (
            f"adapters: {count:,} parameters are trained, of rank {self.lora.rank} beside "
            f"{len(self.kernels)} kernels{kept}; all others are frozen"
        )
