"""A sharding for each table by an integer program, and a bound below every placement.

The program knows chips only by what holds of any placement: the busiest chip has at least the mean
and at least each of its shards; of more than m N shards some chip has m + 1; memory likewise. So
its optimum is a lower bound (`Choice.bound` is HiGHS's dual bound of it), and its solution says
which sharding each table has, but not on which chips; `placing` does. Where tables and chips are
few, `exact` has a variable for each site, and its solution is the best placement itself.

Letters: W ways to lay a table, of all tables; S sites.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from topology.arrays import Floats, Integers
from topology.embeddings.machine import Machine
from topology.embeddings.shardings import PARTS, Sharding, everywhere_seconds

_STEPS = 12  # of size, at each of which a part is as long or not
_LEVELS = 6  # of size, at each of which shards are counted
_SCALE = 1e6  # microseconds: what HiGHS's tolerances are for
EXACT_SITES = 1500  # variables up to which `exact` is asked


@dataclass(frozen=True)
class Choice:
    """A way for each table.

    Attributes:
      ways: int [tables], the index of each table's sharding; None where none was found.
      bound: seconds; no placement whatsoever takes less.
      reach: float [P], seconds of the busiest chip in each part, by the program.
      sites: of `exact`, the sites of each table; None of `choose`.
    """

    ways: list[int] | None
    bound: float
    reach: Floats
    sites: list[Integers] | None = None


@dataclass(frozen=True)
class Problem:
    """All tables' ways on a machine.

    Attributes:
      ways: of each table.
      memory: bytes of a chip for them.
    """

    ways: Sequence[Sequence[Sharding]]
    machine: Machine
    memory: float

    def sites(self, way: Sharding) -> Integers:
        """int [S, chips of a site]: where a shard may lie."""
        if way.on_hosts:
            return self.machine.hosts
        return np.arange(self.machine.chips)[:, None]


class _Rows:
    """Rows of a linear program, each an upper bound of a sum."""

    def __init__(self) -> None:
        self.rows, self.columns, self.values = list[int](), list[int](), list[float]()
        self.high = list[float]()
        self.low = list[float]()

    def add(self, terms: dict[int, float], high: float, low: float = -np.inf) -> None:
        scale = max((abs(v) for v in terms.values()), default=0.0)
        if not scale:
            return
        self.rows += [len(self.high)] * len(terms)
        self.columns += list(terms)
        self.values += [v / scale for v in terms.values()]
        self.high.append(high / scale)
        self.low.append(low / scale)

    def constraint(self, variables: int) -> LinearConstraint:
        shape = (len(self.high), variables)
        matrix = csr_array((self.values, (self.rows, self.columns)), shape)
        return LinearConstraint(matrix, self.low, self.high)


class _Program:
    """The part that `choose` and `exact` share: variables of ways, of parts, and of latencies.

    Columns: a binary of each way, seconds of each of `PARTS` but what all chips do alike, whether
    anything is exchanged and all-reduced; then those of the caller.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.flat = [way for of_table in problem.ways for way in of_table]
        counts = [len(of_table) for of_table in problem.ways]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        W = len(self.flat)
        self.part = {k: W + k for k in range(len(PARTS))}
        self.exchange, self.reduce = W + len(PARTS), W + len(PARTS) + 1
        self.variables = W + len(PARTS) + 2
        machine = problem.machine
        self.costs = [everywhere_seconds(way, machine) * _SCALE for way in self.flat]
        self.costs += [1.0] * len(PARTS)
        self.costs += [_exchange_latency(machine) * _SCALE, machine.reduce_latency * _SCALE]
        self.whole = [1.0] * W + [0.0] * len(PARTS) + [1.0, 1.0]
        self.upper = [1.0] * W + [np.inf] * len(PARTS) + [1.0, 1.0]
        self.rows = _Rows()
        for t, of_table in enumerate(problem.ways):
            span = range(self.starts[t], self.starts[t + 1])
            self.rows.add(dict.fromkeys(span, 1.0), 1.0, 1.0)
            for flag, uses in (
                (self.exchange, [way.exchanges for way in of_table]),
                (self.reduce, [way.reduced > 0 for way in of_table]),
            ):
                terms = {w: 1.0 for w, use in zip(span, uses, strict=True) if use}
                self.rows.add(terms | {flag: -1.0}, 0.0)
        self.every_memory = {w: way.every_memory for w, way in enumerate(self.flat)}

    def variable(self, cost: float = 0.0, *, whole: bool, upper: float = 1.0) -> int:
        self.costs.append(cost)
        self.whole.append(float(whole))
        self.upper.append(upper)
        self.variables += 1
        return self.variables - 1

    def solve(
        self, *, gap: float, seconds: float, relaxed: bool = False
    ) -> tuple[Floats | None, float]:
        """(the solution found, a bound in seconds: infinite where there can be none)."""
        solved = milp(
            self.costs,
            integrality=0 if relaxed else self.whole,
            bounds=Bounds(np.zeros(self.variables), self.upper),
            constraints=self.rows.constraint(self.variables),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if solved.status == 2:
            return None, np.inf
        bound = solved.fun if relaxed else solved.mip_dual_bound
        return solved.x, 0.0 if bound is None else max(float(bound), 0.0) / _SCALE

    def chosen(self, x: Floats) -> list[int]:
        pairs = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [int(np.argmax(x[start:end])) for start, end in pairs]


def _exchange_latency(machine: Machine) -> float:
    """Ids, vectors and gradients are an exchange each."""
    return 3 * machine.exchange_seconds


def latencies(exchanges: bool, reduces: bool, machine: Machine) -> tuple[float, float]:
    """(of the exchanges, of the all-reduce), seconds, where there are such."""
    return _exchange_latency(machine) * exchanges, machine.reduce_latency * reduces


def choose(
    problem: Problem,
    *,
    largest: Floats | None = None,
    gap: float = 2e-3,
    seconds: float = 8.0,
    relaxed: bool = False,
) -> Choice:
    """The best way for each table, as far as no chip is named.

    Args:
      largest: float [P], seconds that a shard may take in each part. Small ones are more even; with
        only such the bound means nothing.
      relaxed: a part of a table may be laid one way, and the rest another; much faster, and the
        bound a little lower.
    """
    program = _Program(problem)
    N, rows = problem.machine.chips, program.rows
    placed = [(w, way) for w, way in enumerate(program.flat) if not way.is_everywhere]
    chips_of = {w: way.shards * problem.sites(way).shape[1] for w, way in placed}
    for w, way in placed:
        if largest is not None and (way.shard > largest * (1 + 1e-9)).any():
            program.upper[w] = 0.0
    for k in range(len(PARTS)):
        mean = {w: way.shard[k] * chips_of[w] / N * _SCALE for w, way in placed}
        rows.add(mean | {program.part[k]: -1.0}, 0.0)
        _reach_shards(program, k)
    mean = {w: way.shard_memory * chips_of[w] / N for w, way in placed}
    rows.add(_sum(program.every_memory, mean), problem.memory)
    _count_large(program, placed, chips_of)
    _limit_memory(program, placed, chips_of)
    x, bound = program.solve(gap=gap, seconds=seconds, relaxed=relaxed)
    reach = np.full(len(PARTS), np.inf)
    if np.isinf(bound):
        return Choice(None, bound, reach)
    if x is not None:
        reach = x[list(program.part.values())] / _SCALE
    # Each table alone, as if evenly on all chips: a bound as well, and a choice if time ran out.
    each = np.array(program.costs[: len(program.flat)]) / _SCALE
    for w, way in placed:
        each[w] += float(way.shard.sum()) * chips_of[w] / N
    each[np.array(program.upper[: len(each)]) == 0] = np.inf
    spans = list(zip(program.starts[:-1], program.starts[1:], strict=True))
    alone = float(sum(each[start:end].min() for start, end in spans))
    ways = [int(each[start:end].argmin()) for start, end in spans]
    return Choice(ways if x is None else program.chosen(x), max(bound, alone), reach)


def _reach_shards(program: _Program, part: int) -> None:
    """A part takes as long as each shard does.

    By steps: of all shards at least so long, one is chosen or none is; so that in the relaxed
    program halves of two long shards count as one.
    """
    tables = [
        {
            w: float(program.flat[w].shard[part]) * _SCALE
            for w in range(start, end)
            if program.flat[w].shard[part] > 0 and program.upper[w]
        }
        for start, end in zip(program.starts[:-1], program.starts[1:], strict=True)
    ]
    for own in tables:
        if own:
            program.rows.add(own | {program.part[part]: -1.0}, 0.0)
    times = np.array([time for own in tables for time in own.values()])
    if not len(times):
        return
    levels = np.unique(np.quantile(times, np.linspace(0.5, 1, _STEPS)))
    reached: dict[int, float] = {}
    for below, level in itertools.pairwise([0.0, *levels]):
        taken = program.variable(whole=True)
        reached[taken] = level - below
        for own in tables:
            least = min(own.values(), default=0.0)
            long = {w: 1.0 for w, time in own.items() if time >= level * (1 - 1e-9)}
            if long and (least < level or level == levels[0]):
                program.rows.add(long | {taken: -1.0}, 0.0)
    program.rows.add(reached | {program.part[part]: -1.0}, 0.0)


def _sum(*terms: dict[int, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for some in terms:
        for column, value in some.items():
            found[column] = found.get(column, 0.0) + value
    return found


def _count_large(
    program: _Program, placed: list[tuple[int, Sharding]], chips_of: dict[int, int]
) -> None:
    """Some chip has ceil(n / N) of n shards; each takes at least the least of their times."""
    N = program.problem.machine.chips
    times = {w: float(way.shard.sum()) * _SCALE for w, way in placed}
    if not times:
        return
    for level in np.unique(np.quantile(list(times.values()), np.linspace(0.3, 1, _LEVELS))):
        large = {w: chips_of[w] / N for w in times if times[w] >= level * (1 - 1e-9)}
        count = program.variable(whole=True, upper=np.inf)
        program.rows.add(large | {count: -1.0}, 0.0)
        parts = dict.fromkeys(program.part.values(), -1.0)
        program.rows.add(parts | {count: float(level) * (1 - 1e-9)}, 0.0)


def _limit_memory(
    program: _Program, placed: list[tuple[int, Sharding]], chips_of: dict[int, int]
) -> None:
    """Limits by memory: m + 1 shards that are too large together lie on m chips; and one has to fit
    beside what every chip has."""
    problem = program.problem
    least = sum(min(way.every_memory for way in of_table) for of_table in problem.ways)
    left = problem.memory - least
    for w, way in placed:  # alone with the least that all chips hold besides
        own = min(other.every_memory for other in problem.ways[_table(program, w)])
        if way.shard_memory + way.every_memory - own > left:
            program.upper[w] = 0.0
    for m in (1, 2, 3):
        large = {
            w: float(chips_of[w])
            for w, way in placed
            if way.shard_memory > left / (m + 1) and program.upper[w]
        }
        program.rows.add(large, float(m * problem.machine.chips))


def _table(program: _Program, w: int) -> int:
    return int(np.searchsorted(program.starts, w, side="right")) - 1


def exact(problem: Problem, *, gap: float = 1e-6, seconds: float = 20.0) -> Choice | None:
    """The best placement, by a variable of each way and site; None where they would be too many."""
    placed = [way for of_table in problem.ways for way in of_table if not way.is_everywhere]
    if sum(len(problem.sites(way)) for way in placed) > EXACT_SITES:
        return None
    program = _Program(problem)
    rows = program.rows
    N = problem.machine.chips
    loads: list[list[dict[int, float]]] = [[{} for _ in range(N)] for _ in PARTS]
    memory: list[dict[int, float]] = [dict(program.every_memory) for _ in range(N)]
    at: dict[int, list[int]] = {}
    for w, way in enumerate(program.flat):
        if way.is_everywhere:
            continue
        sites = problem.sites(way)
        at[w] = [program.variable(whole=True) for _ in sites]
        rows.add(dict.fromkeys(at[w], 1.0) | {w: -float(way.shards)}, 0.0, 0.0)
        for here, chips in zip(at[w], sites, strict=True):
            rows.add({here: 1.0, w: -1.0}, 0.0)
            for chip in chips:
                memory[chip][here] = way.shard_memory
                for k in range(len(PARTS)):
                    loads[k][chip][here] = way.shard[k] * _SCALE
    for k, of_part in enumerate(loads):
        for terms in of_part:
            rows.add(terms | {program.part[k]: -1.0}, 0.0)
    for terms in memory:
        rows.add(terms, problem.memory)
    x, bound = program.solve(gap=gap, seconds=seconds)
    if x is None:
        return Choice(None, bound, np.full(len(PARTS), np.inf))
    ways = program.chosen(x)
    sites = [
        np.flatnonzero(x[at[start + way]] > 0.5) if start + way in at else np.zeros(0, int)
        for start, way in zip(program.starts[:-1], ways, strict=True)
    ]
    return Choice(ways, bound, x[list(program.part.values())] / _SCALE, sites)
