"""Sizes in bytes, as options give them and as pages show them."""

import re

from pjit_train.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str = "--buffer") -> int:
    """Parses a size in bytes, such as 524288, 512KiB or 20MB.

    Args:
      option: that gives it, for the message.

    Raises:
      UserError: it is no size.
    """
    match = re.fullmatch(r"(\d{1,40}(?:\.\d{1,40})?)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    short = text if len(text) < 40 else text[:36] + "..."
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"{option} {short}: no size; write bytes, or such as 512KiB, 20MB, 2GB")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not size <= 2**60:
        raise UserError(f"{option} {short}: 2^60 bytes at most")
    return int(size)


def shown_size(bytes: int) -> str:
    """The size in the largest unit of which it has one or more, such as 64 MiB."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if bytes >= _UNITS[unit.upper()]:
            return f"{bytes / _UNITS[unit.upper()]:.4g} {unit}"
    return f"{bytes} bytes"
