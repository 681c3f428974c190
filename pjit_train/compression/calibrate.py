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
from sparsity.post_training.hessian import Hessian, add_grams, gram

Change = Callable[[str, np.ndarray, Hessian], np.ndarray]
"""(name, kernel [inputs, outputs], X^T X of its inputs) -> the kernel to go on with."""


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
    hidden = enter_all(model, batches)
    for block, products in walk(model, changed["blocks"], hidden, gram, add_grams):
        change_block(block, products, names, change)
    if "head" in names:
        changed["head"] = np.asarray(change("head", params["head"], head_products(model, hidden)))
    return changed


def change_block(
    block: dict[str, Any],
    products: dict[str, Any],
    names: Collection[str],
    change: Change,
) -> None:
    """Changes kernels of one block in place, given what `gram` found of their inputs.

    Args:
      products: by name of a Dense; each is taken out when it has been used.
      names: see `change_kernels`.
    """
    products_II = last = None
    for name in names:
        dense = name.removeprefix("blocks/").removesuffix("/kernel")
        if dense not in products:  # the head
            continue
        found = products.pop(dense)
        if found is not last:  # kernels of the same inputs share it
            last, products_II = found, Hessian(found)
        *parents, key = [*dense.split("/"), "kernel"]
        holder = functools.reduce(lambda tree, key: tree[key], parents, block)
        matrix_IO = holder[key].reshape(len(products_II), -1)
        new = np.asarray(change(name, matrix_IO, products_II))
        holder[key][...] = new.reshape(holder[key].shape)


def head_products(model, hidden: "States") -> Hessian:
    """X^T X of the inputs of the head."""
    sums = (jax.jit(gram)(model.norm(x)) for x, _ in hidden)
    return Hessian(functools.reduce(add_grams, sums))


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


class States:
    """Inputs of blocks, by batch: activations [batch, tokens, d_model], and by layer the others.

    These are held on the device; `pjit_train.compression.states` has them on disk.
    """

    def __init__(self, held: list[tuple[jax.Array, list[dict[str, Any]]]]):
        self.held = held

    def __iter__(self) -> Iterator[tuple[jax.Array, list[dict[str, Any]]]]:
        return iter(self.held)

    def advance(self, forward: Callable[[jax.Array, list[dict[str, Any]]], jax.Array]) -> None:
        """Puts forward(activations, other inputs) in the place of the activations."""
        self.held = [(forward(x, rest), rest) for x, rest in self.held]


class Walker:
    """Goes through blocks one at a time, and measures the inputs of their matmuls.

    Args:
      graph: of one block; all have one shape, so each kind is compiled once.
      measure: of the inputs of a Dense [..., inputs]; `join` joins those of two batches.
    """

    def __init__(self, graph: nnx.GraphDef, measure: Callable, join: Callable):
        static = ("causal", "window")
        self._join = join
        self._forward = jax.jit(functools.partial(_forward, graph), static_argnames=static)
        self._look = jax.jit(functools.partial(_measured, graph, measure), static_argnames=static)

    def measure(self, layer: int, block: dict[str, Any], states: States) -> dict[str, Any]:
        """Measurements by the name of a Dense, such as "attention/query", in order of their use.

        Those of the same inputs are one object.
        """
        on_device = jax.tree.map(jnp.array, block)
        measured = (self._look(on_device, x, **rest[layer]) for x, rest in states)
        joined = functools.reduce(
            lambda a, b: {names: self._join(a[names], b[names]) for names in a}, measured
        )
        return {name: found for names, found in joined.items() for name in names.split("+")}

    def advance(self, layer: int, block: dict[str, Any], states: States) -> None:
        """Sends the states through a block."""
        on_device = jax.tree.map(jnp.array, block)
        states.advance(lambda x, rest: self._forward(on_device, x, **rest[layer]))


def walk(
    model, stacked: dict[str, Any], states: States, measure: Callable, join: Callable
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Walks through the blocks in order, as views of the stacked arrays, and measures their inputs.

    The text goes on through the block as it is when the next one is asked for; at the end `states`
    holds what the last one made of it.

    Args:
      measure, join: see `Walker`.

    Yields:
      The block, and the measurements by the name of a Dense, such as "attention/query".
    """
    walker = Walker(nnx.graphdef(model.blocks), measure, join)
    for layer in range(model.config.num_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], stacked)  # views
        yield block, walker.measure(layer, block, states)
        walker.advance(layer, block, states)


def num_inputs(dense: Dense) -> int:
    """Number of axes of a Dense's kernel that its einsum sums over; they lead."""
    return len(dense.kernel.get_metadata("role").inputs)


class _Tap:
    """A Dense that notes what it is applied to, [..., inputs] or more axes of inputs."""

    def __init__(self, dense: Dense, note: Callable[[jax.Array], None]):
        self.dense, self.note = dense, note

    def __getattr__(self, name: str):
        return getattr(self.dense, name)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.note(x)
        return self.dense(x)


def _maxima(x: jax.Array) -> jax.Array:
    """max |X_j|, float32 [inputs], of rows [..., inputs]."""
    return jnp.max(jnp.abs(x.reshape(-1, x.shape[-1]).astype(jnp.float32)), axis=0)


def _forward(graph, params, x_BTD, **inputs):
    return nnx.merge(graph, params)(x_BTD, **inputs)[0]


def _measured(graph, measure, params, x_BTD, **inputs):
    """{"attention/query+attention/key": measurement} of the inputs of every Dense of a block.

    Those that are given one array are measured once.
    """
    block, groups = nnx.merge(graph, params), []

    def tapped(name, dense):
        def note(x):
            group = next((names for given, names, _ in groups if given is x), None)
            if group is not None:
                return group.append(name)
            inputs = math.prod(x.shape[x.ndim - num_inputs(dense) :])
            groups.append((x, [name], measure(x.reshape(-1, inputs))))

        return _Tap(dense, note)

    replace_dense(block, tapped)
    block(x_BTD, **inputs)
    return {"+".join(names): found for _, names, found in groups}


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


def enter_all(model, batches) -> States:
    """Inputs of the first block for each batch; for `walk`."""
    return States([enter(LanguageModelling(), model, batch) for batch in batches])


def enter(task: Task, model, batch) -> tuple[jax.Array, list[dict[str, Any]]]:
    """The embedded row of a batch, for the first block, and the other inputs of each layer."""
    noted = []
    entrance = nnx.clone(model)
    entrance.blocks = _Entrance(lambda x, inputs: noted.append((x, inputs)))
    entrance.config = dataclasses.replace(model.config, layers="unroll", remat="none")
    task.body(entrance, jax.tree.map(jnp.asarray, dict(batch)))
    return noted[0][0], [inputs for _, inputs in noted]
