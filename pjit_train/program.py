"""A run on a mesh: its state, its compiled functions, and its batches as global arrays."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjit_train import huggingface
from pjit_train.loss import cross_entropy
from pjit_train.run import Run
from pjit_train.step import abstract_state, eval_step, split_model, state_maker, train_step

Batch = dict[str, jax.Array]


def next_token_loss(model, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of a batch in nats, and the sum of its weights."""
    hidden, _ = model.hidden(batch["inputs"], segments=batch.get("segments"))
    weights, targets = batch.get("weights"), batch["targets"]
    loss = cross_entropy(hidden, model.head_kernel(), targets, weights)
    return loss, np.float32(targets.size) if weights is None else weights.sum()


class Program:
    """What a run needs on the devices. Checks all that can be checked before making any array.

    Attributes:
      graph: the model's graph definition; `nnx.merge(graph, params)` is the model.
      schedule: learning rate by number of updates.

    Raises:
      UserError: mesh, batch and model do not fit each other.
    """

    def __init__(self, run: Run, mesh: Mesh):
        run.check_mesh(mesh)
        run.model.check_data(vocab_size=run.data.tokenizer.vocab_size, seq_len=run.data.seq_len)
        self.run, self.mesh = run, mesh
        self._evaluation = None
        self.optimizer, self.schedule = run.optimizer.build(run.steps)
        with jax.set_mesh(mesh):
            self.graph, _ = split_model(run.model, run.rules)
            self._make_state = state_maker(run.model, run.rules, self.optimizer, mesh)
            self.abstract_state = abstract_state(self._make_state)
            self._batch_sharding = NamedSharding(mesh, run.rules.spec(("batch", "length")))

    def describe_mesh(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        return f"mesh {sizes or '1'} ({self.mesh.devices.flat[0].device_kind})"

    def new_state(self):
        """The state before the first step, every array created sharded."""
        with jax.set_mesh(self.mesh):
            weights = self.run.initial_weights
            if weights is None:
                return jax.jit(self._make_state, static_argnums=0)(self.run.seed)
            params = huggingface.load(weights, self.run.model, rules=self.run.rules)[1]
            optimizer_state = jax.jit(self.optimizer.init)(params)
            return {"step": np.int32(0), "params": params, "optimizer": optimizer_state}

    def compile_step(self, batch: Batch) -> Callable:
        """The compiled training step: (state, batch) -> (state, metrics), donating the state."""
        accumulate = self.run.accumulate
        step = train_step(self.graph, self.optimizer, self.schedule, next_token_loss, accumulate)
        return self._compile(jax.jit(step, donate_argnums=0), self.abstract_state, batch)

    def evaluate(self, params, batch: Batch, sums=None) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, sum of weights) of a batch, added to those of the batches before it.

        So each call depends on the one before: programs with collectives that do not may deadlock
        when emulated devices run several at once.
        """
        if sums is None:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            zero = jax.make_array_from_callback((), everywhere, lambda _: np.float32(0))
            sums = zero, zero
        if self._evaluation is None:
            step = jax.jit(eval_step(self.graph, next_token_loss))
            self._evaluation = self._compile(step, params, batch, sums)
        return self._evaluation(params, batch, sums)

    def _compile(self, function, *args) -> Callable:
        with jax.set_mesh(self.mesh):
            compiled = function.lower(*args).compile()
        # Collectives time out after 30 s where one process begins while another still compiles.
        everyone = set(range(jax.process_count()))
        ocp.multihost.sync_global_processes("compiled", timeout=3600, processes=everyone)
        return compiled

    def global_batch(self, read: Callable[[slice], dict[str, np.ndarray]]) -> Batch:
        """A batch as global arrays; each process reads only the rows that its devices hold.

        Args:
          read: the given rows of the batch, each array [rows, seq_len].
        """
        data = self.run.data
        shape = (data.batch_size, data.seq_len)
        local = functools.cache(lambda start, stop: read(slice(start, stop)))

        def rows(index):
            start, stop, _ = index[0].indices(shape[0])
            return local(start, stop)

        indices = self._batch_sharding.addressable_devices_indices_map(shape)
        names = rows(next(iter(indices.values())))
        return {
            name: jax.make_array_from_callback(
                shape, self._batch_sharding, lambda index, name=name: rows(index)[name][:, index[1]]
            )
            for name in names
        }
