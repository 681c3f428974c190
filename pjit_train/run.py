"""Run: its parts, put together and checked before anything starts."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pjit_train.adapters import Lora
from pjit_train.checkpoint import CheckpointConfig
from pjit_train.data.data import Data
from pjit_train.distillation import Distillation
from pjit_train.errors import UserError
from pjit_train.loggers import Logger
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.model_config import ModelConfig
from pjit_train.models.roles import contraction, param_roles
from pjit_train.optimizers import Optimizer
from pjit_train.sharding import MeshShape, Rules
from pjit_train.tasks.language_modelling import LanguageModelling
from pjit_train.tasks.task import Task
from sparsity.numbers.quantized import Quantization, Quantizer
from sparsity.ranges import Count, NonNegative, Whole, check_choice, check_fields
from sparsity.updater import Sparsity, Updater


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Text that a run prints: after every validation, and at its end.

    Attributes:
      prompts: a sample continues each; "" begins a document.
      tokens: how many are sampled; 0 for no samples at all.
      temperature: of the softmax that is sampled from; 0 takes the likeliest token.
    """

    prompts: tuple[str, ...] = ("",)
    tokens: Whole = 200
    temperature: NonNegative = 0.8

    def __post_init__(self):
        check_fields(self, UserError)

    def check(self, max_len: int, tokenizer) -> None:
        """Raises a UserError where samples would be longer than the model's longest sequence."""
        longest = 1 + max((len(tokenizer.encode(prompt)) for prompt in self.prompts), default=0)
        if self.tokens and longest + self.tokens > max_len:
            raise UserError(
                f"samples: a prompt of {longest} tokens, the separator one of them, and tokens="
                f"{self.tokens} exceed the model's max_len={max_len}; use at most {max_len} "
                "together, or tokens=0 for no samples"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Training run: model, data, optimizer, mesh and all else that it is made of.

    Attributes:
      task: what is learned from the data.
      steps: updates of the whole run; the learning-rate schedule spans them.
      initial_weights: a Hugging Face folder of this model to start from, a .gguf file, or
        hf:OWNER/NAME[@REVISION] of the Hugging Face Hub; None draws them at random.
      seed: of parameters, order of the data, and samples.
      sparsity: such as `recipes.Recipe` or `pruning.Pruning` of the package `sparsity`; None trains
        dense.
      quantization: a `quantized.Quantization` of the package `sparsity`; None quantizes nothing.
      adapters: trained in place of the parameters, which stay as they begin; None trains these.
      distillation: adds the distance from a frozen teacher to the loss; None has none.
      accumulate: parts that a batch goes through the model in, their gradients summed.
      log_every: steps between rows of metrics.
      eval_every: steps between validations, 0 for none; one always ends a run that has them.
      eval_batches: batches of a validation, from the start of the validation split.
      on_nonfinite: what an update whose loss or gradient is not finite does to the run. It is never
        applied; "stop" ends the run there, "skip" goes on with the next batch.
      loggers: services that are told the metrics, too, such as `loggers.Wandb`; one of a kind.
      profile: (first, last) step of a `jax.profiler` trace, or None.
    """

    model: ModelConfig
    data: Data
    optimizer: Optimizer
    steps: Count
    task: Task = LanguageModelling()
    initial_weights: str | None = None
    seed: Whole = 0
    mesh: MeshShape = MeshShape()
    rules: Rules = Rules()
    checkpoints: CheckpointConfig = CheckpointConfig()
    samples: Samples = Samples()
    sparsity: Sparsity | None = None
    quantization: Quantization | None = None
    adapters: Lora | None = None
    distillation: Distillation | None = None
    accumulate: Count = 1
    log_every: Count = 10
    eval_every: Whole = 250
    eval_batches: Count = 20
    on_nonfinite: Literal["stop", "skip"] = "stop"
    loggers: Sequence[Logger] = ()
    profile: tuple[Count, Count] | None = None

    def __post_init__(self):
        check_fields(self, UserError)
        kinds = [type(logger).__name__ for logger in self.loggers]
        if len(set(kinds)) < len(kinds):
            raise UserError(f"run: loggers={kinds}; give one of a kind")
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise UserError(f"run: profile={self.profile}; want (first step, last step)")
        if not isinstance(self.sparsity, Sparsity | None):
            raise UserError(
                f"run: sparsity={self.sparsity!r}; use a Sparsity, such as recipes.Recipe or "
                "pruning.Pruning of the package sparsity, or None"
            )
        check_choice("run: on_nonfinite", self.on_nonfinite, ("stop", "skip"), UserError)
        if self.data.batch_size % self.accumulate:
            raise UserError(
                f"run: accumulate={self.accumulate} does not divide batch_size="
                f"{self.data.batch_size}; use a divisor of it"
            )

    @property
    def blocks(self) -> BlockConfig:
        """The model, where it is to be one of blocks.

        Raises:
          UserError: it is of another kind.
        """
        if not isinstance(self.model, BlockConfig):
            raise UserError(
                f"run.Run.model: {type(self.model).__name__} has no blocks; this is for models of "
                "blocks, such as transformer.TransformerConfig"
            )
        return self.model

    @property
    def positions(self) -> int:
        """Positions of a row of the batch: what attention runs over."""
        return self.task.positions(self)

    @property
    def units_per_step(self) -> int:
        """Tokens, images or whatever the task counts, of a step."""
        return self.data.batch_size * self.task.units(self)

    @property
    def flops_per_step(self) -> float:
        """Floating-point operations of a training step."""
        return self.data.batch_size * self.task.flops(self.model, self.positions)

    def _position_shards(self, sizes: Mapping[str, int]) -> int:
        return self.rules.shards(sizes, "length") if self.task.splits_positions else 1

    def build_quantizer(self, params, mesh) -> Quantizer | None:
        """The quantizer of the model's matmuls; None where nothing is quantized.

        Args:
          params: abstract, with their shardings.

        Raises:
          ValueError: the formats do not fit the model or the mesh.
        """
        if self.quantization is None:
            return None
        roles, rules = param_roles(self.model), self.rules

        def activation_shards(name):
            """Shards of the features of a matmul's inputs and of its outputs."""
            role = roles[name]
            return tuple(
                math.prod(rules.shards(mesh.shape, axis) for axis in axes)
                for axes in (role.input_axes, role.output_axes)
            )

        quantizer = self.quantization.build(
            params,
            contraction=lambda name, shape: roles[name].inputs if roles[name].matmul else None,
            seed=self.seed,
            activation_ways=activation_shards,
            tokens=(self.positions, self._position_shards(mesh.shape)),
            attention_operands={name for name, role in roles.items() if role.attends},
        )
        for name, role in roles.items():
            formats = quantizer.formats(name) if role.kind in ("embedding", "head") else None
            if formats is not None and formats.gradients is not None:
                raise ValueError(
                    f"quantization: {name}: gradients of the head are not quantized; give it "
                    "gradients=None, by a pattern before the one that matches it"
                )
        return quantizer

    @property
    def _masks_quantized(self) -> bool:
        """Tells whether masks are made of, and applied to, quantized weights."""
        order = None if self.quantization is None else self.quantization.order
        return order == "quantize_then_sparsify"

    def build_updater(self, params, quantizer: Quantizer | None = None) -> Updater | None:
        """The updater of the run's recipe for these parameters; None for a dense run.

        Args:
          params: abstract, with their shardings.
          quantizer: what `build_quantizer` gave.

        Raises:
          ValueError: the recipe does not fit the model, the mesh or the length of the run.
        """
        if self.sparsity is None:
            return None
        return self.sparsity.build(
            params,
            steps=self.steps,
            contraction=contraction(param_roles(self.model)),
            scored=quantizer.scored if self._masks_quantized and quantizer is not None else None,
        )

    def check_adapters(self, updater: Updater | None) -> None:
        """Raises a UserError where the run's parts do not go with adapters.

        Args:
          updater: what `build_updater` gave.
        """
        why = None
        if not isinstance(self.model, BlockConfig):
            why = f"{type(self.model).__name__} has no blocks with kernels to adapt; leave them out"
        elif updater is not None and updater.packs_at is not None:
            why = "frozen weights are not packed; use a recipe with packed = False"
        elif updater is not None and updater.variance is not None:
            why = "frozen weights have no second moments; use a recipe with variance = None"
        elif updater is not None and updater.scores_training:
            why = "frozen weights have no gradients, which this recipe makes its masks of"
            why += "; use one that goes by weights, such as magnitude"
        elif updater is not None and self._masks_quantized:
            why = "a recipe's masks are applied before quantizing; use 'sparsify_then_quantize'"
        if why is not None:
            raise UserError(f"adapters: {why}")

    def check_mesh(self, sizes: Mapping[str, int]) -> None:
        """Raises a UserError where a mesh of these sizes, by axis, does not divide a batch."""
        rows = self.data.batch_size // self.accumulate
        for what, size, axes in (
            ("batch_size / accumulate", rows, self.rules.batch),
            ("seq_len", self.positions, self.rules.length if self.task.splits_positions else ()),
        ):
            ways = math.prod(sizes[axis] for axis in axes)
            if size % ways:
                shown = " * ".join(f"{axis}={sizes[axis]}" for axis in axes)
                raise UserError(
                    f"mesh: {what} = {size} is not divisible by {shown} = {ways}; "
                    f"use a multiple of {ways}, or a smaller mesh"
                )
