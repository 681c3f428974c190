"""Accelerators and workloads of files, for `torsion dataflow`."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from launch.reports.documents import keyed, read_json, short
from launch.reports.sizes import parse_size
from pjit_train.errors import UserError
from topology.accelerator.accelerator import Accelerator, Energy, Level, MatrixArray
from topology.accelerator.workloads import Attention, Matmul
from topology.numbers import number, whole

_ACCELERATOR = ("name", "array", "vector_lanes", "frequency", "memories", "mac_energy")
_ACCELERATOR += ("vector_energy", "tile_seconds", "source")
_ARRAY = ("rows", "columns", "count", "reshapes", "load_cycles")
_MEMORY = ("name", "size", "bandwidth", "byte_energy")
_WORKLOAD = ("name", "batch", "heads", "kv_heads", "sequence", "keys", "head_dim")
_WORKLOAD += ("bytes_per_element", "bytes_per_logit", "causal", "backward", "matmuls", "source")
_MATMUL = ("name", "count", "m", "k", "n")
_MOST, _MOST_ELEMENTS, _MOST_LEVELS = 2**40, 2**24, 4
_WHAT = "a JSON file of an accelerator; docs/flat.md has one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """An attention, and the other matmuls of its layer, if any."""

    name: str
    attention: Attention
    matmuls: Sequence[Matmul] = ()


def read_accelerator(name: str) -> Accelerator:
    """Reads the accelerator of a file.

    Raises:
      UserError: something in it is unknown, missing or out of its range; names the file and the
        key.
    """
    said = keyed(name, read_json(name, _WHAT), _ACCELERATOR, _ACCELERATOR[1:5])
    try:
        return _accelerator(name, said)
    except ValueError as error:
        raise UserError(str(error)) from error


def _accelerator(where: str, said: dict[str, Any]) -> Accelerator:
    array = keyed(f"{where}: array", said["array"], _ARRAY, _ARRAY[:2])
    sizes = {
        key: whole(f"{where}: array: {key}", array.get(key, 1), least=1, most=_MOST_ELEMENTS)
        for key in _ARRAY[:3]
    }
    reshapes = _flag(f"{where}: array", array, "reshapes")
    if reshapes and (area := sizes["rows"] * sizes["columns"]) & (area - 1):
        raise UserError(f"{where}: array: reshapes: {area} elements; a power of two can")
    entries = said["memories"]
    if not isinstance(entries, list) or not 2 <= len(entries) <= 2 + _MOST_LEVELS:
        raise UserError(
            f"{where}: memories: {short(entries)}: want a list, the buffer next to the array first "
            f"and the memory off the chip last, at most {_MOST_LEVELS} between them"
        )
    memories = [
        _memory(f"{where}: memories: entry {i}", entry, i, of=len(entries))
        for i, entry in enumerate(entries, start=1)
    ]
    for inside, outside in itertools.pairwise(memories[:-1]):
        if outside.size <= inside.size:
            raise UserError(
                f"{where}: memories: {outside.name} has {outside.size} bytes, no more than "
                f"{inside.name} inside of it; leave it out, or mend the order"
            )
    energies = {
        key: number(f"{where}: {key}", said.get(key, 0.0), most=1.0, unit="joules")
        for key in ("mac_energy", "vector_energy")
    }
    label = said.get("name", where)
    if not isinstance(label, str) or not label:
        raise UserError(f"{where}: name {short(label)}: want a text")
    buffer, *levels, memory = memories
    return Accelerator(
        name=label,
        array=MatrixArray(
            **sizes,
            reshapes=reshapes,
            load_cycles=whole(
                f"{where}: array: load_cycles", array.get("load_cycles", 0), most=_MOST
            ),
        ),
        vector_lanes=whole(f"{where}: vector_lanes", said["vector_lanes"], least=1, most=_MOST),
        buffer=buffer.size,
        on_chip_bandwidth=buffer.bandwidth,
        off_chip_bandwidth=memory.bandwidth,
        frequency=number(f"{where}: frequency", said["frequency"], above=0, most=1e13, unit="Hz"),
        energy=Energy(
            mac=energies["mac_energy"],
            vector_operation=energies["vector_energy"],
            on_chip_byte=buffer.byte_energy,
            off_chip_byte=memory.byte_energy,
        ),
        levels=tuple(levels),
        tile_seconds=number(
            f"{where}: tile_seconds", said.get("tile_seconds", 0.0), most=1.0, unit="seconds"
        ),
        sources={"all": str(said.get("source", where))},
    )


def _memory(where: str, said: Any, i: int, *, of: int) -> Level:
    last = i == of
    needed = ("bandwidth",) if last else ("size", "bandwidth")
    said = keyed(where, said, _MEMORY, needed)
    if last and "size" in said:
        raise UserError(f"{where}: size: the last is the memory off the chip, which holds all")
    label = said.get("name", "memory" if last else "buffer" if i == 1 else f"level {i - 1}")
    if not isinstance(label, str) or not label:
        raise UserError(f"{where}: name {short(label)}: want a text")
    size = 0
    if not last:
        size = said["size"]
        if isinstance(size, str):
            size = parse_size(size, f"{where}: size")
        size = whole(f"{where}: size", size, least=1, most=2**60)
    return Level(
        name=label,
        size=size,
        bandwidth=number(
            f"{where}: bandwidth", said["bandwidth"], above=0, most=1e18, unit="bytes a second"
        ),
        byte_energy=number(
            f"{where}: byte_energy", said.get("byte_energy", 0.0), most=1.0, unit="joules"
        ),
    )


def read_workload(name: str) -> Workload:
    """Reads the workload of a file. UserError as of `read_accelerator`."""
    what = "a JSON file of an attention; docs/flat.md has one"
    said = keyed(name, read_json(name, what), _WORKLOAD, ("heads", "sequence", "head_dim"))
    label = said.get("name", name)
    if not isinstance(label, str) or not label:
        raise UserError(f"{name}: name {short(label)}: want a text")
    options = {"batch": "batch", "heads": "heads", "kv_heads": "kv_heads", "sequence": "rows"}
    options |= {"keys": "columns", "head_dim": "head_dim"}
    options |= {key: key for key in ("bytes_per_element", "bytes_per_logit")}
    try:
        sizes: dict[str, Any] = {
            argument: whole(f"{name}: {key}", said[key], least=1, most=_MOST)
            for key, argument in options.items()
            if key in said
        }
        flags = {key: _flag(name, said, key) for key in ("causal", "backward")}
        try:
            attention = Attention(**{"batch": 1} | sizes | flags)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        entries = said.get("matmuls", [])
        if not isinstance(entries, list):
            raise UserError(f"{name}: matmuls: {short(entries)}: want a list of objects")
        matmuls = [_matmul(f"{name}: matmuls: entry {i}", x) for i, x in enumerate(entries, 1)]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return Workload(name=label, attention=attention, matmuls=tuple(matmuls))


def _matmul(where: str, said: Any) -> Matmul:
    said = keyed(where, said, _MATMUL, ("m", "k", "n"))
    sizes = [whole(f"{where}: {x}", said[x], least=1, most=_MOST) for x in ("m", "k", "n")]
    count = whole(f"{where}: count", said.get("count", 1), least=1, most=_MOST)
    name = said.get("name", "matmul")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: name {short(name)}: want a text")
    found = Matmul(name, count, *sizes)
    if found.macs > 10**18:
        raise UserError(f"{where}: {found.macs:.1e} multiplications; at most 1e18 are counted")
    return found


def _flag(where: str, said: dict[str, Any], key: str) -> bool:
    value = said.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} {short(value)}: true or false")
    return value
