"""Execution traces in MLCommons Chakra's format (https://github.com/mlcommons/chakra), read.

A file is a rank's: messages of Protocol Buffers, each after its length as a varint, the first
`GlobalMetadata`, the others `Node`. What is read of them is declared here; other fields are
skipped.

`comm_size` is as ASTRA-sim takes it: what a rank has before the collective. The other attributes
are `comm_type`, `comm_src`, `comm_dst`, `comm_tag`, `pg_name`, `involved_dim`, `num_ops` and
`tensor_size`.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pjit_train.errors import UserError
from topology import Slice
from topology.traces.flows import partition
from topology.traces.trace import COMPUTE, RECEIVE, SEND, Node, Program, Rank, Trace

_MICROSECOND = 1e-6
_LARGEST = 2**31  # bytes of a message; Protocol Buffers allow no more
_SEEN = 1_000_000  # messages of which is remembered what was read
_COMPUTES = {1, 2, 3, 4}  # metadata, loads and stores of memory, computing
_SEND, _RECEIVE, _COLLECTIVE = 5, 6, 7
_KINDS = {
    0: "all_reduce",
    2: "all_gather",
    6: "all_to_all",
    7: "reduce_scatter",
    8: "reduce_scatter",
    9: "all_reduce",  # a barrier, of no bytes
}
_NAMES = ("all_reduce", "reduce", "all_gather", "gather", "scatter", "broadcast", "all_to_all",
          "reduce_scatter", "reduce_scatter_block", "barrier")  # fmt: skip
_VALUES = {  # of an attribute: field and Protocol Buffers' number of its type
    "double_val": (3, 1), "float_val": (5, 2), "int32_val": (7, 5), "int64_val": (9, 3),
    "uint32_val": (11, 13), "uint64_val": (13, 4), "sint32_val": (15, 17), "sint64_val": (17, 18),
    "fixed32_val": (19, 7), "fixed64_val": (21, 6), "sfixed32_val": (23, 15),
    "sfixed64_val": (25, 16), "bool_val": (27, 8), "string_val": (29, 9),
}  # fmt: skip

_PEERS = (b"\x0a\x08comm_dst", b"\x0a\x08comm_src")  # as an attribute begins
_VARINTS = {number << 3 for number in (7, 9, 11, 13)}  # tags of the integers of an attribute

# Place in the file, the message but for the rank of a send's partner, and whether it has none.
_Key = tuple[int, bytes, bool]
_Seen = dict[_Key, "_Read"]


@functools.cache
def message_classes() -> tuple[Any, Any]:
    """The classes `Node` and `GlobalMetadata` of what is read of Chakra's schema."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="torsion_chakra.proto", syntax="proto3")
    file.package = "torsion_chakra"

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, type_, repeated, of in fields:
            label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
            one = made.field.add(name=field, number=number, type=type_, label=label)
            if of:
                one.type_name = f".torsion_chakra.{of}"
        return made

    text, int64, uint64, nested = 9, 3, 4, 11
    message("BoolList", ("values", 1, 8, True, ""))
    attribute = message(
        "AttributeProto",
        ("name", 1, text, False, ""),
        ("bool_list", 28, nested, False, "BoolList"),
        *((name, number, type_, False, "") for name, (number, type_) in _VALUES.items()),
    )
    attribute.oneof_decl.add(name="value")
    for field in attribute.field[1:]:
        field.oneof_index = 0
    message(
        "Node",
        ("id", 1, uint64, False, ""),
        ("name", 2, text, False, ""),
        ("type", 3, int64, False, ""),  # an enumeration, of which unknown values are named here
        ("ctrl_deps", 4, uint64, True, ""),
        ("data_deps", 5, uint64, True, ""),
        ("duration_micros", 7, uint64, False, ""),
        ("attr", 10, nested, True, "AttributeProto"),
    )
    message("GlobalMetadata", ("version", 1, text, False, ""))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"torsion_chakra.{name}"))
        for name in ("Node", "GlobalMetadata")
    ]
    return found[0], found[1]


