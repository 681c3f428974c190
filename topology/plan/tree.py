"""The tree of a scheduled module, in order: operations, loops with their rounds, transfers.

A fusion is one operation; loops and calls are walked into. What begins a transfer and what waits
for it are told apart from what does it at once. What is not understood is kept and counted.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from topology.plan.hlo import Computation, Instruction, Module

COLLECTIVES = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "permute",
    "collective-broadcast": "all_gather",
}
"""Opcodes of collectives, and the kind of `topology.collectives` that prices each."""

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id",
    "after-all", "opt-barrier", "add-dependency", "domain", "rng-get-and-update-state",
    "get-dimension-size", "optimization-barrier",
}  # fmt: skip
"""Opcodes that run nothing."""

DMA = {"copy", "slice", "dynamic-slice", "dynamic-update-slice"}
_NO_WORK = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "AllocateScratch",
    "SliceBitcast", "annotate_device_placement", "InternalAllocate", "TransferToHost",
}  # fmt: skip
_SMALL = 4096  # bytes of a result that a scalar unit makes in no time
_COMPUTED = {"fusion", "convolution", "dot", "custom-call", "copy", "reduce", "broadcast", "iota",
             "transpose", "convert", "sort", "gather", "scatter", "select", "slice", "pad",
             "dynamic-slice", "dynamic-update-slice", "concatenate", "reduce-window", "reverse",
             "select-and-scatter", "rng", "rng-bit-generator", "cholesky", "triangular-solve",
             "fft", "map", "clamp", "compare", "reshape", "copy-p", "topk", "batch-norm-training",
             "negate", "abs", "sign", "not", "exponential", "exponential-minus-one", "log",
             "log-plus-one", "tanh", "logistic", "sqrt", "rsqrt", "cbrt", "sine", "cosine", "tan",
             "erf", "floor", "ceil", "round-nearest-even", "round-nearest-afz", "is-finite",
             "popcnt", "count-leading-zeros", "bitcast-convert", "real", "imag", "add", "subtract",
             "multiply", "divide", "remainder", "maximum", "minimum", "and", "or", "xor", "power",
             "atan2", "complex", "shift-left", "shift-right-logical", "shift-right-arithmetic",
             "stochastic-convert", "reduce-precision", "dynamic-reshape"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Op:
    """An operation.

    Attributes:
      role: "compute"; "collective", at once; "start" of a transfer and "done", which waits for it;
        "free", no work; "unknown".
      collective: of a collective or its start: the instruction that says kind and groups.
      kind: of `topology.collectives`; "dma" where a start or done is a copy on the chip, "dcn"
        where it goes to another slice.
      of: the name of the start that a done waits for.
    """

    instruction: Instruction
    within: Computation
    role: str
    collective: Instruction | None = None
    kind: str | None = None
    of: str | None = None


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop that goes round a number of times; None where that is not known."""

    instruction: Instruction
    rounds: int | None
    body: tuple["Op | Loop", ...]


@dataclass(frozen=True)
class Tree:
    """A module as it runs.

    Attributes:
      nodes: in order.
      not_understood: what was met and is not known, and how often.
    """

    module: Module
    nodes: tuple[Op | Loop, ...]
    not_understood: Counter[str] = field(default_factory=Counter)

    def ops(self) -> Iterator[tuple[Op, int]]:
        """Every operation and how often it runs."""
        yield from _ops(self.nodes, 1)


def _ops(nodes: tuple[Op | Loop, ...], times: int) -> Iterator[tuple[Op, int]]:
    for node in nodes:
        if isinstance(node, Loop):
            yield from _ops(node.body, times * (node.rounds or 1))
        else:
            yield node, times


def tree_of(module: Module) -> Tree:
    """Walks a module from its entry."""
    walk = _Walk(module)
    nodes = walk.computation(module.entry)
    return Tree(module, nodes, walk.not_understood)


Side = tuple[str, int | None]
"""One side of a loop's test: ("constant", value) or ("tuple", index)."""


