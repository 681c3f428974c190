"""Quantization errors of activations and gradients, measured on a part of a batch, by itself.

The scales of these are made within a step. So a forward pass of its own, and where gradients are
quantized a backward one, goes over one sequence of every device.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from pjit_train.compression.calibrate import enter, replace_dense
from pjit_train.models.blocks import scan_layers
from pjit_train.models.projection import WatchedDense, note_input_losses
from pjit_train.run import Run
from pjit_train.sharding import Rules
from pjit_train.sparse_metrics import kind
from sparsity.numbers.quantized import Quantizer
from sparsity.numbers.quantized_kernels import figures


def observe_activations(
    run: Run, graph: nnx.GraphDef, weights, batch: dict[str, jax.Array], quantizer: Quantizer
) -> dict[str, jax.Array]:
    """Figures of the activations and gradients of a quantized run; scalars, float32.

    Of the first row that every device holds of a batch, rounded as in an evaluation. Blocks of
    gradients are those along the outputs.

    Args:
      run: with `accumulate`, the gradients of a part of the batch are of a sum of losses.
      graph: of its model.
      weights: as the model reads them, quantized.
      batch: of training.

    Returns:
      `quantization_error/<layer kind>/activations`: |q(x) - x| / |x| of the inputs of a matmul;
      `.../gradients` of the gradients of its outputs, `.../operands` of what an attention product
        reads of its outputs;
      `clipped/<layer kind>/...`: the share of entries above the greatest value of their block.
    """
    sample = jax.tree.map(lambda x: _first_of_shards(x, run.rules), batch)
    model = nnx.merge(graph, weights)
    block_graph, stacked = nnx.split(model.blocks)
    x_BTD, inputs = enter(run.task, model, sample)
    whole = run.task.weight(batch) if run.accumulate == 1 else 1

    def layer(x_BTD, of_layer, *, inputs):
        params, probes = of_layer
        block, found = nnx.merge(block_graph, params), {}

        def watched(name, dense):
            def note(what, losses):
                found[f"{name}/{what}"] = losses

            return WatchedDense(dense, note, probes.get(name))

        replace_dense(block, watched)
        return block(x_BTD, **inputs)[0], found

    def loss(probes):
        """The loss of the sample as a step has it, and what is noted on the way, by layer."""
        out_BTD, found = scan_layers(period, x_BTD, (stacked, probes), layers)
        found = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
        for name, (stored, read) in run.task.head_reads(model, out_BTD).items():
            note_input_losses(
                stored, read, lambda what, x, n=name: found.update({f"{n}/{what}": x})
            )
        return run.task.head_loss(model, out_BTD, sample)[0] / whole, found

    layers = model.config.num_layers
    # Checkpoints, or the backward pass would keep what a step may not.
    period = [
        jax.checkpoint(functools.partial(layer, inputs=of_kind))
        for of_kind in inputs[: model.config.period]
    ]
    probes = {
        kind(name): jnp.zeros((layers, 4), jnp.float32)
        for name in quantizer.matmuls
        if (formats := quantizer.formats(name)) is not None and formats.gradients is not None
    }
    gradients, found = jax.grad(loss, has_aux=True)(probes)
    found |= {f"{name}/gradients": jnp.sum(x, axis=0) for name, x in gradients.items()}
    shown = {}
    for name, losses in sorted(found.items()):
        shown[f"quantization_error/{name}"], shown[f"clipped/{name}"] = figures(losses)
    return shown


def _first_of_shards(x: jax.Array, rules: Rules) -> jax.Array:
    """The first row that every shard has of a batch; nothing moves."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in rules.batch)
    return x.reshape(ways, x.shape[0] // ways, *x.shape[1:])[:, 0]
