"""Embedding tables, the features that look up in them, and the bags of ids of a batch."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from pjit_train.embeddings.bijection import Bijection, mixed
from pjit_train.embeddings.exact import rounded
from pjit_train.embeddings.row_optimizers import Adagrad, RowOptimizer
from pjit_train.embeddings.storage import Storage
from sparsity.ranges import Count, NonNegative, Whole, check_choice, check_fields

Combiner = Literal["sum", "mean", "sqrtn"]
Sharding = Literal["row", "replicated", "table", "table_row", "column"]
Invalid = Literal["fail", "drop", "reserve"]

# What the rows of a checkpoint are padded to: a multiple that most numbers of devices divide.
_QUANTA = (26880, 3840, 768, 96, 24, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Initial values uniform in [-limit, limit); None for 1/sqrt(rows), as DLRM begins."""

    limit: NonNegative | None = None

    def __post_init__(self):
        check_fields(self)

    def values(self, unit: jax.Array, rows: int) -> jax.Array:
        """Values of a table from numbers uniform in [0, 1)."""
        limit = 1 / math.sqrt(rows) if self.limit is None else self.limit
        return (2 * unit - 1) * np.float32(limit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normal:
    """Initial values of a normal distribution about zero."""

    std: NonNegative = 0.02

    def __post_init__(self):
        check_fields(self)

    def values(self, unit: jax.Array, rows: int) -> jax.Array:
        """Values of a table from numbers uniform in [0, 1)."""
        # Of a table, since the bits of a polynomial are not those of every loop; within 4.3 std.
        index = (unit * np.float32(2**16)).astype(jnp.int32)
        return jnp.asarray(_quantiles())[index] * np.float32(self.std)


@functools.cache
def _quantiles() -> np.ndarray:
    """The standard normal distribution in 2^16 equally likely values, float32."""
    return scipy.special.ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)