def read_trace(
    files: Sequence[Path],
    slice: Slice,
    *,
    groups: Path | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Trace:
    """The trace of a file for each rank, or of one file for all chips of a slice.

    Files belong to ranks by the last number in their names, as in trace.0.et. One file alone is
    that of rank 0, and every other rank does the same from where it is: its groups, and whom it
    sends to, are those of rank 0 moved along the slice.

    Args:
      slice: whose dimensions `involved_dim` is about, row-major: ranks are its chips in order.
      groups: a JSON object {name: [ranks]}, of the process groups that `pg_name` names.

    Raises:
      UserError: a file is none of the format, a rank's is missing, or a node is not understood;
        names file and node, and says what would be right.
    """
    paths = _by_rank(files)
    named = {} if groups is None else _read_groups(groups)
    programs: list[Program] = []
    known: dict[bytes, tuple[int, list[tuple[str, Any]]]] = {}
    each: list[tuple[int, list[tuple[str, Any]]]] = []
    flops, hbm = slice.pod.chip.peak_bf16, slice.pod.chip.hbm_bandwidth
    seen: _Seen = {}
    places: dict[tuple[int, ...], dict[int, int]] = {}
    for r, path in enumerate(paths):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give traces of Chakra") from error
        digest = hashlib.sha256(data).digest()
        if digest not in known:
            program, partners = _File(path, data, flops, hbm).read(seen, places)
            # Those of ranks that do the same share their nodes, so that this is soon known.
            number = next((n for n, p in enumerate(programs) if p == program), len(programs))
            if number == len(programs):
                programs.append(program)
            known[digest] = number, partners
        each.append(known[digest])
        if r and not r % 100:
            progress(f"read {r} of {len(paths)} files")
    whom = _Partners(slice, len(paths), named)
    alone = len(paths) == 1 and slice.num_chips > 1
    try:
        if alone:
            count = slice.num_chips
            ranks = [Rank(0, whom.moved(each[0][1], r)) for r in range(count)]
        else:
            ranks = [
                Rank(number, whom.of(partners, r)) for r, (number, partners) in enumerate(each)
            ]
        return Trace(programs, ranks)
    except ValueError as error:
        raise UserError(f"{paths[0].parent if len(paths) > 1 else paths[0]}: {error}") from error


def _by_rank(files: Sequence[Path]) -> list[Path]:
    paths = []
    for file in files:
        if file.is_dir():
            inside = sorted(file.glob("*.et"))
            if not inside:
                raise UserError(f"{file}: has no traces, such as NAME.0.et, NAME.1.et ...")
            paths += inside
        else:
            paths.append(file)
    if len(paths) == 1:
        return paths
    ranks: dict[int, Path] = {}
    for path in paths:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise UserError(f"{path}: no rank in its name; call files NAME.0.et, NAME.1.et ...")
        rank = int(numbers[-1])
        if rank in ranks:
            raise UserError(f"{path}: rank {rank} is {ranks[rank]} too; give one file a rank")
        ranks[rank] = path
    missing = next((r for r in range(len(ranks)) if r not in ranks), None)
    if missing is not None:
        raise UserError(
            f"{paths[0].parent}: rank {missing} is missing of {len(ranks)} files; give one for "
            f"each of the ranks 0 .. {max(ranks)}"
        )
    return [ranks[r] for r in range(len(ranks))]


def _read_groups(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'--groups {file}: {error}; want JSON such as {{"0": [0, 1]}}') from error
    right = isinstance(found, dict) and all(
        isinstance(ranks, list) and ranks and all(type(r) is int and r >= 0 for r in ranks)
        and len(set(ranks)) == len(ranks)
        for ranks in found.values()
    )  # fmt: skip
    if not right:
        raise UserError(f"--groups {file}: want a JSON object of lists of ranks, no rank twice")
    return {name: tuple(ranks) for name, ranks in found.items()}


@dataclass(frozen=True, slots=True)
class _Read:
    """Result of reading a message.

    Attributes:
      place: {id: place} of the file's nodes, which `node.after` is by.
      whom: how partners are told; None where it computes.
      differs: whether it is a send or receive whose partner stands in the message's place for it.
    """

    id: int
    place: dict[int, int]
    node: Node
    whom: tuple[str, Any] | None
    differs: bool


class _File:
    """A rank's file."""

    def __init__(self, path: Path, data: bytes, flops: float, hbm: float) -> None:
        self.path, self.data, self.flops, self.hbm = path, data, flops, hbm

    def read(
        self, seen: _Seen, places: dict[tuple[int, ...], dict[int, int]]
    ) -> tuple[Program, list[tuple[str, Any]]]:
        """The program, and of what communicates how its partners are told.

        Args:
          seen: of other files, what was read of a message at its place.
          places: of other files, {id: place} of their nodes, by the ids in order.
        """
        of, _ = message_classes()
        found: list[tuple[bytes, int | None, _Key, Any]] = []
        ids: list[int] = []
        for i, message in enumerate(self.messages()):
            rest, peer = _without_peer(message)
            key = i, rest, peer is None
            read = seen.get(key)
            if read is None:
                read = of()
                self.parse(read, message, i + 1)
            ids.append(read.id)
            found.append((message, peer, key, read))
        place = places.setdefault(tuple(ids), {number: i for i, number in enumerate(ids)})
        if len(place) < len(ids):
            again = next(i for i, number in enumerate(ids) if place[number] != i)
            raise self.error(
                of.FromString(found[again][0]), f"has the id {ids[again]} of another one"
            )
        program: list[Node] = []
        partners: list[tuple[str, Any]] = []
        for message, peer, key, read in found:
            if type(read) is not _Read or read.place is not place:
                node = of.FromString(message) if type(read) is _Read else read
                made, whom = self.made(node, place)
                is_peer = whom is not None and whom[0] == "peer"
                if is_peer and whom != ("peer", peer):
                    key = key[0], message, True  # told in a way of its own
                read = _Read(node.id, place, made, whom, is_peer and key[1] is not message)
                if len(seen) < _SEEN:
                    seen[key] = read
            program.append(read.node)
            if read.whom is not None:
                partners.append(_peer(peer) if read.differs else read.whom)
        return tuple(program), partners

    def made(self, node: Any, place: dict[int, int]) -> tuple[Node, tuple[str, Any] | None]:
        """The node of a message, and how its partners are told; None where it computes."""
        awaited = _awaited(node)
        after = tuple(map(place.get, awaited))
        if None in after:
            missing = awaited[after.index(None)]
            raise self.error(node, f"waits for node {missing}, which is not there")
        if node.type in _COMPUTES:
            return Node(node.name, COMPUTE, after, seconds=self.seconds(node)), None
        if node.type in (_SEND, _RECEIVE, _COLLECTIVE):
            return self.communication(node, after)
        raise self.error(node, f"is of type {node.type}, which Chakra does not have")

    def messages(self) -> Iterator[bytes]:
        """The messages of the nodes."""
        at, number, data = 0, 0, self.data
        while at < len(data):
            if (length := data[at]) < 128:
                at += 1
            else:
                length, at = self.varint(at)
            if length > _LARGEST or at + length > len(data):
                raise UserError(
                    f"{self.path}: message {number} would be {length} bytes long, and the file "
                    f"ends after {len(data) - at} more; is it whole, and a trace of Chakra?"
                )
            if number:
                yield data[at : at + length]
            else:
                self.parse(message_classes()[1](), data[at : at + length], 0)
            at, number = at + length, number + 1
        if not number:
            raise UserError(f"{self.path}: is empty; give a trace of Chakra")

    def parse(self, message: Any, data: bytes, number: int) -> None:
        from google.protobuf.message import DecodeError

        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise UserError(
                f"{self.path}: message {number} is no node of Chakra's format"
            ) from error

    def varint(self, at: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 35, 7):
            if at == len(self.data):
                break
            byte = self.data[at]
            value, at = value | (byte & 127) << shift, at + 1
            if byte < 128:
                return value, at
        raise UserError(f"{self.path}: a length at byte {at} is none; is it a trace of Chakra?")

    def seconds(self, node: Any) -> float:
        """Seconds of computing: as measured, or else by the chip's roofline."""
        if node.duration_micros >= 2**63:
            raise self.error(node, f"lasts {node.duration_micros - 2**64} us; let it be 0 or more")
        if node.duration_micros:
            return float(node.duration_micros * _MICROSECOND)
        operations = self.number(node, "num_ops", 0)
        moved = self.number(node, "tensor_size", 0)
        return max(operations / self.flops, moved / self.hbm) if operations else 0.0

    def communication(self, node: Any, after: tuple[int, ...]) -> tuple[Node, tuple[str, Any]]:
        if node.type != _COLLECTIVE:
            sends = node.type == _SEND
            told = {one.name: one for one in node.attr}
            size = self.value(node, told, "comm_size", 0)
            peer = self.value(node, told, "comm_dst" if sends else "comm_src", None)
            tag = self.value(node, told, "comm_tag", 0)
            kind = SEND if sends else RECEIVE
            return Node(node.name, kind, after, bytes=size, tag=int(tag)), _peer(int(peer))
        size = self.number(node, "comm_size", 0)
        number = int(self.number(node, "comm_type", None))
        if number not in _KINDS:
            name = _NAMES[number] if 0 <= number < len(_NAMES) else str(number)
            known = ", ".join(sorted(set(_KINDS.values())))
            raise self.error(node, f"is a {name}; schedules are of {known}")
        whom: tuple[str, Any] = ("all", None)
        for attribute in node.attr:
            if attribute.name == "pg_name" and attribute.string_val:
                whom = "named", attribute.string_val
            elif attribute.name == "involved_dim" and attribute.bool_list.values:
                whom = "dims", tuple(attribute.bool_list.values)
        kind = _KINDS[number]
        return Node(node.name, kind, after, bytes=0.0 if number == 9 else size), whom

    def number(self, node: Any, name: str, default: float | None) -> float:
        return self.value(node, {one.name: one for one in node.attr}, name, default)

    def value(self, node: Any, told: dict[str, Any], name: str, default: float | None) -> float:
        """The number of an attribute."""
        attribute = told.get(name)
        if attribute is None:
            if default is None:
                raise self.error(node, f"has no {name}")
            return default
        usual = attribute.int64_val or attribute.int32_val  # soon found, of millions of sends
        if usual > 0:
            return float(usual)
        which = attribute.WhichOneof("value")
        value = getattr(attribute, which) if which in _VALUES else None
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}", value):
            value = int(value)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.error(node, f"its {name} is {value!r}; let it be a number from 0 on")
        return float(value)

    def error(self, node: Any, text: str) -> UserError:
        return UserError(f"{self.path}: node {node.name!r} ({node.id}): {text}")


