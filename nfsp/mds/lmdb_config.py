"""Sizes and times of the embedded metadata engine.

Owns the defaults and the relations between them.  Pure.
Not here: reading a configuration file.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import Code, KaError

__all__ = ["LmdbConfig"]


@dataclass(frozen=True, slots=True)
class LmdbConfig:
    """Sizes and times.  The journal segment bounds the memory too: two overlays are held."""

    segment_size: int = 32 << 20
    """Bytes of each of the two journal files; only used when a store is made."""
    checkpoint_size: int = 8 << 20
    """Bytes of records after which a checkpoint is begun."""
    checkpoint_entries: int = 40_000
    """Changed keys after which a checkpoint is begun."""
    checkpoint_age_ms: int = 5_000
    """A checkpoint is begun when records have waited this long."""
    checkpoint_retry_ms: int = 500
    """Pause after a checkpoint that failed, say for lack of space."""
    overlay_entries_max: int = 200_000
    """Changed keys per overlay; beyond, batches are refused until a checkpoint is done."""
    map_size: int = 64 << 30
    """Bytes of address space for LMDB to begin with; doubled when it is used up."""

    def validate(self) -> None:
        """Raise USAGE if the values do not go together."""
        if self.segment_size < 8192:
            raise KaError(Code.USAGE, "segment_size must be at least 8192 bytes")
        if not 0 < self.checkpoint_size <= self.segment_size:
            raise KaError(Code.USAGE, "checkpoint_size must be positive, at most segment_size")
        if not 0 < self.checkpoint_entries <= self.overlay_entries_max:
            raise KaError(
                Code.USAGE, "checkpoint_entries must be positive, at most overlay_entries_max"
            )
        if self.map_size < 1 << 20:
            raise KaError(Code.USAGE, "map_size must be at least 1 MiB")
