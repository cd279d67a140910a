"""A job: all that a process must be told to take part in a transfer.  Pure.

It holds the token, so it travels only where the caller's own secrets do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from common import codec
from common.broadcast.manifest import TOKEN_SIZE_MIN, TRANSFER_ID_SIZE
from common.broadcast.node import HopOptions
from common.broadcast.topology import Kind, Shape, Topology, build
from common.errors import Code, KaError

__all__ = ["Job", "decode_job", "encode_job"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer, the same for all its nodes."""

    transfer_id: bytes
    """Random; never used twice."""
    token: bytes
    """Random; who holds it may take part."""
    shape: Shape
    addresses: tuple[str, ...]
    """`host:port` by rank, the source's first."""
    options: HopOptions = field(default_factory=HopOptions)

    def __post_init__(self) -> None:
        if len(self.transfer_id) != TRANSFER_ID_SIZE or len(self.token) < TOKEN_SIZE_MIN:
            raise KaError(Code.USAGE, "a transfer needs an id and a token of the right size")
        if len(self.addresses) != self.shape.receiver_count + 1:
            raise KaError(Code.USAGE, "a transfer needs one address for each rank")

    @property
    def topology(self) -> Topology:
        """Return the trees; built anew each time."""
        return build(self.shape)


def encode_job(job: Job) -> bytes:
    shape = job.shape
    return codec.encode(
        (
            FORMAT,
            job.transfer_id,
            job.token,
            (shape.kind.value, shape.racks, shape.fanout, shape.gap_us, shape.ready_us),
            job.addresses,
            dataclasses.asdict(job.options),
        )
    )


def decode_job(data: bytes) -> Job:
    """Return the job; raises KaError PROTOCOL or USAGE for what is none."""
    match codec.decode(data):
        case [
            int(version), bytes(transfer_id), bytes(token),
            [str(kind), list(racks), int(fanout), int(gap_us), int(ready_us)],
            list(addresses), dict(options),
        ] if version == FORMAT and kind in {one.value for one in Kind}:  # fmt: skip
            shape = Shape(Kind(kind), _whole(racks), fanout, gap_us, ready_us)
            if not all(type(address) is str for address in addresses):
                raise KaError(Code.PROTOCOL, "an address that is none")
            return Job(transfer_id, token, shape, tuple(addresses), _options(options))
    raise KaError(Code.PROTOCOL, "not a job")


def _whole(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise KaError(Code.PROTOCOL, "not a list of whole numbers")
    return tuple(values)


def _options(values: dict[Any, Any]) -> HopOptions:
    known = {one.name for one in dataclasses.fields(HopOptions)}
    if not known.issuperset(values):
        raise KaError(Code.PROTOCOL, "an option of a transfer that is not known here")
    if not all(type(value) in (int, float) for value in values.values()):
        raise KaError(Code.PROTOCOL, "an option of a transfer that is no number")
    return HopOptions(**values)
