"""Tokens of the REST API: made, kept, looked up, revoked.

One JSON file, mode 0600, refused if wider.  It holds no token, only the SHA-256 of each: a token
has 256 random bits, so nothing slower is needed.  A token is shown once, when it is made.

Invariants
  * the file is replaced whole and never half written; two who change it wait for each other;
  * a change counts from the next request on: the file is looked at before each.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import config, nodeset
from common.errors import Code, KaError
from kadeploy.rights import ALL_NODES, Grant, Right

__all__ = ["Token", "Tokens"]

FILE_SIZE_MAX = 4 << 20
_USER = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_TOKEN = re.compile(r"ka-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of one."""

    id: str
    user: str
    nodes: str
    """A node set, or `*`."""
    rights: tuple[Right, ...]
    digest: str
    added_ms: int
    expires_ms: int = 0
    """0: never."""

    def validate(self) -> None:
        if not _USER.fullmatch(self.user):
            raise ValueError(f"not a user's name: {self.user[:80]!r}")
        if not self.rights:
            raise ValueError(f"a token without rights: {self.id}")

    def public(self) -> dict[str, Any]:
        """Return what may be shown, as plain values."""
        values = {**asdict(self), "rights": [right.value for right in self.rights]}
        del values["digest"]
        return values

    def grant(self) -> Grant:
        every = self.nodes == ALL_NODES
        nodes = None if every else frozenset(nodeset.expand(self.nodes))
        return Grant(self.user, frozenset(self.rights), nodes)


@dataclass(frozen=True, slots=True)
class _File:
    tokens: tuple[Token, ...] = ()


class Tokens:
    """The tokens in a file, which need not be there yet.  Blocking, but quick."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark: tuple[int, ...] = ()
        self._known: dict[str, tuple[Token, Grant]] = {}

    def add(
        self, user: str, nodes: str, rights: Sequence[Right], now_ms: int, expires_ms: int = 0
    ) -> str:
        """Make a token and return it; raises USAGE."""
        number = secrets.token_hex(4)
        text = f"ka-{number}-{secrets.token_urlsafe(32)}"
        token = Token(number, user, nodes, tuple(rights), _digest(text), now_ms, expires_ms)
        try:
            token.validate()
        except ValueError as error:
            raise KaError(Code.USAGE, str(error)) from None
        token.grant()  # refuses what is no node set
        with self._changing():
            self._write([*self.known(), token])
        return text

    def known(self) -> list[Token]:
        """Return all, oldest first."""
        self._refresh()
        return [token for token, _ in self._known.values()]

    def revoke(self, number: str) -> Token:
        """Forget a token by its id; raises USAGE for one that is not there."""
        with self._changing():
            tokens = self.known()
            found = [token for token in tokens if token.id == number]
            if not found:
                raise KaError(Code.USAGE, f"no token {number}: see `kadeploy token list`")
            self._write([token for token in tokens if token.id != number])
        return found[0]

    def grant(self, text: str, now_ms: int) -> Grant:
        """Return what a token stands for; raises AUTH, the same for all that is wrong."""
        self._refresh()
        parts = _TOKEN.fullmatch(text)
        token, grant = self._known.get(parts[1] if parts else "", (None, None))
        if token is not None and grant is not None:
            good = hmac.compare_digest(token.digest, _digest(text))
            if good and (token.expires_ms == 0 or now_ms < token.expires_ms):
                return grant
        raise KaError(Code.AUTH, "no valid token: ask for one made by `kadeploy token add`")

    # ------------------------------------------------------------ the file

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._path.with_name(f"{self._path.name}.lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _write(self, tokens: Sequence[Token]) -> None:
        content = {"tokens": [{**token.public(), "digest": token.digest} for token in tokens]}
        draft = self._path.with_name(f".{self._path.name}.new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(fd)
        draft.replace(self._path)

    def _refresh(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            self._mark, self._known = (), {}
            return
        with open(fd, "rb") as file:
            now = os.fstat(fd)
            mark = (now.st_ino, now.st_mtime_ns, now.st_size, now.st_mode)
            if mark == self._mark:
                return
            if not stat.S_ISREG(now.st_mode) or stat.S_IMODE(now.st_mode) & 0o077:
                raise KaError(Code.USAGE, f"{self._path}: others may read it: chmod 600 it")
            data = file.read(FILE_SIZE_MAX)
        try:
            content = json.loads(data)
        except ValueError as error:
            raise KaError(Code.USAGE, f"{self._path}: not JSON: {error}") from None
        tokens = config.check(content, _File, self._path).tokens
        self._known = {token.id: (token, token.grant()) for token in tokens}
        self._mark = mark


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
