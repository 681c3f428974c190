"""What quantizing loses of activations and gradients, measured on a part of a batch, by itself.

The scales of these are made within a step. So a forward pass of its own, and where gradients are
quantized a backward one, goes over one sequence of every device.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from pjit_train.compression.calibrate import enter, replace_dense
from pjit_train.models.loss import cross_entropy
from pjit_train.models.projection import WatchedDense, note_input_losses
from pjit_train.sharding import Rules
from pjit_train.sparse_metrics import kind
from sparsity.numbers.quantized import Quantizer
from sparsity.numbers.quantized_kernels import figures


def observe_activations(
    graph: nnx.GraphDef,
    weights,
    batch: dict[str, jax.Array],
    quantizer: Quantizer,
    rules: Rules,
    accumulate: int = 1,
) -> dict[str, jax.Array]:
    """Figures of the activations and gradients of a quantized run; scalars, float32.

    Of the first sequence that every device holds of a batch, rounded as in an evaluation. Blocks of
    gradients are those along the outputs.

    Args:
      graph: of a `Transformer`.
      weights: as the model reads them, quantized.
      batch: of training.
      accumulate: parts that a step takes of it; with several their gradients are of sums of losses.

    Returns:
      `quantization_error/<layer kind>/activations`: |q(x) - x| / |x| of the inputs of a matmul;
      `.../gradients` of the gradients of its outputs, `.../operands` of what an attention product
        reads of its outputs;
      `clipped/<layer kind>/...`: the share of entries above the greatest value of their block.
    """
    sample = jax.tree.map(lambda x: _first_of_shards(x, rules), batch)
    model = nnx.merge(graph, weights)
    block_graph, stacked = nnx.split(model.blocks)
    x_BTD, inputs = enter(model, sample)
    targets = batch["targets"]
    whole = targets.size if batch.get("weights") is None else batch["weights"].sum()

    @jax.checkpoint  # or the backward pass would keep what a step may not
    def layer(x_BTD, of_layer):
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
        hidden, found = jax.lax.scan(layer, x_BTD, (stacked, probes))
        found = jax.tree.map(lambda x: jnp.sum(x, axis=0), found)
        hidden, table = model.norm(hidden), "embedding" if model.head is None else "head"
        stored = getattr(model, table).get_value()
        note_input_losses(stored, hidden, lambda what, x: found.update({f"{table}/{what}": x}))
        total = cross_entropy(
            model.head_inputs(hidden), model.head_kernel(), sample["targets"], sample.get("weights")
        )
        return total / (whole if accumulate == 1 else 1), found

    layers = model.config.num_layers
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
