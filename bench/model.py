"""The values the benchmark passes around: scales, samples, failures.

Pure.  A sample is one workload on one system in one run; everything the tables show is computed
from samples, so the JSON file of a run holds all that is needed to recompute them.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, fields

from common.errors import Code, KaError

__all__ = ["Failure", "Sample", "Scale", "Unit", "parse_size"]

MIB = 1 << 20
_SUFFIXES = {
    "": 1,
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "K": 1 << 10, "M": 1 << 20, "G": 1 << 30,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
}  # fmt: skip


class Unit(enum.Enum):
    """What a workload's amount counts."""

    BYTES = "bytes"
    FILES = "files"
    READS = "reads"

    @property
    def rate_name(self) -> str:
        return "MB/s" if self is Unit.BYTES else f"{self.value}/s"

    @property
    def rate_divisor(self) -> float:
        return 1e6 if self is Unit.BYTES else 1.0

    @property
    def cpu_name(self) -> str:
        return "s/GB" if self is Unit.BYTES else f"s/1000 {self.value}"

    @property
    def cpu_divisor(self) -> float:
        return 1e9 if self is Unit.BYTES else 1e3


@dataclass(frozen=True, slots=True)
class Scale:
    """How much each workload does.  Fixed counts, so that systems do the same work."""

    size_bytes: int = 1 << 30
    """Of the one large file; a multiple of 1 MiB."""
    read_count: int = 4_000
    """4 KiB random reads at depth 1; four times as many at depth 16."""
    file_count: int = 2_000
    """4 KiB files one worker makes; eight workers share twice as many."""
    fsync_count: int = 500
    tree_entries_max: int = 5_000

    @classmethod
    def quick(cls) -> Scale:
        """Return a scale for trying things out; too short for figures worth keeping."""
        return cls(
            size_bytes=128 * MIB,
            read_count=1_000,
            file_count=400,
            fsync_count=100,
            tree_entries_max=800,
        )

    def validate(self) -> None:
        """Raise KaError(USAGE) where a value cannot be worked with."""
        if self.size_bytes < MIB or self.size_bytes % MIB:
            raise KaError(Code.USAGE, "the size must be a multiple of 1 MiB, and at least 1 MiB")
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise KaError(Code.USAGE, f"{field.name} must be at least 1")


@dataclass(frozen=True, slots=True)
class Sample:
    """One workload, once, on one system."""

    system: str
    workload: str
    run: int
    seconds: float
    amount: int
    cpu_servers_s: float
    cpu_client_s: float
    cpu_load_s: float
    """Of the load generator itself, its system calls' kernel time included."""
    cpu_elsewhere_s: float
    """Of the rest of the machine: what else runs there, and the kernel's own threads."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A system that could not be started or did not finish a group of workloads."""

    system: str
    where: str
    reason: str


def parse_size(text: str) -> int:
    """Return the bytes that a size like 512MiB, 1GiB or 10MB means.  K, M and G are binary."""
    match = re.fullmatch(r"\s*([0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _SUFFIXES:
        raise KaError(Code.USAGE, f"not a size: {text!r} (write it like 512MiB or 1GiB)")
    return int(match[1]) * _SUFFIXES[match[2].upper()]
