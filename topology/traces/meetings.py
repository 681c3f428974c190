"""Meetings of ranks in a trace: which of their nodes are one communication.

Nodes of a group's members are one collective if as many of the group came before them in their
programs; a send and a receive are one if they name each other and a tag, and as many alike came
before.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from topology.arrays import Integers
from topology.traces.trace import RECEIVE, SEND, Node, Trace


@dataclass(eq=False)
class Meeting:
    """A communication of all ranks of some classes at once.

    Attributes:
      kind: a collective, or "send".
      groups: of ranks, in the order of their members; of a send (source, destination).
      parties: (class, position in its program) of the nodes that end with it.
      callers: of these, those that have to come before it begins: all, but no receive.
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    parties: list[tuple[int, int]] = field(default_factory=list)
    callers: int = 0


def meetings(trace: Trace, of: Integers) -> list[Meeting]:
    """The communications of a trace whose ranks have classes `of`, int [R].

    Raises:
      ValueError: members of a group do not do the same in it, or a send has no receive; names the
        ranks and nodes.
    """
    found: dict[tuple[object, ...], Meeting] = {}
    expected: dict[int, set[int]] = {}
    for c in range(int(of.max()) + 1):
        ranks = np.flatnonzero(of == c)
        program = trace.programs[trace.ranks[ranks[0]].program]
        places = [i for i, node in enumerate(program) if node.communicates]
        counts: Counter[tuple[object, ...]] = Counter()
        for i, groups in zip(places, _groups(trace, ranks, program), strict=True):
            node = program[i]
            sends = node.kind in (SEND, RECEIVE)
            place = (groups, node.tag, sends)
            # A rank that sends to itself's like does not count its receives among its sends.
            key = (*place, counts[(*place, node.kind == RECEIVE)])
            counts[(*place, node.kind == RECEIVE)] += 1
            kind = SEND if sends else node.kind
            meeting = found.setdefault(key, Meeting(kind, node.bytes, groups))
            if (kind, node.bytes) != (meeting.kind, meeting.bytes):
                other, j = meeting.parties[0]
                first = int(np.flatnonzero(of == other)[0])
                there = trace.programs[trace.ranks[first].program][j]
                raise ValueError(
                    f"rank {ranks[0]}: node {node.name!r}: {kind} of {node.bytes:g} bytes, where "
                    f"rank {first} has {there.name!r}, {meeting.kind} of {meeting.bytes:g}; let "
                    "the members of a group do the same"
                )
            meeting.parties.append((c, i))
            meeting.callers += node.kind != RECEIVE
            members = {int(of[rank]) for rank in groups[0]}
            expected[id(meeting)] = members
    for meeting in found.values():
        there = {c for c, _ in meeting.parties}
        missing = expected[id(meeting)] - there
        if missing or (meeting.kind == SEND and len(meeting.parties) != 2):
            c, i = meeting.parties[0]
            rank = int(np.flatnonzero(of == c)[0])
            name = trace.programs[trace.ranks[rank].program][i].name
            if missing:
                who = int(np.flatnonzero(of == min(missing))[0])
            else:
                who = next(m for m in meeting.groups[0] if m != rank)
            raise ValueError(
                f"rank {rank}: node {name!r}: a {meeting.kind} with {list(meeting.groups[0])[:8]} "
                f"that rank {who} does not have; is its file of the same run?"
            )
    return list(found.values())


def _groups(
    trace: Trace, ranks: Integers, program: tuple[Node, ...]
) -> list[tuple[tuple[int, ...], ...]]:
    """Lists, for each node that communicates, the groups that the ranks of a class are in."""
    known: dict[tuple[int, ...], int] = {}
    ids = np.array(
        [[known.setdefault(p, len(known)) for p in trace.ranks[r].partners] for r in ranks], int
    ).reshape(len(ranks), -1)
    partners = list(known)
    columns, which = np.unique(ids, axis=1, return_inverse=True)
    ways = [SEND if n.kind == SEND else RECEIVE if n.kind == RECEIVE else "" for n in program
            if n.communicates]  # fmt: skip
    made: dict[tuple[int, str], tuple[tuple[int, ...], ...]] = {}
    result = []
    for way, column in zip(ways, np.ravel(which).tolist(), strict=True):
        if (column, way) not in made:
            each = [partners[p] for p in columns[:, column].tolist()]
            if way == SEND:
                each = [(int(r), peer) for r, (peer,) in zip(ranks, each, strict=True)]
            elif way == RECEIVE:
                each = [(peer, int(r)) for r, (peer,) in zip(ranks, each, strict=True)]
            made[column, way] = tuple(sorted(set(each)))
        result.append(made[column, way])
    return result
