"""A clock that runs a priced program: what is computed, what is sent meanwhile, what waits.

Compute and what is done at once advance the clock. A start puts a transfer on the links of its
directions, a done waits for it. Two transfers in one direction may share a link or queue there:
without queueing gives the lower end of the interval, with it the upper. Links are free where a
round of a loop begins, so every round takes as long.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from topology.plan.pricing import Price, Pricing
from topology.plan.tree import Loop, Op, Tree
from topology.timeline import Event

TRACKS = ("compute", "network", "data-centre network", "copies")


@dataclass
class Collective:
    """All that one kind of collective, of one strategy and size of group, costs in a step.

    Attributes:
      count: how often; bytes: of them all, each of the whole array of its group.
      seconds: on the links; exposed: of these, seconds for which nothing is computed.
    """

    kind: str
    strategy: str
    members: int
    rule: str
    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0

    @property
    def hidden(self) -> float:
        return max(0.0, self.seconds - self.exposed)


@dataclass
class Replay:
    """A step, replayed.

    Attributes:
      seconds: of the step.
      compute: seconds by label of what is computed; matmuls: the part of it that matmuls are.
      collectives: by kind, strategy and group.
      waits: seconds of waiting for copies within the chip.
      recomputed: seconds of what the compiler makes again for want of memory.
      rules: seconds by rule of the price.
      cycles: seconds of computing alone; network: of all collectives, hidden or not.
    """

    seconds: float = 0.0
    compute: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    matmuls: float = 0.0
    collectives: dict[tuple[str | int | None, ...], Collective] = field(default_factory=dict)
    waits: float = 0.0
    recomputed: float = 0.0
    rules: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: list[Event] = field(default_factory=list)

    @property
    def computing(self) -> float:
        return sum(self.compute.values())

    @property
    def network(self) -> float:
        return sum(c.seconds for c in self.collectives.values())

    @property
    def exposed(self) -> float:
        return sum(c.exposed for c in self.collectives.values())


@dataclass(frozen=True)
class Interval:
    """A step's two replays: without transfers that queue (low), and with (high)."""

    low: Replay
    high: Replay

    @property
    def seconds(self) -> float:
        """The middle, which a single number is where one is wanted."""
        return (self.low.seconds + self.high.seconds) / 2


def replay(tree: Tree, pricing: Pricing) -> Interval:
    """Replays a step both ways."""
    return Interval(*(_Clock(pricing, queue).run(tree) for queue in (False, True)))


@dataclass
class _Transfer:
    op: Op
    price: Price
    begins: float
    ends: float


