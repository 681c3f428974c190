"""Ways to lay an embedding table on a slice, and what each costs in a step.

A step has parts that all chips begin together: ids go to the chips that own their rows, owners
gather rows, vectors come back; then gradients go the way of the vectors, backwards, and owners
update rows. A part takes as long as its busiest chip. Rows that every chip has (replicas) need no
exchange, but an all-reduce of their gradients.

Pooling at the requester (SparseCore's way): each chip asks once for each distinct row and gets it
whole. At the owner: it gets every id, and sends one sum for each sample of which it had any.

Letters: N chips, b samples of the fullest chip, V rows, D width, K ids a chip, U distinct ones of
them, g chips over which rows are spread, c column shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from topology.arrays import Floats
from topology.embeddings.machine import Machine
from topology.embeddings.tables import EmbeddingModel, Table

PARTS = ("ids", "gather", "vectors", "gradients", "update")
"""Parts of a step that take as long as the busiest chip does."""

KINDS = ("row", "hot_row", "table_row", "column", "table", "replicated")

HOT_ROWS = tuple(4**k for k in range(4, 12))
"""Numbers of hot rows that are tried: 256 .. 4M."""

ID_BYTES = 4
_HOSTS = (1, 2, 4)  # over whose chips the rows of a table lie
_LEAST_COLUMNS = 8  # 32 bytes of float32, HBM's granule


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A way to lay a table, with its costs.

    Attributes:
      kind: one of `KINDS`.
      pooling: "requester" or "owner"; "" where nothing is exchanged.
      shards: sites that it takes: c chips for columns, hosts for table_row, a chip for a table;
        0 where all chips do alike.
      on_hosts: a site is a host, not a chip.
      hot_rows: of the table's most popular rows, on every chip.
      every: float [5], seconds of each of `PARTS` that it takes on every chip.
      shard: float [5], and those that it adds on each chip of its sites.
      every_memory, shard_memory: bytes, likewise.
      gradients: of a replicated table: "dense", summed over the chips as an array of all rows, or
        "rows", those of each chip sent to all.
      reduced: bytes of the all-reduce of its replicas' gradients.
      exchanges: whether ids and vectors are sent at all.
    """

    kind: str
    pooling: str = ""
    shards: int = 0
    on_hosts: bool = False
    hot_rows: int = 0
    every: Floats
    shard: Floats
    every_memory: float
    shard_memory: float
    gradients: str = ""
    reduced: float = 0.0
    exchanges: bool = True

    @property
    def is_everywhere(self) -> bool:
        """Tells whether all chips do alike."""
        return self.shards == 0