def _without_peer(message: bytes) -> tuple[bytes, int | None]:
    """A message without the rank of a send's or receive's partner, and that rank.

    The whole message, and None, where the rank is not told by an integer, in one place.
    """
    for name in _PEERS:
        at = message.find(name)
        if at < 0:
            continue
        at += len(name) + 1
        if at >= len(message) or message[at - 1] not in _VARINTS or message.find(name, at) >= 0:
            break
        value, end = message[at] & 127, at + 1
        while message[end - 1] >= 128 and end < len(message) and end - at < 5:
            value |= (message[end] & 127) << 7 * (end - at)
            end += 1
        return message[:at] + message[end:], value
    return message, None


def _awaited(node: Any) -> tuple[int, ...]:
    """Ids of the nodes that a node waits for, each once."""
    return tuple(dict.fromkeys([*node.data_deps, *node.ctrl_deps]))


@functools.cache
def _peer(rank: int) -> tuple[str, int]:
    """Partner of a send or receive: one object for millions of them."""
    return "peer", rank


class _Partners:
    """Ranks of groups, from how nodes tell them."""

    def __init__(self, slice: Slice, ranks: int, named: dict[str, tuple[int, ...]]):
        self.slice, self.named = slice, named
        self.count = slice.num_chips if ranks == 1 else ranks
        self.all = tuple(range(self.count))
        self.known: dict[Any, Any] = {}

    def of(self, told: list[tuple[str, Any]], rank: int) -> tuple[tuple[int, ...], ...]:
        return tuple(self.group(one, rank) for one in told)

    def group(self, told: tuple[str, Any], rank: int) -> tuple[int, ...]:
        how, value = told
        if how == "peer":
            return self.known.setdefault(told, (value,))
        if how == "all":
            return self.all
        if how == "dims":
            return self.along(value)[rank]
        if value not in self.named:
            raise ValueError(
                f"rank {rank}: process group {value!r}: give --groups a file that has it, as "
                f'{{"{value}": [0, 1, 2, 3]}}'
            )
        if rank not in self.named[value]:
            raise ValueError(f"rank {rank}: process group {value!r} does not have it")
        return self.named[value]

    def moved(self, told: list[tuple[str, Any]], rank: int) -> tuple[tuple[int, ...], ...]:
        """Partners of a rank that does what rank 0 does, from where it is."""
        return tuple(self.moved_group(one, rank) for one in told)

    def moved_group(self, told: tuple[str, Any], rank: int) -> tuple[int, ...]:
        if told[0] in ("all", "dims"):
            return self.group(told, rank)
        if (told, "moved") not in self.known:
            self.known[told, "moved"] = self.translations(told)
        return self.known[told, "moved"][rank]

    def translations(self, told: tuple[str, Any]) -> list[tuple[int, ...]]:
        how, value = told
        if how == "named":
            mine = self.group(told, 0)
            found = partition(self.slice, (mine,))
            if found is None:
                raise ValueError(
                    f"process group {value!r}: its copies do not fill {self.slice}; give a file a "
                    "rank"
                )
            whose: list[tuple[int, ...]] = [()] * self.count
            for group in found.members.tolist():
                for chip in group:
                    whose[chip] = tuple(group)
            return whose
        if not self.slice.is_torus:
            raise ValueError(f"{self.slice} is no torus, so ranks differ; give a file a rank")
        if value >= self.count:
            raise ValueError(f"rank 0: peer {value}: there are ranks 0 .. {self.count - 1}")
        coordinates = self.slice.coordinates
        to = self.slice.index(self.slice.reduce(coordinates + coordinates[value]))
        return [(int(chip),) for chip in to]

    def along(self, dims: tuple[bool, ...]) -> list[tuple[int, ...]]:
        """The group of each rank along the dimensions that are involved."""
        if ("dims", dims) not in self.known:
            sizes = self.slice.sizes
            if len(dims) == 1:
                dims = dims * len(sizes)
            if len(dims) != len(sizes) or self.count != self.slice.num_chips:
                raise ValueError(
                    f"involved_dim of {len(dims)} dimensions and {self.count} ranks: {self.slice} "
                    f"has {len(sizes)} and {self.slice.num_chips} chips; give a slice that fits"
                )
            chips = np.arange(self.count).reshape(sizes)
            axes = [d for d, involved in enumerate(dims) if involved]
            last = np.moveaxis(chips, axes, range(len(sizes) - len(axes), len(sizes)))
            rows = last.reshape(-1, math.prod(sizes[d] for d in axes))
            whose: list[tuple[int, ...]] = [()] * self.count
            for row in rows.tolist():
                group = tuple(row)
                for chip in row:
                    whose[chip] = group
            self.known["dims", dims] = whose
        return self.known["dims", dims]
