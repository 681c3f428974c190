"""A study of sparsity with quantization: what is compared, and what is measured of trained runs.

After Harma et al., "Effective Interplay between Sparsity and Quantization", ICLR 2025, section 5: a
dense model is fine-tuned with magnitude masks made in every forward pass and straight-through
gradients, and weights and activations are quantized. Also measured is what the paper leaves out:
either order after the same training and in it, and dense models of as many bytes.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pjit_train.checkpoint import Checkpoints
from pjit_train.compression import calibrate
from pjit_train.compression.kernels import as_matrices, kernel_bytes, leaf
from pjit_train.errors import UserError
from pjit_train.evaluate import validate
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.roles import param_roles
from pjit_train.models.transformer import TransformerConfig
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import Rules, make_mesh
from pjit_train.step import weights
from pjit_train.study import abstract_params, build_updater
from pjit_train.tasks.language_modelling import language_model
from sparsity.masks.layers import KERNELS, names
from sparsity.numbers.formats import check_blocks, element_bits, get_format
from sparsity.numbers.quantized import MatmulFormats, Quantization
from sparsity.numbers.quantized_kernels import Order
from sparsity.post_training.interplay import dot_interplay, tensor_interplay
from sparsity.post_training.one_shot import magnitude_mask, parse_pattern
from sparsity.pruning import Pruning
from sparsity.ranges import Count, Positive, check_fields
from sparsity.recipes.kernels import dense_tree
from sparsity.sparsity_types import NByM

ORDERS: tuple[Order, ...] = get_args(Order)
SPARSIFY_FIRST, QUANTIZE_FIRST = ORDERS
PRETRAINED, DENSE, SMALL, SPARSE, BOTH = KINDS = ("pretrained", "dense", "small", "sparse", "both")
"""The kinds of runs: the dense one that all fine-tuning starts from; the same, trained on; smaller
dense ones of a sparse run's bytes; sparse; and sparse and quantized while training."""

SMALL_FORMAT = "int8"  # in which a smaller dense model has the bytes of a sparse one


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterplayStudy:
    """Patterns, formats and seeds that the study combines. Dense runs are always among those that
    are trained.

    Attributes:
      patterns: N:M, N weights kept of every M; or the fraction that is pruned of each kernel.
      formats: of weights and activations, that trained runs are evaluated in, in both orders.
      trained_formats: of these, that runs are also trained in, in both orders; None for all.
      seeds: how many; 0, 1, ... of parameters and data.
      layers: regular expression for the names of the kernels that are pruned and quantized.
      finetune_steps: of every run that starts from the dense one, and of that one more.
      finetune_learning_rate: their peak, after a tenth of these steps.
    """

    patterns: Sequence[str] = ("2:4", "1:4", "0.5")
    formats: Sequence[str] = (
        "int8",
        "int4",
        "hbfp8",
        "hbfp6",
        "hbfp4",
        "mxfp8_e4m3",
        "mxfp6_e3m2",
        "mxfp6_e2m3",
        "mxfp4_e2m1",
        "nvfp4",
    )
    trained_formats: Sequence[str] | None = None
    seeds: Count = 3
    layers: str = KERNELS
    finetune_steps: Count = 100
    finetune_learning_rate: Positive = 3e-4

    def __post_init__(self):
        check_fields(self, UserError)
        try:
            for pattern in self.patterns:
                parse_pattern(pattern)
            for format in (*self.formats, *(self.trained_formats or ())):
                get_format(format)
        except ValueError as error:
            raise UserError(f"study: {error}") from None
        for name in ("patterns", "formats"):
            if not getattr(self, name):
                raise UserError(f"study: {name}=() is empty; give one or more")
        if self.trained_formats == ():
            raise UserError("study: trained_formats=() is empty; give one, or None for all")
        if extra := set(self.trained_formats or ()) - set(self.formats):
            raise UserError(f"study: trained_formats: {', '.join(extra)} is not one of formats")


class Loss(NamedTuple):
    """The validation loss of one model, read in one format and order.

    Attributes:
      kind: of the run, of `KINDS`.
      pattern: None for a dense model that is not small.
      format: of weights and activations; None in full precision.
      order: of `ORDERS`, where there is something to order.
      loss: nats a token.
      bytes: of all parameters as they are stored, by `stored_bytes`.
    """

    kind: str
    pattern: str | None
    format: str | None
    order: str | None
    seed: int
    loss: float
    bytes: int


