"""One-shot compression of single kernels, and the metrics of it.

Letters in names: L layers, I inputs of a kernel, O its outputs.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from pjit_train.errors import UserError
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.roles import Role, Roles, param_roles
from pjit_train.run import Run
from pjit_train.sharding import Rules
from pjit_train.step import split_model
from sparsity.masks.layers import assign, names
from sparsity.masks.nm import nm_violations
from sparsity.numbers.encoding import scale_bits
from sparsity.numbers.formats import Format, check_blocks, get_format
from sparsity.post_training.gptq import Scales, gptq, rtn
from sparsity.post_training.hessian import Hessian
from sparsity.post_training.one_shot import (
    KeepZeros,
    check_pattern,
    magnitude_mask,
    parse_pattern,
    sparsegpt,
    wanda_mask,
)
from sparsity.post_training.smoothquant import smoothing_scales
from sparsity.sparsity_types import NByM

REPORT, SCALES = "compress.json", "scales.safetensors"  # in the directory of a compressed run


def parse_format(text: str) -> Format:
    """The format of a text, as `sparsity.get_format` reads it, with a scale in any case.

    fp8_e4m3 and fp8_e5m2 alone have a scale per output here: of weights, a cast without one would
    lose what is small.

    Raises:
      ValueError: there is no such format or block.
    """
    return get_format(text).for_weights()


def kernel_patterns(
    model: BlockConfig, layers: Mapping[str, str], *, transposable: bool = False
) -> dict[str, str]:
    """The pattern of every kernel that is to be pruned, by its name.

    Args:
      layers: pattern ("2:4", "0.5", or "dense" for none) by regular expression; the first that is
        found in the name of a kernel counts. The kernels are those of the blocks, and the head
        where it is not the token embedding.
      transposable: see `sparsity.post_training.one_shot.magnitude_mask`.

    Raises:
      UserError: a pattern is unknown or does not fit its kernel, or an expression matches no
        kernel, or no kernel would be pruned.
    """

    def check(name, pattern, inputs, outputs):
        check_pattern(pattern, inputs, outputs, transposable=transposable, name=name)

    return _chosen(model, layers, check, "pattern")


def kernel_formats(model: BlockConfig, layers: Mapping[str, str]) -> dict[str, str]:
    """The format of every kernel that is to be quantized, by its name.

    Args:
      layers: format (see `parse_format`, or "dense" for none) by regular expression.

    Raises:
      UserError: as `kernel_patterns`.
    """

    def check(name, text, inputs, outputs):
        check_blocks(parse_format(text), inputs, name=name)

    return _chosen(model, layers, check, "format")


def _chosen(model, layers, check, what: str) -> dict[str, str]:
    params, roles = nnx.to_pure_dict(split_model(model, Rules())[1]), param_roles(model)
    shapes = {
        name: roles[name].matrix_shape(leaf.shape)
        for name, leaf in zip(jax.tree.leaves(names(params)), jax.tree.leaves(params), strict=True)
        if roles[name].kind in ("kernel", "head")
    }
    try:
        chosen = {n: p for n, p in assign(dict.fromkeys(shapes, 0), layers).items() if p}
        for name, value in chosen.items():
            check(name, value, *shapes[name][1:])
    except ValueError as error:
        raise UserError(f"compress: {error}") from error
    if not chosen:
        raise UserError(f"compress: every kernel is left dense; give at least one a {what}")
    return chosen


def _magnitude(kernel_IO, products_II, pattern, *, transposable):
    return jnp.where(magnitude_mask(kernel_IO, pattern, transposable=transposable), kernel_IO, 0)


def _wanda(kernel_IO, products_II, pattern, *, transposable):
    norms_I = np.sqrt(products_II.diagonal)
    mask = wanda_mask(kernel_IO, norms_I, pattern, transposable=transposable)
    return jnp.where(mask, kernel_IO, 0)


def _sparsegpt(kernel_IO, products_II, pattern, *, transposable):
    return sparsegpt(kernel_IO, products_II, pattern=pattern, transposable=transposable)


METHODS = {"magnitude": _magnitude, "wanda": _wanda, "sparsegpt": _sparsegpt}
QUANTIZERS = {
    "rtn": lambda kernel_IO, products_II, format: rtn(kernel_IO, format),
    "gptq": lambda kernel_IO, products_II, format: gptq(kernel_IO, products_II, format),
}


def smooth(
    roles: Roles, params: dict[str, Any], maxima: Mapping[str, np.ndarray], strength: float
) -> dict[str, Any]:
    """A model that computes the same, its norms divided by scales and their kernels multiplied.

    Kernels that read one norm (query, key and value; up and gate) share its scales. Those whose
    inputs come from no norm (out, down) are left.

    Args:
      roles: of its parameters.
      params: of a `Transformer`, arrays of numpy; they are left as they are.
      maxima: what `calibrate.input_maxima` gives.
      strength: see `sparsity.post_training.smoothquant.smoothing_scales`.
    """
    smoothed = dict(flatten_dict(params, sep="/"))
    readers: dict[str, list[str]] = {}  # kernels by the name of their norm
    for name, role in roles.items():
        if role.norm is not None:
            readers.setdefault(f"{name.split('/')[0]}/{role.norm}", []).append(name)
    for norm, kernels in readers.items():
        maxima_LI = maxima[kernels[0]]
        matrices = [as_matrices(roles[name], smoothed[name]) for name in kernels]
        scales_LI = np.stack(
            [
                smoothing_scales(inputs_I, [x[i] for x in matrices], strength)
                for i, inputs_I in enumerate(maxima_LI)
            ]
        )
        for name in (f"{norm}/scale", f"{norm}/bias"):
            if name in smoothed:
                offset = roles[name].offset
                divided = (smoothed[name] + offset) / scales_LI - offset
                smoothed[name] = divided.astype(np.float32)
        for name, matrix_LIO in zip(kernels, matrices, strict=True):
            scaled = (matrix_LIO * scales_LI[..., None]).astype(np.float32)
            smoothed[name] = scaled.reshape(smoothed[name].shape)
    return unflatten_dict(smoothed, sep="/")


def as_matrices(role: Role, kernel):
    """Reshapes a kernel to matrices [layers, inputs, outputs]."""
    return kernel.reshape(role.matrix_shape(kernel.shape))


def squares(kernel_IO, changed_IO, products_II: Hessian | None) -> tuple[float, float]:
    """|X W - X W'|^2 and |X W|^2, from X^T X; of any scale. Where that is None, with X = 1."""
    kernel_IO, changed_IO = (np.asarray(x, np.float32) for x in (kernel_IO, changed_IO))
    if products_II is None:
        lost, whole = (
            float(np.sum(np.square(x, dtype=np.float64)))
            for x in (changed_IO - kernel_IO, kernel_IO)
        )
        return lost, whole
    _, of_kernel = np.frexp(np.abs(kernel_IO).max(initial=0))
    unit = (np.ldexp(x, -of_kernel) for x in (kernel_IO, changed_IO))
    found = _squares(*unit, products_II.unit_II)
    exponent = 2 * (of_kernel + products_II.exponent)
    lost, whole = (np.ldexp(np.float64(x), exponent) for x in found)
    return float(lost), float(whole)


