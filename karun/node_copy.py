"""One node's part in the broadcasts of a copy; runs on the node, out of the heavy archive.

The words: where it goes, how this node is reached, and a line for a shell if a command takes what
comes.  For each transfer a socket is opened and its address said; then a JOB comes, which names
the nodes of this transfer, or the input ends.  One that is not for this node is passed over, so a
node that comes late waits for its own.

What is said, one JSON object a line: {"address", "summed"}, then of each transfer
{"done": true} or {"failed": why}.  A command's own output goes to standard error.
The head's side: karun/copying.py.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import trio

from common import checksum
from common.broadcast.image import Entry
from common.broadcast.job import Job, decode_job
from common.broadcast.manifest import Manifest
from common.broadcast.sink import FileSink
from common.broadcast.store import Sink
from common.broadcast.stream_sink import CommandSink, DeviceSink
from common.broadcast.transfer import run_node
from common.errors import KaError, from_errno
from common.sockets import listen
from karun.agent import frames
from karun.agent.target import filled, resolve, words_of

__all__ = ["JOB", "encode_job_frame", "main"]

JOB = 2
LOCAL, INTERFACE, CONNECTION = "local", "interface", "connection"
"""How a node is reached: on this machine only, by its first network interface, or by the address
that the connection of its agent came to."""
_SIOCGIFCONF = 0x8912
_IFREQ_SIZE = 40
_IFREQ_COUNT_MAX = 64


def encode_job_frame(
    nodes: Sequence[str], name: str, job: bytes, *, is_tree: bool, into: bool
) -> bytes:
    """Return what starts a transfer: the nodes in the order of the broadcast, and the job."""
    members = frames.pack(*nodes)
    return frames.encode(JOB, 0, frames.pack(members, name, int(is_tree), int(into), job))


def main(incoming: Iterator[tuple[int, bytes]], words: list[str]) -> int:
    """Take part until the input ends; return 1 when anything has failed."""
    said = os.dup(1)
    os.dup2(2, 1)  # what a command prints is not for the head's protocol
    node = os.environ["KARUN_NODE"]
    destination, reach, command = words
    path = filled(destination, node)

    def say(**facts: Any) -> None:
        os.write(said, json.dumps(facts).encode() + b"\n")

    while True:
        try:
            sockets = listen(f"{_bracketed(_own_address(reach))}:0")
        except (KaError, OSError) as error:
            say(failed=str(error))
            return 1
        host, port = sockets[0].getsockname()[:2]
        is_device = not command and _is_device(path)
        say(address=f"{_bracketed(host)}:{port}", summed=checksum.COMPILED)
        found = _next_job(incoming, node)
        if found is None:
            return 0
        job, place, name, is_tree, into = found
        sink = _sink(path, command, name, is_device=is_device, is_tree=is_tree, into=into)
        try:
            summary = trio.run(lambda: run_node(job, place, sink, sockets=sockets))  # noqa: B023
        except KaError as error:
            say(failed=str(error))
        else:
            failure = summary.others.get(place)
            if failure is None:
                say(done=True)
            else:
                say(failed=failure.reason)
        for sock in sockets:
            sock.close()


def _next_job(
    incoming: Iterator[tuple[int, bytes]], node: str
) -> tuple[Job, int, str, bool, bool] | None:
    """Return the job, this node's place in it, and what it says of the source."""
    for kind, payload in incoming:
        if kind != JOB:
            continue
        members, name, is_tree, into, encoded = frames.unpack(payload)
        nodes = [frames.text(one) for one in frames.unpack(members)]
        if node in nodes:
            place = nodes.index(node) + 1
            return decode_job(encoded), place, frames.text(name), is_tree == b"1", into == b"1"
    return None


def _sink(
    path: str, command: str, name: str, *, is_device: bool, is_tree: bool, into: bool
) -> Sink:
    if command:
        return CommandSink(["/bin/sh", "-c", command])
    try:
        if is_device and into:
            raise NotADirectoryError(20, "a device takes one source")
        if is_device:
            return DeviceSink(path)
        return FileSink(resolve(path, name, is_tree=is_tree, into=into))
    except OSError as error:
        reason = f"cannot write {path}: {words_of(error)}"
        return _NoSink(KaError(from_errno(error.errno or 0), reason))


class _NoSink(FileSink):
    """Takes nothing: so the head hears why, and at once."""

    def __init__(self, error: KaError) -> None:
        super().__init__("/")
        self._error = error

    def open(self, _manifest: Manifest, _entries: Sequence[Entry]) -> int:
        raise self._error


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


# ------------------------------------------------------------ where this node is


def _own_address(reach: str) -> str:
    if reach == LOCAL:
        return "127.0.0.1"
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if reach == CONNECTION and len(connection) == 4:
        return connection[2]
    found = [address for address in _interface_addresses() if not address.startswith("127.")]
    return found[0] if found else "127.0.0.1"


def _interface_addresses() -> list[str]:
    """Return the IPv4 addresses of all interfaces that are up."""
    buffer = array.array("B", bytes(_IFREQ_SIZE * _IFREQ_COUNT_MAX))
    where, size = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFCONF, struct.pack("iL", size, where))
    (filled_size,) = struct.unpack_from("i", answer)
    rows = buffer.tobytes()[:filled_size]
    starts = range(0, len(rows), _IFREQ_SIZE)
    return [socket.inet_ntoa(rows[at + 20 : at + 24]) for at in starts]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
