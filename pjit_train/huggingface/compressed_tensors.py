"""Hugging Face folders of quantized models in the formats of the compressed-tensors library.

Each quantized weight is stored as codes and scales, in the names, dtypes and packing that the
library reads, and `quantization_config` of config.json says which. Pruned weights are explicit
zeros: no reader takes a `sparsity_config` any more. A model that is not quantized is written by the
same functions, as plain numbers.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from pjit_train import record
from pjit_train.compression.calibrate import calibration_batches, input_maxima, text_of
from pjit_train.compression.kernels import (
    as_matrices,
    load_scales,
    parse_format,
    quantized_kernels,
    violations,
)
from pjit_train.errors import UserError
from pjit_train.evaluate import prepare, restore_weights
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.compressed_tensors_codes import (
    Scheme,
    decode,
    encode,
    input_scales,
    scheme,
)
from pjit_train.huggingface.config import write_config
from pjit_train.huggingface.families import Family, Tensor
from pjit_train.huggingface.sources import folder_of
from pjit_train.huggingface.stored import Place, places
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.roles import Roles, param_roles
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import make_mesh
from sparsity.masks.layers import names
from sparsity.numbers.formats import Format
from sparsity.numbers.quantized_kernels import QuantizedKernel
from sparsity.post_training.gptq import Scales, rtn
from sparsity.recipes.kernels import Kernel, MaskedKernel, dense, dense_tree

log = logging.getLogger("torsion")

SEQUENCES = 128  # of text that scales of activations are taken from, where there are as many


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """Quantization of one kind of kernel of a model.

    Attributes:
      format: of the weights.
      scales: of each layer, a sequence or by its number.
      activations: format of the inputs, or None.
      input_scales: of activations in NVFP4 the tensor scale of each layer; see
        `compressed_tensors_codes.input_scales`.
    """

    format: Format
    scales: Sequence[Scales] | Mapping[int, Scales]
    activations: Format | None = None
    input_scales: Sequence[float] | Mapping[int, float] | np.ndarray = ()

    @property
    def scheme(self) -> Scheme:
        return scheme(self.format, self.activations)


def check(
    folder: str | Path, config: BlockConfig, formats: Mapping[str, tuple[str, str | None]]
) -> None:
    """Raises the UserError that `export` would, of what is known before a run is compressed.

    Args:
      formats: of the weights and of the activations (or None), by name of a kernel; see
        `compress_kernels.kernel_formats`.
    """
    huggingface.check_new(folder)
    Packing(config, {name: _weights(*given) for name, given in formats.items()})


def _weights(format: str, activations: str | None, **rest) -> QuantizedWeights:
    return QuantizedWeights(
        format=parse_format(format),
        activations=None if activations is None else parse_format(activations),
        **{"scales": (), **rest},
    )


def save(
    folder: str | Path,
    config: BlockConfig,
    params: Mapping[str, Any],
    quantized: Mapping[str, QuantizedWeights],
    patterns: Mapping[str, str] | None = None,
    **options,
) -> dict[str, Any]:
    """Writes a folder that `transformers` loads, and vLLM, as a compressed-tensors model.

    Every kernel that is quantized or has a pattern is read back from the file, and must be what it
    was, bit for bit. The folder appears when all of it is written and read, under its name, or not
    at all.

    Args:
      params: as `config.build` has them; those that are quantized hold the values of their format.
      quantized: by name of a kernel, such as "blocks/attention/query/kernel"; where none is, the
        folder is one of plain numbers.
      patterns: N:M, or the fraction of zeros, that a kernel is said to have, by its name.
      options: of `huggingface.save`.

    Returns:
      "bytes" of all files of weights, and "violations" by name of a kernel with an N:M pattern: the
      groups that have more than N nonzeros in the file.

    Raises:
      UserError: as `huggingface.save`; or compressed-tensors has no such format or no such model,
        or values are not those of their format.
    """
    shapes = {"/".join(path): x.shape for path, x in flatten_dict(dict(params)).items()}
    packing = Packing(config, quantized, patterns, shapes)
    huggingface.save(folder, config, params, packing=packing, **options)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"bytes": size, "violations": packing.violations}


def export(
    folder: str | Path, run: Run, directory: Path, *, step: int | None = None, plain: bool = False
) -> dict[str, Any]:
    """Writes a run's parameters and tokenizer as a Hugging Face folder, quantized if the run is.

    Of a run that `compress` wrote, the codes and scales are those of the compression. Of one that
    was trained with `Run.quantization`, weights are rounded as its forward pass rounds them. The
    tensor scale of activations in NVFP4 is taken from the run's training text. The patterns are
    those of the run's recipe.

    Args:
      step: of the checkpoint; None for the newest good one.
      plain: writes the values that the weights take in their formats as plain numbers.

    Returns:
      The "step", whether the folder is "quantized", and what `save` returns.

    Raises:
      UserError: there is no such checkpoint, or as `save`.
    """
    huggingface.check_new(folder)
    program, roles = Program(run, make_mesh(run.mesh)), param_roles(run.blocks)
    step, weights = restore_weights(program, directory, step)
    with jax.set_mesh(program.mesh):
        quantized = {} if plain else _trained(weights, roles) | _compressed(run, directory)
        params = jax.tree.map(np.asarray, dense_tree(weights))
        counted = {} if program.updater is None else program.updater.validity(weights)
    Packing(run.blocks, quantized)  # what has no name there is said first
    quantized = _with_input_scales(quantized, program, params, directory)
    patterns = {name: c.pattern for name, c in counted.items() if c.violations is not None}
    tokenizer = getattr(run.data, "tokenizer", None)  # of text
    options = {"tokenizer": tokenizer, "like": _begun_from(run, directory)}
    done = save(folder, run.blocks, params, quantized, patterns, **options)
    return {"step": step, "quantized": bool(quantized), **done}


def _begun_from(run: Run, directory: Path) -> Path | None:
    """The folder that a run began from, where it is still there and has the run's tokenizer."""
    tokenizer = run.data.tokenizer_file
    if run.initial_weights is None or tokenizer is None:
        return None
    kept = record.read_if_whole(directory)
    source = run.initial_weights
    if kept is not None and Path(kept.folder, source).exists():
        source = str(Path(kept.folder, source))
    try:
        folder = folder_of(source)
        if (folder / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.text:
            return folder
        why = "has another tokenizer by now"
    except (UserError, OSError) as error:
        why = f"cannot be read ({error})"
    log.warning(
        "%s %s: the folder is written without its chat template and its tokens of begin and end",
        run.initial_weights,
        why,
    )
    return None


def _compressed(run: Run, directory: Path) -> dict[str, QuantizedWeights]:
    """Quantization, by name, of the kernels that `compress` quantized."""
    roles = param_roles(run.model)
    return {
        name: _weights(
            row["format"],
            row["activations"],
            scales=load_scales(
                directory, name, run.blocks.num_layers if roles[name].stacked else 1
            ),
        )
        for name, row in quantized_kernels(directory).items()
    }


def _trained(weights, roles: Roles) -> dict[str, QuantizedWeights]:
    """Quantization, by name, of the kernels that a run's own formats round, with its scales."""
    is_kernel = lambda x: isinstance(x, Kernel)
    leaves = jax.tree.leaves(weights, is_leaf=is_kernel)
    labels = jax.tree.leaves(names(jax.tree.map(lambda x: 0, weights, is_leaf=is_kernel)))
    found = {}
    for name, kernel in zip(labels, leaves, strict=True):
        if not isinstance(kernel, QuantizedKernel) or kernel.formats.weights is None:
            continue
        inner = kernel.kernel
        if kernel.order == "quantize_then_sparsify" and isinstance(inner, MaskedKernel):
            inner = inner.weight
        matrices = as_matrices(roles[name], np.asarray(dense(inner)))
        scales = [rtn(matrix_IO, kernel.formats.weights).scales for matrix_IO in matrices]
        found[name] = QuantizedWeights(
            format=kernel.formats.weights, scales=scales, activations=kernel.formats.activations
        )
    return found


def _with_input_scales(
    quantized: Mapping[str, QuantizedWeights], program: Program, params, directory: Path
) -> dict[str, QuantizedWeights]:
    """Adds `input_scales`, taken from the first sequences of the run's training text."""
    scaled = {
        name
        for name, weights in quantized.items()
        if weights.activations is not None and weights.activations.array_bits
    }
    if not scaled:
        return dict(quantized)
    batches = text_of(prepare(program.run, directory))
    text = calibration_batches(batches, min(SEQUENCES, batches.num_train_sequences))
    maxima = input_maxima(program.graph, params, text)
    return {
        name: dataclasses.replace(weights, input_scales=input_scales(maxima[name].max(axis=1)))
        if name in scaled
        else weights
        for name, weights in quantized.items()
    }


def _linear(tensor: Tensor, roles: Roles) -> bool:
    """Tells whether a tensor is a weight [outputs, inputs]: of one linear layer, or of several.

    The head is one, too, where the model has none of its own but the embedding, transposed. Of
    several layers (Phi-3) the outputs are joined, and so are their scales.
    """
    role = roles.get(_kernels(tensor)[0])
    ours, theirs = tensor.layout.split(" -> ")
    outputs, _, inputs = theirs.partition(",")
    kernel = role is None or role.kind in ("kernel", "head")
    joined = len(tensor.paths) == 1 or tensor.axis == 0
    return kernel and joined and bool(inputs) and ours == inputs + outputs


class Packing:
    """Tensors that `huggingface.save` writes in place of some; see `huggingface.Packing`.

    Attributes:
      config: `quantization_config`, or None where nothing is quantized.
      patterns: N:M of a kernel, by its name.
      violations: see `save`.
    """

    def __init__(
        self,
        config: BlockConfig,
        quantized: Mapping[str, QuantizedWeights],
        patterns: Mapping[str, str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        *,
        family: Family | None = None,
    ):
        family, self._roles = family or write_config(config)[0], param_roles(config)
        self.quantized, self.patterns = quantized, patterns or {}
        self._shapes = shapes or {}
        self.violations: dict[str, int] = {}
        self._written: dict[str, tuple[Tensor, bytes]] = {}  # with a digest of the values
        linear = [t for t in family.tensors if _linear(t, self._roles)]
        self._linear = {kernel: t for t in linear for kernel in _kernels(t)}
        self.config = self._config(family.architecture) if quantized else None

    def _config(self, architecture: str) -> dict[str, Any]:
        linear, quantized = self._linear, self.quantized
        groups: dict[str, tuple[Scheme, list[str]]] = {}
        for kernel, weights in quantized.items():
            if kernel not in linear:
                raise UserError(
                    f"export: {kernel} is no linear layer of {architecture}; "
                    "use --dense for plain numbers"
                )
            parts = _kernels(linear[kernel])
            self._check_parts(parts, architecture)
            if kernel == parts[0]:
                _, targets = groups.setdefault(repr(weights.scheme), (weights.scheme, []))
                targets.append(_target(linear[kernel]))
        rest = [_target(t) for k, t in linear.items() if k not in quantized and k == _kernels(t)[0]]
        found = {scheme.name for scheme, _ in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": found.pop() if len(found) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": rest,
            "config_groups": {
                f"group_{number}": {
                    "targets": targets,
                    "weights": scheme.weights,
                    "input_activations": scheme.inputs,
                    "output_activations": None,
                    "format": scheme.name,
                }
                for number, (scheme, targets) in enumerate(groups.values())
            },
        }

    def _check_parts(self, kernels: Sequence[str], architecture: str) -> None:
        """Raises a UserError unless kernels that one tensor holds are quantized alike."""
        schemes = {repr(self.quantized[k].scheme) if k in self.quantized else None for k in kernels}
        formats = [self.quantized[k].format for k in kernels if k in self.quantized]
        whole = any(format.block == "tensor" or format.array_bits for format in formats)
        if len(kernels) > 1 and (len(schemes) > 1 or whole):
            raise UserError(
                f"export: {architecture} has {', '.join(kernels)} in one tensor; give them one "
                "format, with scales of their outputs, or use --dense for plain numbers"
            )

    def tensors(self, name: str, tensor: Tensor, layer: int | None, array) -> dict[str, np.ndarray]:
        """Returns, by name, what is written of one of Hugging Face's tensors."""
        kernels = _kernels(tensor)
        if kernels[0] not in self.quantized:
            if self.patterns.keys() & kernels:
                self._written[name] = tensor, _digest(array)
            return {name: array}
        weights, values_OI = self.quantized[kernels[0]], np.asarray(array, np.float32)
        scheme = weights.scheme
        scales = joined_scales([self.quantized[kernel].scales[layer or 0] for kernel in kernels])
        stored = encode(values_OI, scales, weights.format, scheme.name)
        decoded_OI = decode(stored, scheme.weights, scheme.name)
        if not np.array_equal(decoded_OI, values_OI):
            raise UserError(
                f"export: {', '.join(kernels)} has values that its format and scales do not "
                "give: was the run trained after it was compressed? Use --step 0, or --dense for "
                "plain numbers"
            )
        if len(weights.input_scales):
            stored["input_global_scale"] = np.float32(weights.input_scales[layer or 0]).reshape(1)
        self._written[name] = tensor, _digest(decoded_OI)
        return {f"{name.removesuffix('.weight')}.{part}": x for part, x in stored.items()}

    def values(self, name: str, tensor: Tensor, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """The Hugging Face tensor that stored tensors stand for; undoes `tensors`."""
        kernel = _kernels(tensor)[0]
        if kernel not in self.quantized:
            return stored[name]
        prefix = name.removesuffix("weight")
        parts = {n.removeprefix(prefix): x for n, x in stored.items() if n.startswith(prefix)}
        scheme = self.quantized[kernel].scheme
        return decode(parts, scheme.weights, scheme.name)

    def check(self, folder: Path) -> None:
        """Reads back what was written: every value, and the N:M that it should have."""
        read = _Reader(folder)
        for name, (tensor, digest) in self._written.items():
            kernels = _kernels(tensor)
            if kernels[0] in self.quantized:
                scheme = self.quantized[kernels[0]].scheme
                stored = read.module(name.removesuffix(".weight"))
                array = decode(stored, scheme.weights, scheme.name)
            else:
                array = read.read(name)
            if _digest(array) != digest:
                module = name.removesuffix(".weight")
                raise OSError(f"{module} is read back otherwise than it was written")
            for kernel in self.patterns.keys() & kernels:
                stacked = "{}" in tensor.name
                of_layer = [self._shapes[name][1 if stacked else 0 :] for name in kernels]
                part = tensor.split(array, of_layer)[kernels.index(kernel)]
                found = violations(self._roles[kernel], part, self.patterns[kernel])
                self.violations[kernel] = self.violations.get(kernel, 0) + found


def joined_scales(parts: Sequence[Scales]) -> Scales:
    """Scales of a kernel whose outputs are those of several, one after the other."""
    if len(parts) == 1 or parts[0].scale is None:
        return parts[0]
    along = [
        None if parts[0][field] is None else np.concatenate([x[field] for x in parts], axis=1)
        for field in range(2)
    ]
    return Scales(*along)


def _kernels(tensor: Tensor) -> list[str]:
    """Names of Torsion's parameters that a Hugging Face tensor holds."""
    return [path.replace(".", "/") for path in tensor.paths]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()  # bfloat16 too


class _Reader:
    """The tensors of a folder's safetensors files as they are stored."""

    def __init__(self, folder: Path):
        self._at: dict[str, Place] = {}
        for path in folder.glob("*.safetensors"):
            self._at |= places(path)

    def module(self, module: str) -> dict[str, np.ndarray]:
        """The tensors of one layer, by what follows its name."""
        prefix = f"{module}."
        return {n.removeprefix(prefix): self.read(n) for n in self._at if n.startswith(prefix)}

    def read(self, name: str) -> np.ndarray:
        return self._at[name].read()


def _target(tensor: Tensor) -> str:
    """The linear layers of a tensor, as `targets` and `ignore` name them."""
    module = tensor.name.removesuffix(".weight")
    if "{}" not in module:
        return module
    return "re:^" + r"\d+".join(re.escape(part) for part in module.split("{}")) + "$"
