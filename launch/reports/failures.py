"""Failures of a slice's links, as options give them and as reports say them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pjit_train.errors import UserError
from topology import Part, Slice
from topology.fabric import losses
from topology.routing.throughput import is_cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lost:
    """Links of a slice that carry nothing.

    Attributes:
      links: ids 6 * chip + direction of directed links.
      failed, failed_one_way: the parts by whose failure.
    """

    links: tuple[int, ...] = ()
    failed: tuple[str, ...] = ()
    failed_one_way: tuple[str, ...] = ()

    def said(self) -> dict[str, Any]:
        """Entries of a report about them; none where all links are whole."""
        if not self.links:
            return {}
        return {
            "failed": list(self.failed),
            "failed_one_way": list(self.failed_one_way),
            "lost_links": len(self.links),
        }


WHOLE = Lost()


def lost_links(slice: Slice, failed: Sequence[str] = (), one_way: Sequence[str] = ()) -> Lost:
    """The links that the failure of parts takes from a slice.

    Raises:
      UserError: there is no such part, or the failures take chips or cut the slice in two.
    """
    try:
        chips, links = losses.lost(slice, [Part.parse(name, slice.pod) for name in failed])
        alone = [losses.lost_one_way(slice, Part.parse(name, slice.pod)) for name in one_way]
    except ValueError as error:
        raise UserError(str(error)) from error
    if chips.size:
        raise UserError(
            f"--failed {' '.join(failed)}: takes {chips.size} of the slice's chips, without which "
            "no collective is whole; take a slice that goes without them"
        )
    every = sorted({int(link) for part in (links, *alone) for link in part})
    if is_cut(slice, every):
        raise UserError(
            f"{slice}: the failed links cut it in two; let fewer fail, or take another slice"
        )
    return Lost(links=tuple(every), failed=tuple(failed), failed_one_way=tuple(one_way))


def names_of(found: dict[str, Any]) -> str:
    """The failed parts of a report, for people."""
    return ", ".join(found["failed"] + [f"{link} one way" for link in found["failed_one_way"]])


def around_text(found: dict[str, Any]) -> str:
    """A line that says around what traffic goes."""
    return f"around {names_of(found)}: {found['lost_links']} directed links carry nothing"
