"""Calibration text on its way through a model, block by block, each changed before the next.

So a block sees what the changed ones before it make of the text, as in SparseGPT (Frantar and
Alistarh, 2023) and Wanda (Sun et al., 2024). The device holds the parameters of one block at a
time, and the text as that block is given it.

Letters in names: B batch, T tokens, D model width, I inputs of a kernel, O its outputs.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pjit_train.data.data import Batches as AnyBatches
from pjit_train.data.text import Batches
from pjit_train.errors import UserError
from pjit_train.models.projection import Dense
from pjit_train.tasks.language_modelling import LanguageModelling
from pjit_train.tasks.task import Task
from sparsity.post_training.hessian import add_grams, from_gram, gram

Change = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""(name, kernel [inputs, outputs], X^T X float64 [inputs, inputs]) -> the kernel to go on with."""


def text_of(batches: AnyBatches) -> Batches:
    """The batches of a run of text, as such.

    Raises:
      UserError: they are of other data.
    """
    if not isinstance(batches, Batches):
        raise UserError(
            "calibration: reads text, and the data of the run are other; use a run of text"
        )
    return batches


def calibration_batches(batches: Batches, sequences: int) -> list[dict[str, np.ndarray]]:
    """The first sequences of the training split in the order of training, in equal batches.

    Raises:
      UserError: the text has fewer.
    """
    if sequences < 1:
        raise UserError(f"calibration: {sequences} sequences; use 1 or more")
    if sequences > batches.num_train_sequences:
        raise UserError(
            f"calibration: the training text has {batches.num_train_sequences} sequences of "
            f"{batches.seq_len} tokens, not {sequences}; use at most as many as it has"
        )
    rows = math.gcd(sequences, batches.batch_size)  # of equal batches, each within one of training
    places = (divmod(first, batches.batch_size) for first in range(0, sequences, rows))
    return [batches.train_batch(step, slice(row, row + rows)) for step, row in places]


def change_kernels(
    graph: nnx.GraphDef,
    params: dict[str, Any],
    batches: Sequence[dict[str, np.ndarray]],
    names: Collection[str],
    change: Change,
) -> dict[str, Any]:
    """The parameters with kernels changed in the order in which the text meets them.

    All kernels of a block are given the inputs that they have before any of that block is changed.

    Args:
      graph: of a `Transformer`, used where no mesh is set.
      params: of it, arrays of numpy; they are left as they are.
      batches: `inputs` and, where documents are masked, `segments`: int [batch, tokens].
      names: of the kernels to change, such as "blocks/attention/query/kernel"; "head" is one.
      change: called for each of them and each layer.

    Returns:
      A tree like `params`; what was not changed is shared with it.
    """
    model = nnx.merge(graph, params)
    changed = params | {"blocks": jax.tree.map(np.copy, params["blocks"])}
    wanted = [name.split("/")[1:] for name in names if name.startswith("blocks/")]
    hidden = enter_all(model, batches)
    for block, products in walk(model, changed["blocks"], hidden, gram, add_grams):
        for path in wanted:
            name = "/".join(["blocks", *path])
            *parents, last = path
            holder = functools.reduce(lambda tree, key: tree[key], parents, block)
            products_II = from_gram(products["/".join(parents)])
            matrix_IO = holder[last].reshape(len(products_II), -1)
            new = np.asarray(change(name, matrix_IO, products_II))
            holder[last][...] = new.reshape(holder[last].shape)
    if "head" in names:
        sums = (jax.jit(gram)(model.norm(x)) for x, _ in hidden)
        products_DD = from_gram(functools.reduce(add_grams, sums))
        changed["head"] = np.asarray(change("head", params["head"], products_DD))
    return changed