def check(study: InterplayStudy, run: Run) -> None:
    """Raises a UserError where a pattern or a format of a study does not fit a kernel of a run."""
    for pattern in study.patterns:
        build_updater(dataclasses.replace(run, sparsity=sparsified(pattern, study.layers)))
    for name, (_, inputs, _) in kernel_shapes(language_model(run), study.layers).items():
        for format in study.formats:
            try:
                check_blocks(format, inputs, name=f"study: {name}: {format}")
            except ValueError as error:
                raise UserError(str(error)) from None


def sparsified(pattern: str, layers: str = KERNELS) -> Pruning:
    """The training of the paper: magnitude masks of every forward pass, straight-through."""
    kind = parse_pattern(pattern)
    nm = isinstance(kind, NByM)
    return Pruning(
        algorithm="magnitude_ste",
        sparsity=1 - kind.n / kind.m if isinstance(kind, NByM) else kind,
        sparsity_type=pattern if nm else "unstructured",
        layers=(layers,),
        start_fraction=0.0,
        end_fraction=0.0,
    )


def stored_bytes(
    model: TransformerConfig, format: str | None, pattern: str | None, layers: str = KERNELS
) -> int:
    """Bytes of a model's parameters: scales and the places of kept weights with them.

    An N:M place takes ceil(log2 M) bits; without groups every weight has a bit that says whether it
    is kept. Parameters that are not in `layers` keep their dtype.
    """
    kernels, params = kernel_shapes(model, layers), abstract_params(model, Rules())
    kind = None if pattern is None else parse_pattern(pattern)
    of = None if format is None else get_format(format)
    total = 0
    for name, array in zip(*map(jax.tree.leaves, (names(params), params)), strict=True):
        size, width = array.size, array.dtype.itemsize
        if name not in kernels:
            total += size * width
            continue
        total += kernel_bytes(kernels[name], of, pattern, width)["packed"]
        if isinstance(kind, float):
            bits = 8 * width if of is None else element_bits(of)
            total += math.ceil(size / 8) - math.floor(size * kind * bits / 8)
    return total