_ADAGRAD, _UNIFORM, _STORAGE = Adagrad(learning_rate=0.01), Uniform(), Storage()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Configuration of an embedding table.

    Attributes:
      name: its name in checkpoints and messages.
      rows: ids are 0 .. rows - 1.
      width: values of a row.
      combiner: of the rows of a bag, with weights w: "sum" of w * row; "mean" divides that by the
        sum of w, "sqrtn" by the root of the sum of w^2. A bag that is empty, or whose divisor is
        zero, is zero.
      initializer: a pure function of table, row and seed, on any number of devices.
      optimizer: of its rows.
      sharding: "row" spreads rows over all devices; "replicated" gives each device all of them;
        "table" lays the table on one device, "table_row" on a group of devices of which one is a
        divisor of all (see `Layout`); "column" cuts every row into as many parts as devices.
      hot: ids of rows that every device has, beside a "row" sharding of the others.
      storage: how the values of a row are kept.
      invalid: what happens to ids out of range: "fail" refuses them, see `check_bags`, and where
        nothing on the host saw them, makes their bag NaN; "drop" leaves them out, as if they were
        not in the bag, and counts them; "reserve" gives all of them one row more, which is trained.
    """

    name: str
    rows: Count
    width: Count
    combiner: Combiner = "sum"
    initializer: Uniform | Normal = _UNIFORM
    optimizer: RowOptimizer = _ADAGRAD
    sharding: Sharding = "row"
    hot: Sequence[Whole] = ()
    storage: Storage = _STORAGE
    invalid: Invalid = "fail"

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ValueError(f"Table.name={self.name!r}; use a text without '/'")
        where = f"table {self.name}"
        check_choice(f"{where}: combiner", self.combiner, ("sum", "mean", "sqrtn"))
        shardings = ("row", "replicated", "table", "table_row", "column")
        check_choice(f"{where}: sharding", self.sharding, shardings)
        check_choice(f"{where}: invalid", self.invalid, ("fail", "drop", "reserve"))
        for name, kind in (("optimizer", RowOptimizer), ("storage", Storage)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{where}: {name}={value!r}; use a {kind.__name__}")
        if not isinstance(self.initializer, Uniform | Normal):
            raise ValueError(f"{where}: initializer={self.initializer!r}; use Uniform or Normal")
        if self.rows > 2**30:
            raise ValueError(f"{where}: rows={self.rows}; use at most 2^30 = {2**30}")
        object.__setattr__(self, "hot", tuple(sorted(self.hot)))
        if self.hot and self.sharding != "row":
            raise ValueError(f"{where}: hot rows are for sharding='row', not {self.sharding!r}")
        if self.hot and not (self.hot[0] >= 0 and self.hot[-1] < self.rows):
            bad = self.hot[0] if self.hot[0] < 0 else self.hot[-1]
            raise ValueError(f"{where}: hot id {bad}; use ids from 0 to {self.rows - 1}")
        if len(set(self.hot)) < len(self.hot):
            raise ValueError(f"{where}: hot has an id twice; use each once")
        self.storage.check(where, self.width, self.sharding)

    @functools.cached_property
    def bijection(self) -> Bijection:
        """The map from ids to positions in the table as it is stored."""
        return Bijection(self.positions)

    @functools.cached_property
    def positions(self) -> int:
        """Rows of the table as it is stored, whatever the devices: some of them of no id."""
        size = self.rows + (self.invalid == "reserve")
        quantum = next((q for q in _QUANTA if q <= size / 16), _QUANTA[-1])
        return -(-size // quantum) * quantum

    def initial_rows(
        self, seed: int, positions: jax.Array, first: jax.Array, width: int
    ) -> jax.Array:
        """Initial values of rows by position, float32 [positions, width], from a column on."""
        salt = np.uint32(hash_of(self.name, seed))
        row = mixed(positions.astype(jnp.uint32) + salt)[:, None]
        column = first.astype(jnp.uint32) + jnp.arange(width, dtype=jnp.uint32)[None, :]
        bits = mixed(row ^ mixed(column * np.uint32(0x9E3779B9) + np.uint32(0x7F4A7C15)))
        unit = (bits >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
        return self.initializer.values(unit, self.rows)


def hash_of(name: str, seed: int) -> int:
    """A 32-bit number of a name and a seed, the same in every process (FNV-1a)."""
    value = 0x811C9DC5
    for byte in f"{seed}/{name}".encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A column of a batch that looks up in a table; several may share one.

    Attributes:
      name: the key of its bags in a batch, and of what it gives.
      table: where it looks up.
      hotness: most ids of a bag.
    """

    name: str
    table: Table
    hotness: Count = 1

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.table, Table):
            raise ValueError(f"feature {self.name}: table={self.table!r}; use a Table")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("ids", "weights", "lengths"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Bags:
    """Bags of ids of one feature, one for each sample.

    Attributes:
      ids: integers [batch, hotness].
      weights: [batch, hotness]; None for ones.
      lengths: integers [batch], how many ids of each bag count; None for all of them.
    """

    ids: Any
    weights: Any = None
    lengths: Any = None


def ragged(values: Any, splits: Any, hotness: int, weights: Any = None) -> Bags:
    """Pads bags that stand one after another to one length.

    Args:
      values: the ids of all bags, [N].
      splits: [batch + 1]; bag i has values[splits[i]:splits[i + 1]].
      hotness: length to pad to.
      weights: [N] or None.

    Raises:
      ValueError: the splits do not fit the values, or a bag is longer than `hotness`.
    """
    values, splits = np.asarray(values), np.asarray(splits)
    if splits.ndim != 1 or not np.issubdtype(splits.dtype, np.integer) or not len(splits):
        raise ValueError(f"splits: {splits.dtype}{splits.shape}; use integers [batch + 1]")
    lengths = np.diff(splits)
    if splits[0] != 0 or splits[-1] != len(values) or (lengths < 0).any():
        raise ValueError(
            f"splits go from {splits[0]} to {splits[-1]}; they must rise from 0 to {len(values)}"
        )
    if len(lengths) and lengths.max() > hotness:
        raise ValueError(
            f"bag {int(lengths.argmax())} has {lengths.max()} ids; use hotness={lengths.max()}"
        )
    inside = np.arange(hotness)[None, :] < lengths[:, None]

    def padded(x):
        out = np.zeros(inside.shape, x.dtype)
        out[inside] = x
        return out

    return Bags(
        padded(values),
        None if weights is None else padded(np.asarray(weights)),
        lengths.astype(np.int32),
    )


def check_bags(features: Sequence[Feature], bags: Mapping[str, Bags]) -> None:
    """Checks the bags of a batch on the host, their shapes and dtypes also while tracing.

    Raises:
      ValueError: a bag is missing, or its arrays are of other shapes or dtypes; or, of arrays whose
        values are known and a table that says invalid="fail", an id is out of range. The message
        names the feature, and the id.
    """
    batch = None
    for feature in features:
        where = f"feature {feature.name}"
        if feature.name not in bags:
            raise ValueError(f"{where}: the batch has no bags for it; it has {', '.join(bags)}")
        bag = bags[feature.name]
        if not isinstance(bag, Bags):
            raise ValueError(f"{where}: {type(bag).__name__}; use Bags(ids, weights, lengths)")
        _check_shapes(where, feature, bag)
        if batch is not None and bag.ids.shape[0] != batch:
            raise ValueError(f"{where}: {bag.ids.shape[0]} bags where others have {batch}")
        batch = bag.ids.shape[0]
        if feature.table.invalid == "fail" and not _traced(bag):
            _check_ids(where, feature.table.rows, bag)


def _check_shapes(where: str, feature: Feature, bag: Bags) -> None:
    ids, whole = bag.ids, (np.integer,)
    for name, array, kinds, shape in (
        ("ids", ids, whole, (None, feature.hotness)),
        ("weights", bag.weights, (np.floating, jnp.bfloat16), np.shape(ids)),
        ("lengths", bag.lengths, whole, np.shape(ids)[:1]),
    ):
        if array is None and name != "ids":
            continue
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise ValueError(f"{where}: {name}: {type(array).__name__}; use an array")
        if not any(np.issubdtype(array.dtype, kind) for kind in kinds):
            wanted = "integers" if kinds is whole else "floats"
            raise ValueError(f"{where}: {name} are {array.dtype}; use {wanted}")
        fits = len(array.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits:
            shown = ", ".join("batch" if want is None else str(want) for want in shape)
            raise ValueError(f"{where}: {name} are {list(array.shape)}; use [{shown}]")


def _traced(bag: Bags) -> bool:
    return any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(bag))


def _check_ids(where: str, rows: int, bag: Bags) -> None:
    ids = np.asarray(bag.ids)
    bad = (ids < 0) | (ids >= rows)
    if bag.lengths is not None:
        lengths = np.asarray(bag.lengths)
        if wrong := lengths[(lengths < 0) | (lengths > ids.shape[1])].tolist():
            raise ValueError(f"{where}: a length is {wrong[0]}; use 0 to {ids.shape[1]}")
        bad &= np.arange(ids.shape[1])[None, :] < lengths[:, None]
    if bad.any():
        sample = int(np.argwhere(bad)[0][0])
        raise ValueError(
            f"{where}: id {ids[bad][0]} of sample {sample} is out of range; use 0 to {rows - 1}, "
            "or a table with invalid='drop' or 'reserve'"
        )


def narrowed(bag: Bags) -> Bags:
    """The bags with ids in 32 bits: of 64, JAX would cut off the upper half."""
    ids = bag.ids
    if isinstance(ids, np.ndarray) and ids.dtype.itemsize > 4:
        ids = np.where((ids >= 0) & (ids < 2**31), ids, -1).astype(np.int32)
    return dataclasses.replace(bag, ids=jnp.asarray(ids))


def gains(table: Table, bag: Bags) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Positions and gains of the ids of a batch's bags.

    Returns:
      (positions int32 [batch, hotness], -1 for no row; gains float32 [batch, hotness]; how many ids
      were out of range, int32 []).
    """
    ids = bag.ids
    inside = jnp.ones(ids.shape, bool)
    if bag.lengths is not None:
        inside = jnp.arange(ids.shape[1])[None, :] < bag.lengths[:, None]
    # Compared in the ids' own dtype: int32 would fold others into the range.
    largest = np.iinfo(ids.dtype).max
    good = (ids >= 0) & (ids < table.rows if table.rows <= largest else True)
    bad = inside & ~good
    if table.invalid == "reserve":
        ids, known = jnp.where(good, ids, 0).astype(jnp.int32), inside
        ids = jnp.where(good, ids, table.rows)
    else:
        ids, known = jnp.where(good, ids, 0).astype(jnp.int32), inside & good
    weights = jnp.ones(ids.shape, jnp.float32)
    if bag.weights is not None:
        weights = bag.weights.astype(jnp.float32)
    weights = jnp.where(known, weights, 0)
    if table.combiner != "sum":
        parts = weights if table.combiner == "mean" else rounded(weights * weights)
        total = _sum_in_order(parts)
        divisor = total if table.combiner == "mean" else jnp.sqrt(total)
        inverse = jnp.where(divisor == 0, 0, 1 / jnp.where(divisor == 0, 1, divisor))
        weights = weights * inverse
    if table.invalid == "fail":
        weights = jnp.where(bad, jnp.nan, weights)
    positions = jnp.where(known, table.bijection(ids), -1)
    return positions, weights, jnp.sum(bad, dtype=jnp.int32)


def _sum_in_order(x_BH: jax.Array) -> jax.Array:
    """Sums over the last axis, [B, 1], one after another whatever B is."""
    add = lambda h, total: total + jax.lax.dynamic_slice_in_dim(x_BH, h, 1, axis=1)
    return jax.lax.fori_loop(1, x_BH.shape[1], add, x_BH[:, :1])