def input_maxima(
    graph: nnx.GraphDef, params: dict[str, Any], batches: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The greatest magnitude of every input of every kernel, over the text.

    Returns:
      By name of the kernel, such as "blocks/attention/query/kernel", float32 [layers, inputs]; of
      a head of its own, "head", [1, inputs].

    Arguments are those of `change_kernels`.
    """
    model = nnx.merge(graph, params)
    hidden = enter_all(model, batches)
    layers = [x for _, x in walk(model, params["blocks"], hidden, _maxima, jnp.maximum)]
    maxima = {
        f"blocks/{name}/kernel": np.stack([np.asarray(found[name]) for found in layers])
        for name in layers[0]
    }
    if "head" in params:
        last = functools.reduce(jnp.maximum, (_maxima(model.norm(x)) for x, _ in hidden))
        maxima["head"] = np.asarray(last)[None]
    return maxima


Hidden = list[tuple[jax.Array, list[dict[str, Any]]]]
"""By batch, what blocks are given: activations [batch, tokens, d_model], and each layer's inputs
besides."""


def walk(
    model, stacked: dict[str, Any], hidden: Hidden, measure: Callable, join: Callable
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Walks through the blocks in order, as views of the stacked arrays, and measures their inputs.

    The text goes on through the block as it is when the next one is asked for; at the end `hidden`
    holds what the last one made of it.

    Args:
      measure: of the inputs of a Dense [..., inputs]; `join` joins those of two batches.

    Yields:
      The block, and the measurements by the name of a Dense, such as "attention/query".
    """
    graph = nnx.graphdef(model.blocks)
    # One shape of a block, so each kind is compiled once.
    static = ("causal", "window")
    forward = jax.jit(functools.partial(_forward, graph), static_argnames=static)
    look = jax.jit(functools.partial(_measured, graph, measure), static_argnames=static)
    for layer in range(model.config.num_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], stacked)  # views
        on_device = jax.tree.map(jnp.array, block)
        measured = (look(on_device, x, **rest[layer]) for x, rest in hidden)
        joined = functools.reduce(lambda a, b: {n: join(a[n], b[n]) for n in a}, measured)
        yield block, joined
        on_device = jax.tree.map(jnp.array, block)
        hidden[:] = [(forward(on_device, x, **rest[layer]), rest) for x, rest in hidden]


def num_inputs(dense: Dense) -> int:
    """Number of axes of a Dense's kernel that its einsum sums over; they lead."""
    return len(dense.kernel.get_metadata("role").inputs)


class _Tap:
    """A Dense that notes what it is applied to, [tokens, inputs]."""

    def __init__(self, dense: Dense, note: Callable[[jax.Array], None]):
        self.dense, self.note = dense, note

    def __getattr__(self, name: str):
        return getattr(self.dense, name)

    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = math.prod(x.shape[x.ndim - num_inputs(self.dense) :])
        self.note(x.reshape(-1, inputs))
        return self.dense(x)


def _maxima(x: jax.Array) -> jax.Array:
    """max |X_j|, float32 [inputs], of rows [..., inputs]."""
    return jnp.max(jnp.abs(x.reshape(-1, x.shape[-1]).astype(jnp.float32)), axis=0)


def _forward(graph, params, x_BTD, **inputs):
    return nnx.merge(graph, params)(x_BTD, **inputs)[0]


def _measured(graph, measure, params, x_BTD, **inputs):
    """{"attention/query": measurement} of the inputs of every Dense of a block."""
    block, found = nnx.merge(graph, params), {}

    def tapped(name, dense):
        return _Tap(dense, lambda x: found.__setitem__(name, measure(x)))

    replace_dense(block, tapped)
    block(x_BTD, **inputs)
    return found


def replace_dense(block: nnx.Module, replacement: Callable[[str, Dense], Any]) -> None:
    """Puts replacement("attention/query", dense) in place of every Dense of a block."""
    found = [(path, x) for path, x in nnx.iter_modules(block) if isinstance(x, Dense)]
    for path, dense in found:
        *parents, last = map(str, path)
        parent: Any = functools.reduce(getattr, parents, block)
        setattr(parent, last, replacement("/".join([*parents, last]), dense))


class _Entrance(nnx.Module):
    """Stands in place of a model's blocks and notes what each would be given."""

    def __init__(self, note: Callable):
        self.note = note

    def __call__(self, x_BTD, **inputs):
        self.note(x_BTD, inputs)
        return x_BTD, None


def enter_all(model, batches) -> Hidden:
    """Inputs of the first block for each batch; for `walk`."""
    return [enter(LanguageModelling(), model, batch) for batch in batches]


def enter(task: Task, model, batch) -> tuple[jax.Array, list[dict[str, Any]]]:
    """The embedded row of a batch, for the first block, and the other inputs of each layer."""
    noted = []
    entrance = nnx.clone(model)
    entrance.blocks = _Entrance(lambda x, inputs: noted.append((x, inputs)))
    entrance.config = dataclasses.replace(model.config, layers="unroll", remat="none")
    task.body(entrance, jax.tree.map(jnp.asarray, dict(batch)))
    return noted[0][0], [inputs for _, inputs in noted]
