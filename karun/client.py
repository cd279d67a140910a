"""A command in a session, seen from its user: words go to the session, what it prints comes back.

The start of this process is a good part of what a command in a session takes, so it imports
builtin and C modules only, as an agent does.  What the words mean, what is printed and the exit
code are for the session to say (karun/session_server.py).  Frames (karun/agent/frames.py) over a
Unix socket:

    client                                             session
    RUN(directory, terminals, environment, words)  ->
    INPUT(data) after each ROOM, INPUT_END         ->
    INTERRUPT: Ctrl-C; UNREAD: nobody reads output ->
                                                   <-  WRITE(data) to the stream, ROOM, END(code)
    STOP, INFO: karun/sessions.py                  ->
    JOIN: karun/session_wire.py                    ->
"""

from __future__ import annotations

import os
import select
from _signal import SIGINT, signal  # type: ignore[import-not-found]
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket
from stat import S_ISDIR

from karun.agent import frames
from karun.lines import STDERR, STDOUT
from karun.terminal import TERMINAL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.errors import KaError

__all__ = ["DEFAULT", "connected", "directory", "main", "socket_path"]

DEFAULT = "default"
READ_SIZE = 256 << 10
INPUT_SIZE = 64 << 10
STDIN = 0
INTERRUPTED = 130
NO_READER = 141
"""As a shell reports SIGPIPE."""
PATIENCE = 2
"""The first Ctrl-C asks, the second stops; with another one nobody waits for the session."""

RUN, INPUT, INPUT_END, INTERRUPT, UNREAD, STOP, INFO = range(1, 8)
WRITE, ROOM, END = range(16, 19)

COLOURS = ("NO_COLOR", "CLICOLOR_FORCE", "CLICOLOR", "TERM")
"""Environment that says whether output has colours."""


def main(session: str, words: Sequence[str]) -> int:
    """Run a command in a session; return the exit code, having said what went wrong."""
    try:
        with connected(session) as sock:
            return _Client(sock).run(words)
    except Exception as error:
        from common.errors import KaError

        if not isinstance(error, KaError):
            raise
        TERMINAL.write(STDERR, f"karun: {error}\n".encode("utf-8", "backslashreplace"))
        return error.code.exit_code


def directory() -> str:
    """Return this user's own directory for sockets; raises KaError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = f"{runtime}/karun" if runtime else f"/tmp/karun-{os.geteuid()}"
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise _failure("EIO", f"no directory for sessions: {path}: {error.strerror}") from None
    if found.st_uid != os.geteuid():
        raise _failure("AUTH", f"{path} belongs to another user: set XDG_RUNTIME_DIR to your own")
    if not S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise _failure("AUTH", f"others have access to {path}: remove it")
    return path


def socket_path(session: str) -> str:
    """Return where a session listens; raises KaError."""
    if not session or "/" in session or session.startswith(".") or len(session) > 60:
        raise _failure("USAGE", f"not a name for a session: {session[:60]!r}")
    return f"{directory()}/{session}.sock"


class connected:
    """A connection to a session; a context manager."""

    def __init__(self, session: str) -> None:
        self._session = session

    def __enter__(self) -> Socket:
        self._socket = sock = Socket(AF_UNIX, SOCK_STREAM)
        try:
            sock.connect(socket_path(self._session))
        except OSError:
            sock.close()
            hint = f"karun session start --name {self._session} -w ..."
            raise _failure("UNREACHABLE", f"no session {self._session!r} ({hint})") from None
        return sock

    def __exit__(self, *_error: object) -> None:
        self._socket.close()


class _Client:
    """One command."""

    def __init__(self, sock: Socket) -> None:
        self._socket = sock
        self._decoder = frames.Decoder()
        self._room = False
        """Whether the session wants standard input."""
        self._interrupts = 0
        self._bell, self._bell_rope = os.pipe()

    def run(self, words: Sequence[str]) -> int:
        terminals = "".join(str(fd) for fd in (STDIN, STDOUT, STDERR) if os.isatty(fd))
        colours = [f"{name}={os.environ[name]}" for name in COLOURS if name in os.environ]
        signal(SIGINT, self._interrupt)
        about = (os.getcwd(), terminals, frames.pack(*colours), frames.pack(*words))
        self._send(RUN, frames.pack(*about))
        code = None
        while code is None:
            if self._interrupts > PATIENCE:
                return INTERRUPTED
            code = self._step()
        return code

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._interrupts += 1
        os.write(self._bell_rope, b"!")

    def _step(self) -> int | None:
        """Wait for something to happen, and handle it; return the exit code at the end."""
        listened = self._socket.fileno()
        ready, _, _ = select.select([listened, self._bell, *([STDIN] * self._room)], [], [])
        if self._bell in ready:
            os.read(self._bell, 1)
            self._send(INTERRUPT)
        if STDIN in ready:
            self._room = False
            data = os.read(STDIN, INPUT_SIZE)
            self._send(INPUT if data else INPUT_END, data)
        if listened not in ready:
            return None
        data = self._socket.recv(READ_SIZE)
        if not data:
            raise _failure("UNREACHABLE", "the session has ended")
        for kind, stream, payload in self._decoder.feed(data):
            if kind == END:
                code = frames.number(frames.unpack(payload)[0])
                return code if TERMINAL.has_reader else NO_READER
            if kind == ROOM:
                self._room = True
            else:
                self._write(stream, payload)
        return None

    def _write(self, stream: int, data: bytes) -> None:
        had_reader = TERMINAL.has_reader
        TERMINAL.write(stream, data)
        if had_reader and not TERMINAL.has_reader:
            self._send(UNREAD)

    def _send(self, kind: int, payload: bytes = b"") -> None:
        try:
            self._socket.sendall(frames.encode(kind, 0, payload))
        except OSError:
            pass  # it has ended, perhaps with a word that is still to be read


def _failure(code: str, line: str) -> KaError:
    from common.errors import Code, KaError  # not loaded when all goes well

    return KaError(Code[code], line)
