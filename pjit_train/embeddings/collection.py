"""Embeddings of a model: tables over a mesh, one lookup and one update of rows a step.

embeddings = Embeddings(features, mesh, axes=("data",))
state = embeddings.init(seed)
found, routing = embeddings.lookup(state, bags)            # inside the jitted step
state = embeddings.update(state, routing, gradients, step) # of the loss by `found`

Or `found` may be differentiated by `state`, which gives gradients of whole tables.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pjit_train.embeddings.exchange import Exchange
from pjit_train.embeddings.layout import Stack, stacks
from pjit_train.embeddings.pooling import pooled, spread
from pjit_train.embeddings.routing import Places, Units, tree_sums, units
from pjit_train.embeddings.stored import StoredRows
from pjit_train.embeddings.tables import Bags, Feature, Table, check_bags, gains, narrowed

State = dict[str, Any]
"""{stack: {"rows": {"spread": {array: [devices * slots, ...]}, "copies": {array: [rows, ...]}},
"slots": the same of the optimizer}}: physical rows, as `Layout` says."""


class Routing(NamedTuple):
    """Record of a lookup for the update: {stack: ...}, split over the devices.

    Attributes:
      units: `routing.Units`.
      gains: float32 [batch, columns].
      asked: slots that were asked of each device.
      dropped: by feature, how many ids were out of range, int32 [].
    """

    units: dict[str, Units]
    gains: dict[str, jax.Array]
    asked: dict[str, jax.Array]
    dropped: dict[str, jax.Array]


class Embeddings:
    """Tables on the devices of a mesh.

    Attributes:
      tables: by name.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        mesh: Mesh | None = None,
        *,
        axes: Sequence[str] = (),
        capacity: int | None = None,
    ):
        """Lays the tables of features on a mesh; makes no array.

        Args:
          mesh: None for one device.
          axes: of the mesh, which split the batch and the rows; along the others all is alike.
          capacity: rows that a device asks of another in a round, for all tables of a stack; None
            for 1.5 times what a batch without repeated ids has on average, and 64 more.

        Raises:
          ValueError: two features or tables have one name, or tables do not fit the devices.
        """
        if not features:
            raise ValueError("features: there are none; give at least one Feature")
        self.features, self.mesh = tuple(features), mesh
        self.axes = tuple(a for a in axes if mesh is not None and mesh.shape[a] > 1)
        self.devices = math.prod(mesh.shape[a] for a in self.axes) if self.axes else 1
        if capacity is not None and (isinstance(capacity, bool) or capacity < 1):
            raise ValueError(f"capacity={capacity}; use a whole number from 1, or None")
        self.capacity = capacity
        self.tables: dict[str, Table] = {}
        names: set[str] = set()
        for feature in self.features:
            if feature.name in names:
                raise ValueError(f"feature {feature.name}: two have this name; give each its own")
            names.add(feature.name)
            if self.tables.setdefault(feature.table.name, feature.table) != feature.table:
                raise ValueError(f"table {feature.table.name}: two have this name and differ")
        self.stacks = stacks(list(self.tables.values()), self.devices)
        self._of_stack = {
            s.name: [f for f in self.features if f.table.name in {t.name for t in s.tables}]
            for s in self.stacks
        }
        self._rows = {s.name: StoredRows(s, self.axes) for s in self.stacks}

    # What a step calls.

    def lookup(self, state: State, bags: Mapping[str, Bags]) -> tuple[dict, Routing]:
        """Looks up the bags of a batch.

        Args:
          state: of `init` or `update`; differentiable.
          bags: by the names of features; the batch is split over the devices' axes.

        Returns:
          ({feature: float32 [batch, width]}, what `update` needs).

        Raises:
          ValueError: of `check_bags`; or the devices do not divide the batch.
        """
        check_bags(self.features, bags)
        bags = {f.name: narrowed(bags[f.name]) for f in self.features}
        batch = bags[self.features[0].name].ids.shape[0]
        for stack in self.stacks:
            self._places(stack, batch)  # checks
        rows = {name: of["rows"] for name, of in state.items()}
        look_up = jax.custom_vjp(self._forward)
        look_up.defvjp(self._lookup_fwd, self._lookup_bwd)
        return look_up(rows, bags)

    def update(
        self,
        state: State,
        routing: Routing,
        gradients: Mapping[str, jax.Array],
        step: Any,
        *,
        scale: Any = 1.0,
        apply: Any = True,
    ) -> State:
        """The state after an update of the rows that a lookup found.

        Args:
          routing: of that lookup.
          gradients: of the loss, by what the lookup gave.
          step: number of this update, from 1.
          scale: multiplies the learning rates.
          apply: whether to do it at all, bool [].
        """
        step, scale = jnp.asarray(step, jnp.int32), jnp.asarray(scale, jnp.float32)

        def local(state, routing, gradients, step, scale, apply):
            new = {}
            for stack in self.stacks:
                optimize = functools.partial(
                    self._rows[stack.name].optimized, step=step, scale=scale, apply=apply
                )
                new[stack.name] = self._backward(
                    stack, state[stack.name], routing, gradients, optimize
                )
            return new

        specs = self._state_specs(state), self._routing_specs(routing), self._by_batch(gradients)
        mapped = self._mapped(local, (*specs, P(), P(), P()), specs[0])
        return mapped(state, routing, dict(gradients), step, scale, jnp.asarray(apply, bool))

    # What a lookup is made of.

    def _lookup_fwd(self, rows, bags):
        found, routing = self._forward(rows, bags)
        return (found, routing), (rows, routing, bags)

    def _lookup_bwd(self, residuals, cotangents):
        rows, routing, bags = residuals

        def local(rows, routing, gradients):
            zeros = jax.tree.map(jnp.zeros_like, rows)
            return {
                stack.name: self._backward(
                    stack, {"rows": zeros[stack.name]}, routing, gradients, _written
                )["rows"]
                for stack in self.stacks
            }

        specs = self._state_specs(rows), self._routing_specs(routing)
        mapped = self._mapped(local, (*specs, self._by_batch(cotangents[0])), specs[0])
        of_bags = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), bags)
        of_bags = {
            name: dataclasses.replace(
                of,
                weights=None if bags[name].weights is None else jnp.zeros_like(bags[name].weights),
            )
            for name, of in of_bags.items()
        }
        return mapped(rows, routing, cotangents[0]), of_bags

    def _forward(self, rows, bags):
        def local(rows, bags):
            found, routing = {}, Routing({}, {}, {}, {})
            for stack in self.stacks:
                found |= self._forward_stack(stack, rows[stack.name], bags, routing)
            if self.axes:
                dropped = jax.lax.psum(routing.dropped, self.axes)
                routing = routing._replace(dropped=dropped)
            return found, routing

        shapes = jax.eval_shape(lambda: bags)
        split = P(self.axes or None)
        names = [f.name for f in self.features]
        stacked = [s.name for s in self.stacks]
        routing = Routing(
            {name: Units(*[split] * 5) for name in stacked},
            {name: split for name in stacked},
            {name: split for name in stacked},
            {name: P() for name in names},
        )
        specs = (self._state_specs(rows), self._by_batch(shapes))
        return self._mapped(local, specs, ({name: split for name in names}, routing))(rows, bags)

    def _forward_stack(self, stack: Stack, rows, bags, routing: Routing) -> dict[str, jax.Array]:
        features, keys, counts = self._of_stack[stack.name], [], []
        for feature in features:
            positions, gain, bad = gains(feature.table, bags[feature.name])
            keys.append(stack.keys(feature.table, positions))
            counts.append(gain)
            routing.dropped[feature.name] = bad
        keys_SJ, gains_SJ = jnp.concatenate(keys, axis=1), jnp.concatenate(counts, axis=1)
        stored = self._rows[stack.name]
        if stack.columns and self.axes:
            keys_SJ, gains_SJ = (
                jax.lax.all_gather(x, self.axes, tiled=True) for x in (keys_SJ, gains_SJ)
            )
        exchange = self._exchange(stack, len(keys_SJ) * (1 if stack.columns else self.devices))
        sorted_units = units(keys_SJ, exchange.places, self._device(stack))
        base = exchange.devices * exchange.slots
        found = stored.read(rows, "copies", sorted_units.key - base, sorted_units.key >= base)
        asked = jnp.zeros((1, 1), jnp.int32)
        if stack.slots:
            read = lambda slots: stored.read(rows, "spread", slots, slots < stack.slots)
            found, asked = exchange.fetch(sorted_units, read, found)
        columns = tuple(f.hotness for f in features)
        pools = pooled(found, sorted_units.unit, gains_SJ, columns)
        if stack.columns and self.axes:
            pools = [jax.lax.all_to_all(x, self.axes, 0, 1, tiled=True) for x in pools]
        routing.units[stack.name], routing.asked[stack.name] = sorted_units, asked
        routing.gains[stack.name] = gains_SJ
        return {f.name: pool for f, pool in zip(features, pools, strict=True)}

    def _backward(self, stack: Stack, arrays, routing: Routing, gradients, apply):
        """The arrays of a stack after (arrays, slots, gradients) -> arrays of their rows."""
        features, sorted_units = self._of_stack[stack.name], routing.units[stack.name]
        given = [gradients[f.name].astype(jnp.float32) for f in features]
        if stack.columns and self.axes:
            given = [jax.lax.all_to_all(x, self.axes, 1, 0, tiled=True) for x in given]
        samples = len(given[0])
        exchange = self._exchange(stack, samples * (1 if stack.columns else self.devices))
        columns = tuple(f.hotness for f in features)
        entries = spread(given, sorted_units.order, routing.gains[stack.name], columns)
        sums = tree_sums(entries, sorted_units.levels, exchange.places.levels)
        device = self._device(stack)
        part = lambda kind: {name: of[kind] for name, of in arrays.items()}
        new: dict[str, Any] = {name: {} for name in arrays}

        def put(kind, changed):
            for name, of in changed.items():
                new[name][kind] = of

        if stack.slots:
            optimize = functools.partial(apply, "spread")
            asked = routing.asked[stack.name]
            put(
                "spread",
                exchange.deliver(sorted_units, sums, asked, device, part("spread"), optimize),
            )
        if stack.replicated:
            optimize = functools.partial(apply, "copies")
            put(
                "copies",
                exchange.deliver_copies(
                    sorted_units, sums, stack.replicated, device, part("copies"), optimize
                ),
            )
        return new

    def _places(self, stack: Stack, batch: int) -> Places:
        columns = sum(f.hotness for f in self._of_stack[stack.name])
        if batch % self.devices:
            raise ValueError(
                f"batch of {batch} samples is not divisible by {self.devices} devices; use a "
                f"multiple of {self.devices}"
            )
        devices = 1 if stack.columns else self.devices
        places = Places(batch // devices, devices, columns)
        if places.levels > 30:
            raise ValueError(
                f"batch of {batch} samples with {columns} ids each in one stack is more than 2^30 "
                "places; use a smaller batch, or other widths or optimizers for some tables"
            )
        return places

    def _exchange(self, stack: Stack, batch: int) -> Exchange:
        places = self._places(stack, batch)
        count = places.samples * places.columns
        capacity = self.capacity
        if capacity is None:
            capacity = count if places.devices == 1 else 64 + 3 * count // (2 * places.devices)
        capacity = max(min(capacity, count), places.most_units)
        axes = () if stack.columns else self.axes
        return Exchange(axes, places, stack.slots, capacity)

    def _device(self, stack: Stack) -> jax.Array:
        split = self.axes and not stack.columns
        return jax.lax.axis_index(self.axes) if split else jnp.int32(0)

    @property
    def bytes_per_device(self) -> tuple[int, int]:
        """Bytes of rows and slots on a device: (of what is spread, of what every device has)."""
        spread = copies = 0
        for stack in self.stacks:
            of = self._rows[stack.name].shapes(
                stack.width // (self.devices if stack.columns else 1)
            )
            row = sum(
                math.prod(shape) * dtype.itemsize
                for arrays in of.values()
                for shape, dtype in arrays.values()
            )
            if stack.columns:
                spread += row * stack.replicated
            else:
                spread, copies = spread + row * stack.slots, copies + row * stack.replicated
        return spread, copies

    def check_fits(self, memory: int | None) -> None:
        """Raises a ValueError, which says what would do, where tables exceed a device's memory.

        Args:
          memory: bytes of a device; None where nobody knows.
        """
        spread, copies = self.bytes_per_device
        if memory is None or spread + copies <= memory:
            return
        said = (
            f"tables and their slots take {(spread + copies) / 1e9:,.1f} GB of a device, which has "
            f"{memory / 1e9:,.1f} GB"
        )
        if copies < memory:
            wanted = -(-spread * self.devices // (memory - copies))
            raise ValueError(f"{said}; use at least {wanted} such devices, or smaller rows")
        raise ValueError(f"{said}, {copies / 1e9:,.1f} GB of it replicated; spread these tables")

    def describe(self) -> str:
        """Says, for people, what there is."""
        rows = sum(table.rows for table in self.tables.values())
        size = sum(
            math.prod((table.rows, *shape)) * dtype.itemsize
            for stack in self.stacks
            for table in stack.tables
            for arrays in self._rows[stack.name].shapes(stack.width).values()
            for shape, dtype in arrays.values()
        )
        spread = sum(table.name in s.placements for s in self.stacks for table in s.tables)
        return (
            f"{len(self.tables)} embedding tables, {rows:,} rows, {size / 1e6:,.1f} MB with their "
            f"slots; {spread} spread over {self.devices} devices, {len(self.tables) - spread} not"
        )

    # Making, saving and loading.

    def init(self, seed: int = 0) -> State:
        """The state before the first update, created where it lies; the same on any devices."""
        local = lambda: {s.name: self._rows[s.name].made(seed) for s in self.stacks}
        return jax.jit(self._mapped(local, (), self._state_specs(self._layout_of())))()

    def saved(self, state: State) -> dict[str, Any]:
        """The state by logical rows, the same whatever the devices and shardings.

        Returns:
          {"rows" or "slots": {table: {array: [positions, ...]}}}; row `id` of a table is at
          `table.bijection(id)`.
        """
        padded = self._padded()

        def local(state):
            out: dict[str, Any] = {"rows": {}, "slots": {}}
            for stack in self.stacks:
                for table in stack.tables:
                    of = self._rows[stack.name].saved(state[stack.name], table)
                    for name in out:
                        if of[name]:
                            out[name][table.name] = of[name]
            return out

        def cut(x, want):
            if x.shape == want.shape:
                return x
            x = (
                jax.sharding.reshard(x, NamedSharding(self.mesh, P()))
                if self.mesh is not None
                else x
            )
            return x[: want.shape[0]]

        specs = jax.tree.map(lambda x: x[1], padded, is_leaf=lambda x: isinstance(x, tuple))
        mapped = self._mapped(local, (self._state_specs(state),), specs)
        whole = lambda state: jax.tree.map(cut, mapped(state), self.abstract_saved())
        return jax.jit(whole)(state)

    def loaded(self, saved: dict[str, Any]) -> State:
        """The state of what `saved` gave, on these devices and with these shardings.

        Of what it gave without its "slots" a state that can be looked up in, and not updated.
        """
        wanted = self.abstract_saved()
        names = [n for n in wanted if n in saved or not wanted[n]]  # without slots, or all
        wanted = {n: wanted[n] for n in names if wanted[n]}
        specs = jax.tree.map(lambda x: x.sharding.spec if self.mesh is not None else P(), wanted)

        def local(saved):
            state = {}
            for stack in self.stacks:
                of = {
                    t.name: {n: saved.get(n, {}).get(t.name, {}) for n in names}
                    for t in stack.tables
                }
                split = {t.name: self._splits(stack, t) for t in stack.tables}
                state[stack.name] = self._rows[stack.name].loaded(of, split, names)
            return state

        saved = {n: saved[n] for n in wanted}
        if self.mesh is not None:
            saved = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, wanted)
        layout = {s: {n: of[n] for n in names} for s, of in self._layout_of().items()}
        return jax.jit(self._mapped(local, (specs,), self._state_specs(layout)))(saved)

    def abstract_saved(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of what `saved` gives and `loaded` takes."""
        out: dict[str, Any] = {"rows": {}, "slots": {}}
        for stack in self.stacks:
            for name, arrays in self._rows[stack.name].shapes(stack.width).items():
                for table in stack.tables if arrays else ():
                    out[name][table.name] = {
                        array: self._abstract(stack, table, shape, dtype)
                        for array, (shape, dtype) in arrays.items()
                    }
        return out

    def rows(self, saved: dict[str, Any], table: str, ids: Any) -> np.ndarray:
        """Values of rows of a table by id, float32 [ids, width], of what `saved` gave."""
        of = self.tables[table]
        at = of.bijection(np.asarray(ids))
        return np.asarray(
            of.storage.read(
                {n: jnp.asarray(np.asarray(x)[at]) for n, x in saved["rows"][table].items()}
            )
        )

    def _abstract(self, stack: Stack, table: Table, shape, dtype):
        spec = P()
        if stack.columns and shape:
            spec = P(None, self.axes or None)
        elif self._splits(stack, table):
            spec = P(self.axes)
        sharding = None if self.mesh is None else NamedSharding(self.mesh, spec)
        return jax.ShapeDtypeStruct((table.positions, *shape), dtype, sharding=sharding)

    def _splits(self, stack: Stack, table: Table) -> bool:
        """Tells whether the logical rows of a table are split over the devices when saved."""
        spread = table.name in stack.placements and bool(self.axes)
        return spread and table.positions % self.devices == 0

    def _padded(self) -> dict[str, Any]:
        """The (marker, spec) of each array that a device's `StoredRows.saved` is a part of."""
        out: dict[str, Any] = {"rows": {}, "slots": {}}
        for stack in self.stacks:
            for name, arrays in self._rows[stack.name].shapes(stack.width).items():
                for table in stack.tables if arrays else ():
                    split = P(self.axes or None) if table.name in stack.placements else P()
                    cut = P(None, self.axes or None) if stack.columns else split
                    out[name][table.name] = {
                        array: ("", cut if shape else P() if stack.columns else split)
                        for array, (shape, _) in arrays.items()
                    }
        return out

    def _layout_of(self) -> State:
        """The structure of the state, with the shape of a row at the leaves."""
        return {
            s.name: {
                name: {
                    kind: dict(arrays)
                    for kind, size in (("spread", s.slots), ("copies", s.replicated))
                    if size
                }
                for name, arrays in self._rows[s.name].shapes(s.width).items()
            }
            for s in self.stacks
        }

    def _state_specs(self, state):
        columns = {s.name: s.columns for s in self.stacks}
        leaf = lambda x: isinstance(x, tuple)

        def spec(path, x):
            keys = [part.key for part in path]
            per_row = len(x[0]) == 0 if isinstance(x, tuple) else x.ndim == 1
            if "spread" in keys:
                return P(self.axes or None)
            return P(None, self.axes or None) if columns[keys[0]] and not per_row else P()

        return jax.tree_util.tree_map_with_path(spec, state, is_leaf=leaf)

    def _routing_specs(self, routing: Routing) -> Routing:
        split = P(self.axes or None)
        specs = jax.tree.map(lambda x: split, routing)
        return specs._replace(dropped=jax.tree.map(lambda x: P(), routing.dropped))

    def _by_batch(self, tree):
        return jax.tree.map(lambda x: P(self.axes or None), tree)

    def _mapped(self, function, in_specs, out_specs):
        """`function` on each device's parts; where no mesh is, `function`."""
        if self.mesh is None:
            return function
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

        def call(*args):
            lay = lambda x, spec: jax.sharding.reshard(x, NamedSharding(self.mesh, spec))
            args = [jax.tree.map(lay, x, spec) for x, spec in zip(args, in_specs, strict=True)]
            return mapped(*args)

        return call


def _written(kind, arrays, index, g):
    """Gradients of whole tables, from those of distinct rows."""
    [(name, x)] = arrays["rows"].items()
    size = len(x)
    return {"rows": {name: x.at[jnp.minimum(index, size)].set(g.astype(x.dtype), mode="drop")}}
