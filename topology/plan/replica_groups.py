"""Groups of partitions of a collective, in each of the syntaxes that HLO writes them in."""

import math
import re

import numpy as np

from topology.arrays import Integers


class UnreadGroups(ValueError):
    """Groups in a syntax that is not known."""


def groups_of(attributes: str, num_partitions: int) -> Integers:
    """int [groups, members]: the partitions of each group, from an instruction's attributes.

      Syntaxes: explicit `{{0,1},{2,3}}`, where `{}` is all in one group; iota
      `[4,16]<=[16,4]T(1,0)`; mesh `mesh['a'=4,'b'=2] {'b'}`, row-major, where an axis may be a part
      of one, `'a':(2)2` (the ones before it, its size), and devices may have an order of their own,
    `device_ids=([16,4]T(1,0))`.

      Raises:
        UnreadGroups: there are none, or they are none of these.
    """
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, sizes = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else list(range(len(sizes)))
        if math.prod(shape) != math.prod(sizes) or sorted(order) != list(range(len(sizes))):
            raise UnreadGroups(iota[0])
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return ids.reshape(-1, shape[-1])
    if mesh := re.search(
        r"replica_groups=@?mesh\w*\s*\[([^\]]*)\](?:,?\s*device_ids=\(([^{}]*)\))?\s*"
        r"\{([^{}]*)\}",
        attributes,
    ):
        return _of_mesh(mesh[1], mesh[2], mesh[3])
    if explicit := re.search(r"replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}", attributes):
        rows = [_numbers(row) for row in re.findall(r"\{([\d,\s]*)\}", explicit[1])]
        if not rows:
            return np.arange(num_partitions)[None]
        if len({len(row) for row in rows}) != 1:
            raise UnreadGroups("groups of several sizes")
        return np.array(rows, int)
    raise UnreadGroups("no replica_groups")


def pairs_of(attributes: str) -> list[tuple[int, int]]:
    """(source, target) of a permute. UnreadGroups where there are none."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}", attributes)
    if not found:
        raise UnreadGroups("no source_target_pairs")
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),\s*(\d+)\}", found[1])]


def _of_mesh(axes: str, device_ids: str | None, over: str) -> Integers:
    names = re.findall(r"""['"]([^'"]+)['"]\s*=\s*(\d+)""", axes)
    sizes = [int(size) for _, size in names]
    if not names:
        raise UnreadGroups(f"mesh [{axes}]")
    ids = np.arange(math.prod(sizes))
    if device_ids:
        iota = re.fullmatch(r"\s*\[([\d,]+)\](?:T\(([\d,]+)\))?\s*", device_ids)
        given = ids
        if iota and iota[2]:
            given = ids.reshape(_numbers(iota[1])).transpose(_numbers(iota[2])).ravel()
        elif not iota:
            given = np.array(_numbers(device_ids))
        if not np.array_equal(np.sort(given), ids):
            raise UnreadGroups(f"device_ids {device_ids[:40]}")
        ids = given
    # Each axis cut into the parts that the collective names, in order, and what lies between.
    wanted: list[tuple[str, int, int]] = []
    for name, _, before, size in re.findall(r"""['"]([^'"]+)['"](:\((\d+)\)(\d+))?""", over):
        whole = dict((n, int(s)) for n, s in names).get(name)
        if whole is None:
            raise UnreadGroups(f"axis {name}")
        wanted.append((name, int(before or 1), int(size or whole)))
    dims: list[int] = []
    kept: list[int] = []
    places: dict[tuple[str, int, int], int] = {}
    for (name, text), _ in zip(names, sizes, strict=True):
        whole, at = int(text), 1
        for part in sorted((w for w in wanted if w[0] == name), key=lambda w: w[1]):
            _, before, size = part
            if before % at or whole % (before * size):
                raise UnreadGroups(f"part ({before}){size} of axis {name} of {whole}")
            if before > at:
                kept.append(len(dims))
                dims.append(before // at)
            places[part] = len(dims)
            dims.append(size)
            at = before * size
        if at < whole or whole == 1:
            kept.append(len(dims))
            dims.append(whole // at)
    order = kept + [places[part] for part in wanted]
    members = math.prod(size for _, _, size in wanted)
    return ids.reshape(dims).transpose(order).reshape(-1, members)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
