"""Sizes in bytes as people write and read them: "64MiB".

Pure.  `config.py` takes them in configurations; command lines take and print them.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from common.errors import Code, KaError

__all__ = ["SIZE", "SIZE_MAX", "format_size", "parse_size"]

SIZE: Final = "size in bytes"
"""Marks an int field, `Annotated[int, SIZE]`, that may be written as "64MiB"."""
SIZE_MAX = 2**63 - 1

_UNITS = "KMGTPE"
_SIZE = re.compile(r"([0-9]{1,30})(?:\.([0-9]{1,30}))? ?(?:([KMGTPE])(iB|B)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes in "64MiB", "64M", "1.5 GiB", "10MB" or "4096"; raises KaError USAGE.

    As in GNU coreutils: K, M, ... and KiB, MiB, ... count in 1024, KB, MB, ... in 1000.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise KaError(Code.USAGE, f"not a size (such as 64MiB): {text[:60]!r}")
    whole, part, unit, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    scale = base ** (_UNITS.index(unit.upper()) + 1) if unit else 1
    size = Fraction(f"{whole}.{part or 0}") * scale
    if size.denominator != 1 or size > SIZE_MAX:
        raise KaError(Code.USAGE, f"not a whole number of bytes below 8EiB: {text[:60]!r}")
    return int(size)


def format_size(size: int) -> str:
    """Return *size* for people: "64MiB"; one decimal ("1.4GiB") where it is not a whole number."""
    unit = min(max(size.bit_length() - 1, 0) // 10, len(_UNITS))
    if unit == 0:
        return f"{size}B"
    scale = 1024**unit
    number = str(size // scale) if size % scale == 0 else f"{size / scale:.1f}"
    if number == "1024.0" and unit < len(_UNITS):
        number, unit = "1.0", unit + 1
    return f"{number}{_UNITS[unit - 1]}iB"
