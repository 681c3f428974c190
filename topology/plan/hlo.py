"""The text of a scheduled HLO module, as XLA:TPU and XLA:GPU print it, read into instructions.

Nothing is decided here: `tree` says what runs how often, `pricing` how long it takes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8,
    "f8e5m2fnuz": 8, "f8e4m3fnuz": 8, "f8e3m4": 8, "f8e8m0fnu": 8, "f4e2m1fn": 4, "token": 0,
    "opaque": 0,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+)\s+=\s+")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|called_computations|branch_computations)=")


class UnknownDialect(ValueError):
    """Text that is no HLO of a scheduled module."""


@dataclass(frozen=True)
class Array:
    """An array of a shape.

    Attributes:
      space: memory; on TPU 0 is HBM, 1 VMEM, 3 CMEM, others flags and scalars.
    """

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * BITS.get(self.dtype, 32) / 8


@dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction of a computation.

    Attributes:
      shape: its arrays; several where the result is a tuple.
      operands: names of instructions of the same computation.
      literal: what stands between the parentheses.
      rest: attributes, as text.
    """

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    rest: str
    is_root: bool

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.shape)

    @cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run; None where it has none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found[1]) if found else None

    @cached_property
    def op_name(self) -> str:
        """The path of the function that it comes from, such as jit(step)/while/body/dot."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def is_recomputed(self) -> bool:
        """Tells whether the compiler, short of memory, makes it again."""
        return ".remat" in self.name

    def called(self, kind: str) -> str | None:
        """The computation that an attribute such as `calls` or `body` names."""
        found = re.search(rf"\b{kind}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @cached_property
    def all_called(self) -> tuple[str, ...]:
        found: list[str] = []
        for match in _CALLED.finditer(self.rest):
            rest = self.rest[match.end() :]
            part = rest[: rest.index("}")] if rest.startswith("{") else re.split(r"[,\s]", rest)[0]
            found += re.findall(r"[\w.\-]+", part.replace("%", ""))
        return tuple(found)

    def setting(self, name: str) -> str | None:
        """A string of the JSON of `backend_config`."""
        found = re.search(rf'"{name}":"([^"]*)"', self.rest)
        return found[1] if found else None


@dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order of the schedule, or of their definition."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}


@dataclass(frozen=True, eq=False)
class Module:
    """A module: its computations by name, and the one that it begins with.

    Attributes:
      num_partitions: devices that run it; 1 where the text does not say.
    """

    name: str
    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int
    header: str


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a shape such as `(bf16[8,128]{1,0:T(8,128)S(3)}, u32[])`."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        if dtype not in BITS:
            continue
        space = _SPACE.search(layout)
        dims = tuple(int(n) for n in re.findall(r"\d+", sizes))
        found.append(Array(dtype, dims, int(space[1]) if space else 0))
    return tuple(found)


def parse(text: str) -> Module:
    """Reads a module.

    Raises:
      UnknownDialect: it is no HLO text, has no entry, or is not scheduled; says so in a line.
    """
    first = text.lstrip()[:200].splitlines()[:1]
    if not first or not first[0].startswith("HloModule"):
        kind = "StableHLO or MLIR" if "module" in text[:200] else "something else"
        raise UnknownDialect(
            f"no HLO: the text begins with {(first or [''])[0][:60]!r} ({kind}) and not with "
            "HloModule; give the text of a compiled program, as `compiled.as_text()` writes it"
        )
    header = text.lstrip().split("\n", 1)[0]
    if "is_scheduled=true" not in header:
        raise UnknownDialect(
            "HLO that is not scheduled (no is_scheduled=true in its first line): give the text of "
            "the compiled program, not of the lowered one"
        )
    computations: dict[str, Computation] = {}
    entry, name, lines, is_entry = None, None, list[Instruction](), False
    for line in _lines(text):
        if name is None:
            if (match := _HEADER.match(line)) and " = " not in line.split("->")[0]:
                name, is_entry, lines = match[2], bool(match[1]), []
        elif line.rstrip() == "}":
            if lines:
                computations[name] = Computation(name, tuple(lines))
                entry = computations[name] if is_entry else entry
            name = None
        elif (one := _instruction(line)) is not None:
            lines.append(one)
    if entry is None:
        raise UnknownDialect("HLO without an ENTRY computation, or cut off before its end")
    partitions = re.search(r"num_partitions=(\d+)", header)
    module = re.match(r"HloModule\s+([^,\s]+)", header)
    return Module(
        module[1] if module else "",
        computations,
        entry,
        int(partitions[1]) if partitions else 1,
        header,
    )


def _lines(text: str) -> Iterator[str]:
    """The lines of a module; what a kernel's own attributes break over several is one again."""
    held = ""
    for line in text.splitlines():
        if not line.strip():
            continue
        begins = line.rstrip() == "}" or _INSTRUCTION.match(line) or _HEADER.match(line)
        if held and begins:
            yield held
            held = ""
        held = line if begins or not held else f"{held} {line.strip()}"
    if held:
        yield held


def _instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    at = match.end()
    end = _closing(line, at) if line[at : at + 1] == "(" else _space(line, at)
    shape, rest = line[at:end], line[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if not opcode:
        return None
    begin = opcode.end() - 1
    close = _closing(rest, begin)
    inside = rest[begin + 1 : close - 1]
    return Instruction(
        match[2],
        opcode[1],
        arrays_of(shape),
        tuple(_NAME.findall(inside)),
        inside,
        rest[close:],
        bool(match[1]),
    )


def _closing(text: str, begin: int) -> int:
    """The place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _space(text: str, begin: int) -> int:
    """The place of the blank that ends a shape; layouts hold none."""
    end = text.find(" ", begin)
    return len(text) if end < 0 else end