@jax.jit
def _squares(kernel_IO, changed_IO, products_II):
    def square(w_IO):
        return jnp.vdot(w_IO, jnp.matmul(products_II, w_IO, precision=jax.lax.Precision.HIGHEST))

    return square(changed_IO - kernel_IO), square(kernel_IO)


def relative_error(found: list[tuple[float, float]]) -> float:
    """|X W - X W'| / |X W| over layers, of what `squares` gave for each."""
    lost, whole = np.sum(np.maximum(np.array(found, np.float64), 0), axis=0)
    return math.sqrt(lost / whole) if whole else 0.0


def violations(role: Role, kernel, pattern: str, transposable: bool = False) -> int | None:
    """Groups of a kernel with more than N nonzeros; None where the pattern is a fraction."""
    pattern_type = parse_pattern(pattern)
    if not isinstance(pattern_type, NByM):
        return None
    axes = (-2, -1) if transposable else (-2,)
    matrices_LIO = as_matrices(role, np.asarray(kernel))
    n, m = pattern_type.n, pattern_type.m
    return sum(int(nm_violations(matrices_LIO, n, m, axis=axis)) for axis in axes)


def kernel_bytes(
    shape_LIO: tuple[int, int, int], format: Format | None, pattern: str | None, itemsize: int
) -> dict[str, int]:
    """Bytes of a kernel as it is stored, scales included.

    Args:
      format: None for numbers of `itemsize` bytes.
      pattern: None for a dense kernel.

    Returns:
      Under "zeros" with each zero stored as an element, and under "packed" with the kept elements
      of an N:M pattern and ceil(log2 M) bits each that say where they are (the same number where
      the pattern is none or a fraction).
    """
    layers, inputs, outputs = shape_LIO
    scales = 0
    if format is None:
        bits = 8 * itemsize
    else:
        bits = format.element_bits
        scales = layers * scale_bits(format, (inputs, outputs), 0) // 8
    size = layers * inputs * outputs
    zeros = packed = -(-size * bits // 8) + scales
    pattern_type = None if pattern is None else parse_pattern(pattern)
    if isinstance(pattern_type, NByM):
        kept = size // pattern_type.m * pattern_type.n
        place = (pattern_type.m - 1).bit_length()
        packed = -(-kept * bits // 8) + -(-kept * place // 8) + scales
    return {"zeros": zeros, "packed": packed}


def leaf(params, name: str):
    """Returns the parameter of a name."""
    return functools.reduce(lambda tree, key: tree[key], name.split("/"), params)


def kept_zeros(run: Run) -> dict[str, str]:
    """The pattern of every kernel whose zeros the recipe of a compressed run keeps."""
    if not isinstance(run.sparsity, KeepZeros):
        return {}
    params = nnx.to_pure_dict(split_model(run.model, Rules())[1])
    chosen = jax.tree.leaves(assign(params, run.sparsity.layers), is_leaf=lambda x: x is None)
    return {
        name: pattern
        for name, pattern in zip(jax.tree.leaves(names(params)), chosen, strict=True)
        if pattern is not None
    }


def stored_scales(scales: Mapping[str, list[Scales]]) -> dict[str, np.ndarray]:
    """Arrays that store the scales of each kernel's layers, by name.

    Of integers with a zero point also "NAME/zero_point", int32; of NVFP4 "NAME/tensor".
    """
    found = {}
    for name, layers in scales.items():
        if layers[0].scale is not None:
            found[name] = np.stack([x.scale for x in layers])
        if layers[0].zero_point is not None:
            found[f"{name}/zero_point"] = np.stack([x.zero_point for x in layers])
        if layers[0].tensor_scale is not None:
            found[f"{name}/tensor"] = np.stack([x.tensor_scale for x in layers])
    return found


def quantized_kernels(directory: Path) -> dict[str, dict[str, Any]]:
    """Reads the rows of `REPORT` of the kernels that have a format; {} where there is no report."""
    if not (directory / REPORT).exists():
        return {}
    rows = json.loads((directory / REPORT).read_text())["kernels"]
    return {name: row for name, row in rows.items() if row["format"] is not None}


def load_scales(directory: Path, name: str, layers: int) -> list[Scales]:
    """The scales of a kernel's layers that a compressed run holds."""
    with safe_open(directory / SCALES, "numpy") as file:
        stored = set(file.keys())
        found = [
            file.get_tensor(name + part) if name + part in stored else [None] * layers
            for part in ("", "/zero_point", "/tensor")
        ]
    return [Scales(*of_layer) for of_layer in zip(*found, strict=True)]
