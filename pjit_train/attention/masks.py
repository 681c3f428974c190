"""Masks of attention: the columns a row sees, and the tiles and blocks that hold some of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

_LEAST_WIDTH = 128  # least difference, in columns, between the widths to choose from for a tile
_MAX_GROUPS = 8  # tiles of the forward pass are within so many loops, each with its own columns


@dataclasses.dataclass(frozen=True)
class Mask:
    """Row t sees columns up to t where causal, and from t - window + 1 on where there is a window.

    Attributes:
      offset: index, among the columns, of the first row; None where it is not known while tracing.
      segmented: whether rows see only the columns of their own segment, besides.
    """

    causal: bool
    window: int | None
    offset: int | None
    segmented: bool

    def __call__(self, logits, rows, cols, ids=None, columns=None):
        """Sets logits to -inf where they are masked.

        Args:
          rows, cols: positions, which broadcast against each other to the logits' last two axes.
          ids: segments of rows and of columns, which broadcast likewise, or None.
          columns: how many there are before padding begins, or None where there is no padding.
        """
        conditions = []
        if self.causal:
            conditions.append(cols <= rows)
        if self.window:
            conditions.append(cols > rows - self.window)
        if ids is not None:
            conditions.append(ids[0] == ids[1])
        if columns is not None:
            conditions.append(cols < columns)
        if not conditions:
            return logits
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        return jnp.where(seen, logits, -jnp.inf)

    def row_groups(self, n: int, R: int, S: int):
        """Runs of the n tiles of R rows, with the columns that they have in common.

        Returns:
          The most columns of a tile, and (first tile, last tile, pieces) of each run, with pieces
          (first column, number of columns, whether any is masked). Last tiles are exclusive; no
          row of the run sees columns outside of its pieces. Where `slides` the only piece is as
          wide as one tile needs, and begins where the tile's own first row begins to see.
        """
        by_position = self.causal or self.window is not None
        if self.slides:
            width = min(S, R + self.window - 1)
            return width, [(0, n, [(0, width, True)])]
        if self.offset is None or not by_position:
            return S, [(0, n, [(0, S, by_position or self.segmented)])]
        size, groups = -(-n // _MAX_GROUPS), []
        for first in range(0, n, size):
            last = min(first + size, n)
            top, bottom = self.offset + first * R, self.offset + last * R  # rows top .. bottom - 1
            low, dense, end, high = 0, 0, S, S  # every row sees dense .. end - 1
            if self.window:
                low = min(max(0, top - self.window + 1), S - 1)
                dense = min(max(0, bottom - self.window), S)
            if self.causal:
                high = max(min(S, bottom), low + 1)
                end = max(0, min(top, high))
            if self.segmented or dense >= end:
                pieces = [(low, high - low, True)]
            else:
                pieces = [(low, dense - low, True), (dense, end - dense, False)]
                pieces = [*pieces, (end, high - end, True)]
            groups.append((first, last, [p for p in pieces if p[1] > 0]))
        return max(sum(p[1] for p in pieces) for *_, pieces in groups), groups

    @property
    def slides(self) -> bool:
        """Tells whether a row's columns are a run of known length."""
        return self.causal and self.window is not None

    def widths(self, n: int, S: int) -> list[int]:
        """Numbers of columns, from the first on, of which each of n tiles takes one while running.

        Only S where what a tile sees is known before, or has a width of its own. A single tile,
        such as a token and its cache, is not worth the programs to choose from.
        """
        if not self.causal or self.slides or self.offset is not None or n == 1:
            return [S]
        size = max(_LEAST_WIDTH, -(-S // _MAX_GROUPS))
        return [*range(size, S, size), S]

    def blocks(self, n: int, R: int, m: int, C: int, S: int, offset: int | jax.Array):
        """Pairs of the n blocks of R rows and the m of C columns, of which S are no padding.

        Args:
          offset: index of the first row; while tracing, so are the results.

        Returns:
          The pairs, int [n m, 2]; bool [n m] of those that are seen whole; and of others that hold
          any that is seen.
        """
        i, j = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(m), indexing="ij"))
        seen = np.ones(n * m, bool)
        whole = np.full(n * m, not self.segmented) & ((j + 1) * C <= S)
        top, bottom = offset + i * R, offset + (i + 1) * R - 1
        left, right = j * C, np.minimum((j + 1) * C, S) - 1
        if self.causal:
            seen, whole = seen & (left <= bottom), whole & (right <= top)
        if self.window:
            seen, whole = seen & (right > top - self.window), whole & (left > bottom - self.window)
        return np.stack([i, j], axis=1).astype(np.int32), seen & whole, seen & ~whole