def samples_a_chip(model: EmbeddingModel, machine: Machine) -> int:
    """Samples of the fullest chip."""
    return -(-model.batch // machine.chips)


def shardings(table: Table, model: EmbeddingModel, machine: Machine) -> list[Sharding]:
    """All ways to lay a table that are tried, but those that another betters in every respect."""
    everywhere: list[Sharding] = []
    placed: list[Sharding] = []
    for way in all_shardings(table, model, machine):
        alike, better = (everywhere, _sums_better) if way.is_everywhere else (placed, _better)
        if not any(better(other, way, machine) for other in alike):
            alike[:] = [other for other in alike if not better(way, other, machine)] + [way]
    return everywhere + placed


def all_shardings(table: Table, model: EmbeddingModel, machine: Machine) -> list[Sharding]:
    """All ways to lay a table that are tried."""
    return list(_all(_Lookup(table, model, machine)))


def least_memory(model: EmbeddingModel, machine: Machine) -> float:
    """Bytes of a chip that the tables take with their rows over all chips, or a copy on each."""
    return sum(
        min(
            way.every_memory
            for way in (
                _spread(lookup, "row", "owner", owners=machine.chips),
                _spread(lookup, "row", "requester", owners=machine.chips),
                _replicated(lookup, dense=False),
            )
        )
        for lookup in (_Lookup(table, model, machine) for table in model.tables)
    )


def everywhere_seconds(way: Sharding, machine: Machine) -> float:
    """Seconds that a sharding adds to a step by what all chips do alike, latencies left out."""
    return float(way.every.sum()) + way.reduced * machine.reduce_seconds


def _sums_better(other: Sharding, way: Sharding, machine: Machine) -> bool:
    """Tells whether one is no worse than another that all chips do alike: such costs add up."""
    return (
        everywhere_seconds(other, machine) <= everywhere_seconds(way, machine)
        and other.every_memory <= way.every_memory
        and other.exchanges <= way.exchanges
        and (other.reduced > 0) <= (way.reduced > 0)
    )


def _better(other: Sharding, way: Sharding, machine: Machine) -> bool:
    """Tells whether one is no worse than another on the same number of sites."""
    return (
        (other.shards, other.on_hosts) == (way.shards, way.on_hosts)
        and bool((other.shard <= way.shard).all())
        and other.shard_memory <= way.shard_memory
        and other.every_memory <= way.every_memory
    )


@dataclass(frozen=True)
class _Lookup:
    """A table's lookups in a step."""

    table: Table
    model: EmbeddingModel
    machine: Machine

    @property
    def b(self) -> int:
        return samples_a_chip(self.model, self.machine)

    @property
    def ids(self) -> float:
        return self.b * self.table.ids

    @property
    def vectors(self) -> int:
        """Pooled vectors of a chip."""
        return self.b * len(self.table.hotness)

    def access(self, bytes: float) -> float:
        """Seconds of an access to so many bytes of memory that lie together."""
        whole = float(np.ceil(bytes / self.machine.granule)) * self.machine.granule
        return (whole + self.machine.access_bytes) / self.machine.bandwidth

    def gathered(self, rows: float, width: float) -> float:
        """Seconds to read rows."""
        return rows * self.access(self.table.row_bytes(width))

    def updated(self, asked: float, distinct: float, width: float) -> float:
        """Seconds to write and read the gradients of the rows asked for, then read and write each
        distinct row and its state."""
        state = self.table.slot_bytes(width)
        row = self.access(self.table.row_bytes(width)) + (self.access(state) if state else 0.0)
        return 2 * (asked * self.access(width * self.table.wire_bytes) + distinct * row)

    def distinct(self, beyond: int = 0) -> float:
        """Distinct rows of the whole batch."""
        return self.table.unique(self.b * self.machine.chips, beyond)


def _all(lookup: _Lookup) -> Iterator[Sharding]:
    table, machine = lookup.table, lookup.machine
    N, D = machine.chips, table.width
    for pooling in ("requester", "owner"):
        if N == 1:
            yield _spread(lookup, "table", pooling)
            continue
        yield _spread(lookup, "row", pooling, owners=N)
        for hosts in _HOSTS:
            if hosts < len(machine.hosts):
                owners = hosts * machine.hosts.shape[1]
                yield _spread(lookup, "table_row", pooling, owners=owners, sites=hosts)
        c = 1
        while c <= N and D % c == 0 and (c == 1 or D // c >= _LEAST_COLUMNS):
            yield _spread(lookup, "table" if c == 1 else "column", pooling, columns=c)
            c *= 2
        if pooling == "requester" and table.skew:
            for hot in HOT_ROWS:
                if hot < table.rows // 2:
                    yield _spread(lookup, "hot_row", pooling, owners=N, hot=hot)
    if N > 1:
        yield _replicated(lookup, dense=True)
        yield _replicated(lookup, dense=False)


def _spread(
    lookup: _Lookup,
    kind: str,
    pooling: str,
    *,
    owners: int = 1,
    columns: int = 1,
    sites: int | None = None,
    hot: int = 0,
) -> Sharding:
    """A table with its rows over some owners, or its columns over some chips."""
    table, machine, b = lookup.table, lookup.machine, lookup.b
    N, width, wire = machine.chips, table.width / columns, table.wire_bytes
    rows = -(-(table.rows - hot) // owners)  # of an owner
    distinct = min(lookup.distinct(hot) / owners, rows)
    if pooling == "requester":
        own = table.unique(b, hot)
        asked = _asked(lookup, owners, hot)
        each = asked / N  # of what a pair exchanges
        ids, vectors, received = ID_BYTES * each, each * width * wire, own
    else:
        busiest = _busiest(lookup, owners)
        asked = N * lookup.ids * busiest
        each = sum(b * -np.expm1(h * np.log1p(-min(busiest, 1 - 1e-16))) for h in table.hotness)
        index = ID_BYTES if owners > 1 else 0  # which sample an id is of
        ids, vectors = (ID_BYTES + index) * lookup.ids * busiest, each * width * wire
        received = lookup.vectors if owners == 1 else min(each * owners, lookup.ids)
    pair = machine.pair_seconds
    costs = np.array(
        [
            ids * pair,
            lookup.gathered(asked, width),
            vectors * pair,
            vectors * pair,
            lookup.updated(asked, distinct, width),
        ]
    )
    memory = rows * (table.row_bytes(width) + table.slot_bytes(width)) + N * (ids + vectors)
    shared = received * table.width * wire + lookup.vectors * table.width * 4.0
    nothing, replicas = np.zeros(len(PARTS)), _replicas(lookup, hot)
    if owners == N > 1:
        return Sharding(
            kind=kind,
            pooling=pooling,
            hot_rows=hot,
            every=costs + replicas[0],
            shard=nothing,
            every_memory=memory + shared + replicas[1],
            shard_memory=0.0,
            reduced=replicas[2],
        )
    return Sharding(
        kind=kind,
        pooling=pooling,
        shards=columns if sites is None else sites,
        on_hosts=owners > 1,
        every=nothing,
        shard=costs,
        every_memory=shared,
        shard_memory=memory,
    )


def _asked(lookup: _Lookup, owners: int, hot: int) -> float:
    """Rows that the busiest owner is asked for by all chips."""
    table, N = lookup.table, lookup.machine.chips
    if owners == 1:
        return N * table.unique(lookup.b, hot)
    if table.bundled:  # rows of many bundles: as even as rows that nobody prefers
        hit = table.unique(lookup.b, hot) / table.rows
        mean = N * hit * table.rows / owners
        spread = np.sqrt(2 * np.log(owners) * mean * (1 - hit))
        least = N * hit + mean * (1 - 1 / table.rows)
        return float(min(max(mean + spread, least), N * -(-table.rows // owners)))
    return table.law.asked(table.draws(lookup.b), N, owners, hot)


def _busiest(lookup: _Lookup, owners: int) -> float:
    """The part of a table's ids that its busiest owner gets."""
    table = lookup.table
    if owners == 1:
        return 1.0
    if table.bundled:
        spread = len(table.hotness) / table.ids  # a hot bundle's ids lie on as many owners
        return min(1.0, max(1 / owners, table.law.busiest(owners) * spread + (1 - spread) / owners))
    return table.law.busiest(owners)


def _replicas(lookup: _Lookup, hot: int) -> tuple[Floats, float, float]:
    """Costs, memory and all-reduced bytes of rows that every chip has: the `hot` most popular."""
    table, machine = lookup.table, lookup.machine
    if not hot:
        return np.zeros(len(PARTS)), 0.0, 0.0
    own = table.unique(lookup.b) - (table.unique(lookup.b, hot) if hot < table.rows else 0.0)
    asked = lookup.ids * (table.share(hot) if hot < table.rows else 1.0)
    costs = np.zeros(len(PARTS))
    costs[PARTS.index("gather")] = lookup.gathered(own, table.width)
    dense = hot * table.width * 4.0  # gradients, in float32
    whole = 2 * hot * (table.row_bytes() + table.slot_bytes())
    summed = 2 * asked * lookup.access(table.width * table.wire_bytes)
    streamed = (dense + whole) / machine.bandwidth
    costs[PARTS.index("update")] = summed + streamed
    memory = hot * (table.row_bytes() + table.slot_bytes()) + dense
    return costs, memory, dense if machine.chips > 1 else 0.0


def _replicated(lookup: _Lookup, *, dense: bool) -> Sharding:
    """A table on every chip, whose gradients are all-reduced whole, or the rows of all gathered."""
    table, machine = lookup.table, lookup.machine
    costs, memory, reduced = _replicas(lookup, table.rows)
    if not dense:
        rows = machine.chips * table.unique(lookup.b)
        buffer = rows * (table.width * table.wire_bytes + ID_BYTES)
        costs[PARTS.index("update")] = lookup.updated(rows, lookup.distinct(), table.width)
        memory = table.rows * (table.row_bytes() + table.slot_bytes()) + buffer
        reduced = buffer / 2  # an all-gather is half of an all-reduce
    return Sharding(
        kind="replicated",
        gradients="dense" if dense else "rows",
        every=costs,
        shard=np.zeros(len(PARTS)),
        every_memory=memory + lookup.vectors * table.width * 4.0,
        shard_memory=0.0,
        reduced=reduced,
        exchanges=False,
    )
