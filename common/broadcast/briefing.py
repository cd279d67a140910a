"""The briefing: how the signed manifest and the table of files reach every node.

A node asks its ancestors in the control tree, the nearest first, and answers its own children as
soon as it knows: so the source tells a few, whatever the size.  Nobody answers at once who does
not know yet; an ancestor that cannot be reached, or is silent, is passed over.

    Ask(offset) -> Told(total) with a part of: msgpack [signed manifest: bin, table: bin]

Both are bound to the session: the manifest is signed under its token and names the table's digest.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from common import codec
from common.broadcast.edge import Edge
from common.broadcast.image import TABLE_SIZE_MAX, Entry, decode_table
from common.broadcast.manifest import Manifest, decode_signed, encode_signed
from common.errors import Code, KaError
from common.framing import Kind, encode_frame
from common.messages import Catalogue
from common.outbox import Part

__all__ = ["Briefing", "Plan", "decode_plan", "encode_plan"]

PART_SIZE = 1024 * 1024
SIZE_MAX = TABLE_SIZE_MAX + (8 << 20)
HOLD_S = 0.5
"""Who does not know within this long says so: the asker learns that it lives."""
PATIENCE_S = 1.5
"""An answer comes within this, or the next ancestor is asked."""

_BRIEFING = Catalogue("briefing")


@_BRIEFING.message(1)
class Ask(NamedTuple):
    offset: int


@_BRIEFING.message(2)
class Told(NamedTuple):
    total: int
    """Size of it all; 0: not known here yet."""


class Plan(NamedTuple):
    """What a node must know before it can begin."""

    manifest: Manifest
    entries: list[Entry]
    encoded: bytes


def encode_plan(manifest: Manifest, table: bytes, token: bytes) -> bytes:
    return codec.encode((encode_signed(manifest, token), table))


def decode_plan(encoded: bytes, token: bytes, transfer_id: bytes) -> Plan:
    """Return the plan; raises KaError AUTH or PROTOCOL for one that was tampered with."""
    match codec.decode(encoded):
        case [bytes(signed), bytes(table)]:
            manifest = decode_signed(signed, token)
            if manifest.transfer_id != transfer_id:
                raise KaError(Code.PROTOCOL, "the manifest of another transfer")
            return Plan(manifest, decode_table(table, manifest.image_id), encoded)
    raise KaError(Code.PROTOCOL, "not a plan")


class Briefing:
    """One node's share: what it has been told, and who waits for an answer."""

    def __init__(self) -> None:
        self._encoded = b""
        self._known = trio.Event()
        self._answers: dict[int, tuple[int, bytes] | None] = {}
        self._came = trio.Event()
        self._request_id = 0

    def know(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._known.set()

    async def answer(self, body: bytes, request_id: int) -> list[Part]:
        """Return the frame that answers a request, when there is something to say."""
        message = _BRIEFING.decode(body)
        if type(message) is not Ask or message.offset < 0:
            raise KaError(Code.PROTOCOL, "not a request between hops")
        with trio.move_on_after(HOLD_S):
            await self._known.wait()
        part = memoryview(self._encoded)[message.offset : message.offset + PART_SIZE]
        told = _BRIEFING.encode(Told(len(self._encoded)))
        return [encode_frame(Kind.REPLY, request_id, told, len(part)), part]

    # ------------------------------------------------------------ the asking side

    def answered(self, request_id: int, body: bytes, payload: bytes) -> None:
        message = _BRIEFING.decode(body)
        if type(message) is not Told or not 0 <= message.total <= SIZE_MAX:
            raise KaError(Code.PROTOCOL, "not an answer between hops")
        if request_id in self._answers:  # else it came too late
            self._answers[request_id] = message.total, payload
            self._came.set()

    def broken(self) -> None:
        """A connection is gone: whoever waits should look whether it was theirs."""
        self._came.set()

    async def fetch(self, edge: Edge) -> bytes | None:
        """Return the whole plan as the peer knows it; None when it does not know it yet.

        Raises KaError TIMEOUT or UNREACHABLE when no answer comes.
        """
        encoded = bytearray()
        while True:
            self._request_id += 1
            body = _BRIEFING.encode(Ask(len(encoded)))
            edge.put((encode_frame(Kind.REQUEST, self._request_id, body),))
            edge.flush()
            total, part = await self._answer_to(self._request_id, edge)
            encoded += part
            if len(encoded) == total:
                return bytes(encoded) or None
            if not part or len(encoded) > total:
                raise KaError(Code.PROTOCOL, "a plan that does not end where it should")

    async def _answer_to(self, request_id: int, edge: Edge) -> tuple[int, bytes]:
        self._answers[request_id] = None
        try:
            with trio.move_on_after(PATIENCE_S):
                while edge.is_open and self._answers[request_id] is None:
                    self._came = trio.Event()
                    await self._came.wait()
            answer = self._answers[request_id]
        finally:
            del self._answers[request_id]
        if answer is None:
            code = Code.TIMEOUT if edge.is_open else Code.UNREACHABLE
            raise KaError(code, f"rank {edge.peer} does not answer")
        return answer