class _Walk:
    def __init__(self, module: Module):
        self.module = module
        self.not_understood: Counter[str] = Counter()
        self.called_from: dict[str, tuple[Computation, Instruction]] = {}

    def computation(self, computation: Computation) -> tuple[Op | Loop, ...]:
        nodes: list[Op | Loop] = []
        starts: dict[str, str] = {}  # the result of a start, however passed on -> its name
        for i in computation.instructions:
            if i.opcode == "while":
                nodes.append(self.loop(computation, i))
            elif i.opcode == "call" and (name := i.called("to_apply")) in self.module.computations:
                self.called_from[name] = computation, i
                nodes += self.computation(self.module.computations[name])
            elif i.opcode == "conditional":
                nodes += self.conditional(computation, i)
            else:
                op = self.op(computation, i, starts)
                if op.role == "unknown":
                    self.not_understood[f"opcode {i.opcode}"] += 1
                nodes.append(op)
        return tuple(nodes)

    def conditional(self, computation: Computation, i: Instruction) -> tuple[Op | Loop, ...]:
        """The longest of its branches: which one runs is not known."""
        branches = [c for name in i.all_called if (c := self.module.computations.get(name))]
        self.not_understood["conditional, its longest branch taken"] += 1
        walked = [self.computation(branch) for branch in branches]
        cycles = lambda nodes: sum((op.instruction.cycles or 0) * n for op, n in _ops(nodes, 1))
        return max(walked, key=cycles, default=())

    def loop(self, computation: Computation, i: Instruction) -> Loop:
        body = self.module.computations[i.called("body") or ""]
        self.called_from[body.name] = computation, i
        rounds = self.rounds(computation, i, body)
        if rounds is None:
            self.not_understood["while without a known number of rounds, taken as one"] += 1
        return Loop(i, rounds, self.computation(body))

    def op(self, computation: Computation, i: Instruction, starts: dict[str, str]) -> Op:
        op = functools.partial(Op, i, computation)
        code = i.opcode
        if code in FREE:
            if code in ("get-tuple-element", "bitcast", "tuple"):
                for operand in i.operands:
                    if operand in starts:
                        starts[i.name] = starts[operand]
            return op("free")
        fused = self.fused(i)
        if code.endswith("-start") or code in ("send", "recv", "copy-start"):
            starts[i.name] = i.name
            return self.start(op, i, fused)
        if code.endswith("-update"):  # of a generic asynchronous operation
            starts[i.name] = starts.get(i.operands[0], i.operands[0]) if i.operands else i.name
            return op("free")
        if code.endswith("-done"):
            return op("done", of=next((starts[x] for x in i.operands if x in starts), None))
        if code == "fusion" and fused is not None:
            targets = {x.setting_target for x in _Deep(self.module, fused)}
            held = self.collective_in(fused)
            if "AsyncCollectiveStart" in targets:
                starts[i.name] = i.name
                if held is None:
                    return op("start", kind=None)
                return op("start", collective=held, kind=COLLECTIVES[held.opcode])
            if "AsyncCollectiveDone" in targets:
                first = next((starts[x] for x in i.operands if x in starts), None)
                return op("done", of=first or _only(starts))
            if held is not None:
                scatters = held.opcode == "all-reduce" and i.bytes < held.bytes
                kind = "reduce_scatter" if scatters else COLLECTIVES[held.opcode]
                begun = next((starts[x] for x in i.operands if x in starts), None)
                if begun is not None and i.cycles:
                    starts[i.name] = begun
                    return op("compute")  # carries on a transfer that is counted start to done
                return op("collective", collective=held, kind=kind)
        if code in COLLECTIVES:
            return op("collective", collective=i, kind=COLLECTIVES[code])
        if code == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.rest)
            if target and target[1] in _NO_WORK:
                return op("free")
        if i.cycles is None and i.bytes <= _SMALL:
            return op("free")
        return op("compute" if code in _COMPUTED or i.cycles is not None else "unknown")

    def start(self, op: Callable[..., Op], i: Instruction, fused: Computation | None) -> Op:
        code = i.opcode.removesuffix("-start")
        if code in COLLECTIVES:
            return op("start", collective=i, kind=COLLECTIVES[code])
        if code in DMA:
            return op("start", kind="dma")
        if code in ("send", "recv"):
            return op("start", kind="dcn")
        if code == "async" and fused is not None:
            if (held := self.collective_in(fused)) is not None:
                return op("start", collective=held, kind=COLLECTIVES[held.opcode])
            return op("start", kind="dma")
        return op("unknown")

    def fused(self, i: Instruction) -> Computation | None:
        return self.module.computations.get(i.called("calls") or "")

    def collective_in(self, computation: Computation) -> Instruction | None:
        """The collective within a fusion or one nested in it."""
        return next(
            (i for i in _Deep(self.module, computation).plain if i.opcode in COLLECTIVES), None
        )

    # Rounds of a loop.

    def rounds(self, parent: Computation, loop: Instruction, body: Computation) -> int | None:
        if known := re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        condition = self.module.computations.get(loop.called("condition") or "")
        if condition is None:
            return None
        test = self.compare(condition)
        if test is None:
            return None
        index, direction, limit = test
        bound = self.constant_of_tuple(parent, loop, limit) if limit[0] == "tuple" else limit[1]
        begin = self.constant_of_tuple(parent, loop, ("tuple", index))
        step = self.step(body, index)
        if bound is None or begin is None or not step:
            return None
        return _count(begin, bound, step, direction)

    def compare(self, condition: Computation) -> tuple[int, str, Side] | None:
        """(index of the counter, direction, ("constant", value) or ("tuple", index)) of a test."""
        root, names = condition.root, None
        scope = condition
        if root.opcode == "fusion" and (inner := self.fused(root)) is not None:
            names = {p.name: root.operands[n] for n, p in inner.parameters.items()}
            root, scope = inner.root, inner
        if root.opcode != "compare" or not (d := re.search(r"direction=(\w+)", root.rest)):
            return None

        def side(name: str) -> Side | None:
            place, at = scope, name
            for _ in range(8):
                i = place.by_name.get(at)
                if i is None:
                    return None
                if names and place is scope and i.opcode == "parameter":
                    place, at = condition, names[i.name]
                elif i.opcode in ("copy", "bitcast", "convert"):
                    at = i.operands[0]
                elif i.opcode == "constant":
                    return ("constant", _integer(i))
                elif i.opcode == "get-tuple-element":
                    return ("tuple", _index(i))
                else:
                    return None
            return None

        left, right = (side(name) for name in root.operands)
        if left is None or right is None:
            return None
        direction = d[1]
        if left[0] == "constant":
            left, right = right, left
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        kind, index = left
        return (index, direction, right) if kind == "tuple" and index is not None else None

    def step(self, body: Computation, index: int) -> int | None:
        """Returns what a round adds to the counter."""
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return None
        total, name = 0, body.root.operands[index]
        scope, outer = body, None
        for _ in range(16):
            i = scope.by_name.get(name)
            if i is None:
                return None
            if i.opcode in ("copy", "bitcast", "convert"):
                name = i.operands[0]
            elif i.opcode == "get-tuple-element" and _index(i) == index:
                return total or None
            elif i.opcode == "fusion" and (inner := self.fused(i)) is not None:
                outer = {p.name: i.operands[n] for n, p in inner.parameters.items()}
                scope, name = inner, inner.root.name
            elif i.opcode == "parameter" and outer is not None:
                scope, name, outer = body, outer[i.name], None
            elif i.opcode in ("add", "subtract"):
                values = [self.constant(scope, x) for x in i.operands]
                if values[1] is not None:
                    total += values[1] if i.opcode == "add" else -values[1]
                    name = i.operands[0]
                elif values[0] is not None and i.opcode == "add":
                    total += values[0]
                    name = i.operands[1]
                else:
                    return None
            else:
                return None
        return None

    def constant(self, scope: Computation, name: str) -> int | None:
        i = scope.by_name.get(name)
        while i is not None and i.opcode in ("copy", "bitcast", "convert"):
            i = scope.by_name.get(i.operands[0])
        return _integer(i) if i is not None and i.opcode == "constant" else None

    def constant_of_tuple(self, parent: Computation, loop: Instruction, what: Side) -> int | None:
        """The constant that an element of a loop's tuple begins with."""
        index, scope, name = what[1], parent, loop.operands[0]
        for _ in range(32):
            i = scope.by_name.get(name)
            if i is None:
                return None
            if i.opcode == "tuple":
                if index is None:
                    return None
                name, index = i.operands[index], None
            elif i.opcode in ("copy", "bitcast", "convert", "opt-barrier"):
                name = i.operands[0]
            elif i.opcode == "get-tuple-element":
                index, name = _index(i), i.operands[0]
            elif i.opcode == "constant":
                return _integer(i)
            elif i.opcode == "while":
                body = self.module.computations[i.called("body") or ""]
                if not _unchanged(body, index):
                    return None
                name = i.operands[0]
            elif i.opcode == "parameter" and scope.name in self.called_from:
                outer, call = self.called_from[scope.name]
                if call.opcode == "while" and not _unchanged(scope, index):
                    return None
                name = call.operands[int(i.literal) if call.opcode == "call" else 0]
                scope = outer
            else:
                return None
        return None


