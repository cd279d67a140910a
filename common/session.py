"""The handshake: both sides prove the cluster key before anything else is said.  Sans-I/O.

    client                                server
    Hello(versions, cluster, who, nonce) ->
                                       <- Challenge(version, nonce)
    Proof(HMAC(key, "client", both))     ->
                                       <- Welcome(HMAC(key, "server", both, client's proof))

HMAC-SHA-256 over the exact bytes of Hello and Challenge, so neither can be altered or replayed.
The server proves itself only to a client that has proved itself.  `features` in Hello and
Challenge is where later agreements go (a TLS channel binding, for one): what both name is on.
A failure is an ERROR frame with AUTH, WRONG_CLUSTER or WRONG_VERSION and the end of the
connection.  States and limits: docs/protocol.md#handshake.
"""

from __future__ import annotations

import hmac
from typing import Any, NamedTuple

from common.errors import Code, KaError
from common.messages import Catalogue

__all__ = ["MESSAGES", "VERSIONS", "ClientHandshake", "Hello", "Identity", "ServerHandshake"]

VERSIONS = (1,)
"""Protocol versions this code speaks, best last."""
KEY_SIZE = 32
NONCE_SIZE = 32
HANDSHAKE_BODY_SIZE_MAX = 1024
"""All that an unauthenticated peer can make us hold."""

MESSAGES = Catalogue("handshake")


@MESSAGES.message(1)
class Hello(NamedTuple):
    versions: list[Any]
    cluster_id: str
    role: str
    name: str
    incarnation: bytes
    """Random for each process: connections of one process belong together."""
    connection: int
    """Counts the connections of this incarnation to this peer: the highest is the living one."""
    nonce: bytes
    features: list[Any]


@MESSAGES.message(2)
class Challenge(NamedTuple):
    version: int
    nonce: bytes
    features: list[Any]


@MESSAGES.message(3)
class Proof(NamedTuple):
    mac: bytes


@MESSAGES.message(4)
class Welcome(NamedTuple):
    mac: bytes


class Identity(NamedTuple):
    """Who a process is, on every connection it makes."""

    cluster_id: str
    role: str
    name: str
    incarnation: bytes


def _mac(key: bytes, side: bytes, *parts: bytes) -> bytes:
    mac = hmac.new(key, side, "sha256")
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


class ClientHandshake:
    """The connecting side: send `start()`, then what `receive` returns, until `done`."""

    def __init__(self, identity: Identity, key: bytes, *, connection: int, nonce: bytes) -> None:
        self._key = key
        self._hello = MESSAGES.encode(
            Hello(
                list(VERSIONS), identity.cluster_id, identity.role, identity.name,
                identity.incarnation, connection, nonce, [],
            )
        )  # fmt: skip
        self._challenge: bytes | None = None
        self._proof = b""
        self.version = 0
        self.done = False

    def start(self) -> bytes:
        return self._hello

    def receive(self, body: bytes) -> bytes | None:
        """Take the server's next message; return ours, or None when the handshake is done."""
        message = MESSAGES.decode(body)
        if self._challenge is None:
            if not isinstance(message, Challenge) or len(message.nonce) != NONCE_SIZE:
                raise KaError(Code.PROTOCOL, "handshake: expected a challenge")
            if message.version not in VERSIONS:
                raise KaError(Code.WRONG_VERSION, f"the server chose version {message.version}")
            self._challenge = body
            self.version = message.version
            self._proof = _mac(self._key, b"ka client", self._hello, body)
            return MESSAGES.encode(Proof(self._proof))
        if not isinstance(message, Welcome) or self.done:
            raise KaError(Code.PROTOCOL, "handshake: expected a welcome")
        expected = _mac(self._key, b"ka server", self._hello, self._challenge, self._proof)
        if not hmac.compare_digest(message.mac, expected):
            raise KaError(Code.AUTH, "the server does not hold the cluster key")
        self.done = True
        return None


class ServerHandshake:
    """The accepting side: send what `receive` returns, until `done`; then `hello` says who."""

    def __init__(self, cluster_id: str, key: bytes, *, nonce: bytes) -> None:
        self._cluster_id = cluster_id
        self._key = key
        self._nonce = nonce
        self._hello_body = b""
        self._challenge = b""
        self._ended = False
        self.hello: Hello | None = None
        self.done = False

    def receive(self, body: bytes) -> bytes:
        """Take the client's next message and return the answer; raises KaError to refuse."""
        message = MESSAGES.decode(body)
        if self.hello is None:
            return self._receive_hello(message, body)
        if not isinstance(message, Proof) or self._ended:
            raise KaError(Code.PROTOCOL, "handshake: expected a proof")
        self._ended = True  # one guess for each challenge
        expected = _mac(self._key, b"ka client", self._hello_body, self._challenge)
        if not hmac.compare_digest(message.mac, expected):
            raise KaError(Code.AUTH, "wrong cluster key")
        self.done = True
        mac = _mac(self._key, b"ka server", self._hello_body, self._challenge, message.mac)
        return MESSAGES.encode(Welcome(mac))

    def _receive_hello(self, message: object, body: bytes) -> bytes:
        if not isinstance(message, Hello) or len(message.nonce) != NONCE_SIZE:
            raise KaError(Code.PROTOCOL, "handshake: expected a hello")
        if message.cluster_id != self._cluster_id:
            raise KaError(Code.WRONG_CLUSTER, "this server belongs to another cluster")
        common = [version for version in VERSIONS if version in message.versions]
        if not common:
            raise KaError(
                Code.WRONG_VERSION, f"this server speaks protocol versions {list(VERSIONS)}"
            )
        self.hello = message
        self._hello_body = body
        self._challenge = MESSAGES.encode(Challenge(common[-1], self._nonce, []))
        return self._challenge
