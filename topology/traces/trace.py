"""Execution trace: for each rank a graph of what it computes and sends, as other tools record it.

Ranks whose graphs are alike share a program, so that a thousand of them take no more room than one;
whom they communicate with stands beside it, rank by rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from topology.collectives.collectives import check_kind
from topology.numbers import number

COMPUTE, SEND, RECEIVE = "compute", "send", "receive"


@dataclass(frozen=True, slots=True)
class Node:
    """An operation of a rank.

    Attributes:
      name: for people; two nodes that differ in it alone are equal.
      kind: "compute", "send", "receive", or a collective of `topology.collectives`.
      after: positions in the program of the nodes that end before this one begins.
      seconds: of what is computed.
      bytes: that a rank has before a collective, or that are sent.
      tag: by which a send finds its receive.
    """

    name: str = field(compare=False)
    kind: str
    after: tuple[int, ...] = ()
    seconds: float = 0.0
    bytes: float = 0.0
    tag: int = 0

    @property
    def communicates(self) -> bool:
        return self.kind != COMPUTE


Program = tuple[Node, ...]


@dataclass(frozen=True)
class Rank:
    """Rank of a trace.

    Attributes:
      program: its index in `Trace.programs`.
      partners: for each node that communicates, in the program's order, the ranks of its group in
        their order, or (peer,) of a send or receive.
    """

    program: int
    partners: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """Trace of ranks 0, 1, ...

    Raises:
      ValueError: a program waits for itself or for what is not there, a number is negative or not
        finite, a kind is unknown, or partners are none of the ranks; names the rank and the node.
    """

    programs: Sequence[Program]
    ranks: Sequence[Rank]

    def __post_init__(self) -> None:
        if not self.ranks:
            raise ValueError("trace: has no ranks")
        first = {rank.program: r for r, rank in reversed(list(enumerate(self.ranks)))}
        for p, program in enumerate(self.programs):
            _check_program(program, first.get(p, 0))
        counts = [sum(node.communicates for node in program) for program in self.programs]
        good: set[tuple[int, ...]] = set()
        for r, rank in enumerate(self.ranks):
            if len(rank.partners) != counts[rank.program]:
                raise ValueError(f"rank {r}: {len(rank.partners)} partners of what communicates")
            for members in set(rank.partners) - good:
                if not members or not all(0 <= m < len(self.ranks) for m in members):
                    raise ValueError(
                        f"rank {r}: partners {members}: the trace has ranks 0 .. "
                        f"{len(self.ranks) - 1}; one file is wanted for each rank"
                    )
                good.add(members)


def _check_program(program: Program, rank: int) -> None:
    waiting = [0] * len(program)
    followers: list[list[int]] = [[] for _ in program]
    for i, node in enumerate(program):
        name = f"rank {rank}: node {node.name!r}"
        number(f"{name}: seconds", node.seconds)
        number(f"{name}: bytes", node.bytes)
        if node.kind not in (COMPUTE, SEND, RECEIVE):
            check_kind(node.kind)
        for before in node.after:
            if not 0 <= before < len(program):
                raise ValueError(f"{name}: waits for node {before}, which is not there")
            followers[before].append(i)
            waiting[i] += 1
    ready = [i for i, count in enumerate(waiting) if not count]
    done = 0
    while ready:
        done += 1
        for follower in followers[ready.pop()]:
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append(follower)
    if done < len(program):
        stuck = next(i for i, count in enumerate(waiting) if count)
        raise ValueError(
            f"rank {rank}: node {program[stuck].name!r}: waits for itself, in a cycle of "
            "dependencies"
        )
