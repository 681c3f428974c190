"""Workloads of the dataflow model: attention and the other matmuls of a transformer block.

The models are those of the FLAT paper (Kao et al., ASPLOS 2023, arXiv 2107.06419), with the sizes
of their published configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from topology.numbers import choice, whole

BATCH = 64  # of the paper
_MOST, _MOST_MACS = 2**40, 10**18  # of a size, and of an attention's work, that are counted exactly
SEQUENCES = tuple(512 * 2**i for i in range(8))  # 512 .. 64K


@dataclass(frozen=True, init=False)
class Attention:
    """Logits = Q K^T, softmax over whole rows, output = softmax(logits) V.

    Attributes:
      batch: sequences; heads: of queries, each.
      kv_heads: of keys and values; as many as heads unless given.
      rows: queries of a head; columns: keys, as many as rows unless given.
      bytes_per_element: of Q, K, V and the output.
      bytes_per_logit: the same unless given.
      causal: whether a query sees only the keys up to its own, the last query all of them.
      backward: whether it is the backward pass, out of Q, K, V, the output and its gradient, that
        makes the gradients of Q, K and V.

    Raises:
      ValueError: a size is not positive, kv_heads does not divide heads, or there are fewer keys
        than queries under a causal mask.
    """

    batch: int
    heads: int
    rows: int
    head_dim: int
    columns: int
    kv_heads: int
    bytes_per_element: int
    bytes_per_logit: int
    causal: bool
    backward: bool

    def __init__(
        self,
        *,
        batch: int,
        heads: int,
        rows: int,
        head_dim: int,
        columns: int | None = None,
        kv_heads: int | None = None,
        bytes_per_element: int = 2,
        bytes_per_logit: int | None = None,
        causal: bool = False,
        backward: bool = False,
    ):
        object.__setattr__(self, "causal", bool(causal))
        object.__setattr__(self, "backward", bool(backward))
        sizes = {
            "batch": batch,
            "heads": heads,
            "rows": rows,
            "head_dim": head_dim,
            "columns": rows if columns is None else columns,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "bytes_per_element": bytes_per_element,
            "bytes_per_logit": bytes_per_element if bytes_per_logit is None else bytes_per_logit,
        }
        for name, size in sizes.items():
            object.__setattr__(self, name, whole(name, size, least=1, most=_MOST))
        if self.macs > _MOST_MACS:
            raise ValueError(
                f"batch {self.batch}, heads {self.heads}, rows {self.rows}, columns "
                f"{self.columns}: {self.macs:.1e} multiplications; at most {_MOST_MACS:.0e} are "
                "counted"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.kv_heads} heads of keys and values do not divide {self.heads} heads"
            )
        if self.causal and self.columns < self.rows:
            raise ValueError(
                f"columns {self.columns}: fewer keys than the {self.rows} queries, of which the "
                "first would see none under a causal mask"
            )

    @property
    def num_heads(self) -> int:
        """Heads of keys and values in all sequences: what a tile's loop runs over."""
        return self.batch * self.kv_heads

    @property
    def head_rows(self) -> int:
        """Rows that share the keys and values of a head."""
        return self.rows * (self.heads // self.kv_heads)

    @property
    def logits(self) -> int:
        """Logits that the mask leaves, of all heads and sequences."""
        seen = self.rows * self.columns
        if self.causal:
            seen -= self.rows * (self.rows - 1) // 2
        return self.batch * self.heads * seen

    @property
    def macs(self) -> int:
        """Multiplications and additions: of both matmuls of the attention; of the backward pass
        those of four, since what is recomputed is no part of the work."""
        return (4 if self.backward else 2) * self.logits * self.head_dim

    @property
    def compulsory_bytes(self) -> int:
        """Bytes of what is given, read once, and of what is made, written once."""
        of_rows, of_columns = (4, 4) if self.backward else (2, 2)  # Q, O, dO, dQ; K, V, dK, dV
        elements = of_rows * self.head_rows + of_columns * self.columns
        return self.num_heads * elements * self.head_dim * self.bytes_per_element


class Matmul(NamedTuple):
    """`count` products of [m, k] and [k, n]."""

    name: str
    count: int  # type: ignore[assignment]  # in place of tuple's method
    m: int
    k: int
    n: int

    @property
    def macs(self) -> int:
        return self.count * self.m * self.k * self.n


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of a transformer; `source` says whose."""

    name: str
    heads: int
    d_model: int
    head_dim: int
    d_ff: int
    source: str

    def attention(self, sequence: int, batch: int = BATCH, **options: Any) -> Attention:
        """Sizes of the attention of one layer; options: others of `Attention`."""
        return Attention(
            batch=batch, heads=self.heads, rows=sequence, head_dim=self.head_dim, **options
        )

    def matmuls(self, sequence: int, batch: int = BATCH) -> tuple[Matmul, ...]:
        """The other matmuls of a layer: projections of queries, keys, values, output; both of
        the feed-forward network."""
        tokens, wide = batch * sequence, self.heads * self.head_dim
        return (
            Matmul("query, key, value", 3, tokens, self.d_model, wide),
            Matmul("output", 1, tokens, wide, self.d_model),
            Matmul("feed-forward up", 1, tokens, self.d_model, self.d_ff),
            Matmul("feed-forward down", 1, tokens, self.d_ff, self.d_model),
        )


_ROWS = "sizes in the independent model's rows (FPSG-UIUC/micro24-fusemax-artifact)"

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model(name="BERT", heads=12, d_model=768, head_dim=64, d_ff=3072, source=_ROWS),
        Model(name="TrXL", heads=16, d_model=1024, head_dim=64, d_ff=4096, source=_ROWS),
        Model(
            name="FlauBERT",
            heads=12,
            d_model=768,
            head_dim=64,
            d_ff=3072,
            source="flaubert-base (Le et al., LREC 2020); that the paper took base: assumption",
        ),
        Model(name="T5", heads=8, d_model=512, head_dim=64, d_ff=2048, source=_ROWS),
        Model(name="XLM", heads=16, d_model=2048, head_dim=128, d_ff=8192, source=_ROWS),
    )
}


def model(name: str) -> Model:
    """The model of a name, in any case of letters.

    Raises:
      ValueError: there is none of that name.
    """
    names = {known.lower(): known for known in MODELS}
    return MODELS[choice("model", names.get(name.lower(), name), MODELS)]
