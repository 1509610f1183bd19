"""Sizes and durations as people write them. Sizes are bytes everywhere inside; this is where text becomes a
number and back.
"""

from __future__ import annotations

import re

from vmm.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE_SIZE = 4096

_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB}
_SIZE = re.compile(r"(\d{1,12})\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str, what: str = "size") -> int:
    """Bytes for `256M`, `4GiB`, `4096` (powers of 1024). Raises ConfigError naming `what`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}: {text!r} is not a size; write a number with K, M or G, such as 256M")
    return int(match[1]) * _SUFFIXES[match[2].upper()]


def format_size(size: int) -> str:
    """The shortest exact form of `size` bytes: 268435456 -> `256M`."""
    for suffix, unit in (("G", GIB), ("M", MIB), ("K", KIB)):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
