"""Places of rows: tables of one width, optimizer and storage share a stack on each device.

A row has a key: devices * slots numbers for the slots of all devices, device by device, and after
them one for each row that every device has. So the rows of one device, and the replicated ones, are
each a range of keys, whatever tables they are of.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.tables import Table

NOWHERE = np.int32(2**31 - 1)
"""The key of no row."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Slots of a table: position p is on device first + p // block, in slot offset + p % block."""

    first: int
    count: int
    block: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Stack:
    """The tables of a stack and where their rows lie.

    Attributes:
      name: of the stack, the name of its first table.
      columns: whether devices have parts of rows instead of rows; then all of them are replicated
        but for that.
      placements: of the tables whose rows are spread, by name.
      copies: by name, the first replicated row of a replicated table, or of a table's hot rows.
      slots: rows of a device; replicated: rows that every device has.
    """

    name: str
    tables: tuple[Table, ...]
    devices: int
    columns: bool
    placements: dict[str, Placement]
    copies: dict[str, int]
    slots: int
    replicated: int

    @property
    def width(self) -> int:
        return self.tables[0].width

    def hot(self, table: Table) -> np.ndarray:
        """Positions of a table's hot rows, ascending, int32."""
        return np.sort(table.bijection(np.asarray(table.hot, np.int32)))

    def keys(self, table: Table, positions: jax.Array) -> jax.Array:
        """Keys of rows by position; NOWHERE of positions below 0."""
        first = self.devices * self.slots
        if table.name not in self.placements:
            keys = first + self.copies[table.name] + positions
        else:
            at = self.placements[table.name]
            device = at.first + positions // at.block
            keys = device * self.slots + at.offset + positions % at.block
            if table.hot:
                hot = jnp.asarray(self.hot(table))
                index = jnp.searchsorted(hot, positions)
                index = jnp.minimum(index, len(table.hot) - 1)
                copy = first + self.copies[table.name] + index
                keys = jnp.where(hot[index] == positions, copy, keys)
        return jnp.where(positions < 0, NOWHERE, keys.astype(jnp.int32))


def stacks(tables: Sequence[Table], devices: int) -> list[Stack]:
    """Lays tables on devices.

    Of those by table or group of devices, the largest first takes the device, or the group, that
    has the fewest rows; a group has as many devices as the greatest divisor of their number up to
    its square root.

    Raises:
      ValueError: columns do not divide, or there are too many rows for 32-bit keys.
    """
    by_kind: dict[tuple, list[Table]] = {}
    for table in tables:
        columns = table.sharding == "column"
        if columns and table.width % devices:
            raise ValueError(
                f"table {table.name}: width={table.width} with sharding='column' is not divisible "
                f"by {devices} devices; use a multiple of {devices}, or another sharding"
            )
        kind = table.width, table.optimizer, table.storage, columns
        by_kind.setdefault(kind, []).append(table)
    return [_stack(members, devices, columns) for (*_, columns), members in by_kind.items()]


def _stack(tables: list[Table], devices: int, columns: bool) -> Stack:
    placements, copies, heights, replicated = {}, {}, np.zeros(devices, np.int64), 0
    for table in sorted(tables, key=lambda t: (t.sharding != "row", -t.positions, t.name)):
        if table.hot or table.sharding in ("replicated", "column"):
            copies[table.name] = replicated
            replicated += len(table.hot) or table.positions
        if table.sharding in ("replicated", "column"):
            continue
        count = {"row": devices, "table": 1, "table_row": _group(devices)}[table.sharding]
        block = -(-table.positions // count)
        tops = heights.reshape(-1, count).max(axis=1)  # of each group of so many devices
        group = int(tops.argmin())
        first, offset = group * count, int(tops[group])
        placements[table.name] = Placement(first, count, block, offset)
        heights[first : first + count] = offset + block
    slots = int(heights.max())
    if devices * slots + replicated >= NOWHERE:
        raise ValueError(
            f"tables {', '.join(t.name for t in tables)}: {devices * slots + replicated} rows in "
            f"one stack; use less than 2^31, such as by another width or optimizer for some"
        )
    name = tables[0].name
    return Stack(name, tuple(tables), devices, columns, placements, copies, slots, replicated)


def _group(devices: int) -> int:
    """The greatest divisor of a number of devices up to its square root."""
    return next(k for k in range(int(devices**0.5), 0, -1) if devices % k == 0)