def model_of_equal_bytes(
    model: TransformerConfig, pattern: str, layers: str = KERNELS
) -> TransformerConfig:
    """A smaller dense model that has no more bytes in `SMALL_FORMAT` than the sparse one in it.

    As many layers and heads; widths are multiples of 32, that formats can cut into blocks. Of each
    d_model the greatest d_ff that goes in, and of these shapes that nearest in proportion.
    """
    budget = stored_bytes(model, SMALL_FORMAT, pattern, layers)
    unit = math.lcm(32, 2 * model.num_heads)
    shapes = []
    for d_model in range(unit, model.d_model + 1, unit):
        for d_ff in range(32 * (model.d_ff // 32), 0, -32):
            shape = dataclasses.replace(
                model, d_model=d_model, d_ff=d_ff, head_dim=d_model // model.num_heads
            )
            if stored_bytes(shape, SMALL_FORMAT, None, layers) <= budget:
                shapes.append(shape)
                break
    if not shapes:
        raise UserError(f"study: no dense model is as small as {pattern}; use a larger model")
    proportion = model.d_ff / model.d_model
    return min(shapes, key=lambda s: abs(math.log(s.d_ff / s.d_model / proportion)))


class Measures:
    """Losses and errors of trained runs in the formats of a study."""

    def __init__(self, study: InterplayStudy):
        self.study = study
        self._programs: dict[BlockConfig, Program] = {}  # that evaluate a model

    def formats(self, run: Run) -> list[str]:
        """Lists the study's formats whose blocks divide the inputs of every kernel of a run."""
        shapes = kernel_shapes(language_model(run), self.study.layers).values()
        return [
            format
            for format in self.study.formats
            if all(inputs % _block(format) == 0 for _, inputs, _ in shapes)
        ]

    def losses(self, run: Run, directory: Path) -> dict[str, dict[str, float]]:
        """Validation losses, by format and order, of a run that was trained in full precision.

        Of a sparse run the weights below the masks are there still: in either order both are done
        to those. A dense run has one figure a format, under "sparsify_then_quantize".
        """
        orders = ORDERS if run.sparsity is not None else ORDERS[:1]
        program, state = self._restore(run, directory)
        batches = run.data.prepare(run.seed)
        losses: dict[Any, Any] = {}
        for format in self.formats(run):
            losses[format] = {}
            for order in orders:
                read = self._read(program, state, format, order)
                losses[format][order] = self._loss(program, read, format, batches)
        return losses

    def errors(self, run: Run, directory: Path, pattern: str) -> list[dict[str, Any]]:
        """Errors, by `sparsity.post_training.interplay`, of every kernel, layer and format.

        Errors of a kernel are relative to its norm, those of dot products to their root mean
        square. Activations are those of a sequence of the training text in the sparse model; blocks
        lie along the inputs.
        """
        program, state = self._restore(run, directory)
        numbers = jax.tree.map(np.asarray, state["params"])
        with jax.set_mesh(program.mesh):
            read = dense_tree(weights(state, program.updater))
        read = jax.tree.map(np.asarray, read)
        text = calibrate.calibration_batches(calibrate.text_of(run.data.prepare(run.seed)), 1)
        found = []
        roles = param_roles(run.model)
        for name, layer, inputs in self._inputs(program, read, text):
            kernel = leaf(numbers, name)
            matrix = as_matrices(roles[name], kernel)[layer]
            for format in self.study.formats:
                row = _errors(jnp.asarray(inputs), jnp.asarray(matrix), pattern, format)
                found.append({"kernel": name, "layer": layer, "format": format, **row})
        return found

    def _restore(self, run: Run, directory: Path):
        program = Program(run, make_mesh(run.mesh))
        parts = [name for name in program.abstract_state if name != "optimizer"]
        with Checkpoints(directory / "checkpoints", run.checkpoints) as checkpoints:
            restored = checkpoints.restore(program.abstract_state_after, step=run.steps, only=parts)
        if restored is None:
            raise UserError(f"{directory}/checkpoints: has none of step {run.steps}")
        return program, restored[1]

    def _read(self, program: Program, state, format: str, order: Order):
        """The weights in a format, sparse where the run is, as arrays."""
        quantization = Quantization(layers={self.study.layers: format}, order=order)
        run = dataclasses.replace(program.run, quantization=quantization)
        with jax.set_mesh(program.mesh):
            quantizer = run.build_quantizer(program.abstract_state["params"], program.mesh)
            updater = run.build_updater(program.abstract_state["params"], quantizer)
            return dense_tree(weights(state, updater, quantizer))

    def _loss(self, program: Program, read, format: str, batches) -> float:
        """Validation loss of weights that are quantized already: only activations are to be.

        All runs of a model are thus evaluated by the same compiled functions.
        """
        model = program.run.blocks
        if model not in self._programs:
            plain = dataclasses.replace(program.run, sparsity=None, quantization=None)
            self._programs[model] = Program(plain, program.mesh)
        plain = self._programs[model]
        formats = MatmulFormats(activations=format)
        run = dataclasses.replace(
            plain.run, quantization=Quantization(layers={self.study.layers: formats})
        )
        quantizer = run.build_quantizer(plain.abstract_state["params"], plain.mesh)
        return validate(plain, quantizer.weights(read), batches)["val_loss"]

    def _inputs(self, program: Program, read, text):
        """(name, layer, inputs [tokens, inputs]) of every kernel that is pruned and quantized."""
        kernels = kernel_shapes(language_model(program.run), self.study.layers)
        model = nnx.merge(program.graph, read)
        hidden = calibrate.enter_all(model, text)
        blocks = calibrate.walk(model, read["blocks"], hidden, lambda x: x, jnp.append)
        for layer, (_, inputs) in enumerate(blocks):
            for name in kernels:
                yield name, layer, inputs[name.removeprefix("blocks/").removesuffix("/kernel")]


def _errors(x, kernel_IO, pattern: str, format: str) -> dict[str, float]:
    """The errors of one kernel and of its dot products, relative."""
    mask_of = lambda w: magnitude_mask(w, pattern)
    tensor = tensor_interplay(kernel_IO, mask_of, format, axis=0)
    dot = dot_interplay(x, kernel_IO, mask_of, format)
    exact = jnp.matmul(x, kernel_IO, precision=jax.lax.Precision.HIGHEST)
    norm, size = jnp.linalg.norm(kernel_IO), jnp.sqrt(jnp.mean(exact**2))
    terms = ("sparsity", "quantization", *ORDERS, "bound")
    figures = {name: getattr(tensor, name) / norm for name in terms}
    figures |= {f"dot_{name}": getattr(dot, name) / size for name in terms}
    figures |= {f"violations_{o}": dot.violations[i] for i, o in enumerate(ORDERS)}
    figures["lost"] = tensor.lost
    return {name: float(value) for name, value in jax.device_get(figures).items()}


def kernel_shapes(model: TransformerConfig, layers: str) -> dict[str, tuple[int, int, int]]:
    """(layers, inputs, outputs) by the name of every kernel that the expression finds."""
    params, roles = abstract_params(model, Rules()), param_roles(model)
    rows = zip(*map(jax.tree.leaves, (names(params), params)), strict=True)
    return {
        name: roles[name].matrix_shape(array.shape)
        for name, array in rows
        if re.search(layers, name)
    }


def _block(format: str) -> int:
    """The entries that share a scale, where it is a number; else 1."""
    block = get_format(format).block
    return block if isinstance(block, int) else 1
