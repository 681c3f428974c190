"""Models of recommendation: DLRM (Naumov et al., 2019), and its second version with DCN v2's
crosses (Wang et al., 2021), as MLPerf trains them.

Dense features go through a bottom network, ids through embedding tables, what comes out interacts,
and a top network gives the logit of a click. S samples, F features of ids, D width, I interactions.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pjit_train.embeddings.collection import Embeddings
from pjit_train.embeddings.row_optimizers import Adagrad, RowOptimizer
from pjit_train.embeddings.storage import Storage
from pjit_train.embeddings.tables import (
    Bags,
    Combiner,
    Feature,
    Invalid,
    Normal,
    Sharding,
    Table,
    Uniform,
)
from pjit_train.errors import UserError
from pjit_train.models.model_config import ModelConfig
from pjit_train.models.parameters import Dtype, Initializer
from pjit_train.models.projection import Dense
from pjit_train.sharding import Rules, device_memory
from sparsity.ranges import Count, Whole, check_choice, check_fields

_ADAGRAD, _UNIFORM, _STORAGE = Adagrad(learning_rate=0.005), Uniform(), Storage()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DLRMConfig(ModelConfig):
    """Configuration of a DLRM.

    Attributes:
      num_dense: features that are numbers; 0 for none.
      rows: of each table.
      hotness: of each feature of ids, the most ids of its bag.
      table_of: of each feature, the index of its table; None for a table for each.
      width: of rows, D.
      bottom: widths of the bottom network; the last is D.
      top: widths of the top network before the logit.
      interaction: "cross", DCN v2's crosses of low rank; or "dot", the products of all pairs of
        features.
      cross_layers, cross_rank: of "cross".
      activation: of the networks; DLRM's is "relu".
      combiner, initializer, embedding_optimizer, storage, invalid: of all tables, see
        `embeddings.tables.Table`.
      sharding: of all tables but those of at most `replicate_rows` rows, which are replicated.
      hot_rows: of a row-sharded table, the rows of the ids below this are on every device.
      capacity: of exchanges, see `Embeddings`.
      dtype: of activations and matmuls; param_dtype: of the parameters of the networks.
    """

    num_dense: Whole = 13
    rows: Sequence[Count]
    hotness: Sequence[Count]
    table_of: Sequence[Whole] | None = None
    width: Count = 128
    bottom: Sequence[Count] = (512, 256, 128)
    top: Sequence[Count] = (1024, 1024, 512, 256)
    interaction: Literal["cross", "dot"] = "cross"
    cross_layers: Count = 3
    cross_rank: Count = 512
    activation: Literal["relu", "silu"] = "relu"
    combiner: Combiner = "sum"
    initializer: Uniform | Normal = _UNIFORM
    embedding_optimizer: RowOptimizer = _ADAGRAD
    storage: Storage = _STORAGE
    invalid: Invalid = "fail"
    sharding: Sharding = "row"
    replicate_rows: Whole = 0
    hot_rows: Whole = 0
    capacity: Count | None = None
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    use_bias = True  # of all kernels but those that say otherwise

    def __post_init__(self):
        check_fields(self, UserError)
        for name in ("rows", "hotness", "bottom", "top"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_choice("model: interaction", self.interaction, ("cross", "dot"), UserError)
        check_choice("model: activation", self.activation, ("relu", "silu"), UserError)
        for name in ("dtype", "param_dtype"):
            kinds = ("float32", "bfloat16", "float16")
            check_choice(f"model: {name}", getattr(self, name), kinds, UserError)
        if not self.rows or not self.hotness:
            raise UserError("model: rows and hotness are empty; give one table at least")
        table_of = self.table_of
        if table_of is None and len(self.rows) != len(self.hotness):
            raise UserError(
                f"model: {len(self.rows)} tables (rows) and {len(self.hotness)} features "
                "(hotness); use as many, or say table_of"
            )
        table_of = range(len(self.rows)) if table_of is None else table_of
        object.__setattr__(self, "table_of", tuple(table_of))
        if len(self.table_of) != len(self.hotness) or max(self.table_of) >= len(self.rows):
            raise UserError(
                f"model: table_of={self.table_of}; use {len(self.hotness)} indices of tables, 0 to "
                f"{len(self.rows) - 1}"
            )
        if self.num_dense and (not self.bottom or self.bottom[-1] != self.width):
            raise UserError(
                f"model: bottom={self.bottom} must end with width={self.width}, that dense "
                "features be as wide as rows"
            )
        try:
            _ = self.features  # tables check themselves
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    @functools.cached_property
    def features(self) -> tuple[Feature, ...]:
        """The features of ids, in their order, with their tables."""
        tables = [self._table(i, rows) for i, rows in enumerate(self.rows)]
        return tuple(
            Feature(name=f"feature_{i:02}", table=tables[t], hotness=hotness)
            for i, (t, hotness) in enumerate(zip(self.table_of, self.hotness, strict=True))
        )

    def _table(self, index: int, rows: int) -> Table:
        sharding = "replicated" if rows <= self.replicate_rows else self.sharding
        hot = range(min(self.hot_rows, rows)) if sharding == "row" else ()
        return Table(
            name=f"table_{index:02}",
            rows=rows,
            width=self.width,
            combiner=self.combiner,
            initializer=self.initializer,
            optimizer=self.embedding_optimizer,
            sharding=sharding,
            hot=tuple(hot),
            storage=self.storage,
            invalid=self.invalid,
        )

    def embeddings(self, rules: Rules, mesh: Mesh) -> Embeddings:
        """The tables on a mesh, spread over the axes that split the batch."""
        try:
            made = Embeddings(self.features, mesh, axes=rules.batch, capacity=self.capacity)
            made.check_fits(device_memory(mesh.devices.flat[0], mesh.size))
            return made
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    def bags(self, batch) -> dict[str, Bags]:
        """The bags of a batch: of its "ids" [S, columns of all features] and "lengths" [S, F]."""
        bags, first = {}, 0
        for i, feature in enumerate(self.features):
            ids = batch["ids"][:, first : first + feature.hotness]
            lengths = batch["lengths"][:, i] if "lengths" in batch else None
            bags[feature.name] = Bags(ids, None, lengths)
            first += feature.hotness
        return bags

    @property
    def num_vectors(self) -> int:
        """Vectors of width D that interact."""
        return len(self.hotness) + (self.num_dense > 0)

    @property
    def top_inputs(self) -> int:
        """Features that the top network is given."""
        if self.interaction == "cross":
            return self.num_vectors * self.width
        pairs = self.num_vectors * (self.num_vectors - 1) // 2
        return pairs + (self.width if self.num_dense else 0)

    @property
    def _kernels(self) -> list[tuple[int, int]]:
        bottom = [self.num_dense, *self.bottom] if self.num_dense else []
        top, wide = [self.top_inputs, *self.top, 1], self.num_vectors * self.width
        crosses = [(wide, self.cross_rank), (self.cross_rank, wide)] * self.cross_layers
        pairs = [*itertools.pairwise(bottom), *itertools.pairwise(top)]
        return pairs + (crosses if self.interaction == "cross" else [])

    @property
    def num_params(self) -> int:
        """Elements of all parameters of the networks, without the tables."""
        biases = sum(outputs for _, outputs in self._kernels)
        if self.interaction == "cross":
            biases -= self.cross_layers * self.cross_rank
        return sum(a * b for a, b in self._kernels) + biases

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of a training step for a sample, in the networks."""
        dot = self.interaction == "dot"
        pairs = self.num_vectors**2 * self.width if dot else 0
        return 6.0 * (sum(a * b for a, b in self._kernels) + pairs)

    def build(self, key: jax.Array, rules: Rules) -> "DLRM":
        return DLRM(self, key, rules)