class _Deep:
    """The instructions of a computation and of all that it calls."""

    def __init__(self, module: Module, computation: Computation):
        self.plain: list[Instruction] = []
        todo, seen = [computation], {computation.name}
        while todo:
            for i in todo.pop().instructions:
                self.plain.append(i)
                for name in i.all_called:
                    if name not in seen and (inner := module.computations.get(name)) is not None:
                        seen.add(name)
                        todo.append(inner)

    def __iter__(self) -> Iterator["_Target"]:
        return (_Target(i) for i in self.plain if i.opcode == "custom-call")


@dataclass(frozen=True)
class _Target:
    instruction: Instruction

    @property
    def setting_target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.instruction.rest)
        return found[1] if found else ""


def _only(starts: dict[str, str]) -> str | None:
    names = set(starts.values())
    return next(iter(names)) if len(names) == 1 else None


def _unchanged(body: Computation, index: int | None) -> bool:
    """Tells whether a loop hands an element of its tuple on as it was."""
    if index is None or body.root.opcode != "tuple":
        return False
    i = body.by_name.get(body.root.operands[index])
    while i is not None and i.opcode in ("copy", "bitcast"):
        i = body.by_name.get(i.operands[0])
    return i is not None and i.opcode == "get-tuple-element" and _index(i) == index


def _index(i: Instruction) -> int:
    found = re.search(r"index=(\d+)", i.rest)
    return int(found[1]) if found else -1


def _integer(i: Instruction) -> int | None:
    return int(i.literal) if re.fullmatch(r"-?\d+", i.literal.strip()) else None


def _count(begin: int, bound: int, step: int, direction: str) -> int | None:
    """Rounds of a loop whose counter begins and steps so, while the test holds."""
    ahead = {"LT": step > 0, "LE": step > 0, "NE": True, "GT": step < 0, "GE": step < 0}
    if not ahead.get(direction, False):
        return None
    bound += {"LE": 1, "GE": -1}.get(direction, 0)
    return max(0, math.ceil((bound - begin) / step))
