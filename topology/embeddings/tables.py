"""Embedding tables of a recommendation model, as data: what a step looks up in them."""

import math
from dataclasses import dataclass, field

import numpy as np

from topology.embeddings.skew import MOST_ROWS, MOST_SKEW, PowerLaw
from topology.numbers import choice, number, whole

DTYPES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes of an element of a table. Rows of int8 and int4 have a float32 scale each."""

SLOTS = {  # floats for each element, floats for each row
    "none": (0.0, 0.0),
    "sgd": (0.0, 0.0),
    "adagrad": (1.0, 0.0),
    "rowwise_adagrad": (0.0, 1.0),
    "adam": (2.0, 0.0),
    "ftrl": (2.0, 0.0),
}
"""State that an optimizer keeps of a row, in float32."""

MOST_WIDTH, MOST_HOTNESS, MOST_BATCH, MOST_SLOTS = 2**16, 1e6, 2**31, 16.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table and the features that look rows of it up.

    Attributes:
      rows: V.
      width: D, elements of a row.
      hotness: ids a sample of each feature that uses the table, on average; they are pooled into
        one vector a feature.
      dtype: in which rows are stored; one of `DTYPES`.
      slots: floats that the optimizer keeps for each element of a row.
      row_slots: floats that it keeps for each row.
      skew: exponent of the popularity of rows; see `skew.PowerLaw`.
      bundled: the first id of a sample brings its others along, a fixed map, as in MLPerf's
        multi-hot Criteo; else all ids are drawn apart.

    Raises:
      ValueError: a number is out of its range; names table and attribute.
    """

    name: str
    rows: int
    width: int
    hotness: tuple[float, ...] = (1.0,)
    dtype: str = "float32"
    slots: float = 1.0
    row_slots: float = 0.0
    skew: float = 0.0
    bundled: bool = False

    def __post_init__(self) -> None:
        of = f"table {self.name!r}: "
        whole(of + "rows", self.rows, least=1, most=MOST_ROWS)
        whole(of + "width", self.width, least=1, most=MOST_WIDTH)
        if not self.hotness:
            raise ValueError(f"{of}hotness: of at least one feature")
        for hotness in self.hotness:
            number(of + "hotness", hotness, above=0, most=MOST_HOTNESS, unit="ids a sample")
        choice(of + "dtype", self.dtype, DTYPES)
        number(of + "slots", self.slots, most=MOST_SLOTS)
        number(of + "row_slots", self.row_slots, most=MOST_SLOTS)
        number(of + "skew", self.skew, most=MOST_SKEW)

    @property
    def ids(self) -> float:
        """Ids of a sample, of all features together."""
        return sum(self.hotness)

    @property
    def element_bytes(self) -> float:
        return DTYPES[self.dtype]

    @property
    def wire_bytes(self) -> float:
        """Bytes of an element of the vectors and gradients that are sent: of the stored element,
        bfloat16 at least."""
        return max(self.element_bytes, 2.0)

    def row_bytes(self, width: float | None = None) -> float:
        """Bytes of the elements of a stored row, or of `width` columns of it, with its scale."""
        scale = 4.0 if self.element_bytes <= 1 else 0.0
        return (self.width if width is None else width) * self.element_bytes + scale

    def slot_bytes(self, width: float | None = None) -> float:
        """Bytes of the optimizer's state of a row, or of `width` columns of it."""
        return 4 * ((self.width if width is None else width) * self.slots + self.row_slots)

    @property
    def bytes(self) -> float:
        """Bytes of all rows, without the optimizer's state."""
        return self.rows * self.row_bytes()

    @property
    def law(self) -> PowerLaw:
        return PowerLaw(self.rows, self.skew)

    def draws(self, samples: float) -> float:
        """Independent draws of the law in so many samples: ids, or where they are bundled first
        ids."""
        return samples * (len(self.hotness) if self.bundled else self.ids)

    def unique(self, samples: float, beyond: int = 0) -> float:
        """The expected number of distinct rows that some samples look up.

        Args:
          beyond: so many of the most popular rows are left out.
        """
        if not self.bundled:
            return self.law.unique(self.draws(samples), beyond)
        # Distinct bundles, each of rows anywhere in the table; hot rows are those of hot bundles.
        of_bundle = self.ids / len(self.hotness)
        bundles = self.law.unique(self.draws(samples), round(beyond / of_bundle))
        return -math.expm1(-of_bundle * bundles / self.rows) * self.rows

    def share(self, top: int) -> float:
        """The part of ids that the `top` most popular rows get."""
        return self.law.share(round(top * len(self.hotness) / self.ids) if self.bundled else top)


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """The tables of a model and the samples of a step.

    Attributes:
      batch: samples of a step, on all chips together.
      dense_bytes: memory of a chip that the rest of the model takes.
      source: where its sizes come from.

    Raises:
      ValueError: there is no table, two have one name, or a number is out of its range.
    """

    name: str
    tables: tuple[Table, ...]
    batch: int
    dense_bytes: float = 0.0
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        whole("batch", self.batch, least=1, most=MOST_BATCH)
        number("dense_bytes", self.dense_bytes, unit="bytes")
        if not self.tables:
            raise ValueError("tables: none is given; give at least one with rows and width")
        names = [table.name for table in self.tables]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"table {twice[0]!r}: stands twice; give each table its own name")

    @property
    def ids(self) -> float:
        """Ids of a sample."""
        return sum(table.ids for table in self.tables)

    @property
    def features(self) -> int:
        return sum(len(table.hotness) for table in self.tables)

    @property
    def bytes(self) -> float:
        """Bytes of all rows, without the optimizer's state."""
        return sum(table.bytes for table in self.tables)


_DLRM_ROWS = (
    *(40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209),
    *(11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36),
)
_DLRM_HOTNESS = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)

DLRM_V2 = EmbeddingModel(
    name="dlrm_v2",
    tables=tuple(
        Table(name=f"cat_{k}", rows=rows, width=128, hotness=(float(hotness),), bundled=True)
        for k, (rows, hotness) in enumerate(zip(_DLRM_ROWS, _DLRM_HOTNESS, strict=True))
    ),
    batch=65536,
    source="MLPerf Training's DLRM-v2 (facebookresearch/dlrm): 26 tables, Adagrad",
)
"""MLPerf's DLRM-v2: 204,184,588 rows of 128 floats, 104.5 GB, 214 ids a sample. How popular its
rows are is not published: `skew` is 0, so no id repeats but by chance."""


def synthetic(tables: int = 1000, seed: int = 0, batch: int = 65536) -> EmbeddingModel:
    """A model of many tables, of sizes spread as those of production models are said to be.

    Rows 10 .. 10^7.5 and hotness 1 .. 100 by the logarithm, most of them near the low end; widths
    8 .. 128; skews 0 .. 1.2.
    """
    rng = np.random.default_rng(seed)
    made = [
        Table(
            name=f"t{k}",
            rows=int(10 ** rng.uniform(1, 7.5)),
            width=int(rng.choice([8, 16, 32, 64, 128])),
            hotness=(float(round(10 ** (2 * rng.beta(1, 2)))),),
            slots=float(rng.choice([0, 1])),
            skew=float(rng.choice([0.0, 0.8, 1.0, 1.2])),
        )
        for k in range(whole("tables", tables, least=1, most=100_000))
    ]
    return EmbeddingModel(name=f"synthetic_{tables}", tables=tuple(made), batch=batch)
