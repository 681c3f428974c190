"""Values of rows as they are kept: in float32, or in fewer bits by stochastic rounding."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pjit_train.embeddings.bijection import mixed
from pjit_train.embeddings.exact import rounded
from sparsity.ranges import check_choice

Arrays = dict[str, jax.Array]
Values = Literal["float32", "bfloat16", "int8", "int4"]
_LARGEST = {"int8": 127, "int4": 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """Form in which a table keeps its rows; updates are computed in float32.

    Attributes:
      values: "int8" and "int4" have one float32 scale a row, its greatest magnitude / 127 or / 7;
        "int4" packs two values into a byte.
      rounding: of what an update writes. "stochastic" goes up or down with the probability that
        makes it right on average, so that updates smaller than a step are not lost; its bits are a
        function of (step, row, column). "even" goes to the nearest.
    """

    values: Values = "float32"
    rounding: Literal["stochastic", "even"] = "stochastic"

    def __post_init__(self):
        names = ("float32", "bfloat16", "int8", "int4")
        check_choice("Storage.values", self.values, names)
        check_choice("Storage.rounding", self.rounding, ("stochastic", "even"))

    def check(self, where: str, width: int, sharding: str) -> None:
        """Raises a ValueError where a table of such rows cannot be kept so."""
        if self.values == "int4" and width % 2:
            raise ValueError(f"{where}: width={width} with int4 rows; use an even width")
        if self.values in _LARGEST and sharding == "column":
            raise ValueError(
                f"{where}: {self.values} rows have one scale, and sharding='column' cuts rows; "
                "use another sharding"
            )

    def shapes(self, width: int) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """{array: (shape of a row, dtype)}."""
        match self.values:
            case "int8":
                return {"rows": ((width,), jnp.dtype("int8")), "scale": ((), jnp.dtype("float32"))}
            case "int4":
                packed = (width // 2,), jnp.dtype("uint8")
                return {"rows": packed, "scale": ((), jnp.dtype("float32"))}
            case values:
                return {"rows": ((width,), jnp.dtype(values))}

    def read(self, arrays: Arrays) -> jax.Array:
        """Values of rows, float32 [rows, width]."""
        codes = arrays["rows"]
        if self.values not in _LARGEST:
            return codes.astype(jnp.float32)
        if self.values == "int4":
            low, high = codes & 15, codes >> 4
            codes = jnp.stack([low, high], axis=-1).reshape(codes.shape[0], -1).astype(jnp.int32)
            codes = codes - 8
        return codes.astype(jnp.float32) * arrays["scale"][:, None]

    def write(self, w: jax.Array, rows: jax.Array, step: jax.Array, first: jax.Array) -> Arrays:
        """The arrays of rows with these values.

        Args:
          w: float32 [rows, width].
          rows: what tells rows apart in the table, int32 [rows], for stochastic rounding.
          step: int32 [].
          first: of the columns, int32 []: where w begins in its rows.
        """
        if self.values == "float32":
            return {"rows": w}
        if self.values == "bfloat16":
            if self.rounding == "even":
                return {"rows": w.astype(jnp.bfloat16)}
            bits = jax.lax.bitcast_convert_type(w, jnp.uint32)
            up = bits + (_noise(w.shape, rows, step, first) >> np.uint32(16))
            up = jnp.where(jnp.isfinite(w), up, bits)
            kept = jax.lax.bitcast_convert_type(up & np.uint32(0xFFFF0000), jnp.float32)
            return {"rows": kept.astype(jnp.bfloat16)}
        largest = _LARGEST[self.values]
        scale = jnp.max(jnp.abs(w), axis=-1) * np.float32(1 / largest)
        x = w * (1 / jnp.where(scale == 0, 1, scale))[:, None]
        if self.rounding == "even":
            codes = jnp.round(x)
        else:
            unit = (_noise(w.shape, rows, step, first) >> np.uint32(8)).astype(jnp.float32)
            codes = jnp.floor(rounded(x) + unit * np.float32(2**-24))
        codes = jnp.clip(codes, -largest, largest).astype(jnp.int32)
        if self.values == "int8":
            return {"rows": codes.astype(jnp.int8), "scale": scale}
        pairs = (codes + 8).reshape(codes.shape[0], -1, 2)
        return {"rows": (pairs[..., 0] | pairs[..., 1] << 4).astype(jnp.uint8), "scale": scale}


def _noise(shape, rows, step, first) -> jax.Array:
    """Random uint32 of `shape`, each a function of its step, row and column."""
    row = mixed(rows.astype(jnp.uint32) ^ mixed(step.astype(jnp.uint32)))[:, None]
    column = first.astype(jnp.uint32) + jnp.arange(shape[1], dtype=jnp.uint32)[None, :]
    return mixed(row + mixed(column * np.uint32(0x9E3779B9)))
