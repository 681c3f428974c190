"""From a trained run to a run directory that starts from its pruned parameters."""

import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pjit_train.blocks import BlockConfig, contraction_axes
from pjit_train.calibrate import calibration_batches, change_kernels
from pjit_train.checkpoint import Checkpoints
from pjit_train.errors import UserError
from pjit_train.evaluate import restore_weights, validate
from pjit_train.program import Program
from pjit_train.run import Run
from pjit_train.sharding import Rules, make_mesh
from pjit_train.step import new_state, split_model
from sparsity.kernels import dense_tree
from sparsity.layers import assign, names
from sparsity.nm import nm_violations
from sparsity.one_shot import check_pattern, magnitude_mask, parse_pattern, sparsegpt, wanda_mask
from sparsity.sparsity_types import NByM

log = logging.getLogger("torsion")

KERNELS = r"(attention|feed_forward)/.*kernel"
"""The kernels of the blocks: what is pruned unless something else is named."""

Step = Callable[[jax.Array, jax.Array, str], jax.Array]
"""(kernel [inputs, outputs], X^T X of its inputs, its pattern) -> the kernel to go on with."""


def kernel_patterns(
    model: BlockConfig, layers: Mapping[str, str], *, transposable: bool = False
) -> dict[str, str]:
    """The pattern of every kernel that is to be pruned, by its name.

    Args:
      layers: pattern ("2:4", "0.5", or "dense" for none) by regular expression; the first that is
        found in the name of a kernel counts. The kernels are those of the blocks, and the head
        where it is not the token embedding.
      transposable: see `sparsity.one_shot.magnitude_mask`.

    Raises:
      UserError: a pattern is unknown or does not fit its kernel, or an expression matches no
        kernel, or no kernel would be pruned.
    """
    params = nnx.to_pure_dict(split_model(model, Rules())[1])
    shapes = {
        name: leaf.shape
        for name, leaf in zip(jax.tree.leaves(names(params)), jax.tree.leaves(params), strict=True)
        if name.endswith("/kernel") or name == "head"
    }
    try:
        chosen = {n: p for n, p in assign(dict.fromkeys(shapes, 0), layers).items() if p}
        for name, pattern in chosen.items():
            inputs, outputs = _matrix(name, shapes[name])[1:]
            check_pattern(pattern, inputs, outputs, transposable=transposable, name=name)
    except ValueError as error:
        raise UserError(f"compress: {error}") from error
    if not chosen:
        raise UserError("compress: every kernel is left dense; give at least one a pattern")
    return chosen


