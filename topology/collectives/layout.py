"""Assignment of chips to places of a logical mesh, so that given traffic costs least.

A slice is read as a box: chips are a_0 g_0 + a_1 g_1 + a_2 g_2 with 0 <= a_i < n_i. On a regular
slice g is x, y, z; on a twisted one there are several boxes, because the lattice offers other
bases, and in some a dimension closes to a ring of its own that in the slice's own shape ends in
another place. Every size n_i is factored, each factor given to a mesh axis, and the factors of a
dimension put in an order; the inner axis has neighbours one g_i apart.

What is searched includes what `jax.experimental.mesh_utils.create_device_mesh` does: axes from the
last to the first each take whole dimensions, or factors of them where it may split.
"""

import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from topology.arrays import Floats, Integers
from topology.collectives.collectives import Cost, Network, check_kind, collective_cost
from topology.collectives.degraded import degraded_cost
from topology.collectives.groups import Groups, groups_of_axes
from topology.numbers import number, whole
from topology.routing.routing import short_vectors
from topology.torus.boxes import boxes
from topology.torus.shapes import three
from topology.torus.slices import Slice

_IMPROVED = 8  # of the best factorisations, so many have the order of their factors improved


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Traffic of a collective over mesh axes, carried out `count` times.

    Attributes:
      kind: one of `collectives.KINDS`. A permute is from each member of one axis to the next.
      axes: names of mesh axes.
      bytes: as in `topology.collectives`.
      strategy: the row of `collectives.EFFICIENCIES`; by default that of the ideal schedule.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float = 1.0
    strategy: str | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        name = f"traffic {self.kind} over {', '.join(self.axes)}"
        number(f"{name}: bytes", self.bytes)
        number(f"{name}: count", self.count)
        if self.kind == "permute" and len(self.axes) != 1:
            raise ValueError(f"traffic permute over {self.axes}: it goes over one axis")

    def seconds(
        self, groups: Groups, network: Network, failed_links: Collection[int] = ()
    ) -> float:
        """Seconds of all of it in groups of chips, around failed links."""
        if not failed_links:
            return self.cost_seconds(collective_cost(self.kind, groups), network)
        around = [degraded_cost(self.kind, groups, failed_links, longer=n) for n in (0, 2)]
        return min(self.cost_seconds(cost, network) for cost in around)

    def cost_seconds(self, cost: Cost, network: Network) -> float:
        """Seconds of a collective of this kind and size, where one of a byte has a cost."""
        paths = self.kind in ("all_to_all", "permute")
        strategy = self.strategy or ("shortest_paths" if paths else "breadth_first")
        return self.count * cost.seconds(self.bytes, network, strategy)


_Digits = list[tuple[int, int, int]]


