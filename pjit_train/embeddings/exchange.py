"""Units of all devices to the owners of their rows and back, in rounds of a fixed size.

A device has a lane of units for each owner. In a round it sends each owner up to `capacity` of
them; if a lane of any device has more, all devices stop before the first row that does not fit, so
that all units of a row travel in one round, and another round follows. Any capacity so gives the
same answer. All functions run inside a `shard_map`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.layout import NOWHERE
from pjit_train.embeddings.routing import Places, Units, compact, joins, tree_sums

Read = Callable[[jax.Array], jax.Array]
"""Rows in slots of this device, [slots] -> float32 [slots, D]; zeros where is no such slot."""
Apply = Callable[[Any, jax.Array, jax.Array], Any]
"""(arrays, distinct slots, sums of their gradients float32 [slots, D]) -> the arrays after it;
slots past the last are dropped."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The devices that share a stack.

    Attributes:
      axes: of the mesh, over which they lie; () for one device.
      slots: of a device.
      capacity: units that a device sends an owner in a round.
    """

    axes: tuple[str, ...]
    places: Places
    slots: int
    capacity: int

    @property
    def devices(self) -> int:
        return self.places.devices

    def fetch(self, units: Units, read: Read, out_UD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rows of all units.

        Args:
          out_UD: [K, D], where they are written.

        Returns:
          (rows [K, D], the slots that were asked of this device in the first round
          [devices, capacity]).
        """
        if self.devices == 1:
            mine = jnp.where(units.key < self.slots, units.key, self.slots)
            found = jnp.where((units.key < self.slots)[:, None], read(mine), out_UD)
            return found, jnp.zeros((1, self.capacity), jnp.int32)

        def turn(carry):
            low, _, index, out, asked = carry
            high, count, more = self._round(units, low)
            unit, slots = self._sent(units, low, count)
            now = self._swap(slots)
            back = self._swap(self._read_once(now, read))
            out = out.at[unit.reshape(-1)].set(back.reshape(-1, back.shape[-1]), mode="drop")
            asked = jnp.where(index == 0, now, asked)
            return high, more, index + 1, out, asked

        low = self._lanes(units)[:-1]
        asked = jnp.zeros((self.devices, self.capacity), jnp.int32)
        carry = low, jnp.bool_(True), jnp.int32(0), out_UD, asked
        *_, out, asked = jax.lax.while_loop(lambda carry: carry[1], turn, carry)
        return out, asked

    def _read_once(self, slots: jax.Array, read: Read) -> jax.Array:
        """Rows [devices, capacity, D] by slot, each read once however many devices ask for it."""
        key, order = _sorted(slots.reshape(-1))
        begins = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
        first = compact(begins)
        rows = read(jnp.take(key, first, mode="fill", fill_value=self.slots))
        rank = jnp.zeros_like(order).at[order].set(jnp.cumsum(begins, dtype=jnp.int32) - 1)
        return rows[rank].reshape(*slots.shape, rows.shape[-1])

    def deliver(
        self, units: Units, sums_KD: jax.Array, asked: jax.Array, device, arrays: Any, apply: Apply
    ) -> Any:
        """Brings the gradients of all units to their owners, and applies them there.

        Args:
          sums_KD: at the first entry of each unit, the sum of its gradients.
          asked: of `fetch`.
          device: index of this one.
          arrays: of this device.
        """
        if self.devices == 1:
            mine = jnp.where(units.key < self.slots, units.key, self.slots)
            return apply(arrays, mine, jnp.take(sums_KD, units.first, axis=0, mode="clip"))

        def turn(carry):
            low, _, index, arrays = carry
            high, count, more = self._round(units, low)
            unit, slots = self._sent(units, low, count)
            entry = jnp.take(units.first, unit, mode="fill", fill_value=len(units.first))
            sent = jnp.take(sums_KD, entry, axis=0, mode="fill", fill_value=0)
            now = jax.lax.cond(index == 0, lambda: asked, lambda: self._swap(slots))
            got = self._swap(sent).reshape(-1, sums_KD.shape[-1])
            if self.places.aligned:
                place = jnp.repeat(jnp.arange(self.devices, dtype=jnp.int32), self.capacity)
                levels = (self.devices - 1).bit_length()
            else:
                place = self._swap(self._places(units, entry, device)).reshape(-1)
                levels = self.places.levels
            arrays = self._apply(arrays, now.reshape(-1), place, levels, got, apply)
            return high, more, index + 1, arrays

        carry = self._lanes(units)[:-1], jnp.bool_(True), jnp.int32(0), arrays
        return jax.lax.while_loop(lambda carry: carry[1], turn, carry)[-1]

    def deliver_copies(
        self, units: Units, sums_KD: jax.Array, rows: int, device, arrays: Any, apply: Apply
    ) -> Any:
        """Applies the gradients of replicated rows, the same on every device.

        Args:
          rows: how many of them there are; their keys are the last.
        """
        base = self.devices * self.slots
        if self.devices == 1:
            slots = jnp.where(units.key == NOWHERE, rows, units.key - base)
            slots = jnp.where(slots < 0, rows, slots)
            return apply(arrays, slots, jnp.take(sums_KD, units.first, axis=0, mode="clip"))
        size = min(len(units.key), rows * self.places.most_units)
        unit = self._lanes(units)[self.devices] + jnp.arange(size, dtype=jnp.int32)
        key = jnp.take(units.key, unit, mode="fill", fill_value=NOWHERE)
        slots = jnp.where(key == NOWHERE, rows, key - base)
        entry = jnp.take(units.first, unit, mode="fill", fill_value=len(units.first))
        sent = jnp.take(sums_KD, entry, axis=0, mode="fill", fill_value=0)
        place = self._places(units, entry, device)
        slots, place, got = (
            jax.lax.all_gather(x, self.axes, tiled=True) for x in (slots, place, sent)
        )
        return self._apply(arrays, slots, place, self.places.levels, got, apply, rows)

    def _apply(self, arrays, slots, place, levels, got, apply: Apply, end: int | None = None):
        """Applies gradients of many devices, the entries of a slot in the order of their places."""
        end = self.slots if end is None else end
        key, order = _sorted(slots)
        key = jnp.where(key == end, NOWHERE, key)
        joined = joins(key, place[order], levels)
        sums = tree_sums(got[order], joined, levels)
        first = compact((joined == levels) & (key != NOWHERE))
        distinct = jnp.take(jnp.where(key == NOWHERE, end, key), first, mode="fill", fill_value=end)
        return apply(arrays, distinct, jnp.take(sums, first, axis=0, mode="clip"))

    def _places(self, units: Units, entry: jax.Array, device) -> jax.Array:
        at = jnp.take(units.order, entry, mode="fill", fill_value=0)
        sample = device * self.places.samples + at // self.places.columns
        return (sample << self.places.bits) | (at % self.places.columns)

    def _lanes(self, units: Units) -> jax.Array:
        """The first unit of each owner's lane, and after them of the replicated rows, int32."""
        owners = np.arange(self.devices + 1, dtype=np.int32) * np.int32(self.slots)
        return jnp.searchsorted(units.key, owners).astype(jnp.int32)

    def _round(self, units: Units, low: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(where the lanes go on after this round, units sent in it, whether one follows)."""
        end = self._lanes(units)[1:]
        next_key = jnp.take(units.key, low + self.capacity, mode="fill", fill_value=NOWHERE)
        next_key = jnp.where(low + self.capacity < end, next_key, NOWHERE)
        next_key = jax.lax.pmin(next_key, self.axes)
        high = jnp.minimum(jnp.searchsorted(units.key, next_key).astype(jnp.int32), end)
        return high, high - low, jnp.any(next_key != NOWHERE)

    def _sent(self, units: Units, low: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(units of a round, K past the last; their slots) for each owner [devices, capacity]."""
        index = jnp.arange(self.capacity, dtype=jnp.int32)
        inside = index[None, :] < count[:, None]
        unit = jnp.where(inside, low[:, None] + index, len(units.key))
        key = jnp.take(units.key, unit, mode="fill", fill_value=NOWHERE)
        owner = jnp.arange(self.devices, dtype=jnp.int32)[:, None]
        return unit, jnp.where(inside, key - owner * self.slots, self.slots)

    def _swap(self, x: jax.Array) -> jax.Array:
        """Gives each device its part, and returns the parts that all have for this one."""
        return jax.lax.all_to_all(x, self.axes, 0, 0, tiled=True)


def _sorted(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys in order, and where each was, equal ones in the order that they had."""
    index = jnp.arange(len(keys), dtype=jnp.int32)
    key, order = jax.lax.sort((keys, index), num_keys=1, is_stable=True)
    return key, order
