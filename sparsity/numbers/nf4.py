"""NF4: sixteen values at the quantiles of a normal distribution."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sparsity.numbers.blocks import Block
from sparsity.numbers.format import Format
from sparsity.numbers.rounding import MAGNITUDE, Rounding, bits_of, float_of
from sparsity.numbers.scales import Scale, ratio_scale
from sparsity.ranges import check_fields

VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The values by code (Dettmers et al., 2023, appendix E)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Format):
    """4-bit NormalFloat of QLoRA (Dettmers et al., 2023, arXiv 2305.14314).

    scale = max |x| of a block in float32, 1 of a block of zeros; the code of x is that of the one
    of the sixteen `VALUES` that is nearest to x / scale, a quotient in IEEE float32. Where two are
    as near, "even" takes the one of even code and "away" the greater magnitude (bitsandbytes: the
    lower value); "floor" takes the nearest that has no greater magnitude, and "stochastic" one of
    its two neighbours. There is one zero. A subnormal product of value and scale is rounded twice,
    as of `FP8`. The paper's second quantization, of the scales, is not part of it.

    Attributes:
      block: entries along the axis that share a scale, "channel" or "tensor".
    """

    block: Block = 64

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def element_bits(self) -> int:
        return 4

    def scale(
        self, blocks: jax.Array, axes: tuple[int, ...], earlier: Scale | None = None
    ) -> Scale:
        return ratio_scale(self.largest(blocks, axes), 1, 1)

    def limit(self, negative: jax.Array, scale: Scale | None) -> float:
        return 1.0

    def elements(
        self, blocks: jax.Array, scale: Scale | None, rounding: Rounding, noise: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        sign = bits_of(blocks) & ~MAGNITUDE
        x = float_of(bits_of(self.lifted(blocks, scale)) | sign)
        if rounding == "stochastic":
            below = _chosen(x, VALUES[1:])
            above = _chosen(x, VALUES[1:], (*VALUES[1:], VALUES[-1]))
            if noise is None:
                raise ValueError(f"rounding={rounding!r} needs noise")
            value = jnp.where(x - below > noise * (above - below), above, below)
        else:
            value = _chosen(x, _BOUNDS[rounding])
        bits = bits_of(jnp.where(jnp.isnan(x), x, value))
        return float_of(bits & MAGNITUDE), bits & ~MAGNITUDE

    def codes(self, magnitude: jax.Array, negative: jax.Array, scale: Scale | None) -> jax.Array:
        value = jnp.where(negative, -magnitude, magnitude)
        return _chosen(value, VALUES[1:], range(16))

    def magnitudes(self, codes: jax.Array, scale: Scale | None) -> tuple[jax.Array, jax.Array]:
        value = _chosen(codes, range(1, 16))
        return jnp.abs(value), value < 0


Numbers = Sequence[float] | np.ndarray


def _chosen(x: jax.Array, bounds: Numbers, of: Numbers = VALUES) -> jax.Array:
    """of[i], i the number of bounds, in ascending order, that x has reached."""
    found = jnp.full(x.shape, of[0])
    for bound, value in zip(bounds, of[1:], strict=True):
        found = jnp.where(x >= bound, value, found)
    return found


def _middles(tie_goes_up: Callable[[int], bool]) -> np.ndarray:
    """The least float32 that are nearer to a value than to the one before it.

    Args:
      tie_goes_up: whether what lies in the very middle between values i and i + 1 is i + 1.
    """
    bounds = []
    for i in range(15):
        middle = (float(VALUES[i]) + float(VALUES[i + 1])) / 2  # exact in float64
        bound = np.float32(middle)
        below = float(bound) < middle  # in float64: of the two, numpy would take float32
        if below or (float(bound) == middle and not tie_goes_up(i)):
            bound = np.nextafter(bound, np.float32(math.inf))
        bounds.append(bound)
    return np.array(bounds)


_ZERO = 7
_BOUNDS = {
    "even": _middles(lambda i: i % 2 == 1),
    "away": _middles(lambda i: i >= _ZERO),
    "floor": np.where(
        np.arange(15) < _ZERO, np.nextafter(VALUES[:-1], np.float32(math.inf)), VALUES[1:]
    ),
}
