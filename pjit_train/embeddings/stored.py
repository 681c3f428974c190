"""The rows of a stack as a device has them: read, optimized, made, and to and from logical rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.exact import mean_of_columns
from pjit_train.embeddings.layout import Placement, Stack
from pjit_train.embeddings.tables import Table, hash_of

Parts = dict[str, dict[str, dict[str, jax.Array]]]
"""{"rows" or "slots": {"spread" or "copies": {array: [rows, ...]}}} of one device."""


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """The rows of a stack on each of the devices along `axes`. All methods but `shapes` run inside
    a `shard_map`."""

    stack: Stack
    axes: tuple[str, ...]

    @property
    def _table(self) -> Table:
        return self.stack.tables[0]  # width, optimizer and storage are those of all

    @property
    def _width(self) -> int:
        """Columns that a device has of a row."""
        return self.stack.width // (self.stack.devices if self.stack.columns else 1)

    def shapes(self, width: int) -> dict[str, dict[str, tuple[tuple[int, ...], Any]]]:
        """{"rows" or "slots": {array: (shape of a row of this width, dtype)}}."""
        slots: dict[str, tuple[tuple[int, ...], Any]] = {
            name: ((), jnp.dtype("float32")) if slot.per_row else ((width,), jnp.dtype("float32"))
            for name, slot in self._table.optimizer.slots.items()
        }
        return {"rows": self._table.storage.shapes(width), "slots": slots}

    def read(self, rows: Any, kind: str, index: jax.Array, valid: jax.Array) -> jax.Array:
        """Values of rows by index, float32 [index, width]; zeros where it is not valid."""
        if kind not in rows:
            return jnp.zeros((len(index), self._width), jnp.float32)
        index = jnp.where(valid, index, 0)
        found = self._table.storage.read({n: x[index] for n, x in rows[kind].items()})
        return jnp.where(valid[:, None], found, 0)

    def optimized(self, kind: str, arrays, index: jax.Array, g: jax.Array, *, step, scale, apply):
        """The arrays {"rows", "slots"} of a kind after an update of distinct rows."""
        optimizer, storage = self._table.optimizer, self._table.storage
        size = len(next(iter(arrays["rows"].values())))
        at = jnp.minimum(index, size - 1)
        old = jax.tree.map(lambda x: x[at], arrays)
        w, slots = optimizer.apply(
            storage.read(old["rows"]), old["slots"], g, step, scale, self._mean
        )
        first = self._device() * self._width if self.stack.columns else jnp.int32(0)
        rows = storage.write(w, self._identity(kind, at), step, first)
        target = jnp.where(apply, index, size)
        put = lambda x, new: x.at[target].set(new.astype(x.dtype), mode="drop")
        return jax.tree.map(put, arrays, {"rows": rows, "slots": slots})

    def _mean(self, x: jax.Array) -> jax.Array:
        if self.stack.columns and self.axes:
            x = jax.lax.all_gather(x, self.axes, axis=1, tiled=True)
        return mean_of_columns(x)

    def _device(self) -> jax.Array:
        return jax.lax.axis_index(self.axes) if self.axes else jnp.int32(0)

    def _identity(self, kind: str, index: jax.Array) -> jax.Array:
        """Names of rows for random bits: of their table and position, uint32."""
        name = jnp.zeros(index.shape, jnp.uint32)
        for table in self.stack.tables:
            salt = np.uint32(hash_of(table.name, 1))
            if kind == "spread" and table.name in self.stack.placements:
                at = self.stack.placements[table.name]
                device = self._device() - at.first
                slot = index - at.offset
                inside = (slot >= 0) & (slot < at.block) & (device >= 0) & (device < at.count)
                position = device * at.block + slot
            elif kind == "copies" and table.name in self.stack.copies:
                slot = index - self.stack.copies[table.name]
                count = len(table.hot) or table.positions
                inside, position = (slot >= 0) & (slot < count), slot
                if table.hot:
                    position = jnp.asarray(self.stack.hot(table))[jnp.clip(slot, 0, count - 1)]
            else:
                continue
            name = jnp.where(inside, position.astype(jnp.uint32) + salt, name)
        return name

    # Made.

    def made(self, seed: int) -> Parts:
        """The rows and slots before the first update."""
        stack = self.stack
        parts: Parts = {"rows": {}, "slots": {}}
        device = self._device()
        for kind, size in (("spread", stack.slots), ("copies", stack.replicated)):
            if not size:
                continue
            arrays = {
                name: jnp.zeros((size, *shape), dtype)
                for name, (shape, dtype) in self.shapes(self._width)["rows"].items()
            }
            for table in stack.tables:
                if kind == "spread" and table.name in stack.placements:
                    at = stack.placements[table.name]
                    offset = at.offset
                    positions = (device - at.first) * at.block + jnp.arange(at.block)
                    inside = (device >= at.first) & (device < at.first + at.count)
                elif kind == "copies" and table.name in stack.copies:
                    offset, inside = stack.copies[table.name], True
                    positions = jnp.arange(table.positions)
                    if table.hot:
                        positions = jnp.asarray(stack.hot(table))
                else:
                    continue
                arrays = self._put_initial(arrays, positions, offset, table, seed, inside)
            parts["rows"][kind] = arrays
            parts["slots"][kind] = {
                name: jnp.full((size, *shape), self._table.optimizer.slots[name].initial, dtype)
                for name, (shape, dtype) in self.shapes(self._width)["slots"].items()
            }
        return parts

    def _put_initial(self, arrays, positions, offset: int, table: Table, seed: int, inside):
        first = self._device() * self._width if self.stack.columns else jnp.int32(0)
        w = table.initial_rows(seed, positions, first, self._width)
        identity = positions.astype(jnp.uint32) + np.uint32(hash_of(table.name, 1))
        new = table.storage.write(w, identity, jnp.int32(0), first)

        def put(x, new):
            old = jax.lax.dynamic_slice_in_dim(x, offset, len(new))
            new = jnp.where(inside, new.astype(x.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(x, new, offset, 0)

        return jax.tree.map(put, arrays, new)

    # To logical rows and back. The logical rows of a table stand in the order of their positions.

    def saved(self, parts: Parts, table: Table) -> dict[str, dict[str, jax.Array]]:
        """The part of a table's logical rows that is this device's; some are padded."""
        pick = lambda x: self._saved(x, table)
        gather = {}
        for name, kinds in parts.items():
            arrays = next(iter(kinds.values()))
            gather[name] = {a: pick({kind: kinds[kind][a] for kind in kinds}) for a in arrays}
        return gather

    def _saved(self, kinds: dict[str, jax.Array], table: Table) -> jax.Array:
        stack = self.stack
        if table.name not in stack.placements:
            first = stack.copies[table.name]
            return kinds["copies"][first : first + table.positions]
        at = stack.placements[table.name]
        block = kinds["spread"][at.offset : at.offset + at.block]
        device = self._device()
        if table.hot:
            first = stack.copies[table.name]
            copies, hot = kinds["copies"][first : first + len(table.hot)], stack.hot(table)
            mine = jnp.where(at.first + hot // at.block == device, hot % at.block, at.block)
            block = block.at[mine].set(copies, mode="drop")
        if at.count == stack.devices:
            return block
        # Each device of the group puts its rows where they belong, the others zeros: a sum of bits.
        whole = jnp.zeros(
            (stack.devices * self._share(table), *block.shape[1:]), _bits(block).dtype
        )
        inside = (device >= at.first) & (device < at.first + at.count)
        bits = jnp.where(inside, _bits(block), 0)
        start = jnp.clip(device - at.first, 0, at.count - 1) * at.block
        whole = jax.lax.dynamic_update_slice_in_dim(whole, bits, start, 0)
        share = jax.lax.psum_scatter(whole, self.axes, scatter_dimension=0, tiled=True)
        return jax.lax.bitcast_convert_type(share, block.dtype)

    def loaded(self, of_tables, split: dict[str, bool], names) -> Parts:
        """The rows and slots of this device.

        Args:
          of_tables: what `saved` gave, by table; without padding.
          split: by table, whether its rows are split over the devices; else each has all of them.
          names: "rows", and "slots" where they are wanted.
        """
        parts: Parts = {name: {} for name in names}
        for name in names:
            arrays = self.shapes(self._width)[name]
            for kind, size in (("spread", self.stack.slots), ("copies", self.stack.replicated)):
                if size:
                    parts[name][kind] = {
                        a: self._loaded(kind, size, shape, dtype, a, name, of_tables, split)
                        for a, (shape, dtype) in arrays.items()
                    }
        return parts

    def _loaded(self, kind, size, shape, dtype, array, name, of_tables, split):
        stack, out = self.stack, jnp.zeros((size, *shape), dtype)
        for table in stack.tables:
            x = of_tables[table.name][name][array]
            if table.name in stack.placements:
                at = stack.placements[table.name]
                block = self._block(x, at, split[table.name])
                if kind == "spread":
                    inside = self._device() >= at.first
                    inside &= self._device() < at.first + at.count
                    old = out[at.offset : at.offset + at.block]
                    out = jax.lax.dynamic_update_slice_in_dim(
                        out, jnp.where(inside, block, old), at.offset, 0
                    )
                elif table.hot:
                    hot = stack.hot(table)
                    mine = jnp.asarray(at.first + hot // at.block) == self._device()
                    bits = _bits(block[hot % at.block])
                    bits = jnp.where(mine.reshape(-1, *[1] * (bits.ndim - 1)), bits, 0)
                    bits = jax.lax.psum(bits, self.axes) if self.axes else bits
                    copies = jax.lax.bitcast_convert_type(bits, dtype)
                    first = stack.copies[table.name]
                    out = jax.lax.dynamic_update_slice_in_dim(out, copies, first, 0)
            elif kind == "copies":
                first = stack.copies[table.name]
                out = jax.lax.dynamic_update_slice_in_dim(out, x, first, 0)
        return out

    def _block(self, x: jax.Array, at: Placement, split: bool) -> jax.Array:
        """The rows of this device, from its share of all or from all of them."""
        if split and at.count == self.stack.devices and len(x) == at.block:
            return x
        if split:
            x = jax.lax.all_gather(x, self.axes, tiled=True)
        short = at.count * at.block - len(x)
        x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1))
        start = jnp.clip(self._device() - at.first, 0, at.count - 1) * at.block
        return jax.lax.dynamic_slice_in_dim(x, start, at.block)

    def _share(self, table: Table) -> int:
        at = self.stack.placements[table.name]
        return -(-max(table.positions, at.count * at.block) // self.stack.devices)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