class _Clock:
    def __init__(self, pricing: Pricing, queueing: bool):
        self.pricing, self.queueing = pricing, queueing
        self.found = Replay()

    def run(self, tree: Tree) -> Replay:
        self.found.seconds = self.nodes(tree.nodes, 0.0, 1, True)
        return self.found

    def nodes(self, nodes: tuple[Op | Loop, ...], t: float, times: int, shown: bool) -> float:
        """Runs nodes from time t; each adds to the sums `times` times. Returns the time after."""
        busy: dict[int | str, float] = defaultdict(float)
        going: dict[str, _Transfer] = {}
        dones = {n.of: n.instruction for n in nodes if isinstance(n, Op) and n.role == "done"}
        for node in nodes:
            if isinstance(node, Loop):
                t = self.loop(node, t, times, shown)
                busy.clear()
                continue
            name = node.instruction.name
            if node.role == "done":
                if (transfer := going.pop(node.of or "", None)) is not None:
                    t = self.wait(transfer, t, times, shown)
                continue
            price = self.pricing.price(node, dones.get(name))
            if node.role == "start":
                begins = max([t, *(busy[use] for use in price.uses)]) if self.queueing else t
                ends = begins + price.seconds
                for use in price.uses:
                    busy[use] = ends
                going[name] = _Transfer(node, price, begins, ends)
                if node.kind != "dma":
                    self.count(node, price, times, 0.0)
                if shown and price.seconds > 0:
                    self.show(node, price, begins)
            elif node.role == "collective":
                begins = max([t, *(busy[use] for use in price.uses)]) if self.queueing else t
                ends = begins + price.seconds
                self.count(node, price, times, ends - t)
                if shown and price.seconds > 0:
                    self.show(node, price, begins)
                for use in price.uses:
                    busy[use] = ends
                t = ends
            elif price.seconds > 0:
                self.computed(node, price, times)
                if shown:
                    self.show(node, price, t)
                t += price.seconds
        for transfer in going.values():  # that nothing waits for
            if transfer.op.kind not in ("dma", "dcn"):
                t = max(t, transfer.ends)
        return t

    def loop(self, loop: Loop, t: float, times: int, shown: bool) -> float:
        rounds = 1 if loop.rounds is None else loop.rounds
        if rounds == 0:
            return t
        one = self.nodes(loop.body, t, times * rounds, shown) - t
        if shown and rounds > 1:
            name = f"{rounds - 1} more rounds of {loop.instruction.name}"
            self.found.events.append(Event(name, "compute", t + one, (rounds - 1) * one))
        return t + rounds * one

    def wait(self, transfer: _Transfer, t: float, times: int, shown: bool) -> float:
        waited = max(0.0, transfer.ends - t)
        if transfer.op.kind == "dma":
            self.found.waits += times * waited
        else:
            self.collective(transfer.op, transfer.price).exposed += times * waited
        if shown and waited > 0:
            self.found.events.append(Event("wait", "compute", t, waited))
        return t + waited

    def count(self, op: Op, price: Price, times: int, exposed: float) -> None:
        found = self.collective(op, price)
        found.count += times
        found.bytes += times * price.bytes
        found.seconds += times * price.seconds
        found.exposed += times * exposed
        self.found.rules[price.rule] += times * price.seconds

    def collective(self, op: Op, price: Price) -> Collective:
        key = (op.kind, price.strategy, price.members, price.rule)
        one = Collective(op.kind or "", price.strategy, price.members, price.rule)
        return self.found.collectives.setdefault(key, one)

    def computed(self, op: Op, price: Price, times: int) -> None:
        seconds = times * price.seconds
        self.found.compute[label(op)] += seconds
        self.found.rules[price.rule] += seconds
        if is_matmul(op, self.pricing):
            self.found.matmuls += seconds
        if op.instruction.is_recomputed:
            self.found.recomputed += seconds

    def show(self, op: Op, price: Price, begins: float) -> None:
        track = "compute"
        if op.role != "compute":
            track = {"dma": "copies", "dcn": "data-centre network"}.get(op.kind or "", "network")
            if track == "network" and op.role == "collective":
                name = f"{op.kind} (at once)"
                self.found.events.append(Event(name, "compute", begins, price.seconds))
        name = label(op) if op.role == "compute" else f"{op.kind} {price.strategy}".strip()
        self.found.events.append(Event(name, track, begins, price.seconds))


def label(op: Op) -> str:
    """The end of an operation's path in the program, without wrappers: what it is part of."""
    i = op.instruction
    parts = [p for p in i.op_name.split("/") if p]
    backward = "transpose(" in i.op_name
    again = "rematted_computation" in i.op_name or ("checkpoint" in i.op_name and not backward)
    skip = ("jit(", "jvp(", "transpose(", "while", "body", "cond", "closed_call", "checkpoint",
            "rematted_computation", "remat", "shard_map", "pjit", "scan", "vmap(")  # fmt: skip
    kept = [p for p in parts if not p.startswith(skip)]
    name = "/".join(kept[-2:]) or i.opcode
    place = ""
    if backward:
        place = " (made again)" if "rematted_computation" in i.op_name else " (backward)"
    elif again:
        place = ""
    return name + place


def is_matmul(op: Op, pricing: Pricing) -> bool:
    """Tells whether an operation multiplies matrices."""
    i = op.instruction
    if i.opcode in ("dot", "convolution"):
        return True
    if i.opcode == "custom-call":
        return True  # of those with a price: kernels
    return pricing.holds_matmul(i)