class Network(nnx.Module):
    """Dense layers with an activation after each; but not after the last, where `logit`."""

    def __init__(self, config: DLRMConfig, widths: Sequence[int], init, logit: bool = False):
        # He et al.'s scale, by the mean of inputs and outputs, as MLPerf's DLRM begins.
        self.layers = nnx.List(
            [
                _dense(config, a, b, init, math.sqrt(2 / (a + b)))
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.logit, self.activation = logit, config.activation

    def __call__(self, x_SI: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers, 1):
            x_SI = layer(x_SI)
            if not self.logit or i < len(self.layers):
                x_SI = getattr(jax.nn, self.activation)(x_SI)
        return x_SI


class Crosses(nnx.Module):
    """x <- x0 * (U V x + b) + x, layer by layer (Wang et al., 2021, section 3.4)."""

    def __init__(self, config: DLRMConfig, wide: int, init: Initializer):
        std = math.sqrt(2 / (wide + config.cross_rank))
        layers = range(config.cross_layers)
        down = [_dense(config, wide, config.cross_rank, init, std, bias=False) for _ in layers]
        up = [_dense(config, config.cross_rank, wide, init, std) for _ in layers]
        self.down, self.up = nnx.List(down), nnx.List(up)

    def __call__(self, x0_SI: jax.Array) -> jax.Array:
        x_SI = x0_SI
        for down, up in zip(self.down, self.up, strict=True):
            x_SI = x0_SI * up(down(x_SI)) + x_SI
        return x_SI


def _dense(config, inputs: int, outputs: int, init, std: float, bias: bool | None = None) -> Dense:
    shape, axes = (inputs, outputs), (None, None)
    return Dense("bi,io->bo", shape, axes, std=std, config=config, init=init, bias=bias)


class DLRM(nnx.Module):
    """The networks of a DLRM; its tables are the run's `Embeddings`."""

    def __init__(self, config: DLRMConfig, key: jax.Array, rules: Rules):
        c = self.config = config
        init = Initializer(key, rules, c.param_dtype)
        self.bottom = Network(c, (c.num_dense, *c.bottom), init) if c.num_dense else None
        wide = c.num_vectors * c.width
        self.crosses = Crosses(c, wide, init) if c.interaction == "cross" else None
        self.top = Network(c, (c.top_inputs, *c.top, 1), init, logit=True)

    def __call__(self, dense_SN: jax.Array | None, embedded: dict[str, Any]) -> jax.Array:
        """Logits of clicks, float32 [S].

        Args:
          dense_SN: numbers, [S, num_dense]; None where there are none.
          embedded: {feature: [S, D]}, what the lookup gave.
        """
        dtype = self.config.dtype
        vectors = [embedded[f.name].astype(dtype) for f in self.config.features]
        if self.bottom is not None:
            vectors.insert(0, self.bottom(jnp.asarray(dense_SN, dtype)))
        if self.crosses is not None:
            x_SI = self.crosses(jnp.concatenate(vectors, axis=-1))
        else:
            x_SI = self._products(vectors)
        return self.top(x_SI)[:, 0].astype(jnp.float32)

    def _products(self, vectors: list[jax.Array]) -> jax.Array:
        x_SVD = jnp.stack(vectors, axis=1)
        products_SVV = jnp.einsum("svd,swd->svw", x_SVD, x_SVD)
        rows, columns = np.tril_indices(len(vectors), -1)
        pairs_SP = jnp.stack(
            [products_SVV[:, v, w] for v, w in zip(rows, columns, strict=True)], axis=1
        )
        return jnp.concatenate([vectors[0], pairs_SP], axis=1) if self.bottom else pairs_SP
