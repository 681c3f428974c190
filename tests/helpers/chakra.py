"""Execution traces written byte by byte, by the encoding of Protocol Buffers and Chakra's schema.

Nothing of what reads them is used, so that the two check each other.
"""

import struct
from pathlib import Path

COMPUTE, SEND, RECEIVE, COLLECTIVE = 4, 5, 6, 7
ALL_REDUCE, BROADCAST, ALL_GATHER, ALL_TO_ALL, REDUCE_SCATTER, BARRIER = 0, 5, 2, 6, 7, 9


def varint(value: int) -> bytes:
    value %= 2**64  # as two's complement
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | str | bytes | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    body = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(body)) + body


def attribute(name: str, value: int | float | str | list[bool]) -> bytes:
    """An `AttributeProto`: an int64 (9), a double (3), a string (29) or a list of bools (28)."""
    if isinstance(value, float):
        return field(1, name) + field(3, value)
    if isinstance(value, list):
        packed = b"".join(map(varint, value))
        return field(1, name) + field(28, field(1, packed))
    return field(1, name) + field(29 if isinstance(value, str) else 9, value)


def node(
    id: int, type: int, after: list[int] = (), *, name: str = "", micros: int = 0, **attributes
) -> bytes:
    body = field(1, id) + field(2, name or f"node {id}") + field(3, type)
    if after:
        body += field(5, b"".join(map(varint, after)))  # data_deps, packed
    if micros:
        body += field(7, micros)
    for key, value in attributes.items():
        body += field(10, attribute(key, value))
    return body


def collective(id: int, kind: int, size: int, after: list[int] = (), **attributes) -> bytes:
    return node(id, COLLECTIVE, after, comm_type=kind, comm_size=size, **attributes)


def write(file: Path, *nodes: bytes) -> Path:
    messages = [field(1, "0.0.4"), *nodes]
    file.write_bytes(b"".join(varint(len(m)) + m for m in messages))
    return file