def compress(
    run: Run,
    directory: Path,
    sparse_run: Run,
    out: Path,
    *,
    config_text: str,
    method: str,
    patterns: Mapping[str, str],
    transposable: bool = False,
    sequences: int = 128,
    step: int | None = None,
) -> dict[str, Any]:
    """Prunes the parameters of a run's checkpoint and writes a run directory of them.

    It holds the parameters as a checkpoint of step 0, with the optimizer's state of a first step:
    training that resumes there repeats the run's schedule on what is left (as ASP does; Mishra et
    al., 2021). It appears when all of it is written and read back, or not at all.

    Args:
      run: of `directory`, on a mesh of one device.
      sparse_run: the run of the new directory, on the same mesh; its recipe keeps the zeros.
      out: the new directory.
      config_text: the configuration of `sparse_run`.
      method: a name of `METHODS`.
      patterns: what `kernel_patterns` gives.
      sequences: of calibration text, from the start of the run's training.
      step: of the checkpoint; None for the newest good one.

    Returns:
      What `compress.json` in the new directory holds: what was asked for, under "kernels" for every
      kind of kernel its pattern, the fraction of zeros, the number of groups with more than N
      nonzeros (None where the pattern is a fraction) and |X W - X W'| / |X W| over the calibration
      text and all layers, where X are the inputs that the kernel has when it is pruned; the zeros
      are those of the written checkpoint. And under "before" and "after" the figures of
      `validate`.

    Raises:
      UserError: there is no such checkpoint or too little text, or `out` exists or cannot be
        written.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it, or use another --out")
    mesh = make_mesh(run.mesh)
    program, sparse = Program(run, mesh), Program(sparse_run, mesh)
    batches = run.data.prepare(run.seed)
    text = calibration_batches(batches, sequences)
    step, weights = restore_weights(program, directory, step)
    with jax.set_mesh(mesh):
        params = jax.tree.map(np.asarray, dense_tree(weights))
    before = validate(sparse, _on_mesh(sparse, params), batches)

    steps: list[Step] = [functools.partial(METHODS[method], transposable=transposable)]
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in patterns}

    def change(name, kernel_IO, products_II):
        changed = kernel_IO
        try:
            for apply in steps:
                changed = apply(changed, products_II, patterns[name])
        except ValueError as error:
            raise UserError(f"compress: {name}: {error}") from error
        errors[name].append(jax.device_get(_squares(kernel_IO, changed, products_II)))
        return changed

    params = change_kernels(program.graph, params, text, patterns.keys(), change)

    temporary = out.parent / f".{out.name}.saving"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
        temporary.mkdir(parents=True)
        (temporary / "config.gin").write_text(config_text)
        _save(sparse, params, temporary)
        written = restore_weights(sparse, temporary)[1]
        report = {
            "run": str(directory),
            "step": step,
            "method": method,
            "transposable": transposable,
            "sequences": sequences,
            "kernels": {
                name: _describe(name, _leaf(written, name), pattern, transposable, errors[name])
                for name, pattern in patterns.items()
            },
            "before": before,
            "after": validate(sparse, written, batches),
        }
        (temporary / "compress.json").write_text(json.dumps(report, indent=2) + "\n")
        temporary.rename(out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{out}: cannot be written ({error}); nothing is left") from error
        raise
    return report


def _magnitude(kernel_IO, products_II, pattern, *, transposable):
    return jnp.where(magnitude_mask(kernel_IO, pattern, transposable=transposable), kernel_IO, 0)


def _wanda(kernel_IO, products_II, pattern, *, transposable):
    norms_I = jnp.sqrt(jnp.diagonal(products_II))
    mask = wanda_mask(kernel_IO, norms_I, pattern, transposable=transposable)
    return jnp.where(mask, kernel_IO, 0)


def _sparsegpt(kernel_IO, products_II, pattern, *, transposable):
    return sparsegpt(kernel_IO, products_II, pattern=pattern, transposable=transposable)


METHODS = {"magnitude": _magnitude, "wanda": _wanda, "sparsegpt": _sparsegpt}


@jax.jit
def _squares(kernel_IO, changed_IO, products_II) -> tuple[jax.Array, jax.Array]:
    """|X W - X W'|^2 and |X W|^2, from X^T X."""

    def square(w_IO):
        w_IO = w_IO.astype(jnp.float32)
        return jnp.vdot(w_IO, jnp.matmul(products_II, w_IO, precision=jax.lax.Precision.HIGHEST))

    difference = changed_IO.astype(jnp.float32) - kernel_IO.astype(jnp.float32)
    return square(difference), square(kernel_IO)


def _on_mesh(program: Program, params):
    return jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), params, program.abstract_state["params"]
    )


def _save(program: Program, params, directory: Path) -> None:
    """Writes the parameters as the checkpoint of step 0."""
    make = functools.partial(new_state, optimizer=program.optimizer, updater=program.updater)
    with jax.set_mesh(program.mesh):
        state = jax.jit(make)(_on_mesh(program, params))
    with Checkpoints(directory / "checkpoints", program.run.checkpoints) as checkpoints:
        checkpoints.save(0, state)


def _describe(name, kernel, pattern, transposable, errors) -> dict[str, Any]:
    """The figures of a kind of kernel; see `compress`."""
    kernel, pattern_type = np.asarray(kernel), parse_pattern(pattern)
    violations = None
    if isinstance(pattern_type, NByM):
        n, m = pattern_type.n, pattern_type.m
        axes = (-2, -1) if transposable else (-2,)
        matrices_LIO = kernel.reshape(_matrix(name, kernel.shape))
        violations = sum(int(nm_violations(matrices_LIO, n, m, axis=axis)) for axis in axes)
    lost, whole = np.sum(np.maximum(np.array(errors, np.float64), 0), axis=0)
    return {
        "pattern": pattern,
        "sparsity": float(np.mean(kernel == 0)),
        "violations": violations,
        "error": math.sqrt(lost / whole) if whole else 0.0,
    }


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(layers, inputs, outputs) of a kernel of stacked layers, or of one that is not stacked."""
    axes = [axis + len(shape) for axis in contraction_axes(name, shape)]
    first, last = min(axes), max(axes) + 1
    return math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])


def _leaf(params, name: str):
    return functools.reduce(lambda tree, key: tree[key], name.split("/"), params)