@dataclass(frozen=True)
class Digit:
    """A part of a mesh axis: `size` chips, one after another by a vector of hops."""

    vector: tuple[int, int, int]
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Layout of a mesh on the chips of a slice.

    Attributes:
      devices: int, chip indices in the mesh's shape: put the device of each chip there and give
        the array to `jax.sharding.Mesh`.
      axes: of every mesh axis, its digits, the outermost first.
      seconds: all the traffic, one collective after another.
      traffic_seconds: of each entry of the traffic.
    """

    slice: Slice
    mesh: Mapping[str, int]
    devices: Integers
    axes: Mapping[str, tuple[Digit, ...]]
    seconds: float
    traffic_seconds: tuple[float, ...]


def lay_mesh(
    slice: Slice,
    mesh: Mapping[str, int],
    traffic: Sequence[Traffic],
    network: Network | None = None,
    failed_links: Collection[int] = (),
) -> Layout:
    """The layout of a mesh on which the traffic takes least.

    The best of all factorisations of the boxes' sizes to the axes, with the order of factors in a
    dimension by how much traffic their axes have, or as the axes stand; the best of those are then
    improved by trying all orders, one dimension after another. Of equal ones the first found.

    Args:
      mesh: sizes of the axes by name; their product is the number of chips.
      failed_links: as `traffic_seconds` has them. With any, the best are found for the slice with
        all its links, and the one of them is taken that takes least around those that failed.

    Raises:
      ValueError: the product is another, traffic names an axis that is not there, or the failed
        links cut the slice in two.
    """
    network = network or Network.of(slice.pod)
    _check_mesh(slice, mesh, traffic)
    search = _Search(slice, mesh, traffic, network)
    best: dict[_Candidate, float] = {}
    limit = math.inf  # the seconds of the worst in `best`, once it is full
    candidates = [
        _Candidate(b, factors, order)
        for b, box in enumerate(search.boxes)
        for factors in _factorisations(box.sizes, tuple(mesh.values()))
        for order in search.first_orders(factors)
    ]
    for candidate in sorted(candidates, key=search.least):
        seconds = search.seconds(candidate, limit)
        if seconds < limit:
            best[candidate] = seconds
            if len(best) > _IMPROVED:
                del best[max(best, key=lambda candidate: best[candidate])]
            if len(best) == _IMPROVED:
                limit = max(best.values())
    improved = [search.improve(one) for one in sorted(best, key=lambda one: best[one])]

    def laid(candidate: _Candidate) -> tuple[Integers, tuple[float, ...]]:
        axes = [
            search.members(candidate.box, d, a in search.ordered)
            for a, d in enumerate(search.digits(candidate))
        ]
        devices = _devices(slice, axes)
        return devices, traffic_seconds(slice, mesh, devices, traffic, network, failed_links)

    if failed_links:
        layouts = {one: laid(one) for one in dict.fromkeys(improved)}
        chosen = min(layouts, key=lambda one: sum(layouts[one][1]))
        devices, each = layouts[chosen]
    else:
        chosen = min(improved, key=search.seconds)
        devices, each = laid(chosen)
    b, digits = chosen.box, search.digits(chosen)
    vectors = [
        tuple(Digit(three(s * v for v in search.boxes[b].vectors[i]), f) for i, s, f in axis)
        for axis in digits
    ]
    return Layout(
        slice=slice,
        mesh=dict(mesh),
        devices=devices,
        axes=dict(zip(mesh, vectors, strict=True)),
        seconds=sum(each),
        traffic_seconds=each,
    )


def traffic_seconds(
    slice: Slice,
    mesh: Mapping[str, int],
    devices: npt.ArrayLike,
    traffic: Sequence[Traffic],
    network: Network | None = None,
    failed_links: Collection[int] = (),
) -> tuple[float, ...]:
    """Seconds of each entry of the traffic for any order of devices.

    Args:
      failed_links: ids 6 * chip + direction of directed links that carry nothing; traffic goes
        around them (`topology.collectives.degraded`).

    Raises:
      ValueError: the array has another shape than the mesh, its groups are no translations of each
        other, or the failed links cut the slice in two.
    """
    _check_mesh(slice, mesh, traffic)
    devices, names = np.asarray(devices), list(mesh)
    if devices.shape != tuple(mesh.values()):
        raise ValueError(f"devices of shape {devices.shape}: the mesh is {tuple(mesh.values())}")
    return tuple(
        one.seconds(
            groups_of_axes(slice, devices, [names.index(a) for a in one.axes]),
            network or Network.of(slice.pod),
            failed_links,
        )
        for one in traffic
    )


class _Candidate(NamedTuple):
    """A box by its index, the factors [3][axes] of its sizes, and orders [3] of the axes, the
    innermost first."""

    box: int
    factors: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]


class _Search:
    """The traffic's cost of a candidate.

    Digits of an axis are (dimension of the box, stride, size) each, the outermost first.
    """

    def __init__(
        self, slice: Slice, mesh: Mapping[str, int], traffic: Sequence[Traffic], network: Network
    ):
        self.slice, self.network = slice, network
        self.names = list(mesh)
        self.boxes = boxes(slice)
        entries = [
            (
                one,
                [self.names.index(a) for a in one.axes],
                self._least(one, math.prod(mesh[a] for a in one.axes)),
            )
            for one in traffic
        ]
        # What is quickly known comes first, and more bytes before fewer.
        self.entries = sorted(
            entries, key=lambda e: (e[0].kind == "all_to_all", -e[0].bytes * e[0].count)
        )
        self.ordered = {axes[0] for one, axes, _ in self.entries if one.kind == "permute"}
        self.images = np.array([slice.symmetry_action(P) for P in slice.point_symmetries])
        self.costs: dict[Hashable, Cost] = {}
        self.bounds: dict[Hashable, float] = {}
        weight = [sum(t.bytes * t.count for t in traffic if name in t.axes) for name in self.names]
        self.by_traffic = sorted(range(len(weight)), key=lambda a: -weight[a])

    def first_orders(
        self, factors: tuple[tuple[int, ...], ...]
    ) -> Iterable[tuple[tuple[int, ...], ...]]:
        """Orders, the innermost axis first: the most traffic inside, outside, and as JAX has it."""
        tried = (self.by_traffic, self.by_traffic[::-1], range(len(self.names))[::-1])
        orders = (
            tuple(tuple(a for a in order if row[a] > 1) for row in factors) for order in tried
        )
        return dict.fromkeys(orders)

    def digits(self, candidate: _Candidate) -> list[_Digits]:
        """Lists the digits of every mesh axis."""
        b, factors, order = candidate
        digits: list[_Digits] = [[] for _ in self.names]
        for i, axes in enumerate(order):
            stride = 1
            for a in axes:
                digits[a].append((i, stride, factors[i][a]))
                stride *= factors[i][a]
        # The first digit of an axis with permutes closes its path: one that may do so in one step.
        for a in self.ordered:
            sizes = self.boxes[b].sizes
            digits[a].sort(key=lambda d: (d[2] % 2, d[1] * d[2] < sizes[d[0]], d[1]))
        return digits

    def seconds(self, candidate: _Candidate, limit: float = math.inf) -> float:
        """Seconds of all the traffic; infinite once they are known to be no less than `limit`."""
        parts = self._parts(candidate)
        total = sum(least for *_, least in parts)
        for one, mine, least in parts:
            if total >= limit:
                return math.inf
            cost = self.cost(one.kind, candidate.box, mine)
            total += one.cost_seconds(cost, self.network) - least
        return total

    def least(self, candidate: _Candidate) -> float:
        """Seconds that all the traffic takes at least; known at once."""
        return sum(least for *_, least in self._parts(candidate))

    def _parts(self, candidate: _Candidate) -> list[tuple[Traffic, _Digits, float]]:
        """(entry, its digits, the seconds that it takes at least) of all entries."""
        digits, parts = self.digits(candidate), []
        for one, axes, least in self.entries:
            mine = [d for a in axes for d in digits[a]]
            if one.kind == "all_to_all" and self.slice.is_twisted:
                bound = self._all_to_all_bound(candidate.box, self._alike(mine))
                least = max(least, one.cost_seconds(Cost(0, bound), self.network))
            parts.append((one, mine, least))
        return parts

    def _all_to_all_bound(self, b: int, digits: _Digits) -> float:
        """Load that an all-to-all of a byte has at least: its paths cost as much as the cheapest
        ones, at any prices of the links, and the most loaded link carries the mean at least."""
        key = b, tuple(digits)
        if key not in self.bounds:
            apart: Integers = np.zeros((1, 3), int)
            pairs: Floats = np.ones(1)
            for i, stride, size in digits:
                ahead = np.arange(1 - size, size)
                steps = ahead[:, None] * (stride * np.array(self.boxes[b].vectors[i]))
                apart = (apart[:, None] + steps).reshape(-1, 3)
                pairs = np.outer(pairs, (size - np.abs(ahead)) / size**2).ravel()
            costs = self.path_costs[:, self.slice.index(self.slice.reduce(apart))]
            self.bounds[key] = float((costs @ pairs).max())
        return self.bounds[key]

    @cached_property
    def path_costs(self) -> Floats:
        """float [7, N]: of the cheapest path to each chip of a torus, at some prices of x, y and z
        at which the links of a chip cost 1."""
        chips, vectors = short_vectors(self.slice)
        starts = np.searchsorted(chips, np.arange(self.slice.num_chips))
        prices = np.array(list(itertools.product((0, 1), repeat=3))[1:])
        costs = np.abs(vectors) @ (prices / (2 * prices.sum(axis=1, keepdims=True))).T
        return np.asarray(np.minimum.reduceat(costs, starts).T)

    def _least(self, one: Traffic, n: int) -> float:
        """Seconds that one entry takes at least: what a chip receives, over all its links; in an
        all-to-all, as often as it has hops, at most 4 h^2 + 2 chips being h hops away."""
        received = {"all_reduce": 2 * (n - 1), "permute": 0}.get(one.kind, n - 1)
        if one.kind == "all_to_all":
            h = np.arange(1, 1 + math.ceil(n ** (1 / 3)))
            received = int(np.repeat(h, 4 * h**2 + 2)[: n - 1].sum())
        degree = max(1, int((self.slice.neighbours >= 0).sum(axis=1).max()))
        return one.cost_seconds(Cost(0, received / n / degree), self.network)

    def cost(self, kind: str, b: int, digits: _Digits) -> Cost:
        if kind == "reduce_scatter":  # an all-gather backwards, and an all-reduce is both
            return self.cost("all_gather", b, digits)
        if kind == "all_reduce":
            half = self.cost("all_gather", b, digits)
            return Cost(2 * half.hops, 2 * half.load)
        if kind != "permute":
            digits = self._alike(digits)
        key = kind, b, tuple(digits)
        if key not in self.costs:
            rest = self._rest(b, digits)
            mine = self.members(b, digits, ordered=kind == "permute")
            parts = [self.members(b, rest), mine]
            known = self._known(kind, *parts)
            if known not in self.costs:
                groups = Groups(self.slice, _devices(self.slice, parts))
                self.costs[known] = collective_cost(kind, groups)
            self.costs[key] = self.costs[known]
        return self.costs[key]

    def _known(self, kind: str, offsets: Integers, members: Integers) -> Hashable:
        """Returns a key that groups of different boxes share if they are equal or mirror images."""
        if not self.slice.is_twisted:
            return kind, members.tobytes(), offsets.tobytes()
        images = self.images[:, self.slice.index(self.slice.reduce(members))]
        images = images if kind == "permute" else np.sort(images, axis=1)
        first = np.lexsort(images.T[::-1])[0]
        if kind not in ("all_to_all", "permute"):
            return kind, images[first].tobytes()
        others = np.sort(self.images[first, self.slice.index(self.slice.reduce(offsets))])
        return kind, images[first].tobytes(), others.tobytes()

    def improve(self, candidate: _Candidate) -> _Candidate:
        """The candidate after trying all orders of each dimension, until none is better."""
        best, better = self.seconds(candidate), True
        while better:
            better = False
            for i in range(len(candidate.order)):
                for axes in itertools.permutations(candidate.order[i]):
                    order = (*candidate.order[:i], axes, *candidate.order[i + 1 :])
                    other = candidate._replace(order=order)
                    seconds = self.seconds(other)
                    if seconds < best * (1 - 1e-12):
                        best, candidate, better = seconds, other, True
        return candidate

    def members(self, b: int, digits: _Digits, ordered: bool = False) -> Integers:
        """int [n, 3]: the vectors of an axis, row-major; for permutes in reflected order, in which
        each differs from the next by one step of one digit."""
        vectors: Integers = np.zeros((1, 3), int)
        for i, stride, size in reversed(digits):
            step = stride * np.array(self.boxes[b].vectors[i])
            rows = [vectors if a % 2 == 0 or not ordered else vectors[::-1] for a in range(size)]
            vectors = np.concatenate([row + a * step for a, row in enumerate(rows)])
        return vectors

    def _alike(self, digits: _Digits) -> _Digits:
        """Digits by which the same groups, or their mirror images, are known: neighbours in a
        dimension merged, and dimensions that are alike exchanged."""
        rows = []
        for i in range(3):
            row: list[tuple[int, int]] = []
            for _, stride, size in sorted(d for d in digits if d[0] == i):
                if row and row[-1][0] * row[-1][1] == stride:
                    row[-1] = (row[-1][0], row[-1][1] * size)
                else:
                    row.append((stride, size))
            rows.append(tuple(row))
        if not self.slice.is_twisted:
            rates = self.slice.link_rates[::2].tolist()
            kinds = list(zip(self.slice.shape, self.slice.wrap, rates, strict=True))
            for kind in set(kinds):
                same = [i for i in range(3) if kinds[i] == kind]
                for i, ordered in zip(same, sorted(rows[i] for i in same), strict=True):
                    rows[i] = ordered
        return [(i, *digit) for i in range(3) for digit in rows[i]]

    def _rest(self, b: int, digits: _Digits) -> _Digits:
        """Lists the digits by which all other chips of a box are counted."""
        rest = []
        for i, n in enumerate(self.boxes[b].sizes):
            at = 1
            for _, stride, size in [*sorted(d for d in digits if d[0] == i), (i, n, 1)]:
                if stride > at:
                    rest.append((i, at, stride // at))
                at = stride * size
        return rest


def _devices(slice: Slice, axes: Iterable[Integers]) -> Integers:
    """int [sizes of the axes]: chips, from the vectors [n, 3] of each axis."""
    total: Integers = np.zeros(3, int)
    for vectors in axes:
        total = total[..., None, :] + vectors
    return slice.index(slice.reduce(total))


def _factorisations(
    sizes: Sequence[int], wanted: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields int [dimensions][axes] with the products `sizes` of rows and `wanted` of columns."""

    def columns(size: int, left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            if size == 1:
                yield ()
            return
        for f in range(1, size + 1):
            if math.gcd(size, left[0]) % f == 0:
                yield from ((f, *rest) for rest in columns(size // f, left[1:]))

    def matrices(
        axes: tuple[int, ...], left: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], ...]]:
        if not axes:
            yield ()
            return
        for column in columns(axes[0], left):
            remaining = tuple(n // f for n, f in zip(left, column, strict=True))
            yield from ((column, *rest) for rest in matrices(axes[1:], remaining))

    for matrix in matrices(tuple(wanted), tuple(sizes)):
        yield tuple(zip(*matrix, strict=True))


def _check_mesh(slice: Slice, mesh: Mapping[str, int], traffic: Sequence[Traffic]) -> None:
    if not mesh:
        raise ValueError("mesh {}: name its axes, such as {'data': 4}")
    for axis, size in mesh.items():
        whole(f"mesh axis {axis}", size, least=1, most=slice.num_chips)
    product = math.prod(mesh.values())
    if product != slice.num_chips:
        raise ValueError(
            f"mesh {','.join(f'{a}={n}' for a, n in mesh.items())}: makes {product} devices, "
            f"slice {slice} has {slice.num_chips} chips; let the product be {slice.num_chips}"
        )
    for one in traffic:
        wrong = [a for a in one.axes if a not in mesh]
        if wrong or len(set(one.axes)) < len(one.axes) or not one.axes:
            raise ValueError(
                f"traffic {one.kind} over {', '.join(one.axes) or 'no axis'}: "
                f"name axes of the mesh, each once: {', '.join(mesh)}"
            )
