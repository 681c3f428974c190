"""A run on a mesh: its state, its compiled functions, and its batches as global arrays."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, auto_axes

from pjit_train.activation_metrics import observe_activations
from pjit_train.attention.dispatch import check_way
from pjit_train.data.text import TextData
from pjit_train.digest import digests
from pjit_train.errors import UserError
from pjit_train.huggingface import peft
from pjit_train.huggingface import weights as huggingface
from pjit_train.huggingface.sources import folder_of
from pjit_train.models.block_config import BlockConfig
from pjit_train.models.roles import param_roles
from pjit_train.run import Run
from pjit_train.sparse_metrics import observe, observe_quantization
from pjit_train.step import (
    State,
    abstract,
    check_layout,
    eval_step,
    joined,
    new_params,
    new_state,
    split,
    split_model,
    train_step,
    weights,
)
from pjit_train.tasks.task import Sums

Batch = dict[str, jax.Array]

# Entries of a checkpoint: the rows of tables, and what their optimizer keeps.
_TABLES = {"rows": "tables", "slots": "table_slots"}


class Program:
    """Compiled functions of a run on its devices. Checks all that can be checked before making any
    array.

    Attributes:
      graph: the model's graph definition; `nnx.merge(graph, params)` is the model.
      schedule: learning rate by number of updates.
      embeddings: `Embeddings` of the model; None where it has none.

    Raises:
      UserError: mesh, batch and model do not fit each other.
    """

    def __init__(self, run: Run, mesh: Mesh):
        run.task.check(run)
        run.check_mesh(mesh.shape)
        self.run, self.mesh = run, mesh
        self._observe: Callable | None = None
        self._merge: Callable | None = None
        self._evaluations: dict[Any, Callable] = {}  # by the structure and types of the weights
        with jax.set_mesh(mesh):
            check_layout(run.model, run.rules, mesh)
            if isinstance(run.model, BlockConfig):
                check_way(run.model.attention, mesh.devices.flat[0].platform)
            self.embeddings = run.model.embeddings(run.rules, mesh)
            self.graph, _ = split_model(run.model, run.rules)
            self.teacher = None if run.distillation is None else run.distillation.build(run)
            params = abstract(self._new_params, 0)
            try:
                self.quantizer = run.build_quantizer(params, mesh)
            except ValueError as error:
                raise UserError(str(error)) from error
            try:
                self._build_optimizer(params)
            except (TypeError, ValueError) as error:
                if run.sparsity is None:
                    raise
                raise UserError(f"sparsity: {error}") from error
            self._batch_shardings = {
                name: NamedSharding(mesh, run.rules.spec(axes))
                for name, axes in run.task.axes.items()
            }

    def _build_optimizer(self, params) -> None:
        """The recipe, the optimizer inside it, and the state that they make of the parameters."""
        run = self.run
        self.updater = run.build_updater(params, self.quantizer)
        self.adapters = None
        if run.adapters is None:
            roles, around = param_roles(run.model), self.updater
        else:
            run.check_adapters(self.updater)
            self.adapters = run.adapters.build(run.model, run.rules, params)
            roles, around = self.adapters.roles, None
        self.optimizer, self.schedule = run.optimizer.build(run.steps, roles, around)
        self.abstract_state = abstract(self._new_state, params)
        if self._has_teacher:
            config = self.teacher.config
            make = lambda: new_params(config, run.rules, 0)
            check_layout(config, run.rules, self.mesh)
            self.abstract_state["teacher"] = abstract(make)
        self._packs_at = None if self.updater is None else self.updater.packs_at
        if self._packs_at is not None:
            self._abstract_packed = abstract(self._pack, self.abstract_state)

    def describe_mesh(self) -> str:
        sizes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        return f"mesh {sizes or '1'} ({self.mesh.devices.flat[0].device_kind})"

    def new_state(self) -> State:
        """The state before the first step, every array created sharded."""
        with jax.set_mesh(self.mesh):
            if self.run.initial_weights is None:
                make = lambda seed: self._new_state(self._new_params(seed))
                state = jax.jit(make, static_argnums=0)(self.run.seed)
            else:
                state = jax.jit(self._new_state, donate_argnums=0)(self._initial_params())
            if self.adapters is not None and self.adapters.lora.initial is not None:
                shardings = jax.tree.map(lambda x: x.sharding, state["adapters"])
                state["adapters"] = jax.device_put(self._initial_adapters(), shardings)
            return state | ({"teacher": self._teacher_params()} if self._has_teacher else {})

    @property
    def _has_teacher(self) -> bool:
        """Tells whether the state holds a teacher, apart from parameters that adapters freeze."""
        if self.teacher is None:
            return False
        return self.adapters is None or self.teacher.folder is not None

    def _initial_adapters(self):
        return peft.load(Path(self.adapters.lora.initial), self.run.blocks, self.adapters)

    def _teacher_params(self):
        return self._initial_params() if self.teacher.folder is None else self.teacher.load()

    def _initial_params(self):
        """The parameters that the run begins with."""
        source = self.run.initial_weights
        if source is None:
            return jax.jit(self._new_params, static_argnums=0)(self.run.seed)
        return huggingface.load(folder_of(source), self.run.blocks, rules=self.run.rules)[1]

    def _new_params(self, seed: int):
        return new_params(self.run.model, self.run.rules, seed)

    def _new_state(self, params) -> State:
        run = self.run
        trained = None if self.adapters is None else self.adapters.init(run.seed)
        return new_state(params, self.optimizer, self.updater, self.embeddings, run.seed, trained)

    def masks(self, state: State):
        """A copy of the part of a sparse run's state with its masks, which a step would donate."""
        return jax.tree.map(jnp.copy, state.get("sparsity"))

    @property
    def observes(self) -> bool:
        """Tells whether `observe` has anything to say."""
        return self.updater is not None or self.quantizer is not None

    def observe(self, before, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Computes the metrics of a sparse or quantized run.

        Args:
          before: what `masks` gave at the observation before; None in a run that is not sparse.
          batch: of the step that gave the state.
        """

        def figures(before, state):
            found = {}
            if self.updater is not None:
                found |= observe(self.updater, self.run.optimizer, before, state)
            if self.quantizer is not None:
                found |= observe_quantization(self.quantizer, self.updater, state, self.adapters)
            return found

        def observed(before, state, batch):
            found = auto_axes(figures, out_sharding=PartitionSpec())(before, state)
            if self.quantizer is None or not isinstance(self.run.model, BlockConfig):
                return found
            read = weights(state, self.updater, self.quantizer, adapters=self.adapters)
            return found | observe_activations(self.run, self.graph, read, batch, self.quantizer)

        if self._observe is None:
            self._observe = jax.jit(observed)
        with jax.set_mesh(self.mesh):
            return self._observe(before, state, batch)

    def weights(self, state: State):
        """The parameters as a model reads them to evaluate or sample, masked and quantized; of one
        with embeddings {"params": these, "embeddings": their state}."""
        with jax.set_mesh(self.mesh):
            params = self._read(state)
        if self.embeddings is None:
            return params
        return {"params": params, "embeddings": state["embeddings"]}

    def _read(self, state: State):
        """`step.weights` for an evaluation; one compiled pass where adapters are merged."""
        if self.adapters is None:
            return weights(state, self.updater, self.quantizer)
        if self._merge is None:
            read = lambda state: weights(
                state, self.updater, self.quantizer, adapters=self.adapters
            )
            self._merge = jax.jit(read)
        return self._merge(
            {name: x for name, x in state.items() if name not in ("optimizer", "teacher")}
        )

    def _sums(self, weights, batch: Batch) -> Sums:
        """The sums of the run's task over a batch."""
        if self.embeddings is not None:
            found, _ = self._lookup(weights["embeddings"], batch)
            weights, batch = weights["params"], {**batch, "embedded": found}
        return self.run.task.sums(nnx.merge(self.graph, weights), batch)

    def _lookup(self, state, batch: Batch):
        return self.embeddings.lookup(state, self.run.model.bags(batch))

    def _update(self, state, routing, gradients, step, *, apply):
        """An update of the tables, whose learning rates follow the schedule of the run's."""
        scale = self.schedule(step - 1) / self.run.optimizer.learning_rate
        return self.embeddings.update(state, routing, gradients, step, scale=scale, apply=apply)

    def saved(self, state: State) -> State:
        """The state as a checkpoint has it: tables by logical rows, which no mesh changes.

        Of frozen parameters it has their digests.
        """
        if frozen := self._frozen:
            return _without(state, frozen, {name: digests(state[name]) for name in frozen})
        if self.embeddings is None:
            return state
        with jax.set_mesh(self.mesh):
            tables = self.embeddings.saved(state["embeddings"])
        return _with_tables(state, tables)

    def loaded(self, saved: State) -> State:
        """The state of what `saved` gave; or of a part without the optimizer's, for `weights`.

        Raises:
          UserError: the frozen parameters are not those that the run began with.
        """
        if self._frozen:
            return self._with_frozen(saved)
        if self.embeddings is None:
            return saved
        tables = {name: saved[_TABLES[name]] for name in _TABLES if _TABLES[name] in saved}
        with jax.set_mesh(self.mesh):
            state = self.embeddings.loaded(tables)
        others = {name: x for name, x in saved.items() if name not in _TABLES.values()}
        return {**others, "embeddings": state}

    def abstract_saved_after(self, step: int) -> State:
        """Shapes, dtypes and shardings of what `saved` gives of the state after a step."""
        state = self.abstract_state_after(step)
        if frozen := self._frozen:
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            digest = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere)
            kept = {name: jax.tree.map(lambda x: digest, state[name]) for name in frozen}
            return _without(state, frozen, kept)
        if self.embeddings is None:
            return state
        return _with_tables(state, self.embeddings.abstract_saved())

    @property
    def _frozen(self) -> tuple[str, ...]:
        """Entries of the state that the run does not change, which are made or read again."""
        frozen = {"params": self.adapters is not None, "teacher": self._has_teacher}
        return tuple(name for name, is_so in frozen.items() if is_so)

    def _with_frozen(self, saved: State) -> State:
        """The state with what its run does not change; no teacher where it is not trained on."""
        found, run = {}, self.run
        sources = {
            "params": (f"initial_weights={run.initial_weights}", self._initial_params),
            "teacher": (
                f"teacher={getattr(run.distillation, 'teacher', None)}",
                self._teacher_params,
            ),
        }
        for name in self._frozen:
            if name == "teacher" and "optimizer" not in saved:
                continue
            what, make = sources[name]
            with jax.set_mesh(self.mesh):
                found[name] = make()
            now, then = jax.device_get((digests(found[name]), saved["frozen"][name]))
            if not all(jax.tree.leaves(jax.tree.map(np.array_equal, now, then))):
                raise UserError(f"{what}: not the weights that the run began with; put those back")
        return {name: x for name, x in saved.items() if name != "frozen"} | found

    def abstract_state_after(self, step: int) -> State:
        """Shapes, dtypes and shardings of the state after a step: packed, where the recipe says."""
        packed = self._packs_at is not None and step > self._packs_at
        return self._abstract_packed if packed else self.abstract_state

    @property
    def packs(self) -> bool:
        """Tells whether the recipe packs the state at all."""
        return self._packs_at is not None

    def packs_after(self, step: int) -> bool:
        """Tells whether the state is to be packed between a step and the next."""
        return step == self._packs_at

    def pack(self, state: State) -> State:
        """The state with only the kept weights of the kernels of the recipe; donates the state."""
        with jax.set_mesh(self.mesh), warnings.catch_warnings():
            # What shrinks cannot be reused; donated, it is at least freed early.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return jax.jit(self._pack, donate_argnums=0)(state)

    def _pack(self, state: State) -> State:
        params, optimizer_state = self.updater.pack(state["params"], joined(state))
        teacher = {name: state[name] for name in ("teacher",) if name in state}
        parts = split(optimizer_state, self.updater)
        return {"step": state["step"], "params": params, **parts, **teacher}

    def compile_step(self, batch: Batch, step: int = 1) -> Callable:
        """The compiled training step: (state, batch) -> (state, metrics), donating the state.

        Args:
          step: that it is for; and for all later ones, up to one before which the state is packed.
        """
        return self._compile(*self._step(step), batch)

    def lower_step(self, step: int = 1) -> jax.stages.Lowered:
        """The training step of `compile_step`, lowered for the mesh's devices and not compiled.

        No device is used, so they may be those of a slice that is not there.
        """
        function, state = self._step(step)
        rows, positions = self.run.data.batch_size, self.run.positions
        if not isinstance(self.run.data, TextData):
            raise UserError(f"{self.run.task.title}: a step is lowered of language modelling only")
        batch = {
            name: jax.ShapeDtypeStruct(
                (rows, positions), dtype, sharding=self._batch_shardings[name]
            )
            for name, dtype in self.run.data.arrays.items()
        }
        with jax.set_mesh(self.mesh):
            return function.lower(state, batch)

    def _step(self, step: int) -> tuple[Any, State]:
        """The jitted step from a number of updates on, and the abstract state that it takes."""
        accumulate = self.run.accumulate
        function = train_step(
            self.graph,
            self.optimizer,
            self.schedule,
            self.run.task.loss,
            accumulate,
            self.updater,
            self.quantizer,
            None if self.embeddings is None else self._lookup,
            None if self.embeddings is None else self._update,
            self.adapters,
            self.teacher,
        )
        return jax.jit(function, donate_argnums=0), self.abstract_state_after(step)

    def evaluate(self, weights, batch: Batch, sums: Sums | None = None) -> Sums:
        """The sums of the run's task over a batch, added to those of the batches before it.

        So each call depends on the one before: programs with collectives that do not may deadlock
        when emulated devices run several at once.
        """
        if sums is None:
            sums = self._zeros(weights, batch)
        leaves, structure = jax.tree.flatten(weights)
        kind = structure, tuple(map(jax.typeof, leaves))  # a compiled step takes no other dtypes
        if kind not in self._evaluations:
            step = jax.jit(eval_step(self._sums))
            self._evaluations[kind] = self._compile(step, weights, batch, sums)
        return self._evaluations[kind](weights, batch, sums)

    def _zeros(self, weights, batch: Batch) -> Sums:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(self._sums, weights, batch)

        def zero(like):
            make = lambda index: np.zeros(like.shape, np.float32)[index]
            return jax.make_array_from_callback(like.shape, everywhere, make)

        return jax.tree.map(zero, shapes)

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
          read: the given rows of the batch, each array [rows, ...].
        """
        size = self.run.data.batch_size

        @functools.cache
        def local(start, stop):
            found = read(slice(start, stop))
            self.run.task.check_rows(self.run, found)
            return found

        def rows(index):
            start, stop, _ = index[0].indices(size)
            return local(start, stop)

        def shard(name, index):
            return rows(index)[name][:, *index[1:]]

        # Every array is split over its rows alike.
        sharding = next(iter(self._batch_shardings.values()))
        by_rows = NamedSharding(self.mesh, PartitionSpec(sharding.spec[0]))
        indices = by_rows.addressable_devices_indices_map((size,))
        return {
            name: jax.make_array_from_callback(
                (size, *array.shape[1:]),
                self._batch_shardings[name],
                functools.partial(shard, name),
            )
            for name, array in rows(next(iter(indices.values()))).items()
        }


def _without(state: State, names: tuple[str, ...], digests) -> State:
    """A state with digests in place of what its run does not change."""
    return {name: x for name, x in state.items() if name not in names} | {"frozen": digests}


def _with_tables(state: State, tables: dict[str, Any]) -> State:
    """A state whose embeddings stand by logical rows."""
    others = {name: x for name, x in state.items() if name != "embeddings"}
    return others | {_TABLES[name]: x for name, x in tables.items() if x}
