"""Seconds of each operation of a program, by a named rule, on a slice as it is wired.

Rules, in the order in which they are tried:
  cycles    the compiler's estimate over the chip's clock; it has HBM's time in it
  copy      the lesser of that and the bytes moved over HBM's bandwidth: estimates of copies that
            change a layout are doubtful
  kernel    a kernel without an estimate: attention by its shapes, the causal half; others by the
            FLOPs that they say
  matmul    a matmul without an estimate, by its FLOPs
  bytes     whatever has no estimate, by the bytes that it reads and writes
  groups    a collective: the schedules of `topology.collectives` for its groups on the slice
  ring      a collective whose groups are no translations of each other, by the formula of a ring
  paths     a permute, by the most loaded link of its shortest paths
  dcn       bytes to another slice, over a chip's part of its host's network
  dma       a copy between memories of the chip
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from topology.arrays import Integers
from topology.collectives import Network, collective_cost
from topology.collectives.groups import Groups, path_links, vectors_between
from topology.plan.hlo import Computation, Instruction, Module
from topology.plan.machine import Machine
from topology.plan.replica_groups import UnreadGroups, groups_of, pairs_of
from topology.plan.tree import Op
from topology.torus.slices import Slice

ALL_LINKS = tuple(range(6))


@dataclass(frozen=True)
class Price:
    """Seconds of an operation.

    Attributes:
      uses: directions of links (0 .. 5, +x, -x, +y, ...) that a transfer keeps busy, "hbm" or
        "dcn"; nothing where it is computed.
      strategy: how the compiler says that a collective goes.
      members: of a group.
      bytes: of the whole array of a group, or moved.
    """

    seconds: float
    rule: str
    uses: tuple[int | str, ...] = ()
    strategy: str = ""
    members: int = 1
    bytes: float = 0.0


class Pricing:
    """Prices of a program's operations on a slice.

    Args:
      slice: that one slice of the program lies on, as wired.
      chips: int [partitions], the index in the slice of each partition's chip; by default their
        order.
      free: kinds of collectives that cost nothing, for "what if".

    Attributes:
      not_understood: what had no rule of its own, and how often.
    """

    def __init__(
        self,
        module: Module,
        slice: Slice,
        machine: Machine,
        *,
        chips: Integers | None = None,
        slice_of: Integers | None = None,
        free: tuple[str, ...] = (),
    ):
        self.module, self.slice, self.machine = module, slice, machine
        N = slice.num_chips
        count = module.num_partitions if module.num_partitions > 1 else N
        self.chips = np.arange(count) % N if chips is None else np.asarray(chips)
        self.slice_of = np.arange(count) // N if slice_of is None else np.asarray(slice_of)
        if len(self.chips) != count or count % N:
            raise ValueError(
                f"slice {slice}: {N} chips, and the program is for {count}; give the slice that it "
                "was compiled for"
            )
        self.network = Network(bandwidth=machine.link, hop_latency=machine.hop)
        self.free = free
        self.not_understood: Counter[str] = Counter()
        self._known: dict[tuple[str | float | None, ...], Price] = {}
        self._fused_copies: dict[str, bool] = {}
        self._matmuls: dict[str, bool] = {}

    def price(self, op: Op, done: Instruction | None = None) -> Price:
        """The price of an operation; of a start, given what waits for it, of its transfer."""
        i = op.instruction
        if op.role in ("free", "done"):
            return Price(0.0, "free")
        if op.role == "unknown":
            self.not_understood[f"{i.opcode}, priced by its bytes"] += 1
            return self._by_bytes(op)
        if op.kind == "dma":
            moved = (done or i).bytes
            return Price(moved / self.machine.hbm, "dma", ("hbm",), bytes=moved)
        if op.kind == "dcn":
            moved = max((a.bytes for a in i.shape), default=0.0)
            moved = moved if i.opcode.startswith("send") else 0.0  # a transfer has two ends
            return Price(moved / self.machine.dcn, "dcn", ("dcn",), bytes=moved)
        if op.role == "start" and op.collective is None:
            self.not_understood[f"{i.opcode} of no known collective"] += 1
            return Price(0.0, "free")
        if op.collective is not None:
            return self.collective(op, done)
        return self.compute(op)

    # Compute.

    def compute(self, op: Op) -> Price:
        i, machine = op.instruction, self.machine
        if i.cycles is not None:
            seconds = i.cycles / machine.clock
            if i.opcode == "copy" or self._only_copies(i):
                return Price(min(seconds, self._moved(op) / machine.hbm), "copy")
            return Price(seconds, "cycles")
        if i.opcode == "custom-call":
            return self._kernel(op)
        if (flops := self._matmul_flops(op)) > 0:
            return Price(max(flops / machine.peak, self._moved(op) / machine.hbm), "matmul")
        return self._by_bytes(op)

    def _by_bytes(self, op: Op) -> Price:
        return Price(self._moved(op) / self.machine.hbm, "bytes")

    def _moved(self, op: Op) -> float:
        """Bytes that an operation reads of HBM and writes there."""
        i = op.instruction
        fused = self.module.computations.get(i.called("calls") or "")
        if fused is not None:
            return fused_bytes(self.module, fused)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm(i)
        operands = [op.within.by_name[x] for x in i.operands if x in op.within.by_name]
        if i.opcode == "dynamic-update-slice" and len(operands) > 1:
            return 2 * _hbm(operands[1])
        passes = (
            2 * math.log2(max(2, max(i.shape[0].sizes, default=2))) if i.opcode == "sort" else 1
        )
        return passes * (_hbm(i) + sum(map(_hbm, operands)))

    def _only_copies(self, i: Instruction) -> bool:
        name = i.called("calls") if i.opcode == "fusion" else None
        if name is None or (fused := self.module.computations.get(name)) is None:
            return False
        if name not in self._fused_copies:
            codes = {x.opcode for x in fused.instructions}
            moves = {"copy", "transpose"}
            self._fused_copies[name] = bool(codes & moves) and codes <= moves | {
                "parameter", "bitcast", "reshape", "tuple"
            }  # fmt: skip
        return self._fused_copies[name]

    def holds_matmul(self, i: Instruction) -> bool:
        """Tells whether a fusion holds a matmul."""
        name = i.called("calls") or ""
        if name not in self._matmuls:
            todo, found = [name], False
            while todo and not found:
                fused = self.module.computations.get(todo.pop())
                for x in fused.instructions if fused is not None else ():
                    found = found or x.opcode in ("dot", "convolution")
                    todo += [x.called("calls") or ""] if x.opcode == "fusion" else []
            self._matmuls[name] = found
        return self._matmuls[name]

    def _kernel(self, op: Op) -> Price:
        i, machine = op.instruction, self.machine
        if flops := attention_flops(i, op.within):
            return Price(flops / (machine.flash * machine.peak), "kernel")
        said = re.search(r'"?flops"?[:=]\s*"?(\d+)', i.rest)
        if said:
            return Price(int(said[1]) / (machine.flash * machine.peak), "kernel")
        target = re.search(r'custom_call_target="([^"]*)"', i.rest)
        self.not_understood[f"custom call {target[1] if target else '?'}, priced by its bytes"] += 1
        return self._by_bytes(op)

    def _matmul_flops(self, op: Op) -> float:
        i = op.instruction
        fused = self.module.computations.get(i.called("calls") or "")
        found = fused.instructions if fused is not None else (i,)
        scope = fused if fused is not None else op.within
        return sum(matmul_flops(x, scope) for x in found if x.opcode in ("dot", "convolution"))

    # Networks.

    def collective(self, op: Op, done: Instruction | None = None) -> Price:
        i, kind = op.collective, op.kind
        assert i is not None
        assert kind is not None
        size = self._array(op, done)
        strategy, colors = _strategy(op.instruction if _says(op.instruction) else i)
        groups = re.search(r"(replica_groups|source_target_pairs)=.*", i.rest)
        key = (kind, size, strategy, colors, groups[0].split(", use_global")[0] if groups else "")
        if key not in self._known:
            self._known[key] = self._collective(i, kind, size, strategy, colors)
        price = self._known[key]
        if kind in self.free:
            return Price(0.0, "free", (), price.strategy, price.members, price.bytes)
        return price

    def _array(self, op: Op, done: Instruction | None) -> float:
        """Bytes of the whole array of a group, or of what a chip sends."""
        i = op.collective
        assert i is not None
        if op.kind == "reduce_scatter" and i.opcode == "all-reduce":
            return i.bytes
        if op.kind == "reduce_scatter":
            operands = [op.within.by_name[x] for x in i.operands if x in op.within.by_name]
            return sum(x.bytes for x in operands) or i.bytes
        if done is not None and op.role == "start" and op.instruction is i:
            return done.bytes
        return i.bytes

    def _collective(
        self, i: Instruction, kind: str, size: float, strategy: str, colors: int | None
    ) -> Price:
        try:
            if kind == "permute":
                return self._permute(pairs_of(i.rest), size, strategy)
            rows = groups_of(i.rest, len(self.chips))
        except UnreadGroups as error:
            self.not_understood[f"groups of {i.opcode}: {error}; taken over all chips"] += 1
            rows = np.arange(len(self.chips))[None]
        n = rows.shape[1]
        if n == 1:
            return Price(0.0, "free", (), strategy, 1, size)
        across = len(np.unique(self.slice_of[rows[0]]))
        if across > 1:
            return self._across(kind, rows, size, strategy, across)
        members = self.chips[rows[self.slice_of[rows[:, 0]] == 0]]
        try:
            groups = Groups(self.slice, members)
            cost = collective_cost(kind, groups)
        except ValueError:
            load = {"all_reduce": 2.0, "all_to_all": n / 4}.get(kind, 1.0) * (n - 1) / n / 2
            return Price(load * size / self.machine.link, "ring", ALL_LINKS, strategy, n, size)
        moves = groups.moves
        uses = tuple(
            2 * d + (sign < 0)
            for d in range(3)
            for sign in (1, -1)
            if (np.sign(moves[:, d]) == sign).any()
        )
        slower = 1.0
        if colors is not None and kind != "all_to_all":
            used = colors if strategy.startswith("UniDirection") else 2 * colors
            slower = max(1.0, len(uses) / min(used, len(uses)))
        seconds = cost.hops * self.machine.hop + slower * cost.load * size / self.machine.link
        return Price(seconds, "groups", uses, strategy, n, size)

    def _permute(self, pairs: list[tuple[int, int]], size: float, strategy: str) -> Price:
        ends = np.array([(a, b) for a, b in pairs if a != b], int).reshape(-1, 2)
        if not len(ends):
            return Price(0.0, "free", (), strategy, 1, size)
        if (self.slice_of[ends[:, 0]] != self.slice_of[ends[:, 1]]).any():
            return Price(size / self.machine.dcn, "dcn", ("dcn",), strategy, len(ends), size)
        here = self.slice_of[ends[:, 0]] == 0
        sources, targets = self.chips[ends[here, 0]], self.chips[ends[here, 1]]
        vectors = vectors_between(self.slice, sources, targets)
        links, directions = path_links(self.slice, sources, vectors)
        load = int(np.bincount(links[links >= 0]).max())
        hops = int(np.abs(vectors).sum(axis=1).max())
        seconds = hops * self.machine.hop + load * size / self.machine.link
        uses = tuple(int(d) for d in np.unique(directions[directions >= 0]))
        return Price(seconds, "paths", uses, strategy, 2, size)

    def _across(self, kind: str, rows: Integers, size: float, strategy: str, slices: int) -> Price:
        """A collective between slices: each chip's part goes over its host's network."""
        within = rows.shape[1] // slices
        times = 2 if kind == "all_reduce" else 1
        moved = times * size / max(1, within) * (slices - 1) / slices
        return Price(moved / self.machine.dcn, "dcn", ("dcn",), strategy, rows.shape[1], size)


def fused_bytes(module: Module, fused: Computation) -> float:
    """Bytes that a fusion reads of HBM and writes there.

    A parameter that is only sliced counts as its slices, however deep in nested fusions; an update
    of a slice counts as what it writes.
    """

    def read(computation: Computation, parameter: Instruction) -> float:
        total = 0.0
        for user in computation.instructions:
            for place, name in enumerate(user.operands):
                if name != parameter.name:
                    continue
                inner = module.computations.get(user.called("calls") or "")
                if user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.bytes if place == 0 else 0.0
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    continue
                elif user.opcode in ("bitcast", "reshape") and user.bytes == parameter.bytes:
                    total += read(computation, user)
                elif inner is not None and place in inner.parameters:
                    total += read(inner, inner.parameters[place])
                else:
                    return parameter.bytes
        return min(total, parameter.bytes)

    def written(computation: Computation, i: Instruction) -> float:
        if i.opcode == "tuple":
            parts = (computation.by_name.get(x) for x in i.operands)
            return sum(written(computation, x) for x in parts if x is not None)
        if i.opcode in ("bitcast", "reshape") and i.operands[0] in computation.by_name:
            return written(computation, computation.by_name[i.operands[0]])
        inner = module.computations.get(i.called("calls") or "")
        if inner is not None:
            return written(inner, inner.root)
        if i.opcode == "dynamic-update-slice":
            update = computation.by_name.get(i.operands[1])
            return i.bytes if update is None else update.bytes
        return 0.0 if i.opcode == "parameter" else i.bytes

    reads = sum(read(fused, p) for p in fused.parameters.values() if _in_hbm(p))
    return reads + (written(fused, fused.root) if _in_hbm(fused.root) else 0.0)


def matmul_flops(i: Instruction, scope: Computation) -> float:
    """FLOPs of a dot, or of a convolution that is one; 0 where its shapes are not known."""
    operands = [scope.by_name.get(x) for x in i.operands[:2]]
    if len(operands) < 2 or any(x is None or not x.shape for x in operands) or not i.shape:
        return 0.0
    left, right = (x.shape[0].sizes for x in operands if x is not None)
    out = math.prod(i.shape[0].sizes)
    if i.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        over = math.prod(left[int(d)] for d in summed[1].split(",") if d) if summed else 1
        return 2.0 * out * over
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    if not labels or len(labels[2]) != len(right):
        return 0.0
    over = math.prod(size for size, axis in zip(right, labels[2], strict=True) if axis != "o")
    return 2.0 * out * over


_ATTENTION = re.compile(r"splash|flash|attention|mha|mqa", re.IGNORECASE)


def attention_flops(i: Instruction, scope: Computation) -> float:
    """FLOPs of an attention kernel, the causal half of its square; 0 where it is none.

    Matmuls of [rows, columns, head_dim]: 2 forward, 3 for the gradient of the queries, 4 for those
    of keys and values.
    """
    named = i.op_name + " " + i.name + " " + (i.setting("kernel_name") or "")
    if not _ATTENTION.search(named):
        return 0.0
    operands = [scope.by_name.get(x) for x in i.operands]
    arrays = [a for x in operands if x is not None for a in x.shape if len(a.sizes) >= 3]
    floats = [a for a in arrays if a.dtype in ("bf16", "f32", "f16")]
    if len(floats) < 3:
        return 0.0
    query, key = floats[0].sizes, floats[1].sizes
    products = 2
    if "dkv" in named:
        products = 4
    elif "dq" in named:
        products = 3
    return products * 2.0 * math.prod(query) * key[-2] / 2


def _in_hbm(i: Instruction) -> bool:
    return any(a.space == 0 for a in i.shape)


def _hbm(i: Instruction) -> float:
    return sum(a.bytes for a in i.shape if a.space == 0)


def _says(i: Instruction) -> bool:
    return "collective_algorithm_config" in i.rest


def _strategy(i: Instruction) -> tuple[str, int | None]:
    """The strategy of a collective, or its emitter, and its colors where the compiler says them."""
    at = i.rest.find("collective_algorithm_config")
    text = i.rest[at : at + 800] if at >= 0 else ""
    strategy = re.search(r'"strategy":"([^"]*)"', text) or re.search(r'"emitter":"([^"]*)"', text)
    colors = re.search(r"colors:(\d+)", text)
    return strategy[1] if strategy else "", int(colors[1]) if colors else None
