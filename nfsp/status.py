"""`nfsp status`: ask every daemon of the cluster how it is, and lay the answers out."""

from __future__ import annotations

import secrets
from typing import Any

import trio

from common import codec
from common.config import format_size
from common.errors import KaError
from common.link import Link
from common.session import Identity
from nfsp import wire
from nfsp.config import ClusterConfig, IodConfig, MdsConfig

__all__ = ["gather", "lay_out"]

PATIENCE_S = 2.0


async def gather(config: ClusterConfig, key: bytes) -> dict[str, Any]:
    """Return {"mds": [...], "iod": [...]}; a daemon that does not answer has an "error"."""
    identity = Identity(config.cluster.id, "admin", "status", secrets.token_bytes(16))
    result: dict[str, Any] = {"cluster": config.cluster.name, "mds": [], "iod": []}

    async def ask(kind: str, daemon: MdsConfig | IodConfig, place: int) -> None:
        name = f"{kind}{daemon.id}"
        link = Link(
            name, daemon.address, daemon.socket, identity=identity, key=key, patience_s=PATIENCE_S
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(link.run)
            try:
                if kind == "mds":
                    body, _ = await link.call(wire.MDS.encode(wire.Status()))
                else:
                    body, _ = await link.call(wire.IOD.encode(wire.IodStatus()))
                message = (wire.MDS if kind == "mds" else wire.IOD).decode(body)
                answer = codec.decode(message.status)
            except KaError as error:
                answer = {"error": str(error)}
            result[kind][place] = {"name": name, "address": daemon.address, **answer}
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        result["mds"] = [None] * len(config.mds)
        result["iod"] = [None] * len(config.iod)
        for place, mds in enumerate(config.mds):
            nursery.start_soon(ask, "mds", mds, place)
        for place, iod in enumerate(config.iod):
            nursery.start_soon(ask, "iod", iod, place)
    return result


def lay_out(status: dict[str, Any]) -> str:
    """Return the status as lines for a person."""
    lines = [f"cluster {status['cluster']}"]
    for mds in status["mds"]:
        if "error" in mds:
            lines.append(f"  {mds['name']:<8} DOWN  {mds['error']}")
            continue
        engine = mds["engine"]
        lines.append(
            f"  {mds['name']:<8} up    {mds['address']:<22} epoch {mds['epoch']}, "
            f"{len(mds['sessions'])} sessions, {engine['overlay_entries']} records to checkpoint"
        )
    total = free = 0
    for iod in status["iod"]:
        if "error" in iod:
            lines.append(f"  {iod['name']:<8} DOWN  {iod['error']}")
            continue
        total += iod["total_bytes"]
        free += iod["available_bytes"]
        lines.append(
            f"  {iod['name']:<8} up    {iod['address']:<22} "
            f"{format_size(iod['available_bytes'])} of {format_size(iod['total_bytes'])} free"
        )
    lines.append(f"  space    {format_size(free)} of {format_size(total)} free")
    for mds in status["mds"]:
        for session in mds.get("sessions", ()):
            if session["mountpoint"]:
                lines.append(
                    f"  mount    {session['host']}:{session['mountpoint']} "
                    f"(pid {session['pid']}, {session['opens']} open"
                    f"{', durable' if session['durable'] else ''})"
                )
    return "\n".join(lines)
