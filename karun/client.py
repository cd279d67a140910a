"""A command in a session, seen from its user: a socket to the session, printers, nothing else.

Imports no trio, no click, no ClusterShell unless there is something to fold: the start of this
process is most of what a command in a session takes.  The protocol is karun/agent/frames.py's
frames over a Unix socket; the other side is karun/sessions.py.

    client                                       session
    RUN(flags, limit, cwd, argv, env, nodes)  ->
                                             <-  NAMES(name...) of the nodes it runs on
    INPUT(data)..., INPUT_END, SIGNAL(n)      ->
                                             <-  OUTPUT(rank), EXITED(rank), FAILED(rank), ROOM
                                             <-  DONE, or REFUSED(line)
"""

from __future__ import annotations

import getopt
import os
import select
import stat
from _socket import AF_UNIX, SOCK_STREAM
from _socket import socket as Socket
from collections.abc import Iterable, Iterator

from common.errors import Code, KaError
from karun.agent import frames
from karun.options import TERMINAL, Options, printing
from karun.output import Printer

__all__ = ["DEFAULT", "directory", "main", "parse", "stop"]

DEFAULT = "default"
READ_SIZE = 256 << 10
INPUT_SIZE = 64 << 10
INTERRUPTED = 130

RUN, INPUT, INPUT_END, SIGNAL, STOP, INFO = range(1, 7)
NAMES, OUTPUT, EXITED, FAILED, ROOM, DONE, REFUSED = range(16, 23)

_FLAGS = {
    "-b": "gather", "-B": "gather_all", "-L": "by_line", "-N": "no_label", "-S": "highest",
    "-n": "no_stdin", "-q": "quiet", "--diff": "diff", "--json": "as_json", "--sudo": "sudo",
    "--pty": "pty",
}  # fmt: skip
_VALUES = {"--outdir": "outdir", "--errdir": "errdir", "--cwd": "cwd"}
_SHORT = "w:u:bBLNSnq"
_LONG = ["session=", "diff", "json", "sudo", "pty", "outdir=", "errdir=", "cwd=", "env="]


def parse(words: list[str]) -> tuple[str, str, Options] | None:
    """Return session, nodes ("": all) and options; None if there is more than a session takes."""
    try:
        given, command = getopt.getopt(words, _SHORT, _LONG)
    except getopt.GetoptError:
        return None
    session, nodes = None, []
    found: dict[str, object] = {}
    env: list[str] = []
    for option, value in given:
        if option == "--session":
            session = value
        elif option == "-w":
            nodes.append(value)
        elif option == "--env":
            env.append(value)
        elif option == "-u":
            try:
                found["limit_s"] = float(value)
            except ValueError:
                return None
        elif option in _VALUES:
            found[_VALUES[option]] = value
        else:
            found[_FLAGS[option]] = True
    if session is None or not command:
        return None
    options = Options(command=tuple(command), env=tuple(env), **found)  # type: ignore[arg-type]
    return session, ",".join(nodes), options


def main(session: str, nodes: str, options: Options) -> int:
    """Run a command in a session; return the exit code, having said what went wrong."""
    try:
        with connected(session) as sock:
            return _Client(sock, options).run(nodes)
    except KaError as error:
        TERMINAL.write(2, f"karun: {error}\n".encode("utf-8", "backslashreplace"))
        return error.code.exit_code


def stop(session: str) -> None:
    """End a session, and wait until it is gone; raises KaError."""
    with connected(session) as sock:
        sock.sendall(frames.encode(STOP, 0))
        while sock.recv(READ_SIZE):
            pass


def directory() -> str:
    """Return this user's own directory for sockets; raises KaError."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = f"{runtime}/karun" if runtime else f"/tmp/karun-{os.geteuid()}"
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise KaError(Code.EIO, f"no directory for sessions: {path}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise KaError(Code.AUTH, f"others have access to {path}: remove it")
    return path


def socket_path(session: str) -> str:
    if not session or "/" in session or session.startswith(".") or len(session) > 60:
        raise KaError(Code.USAGE, f"not a name for a session: {session[:60]!r}")
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
            raise KaError(Code.UNREACHABLE, f"no session {self._session!r} ({hint})") from None
        return sock

    def __exit__(self, *_error: object) -> None:
        self._socket.close()


class _LazyNames:
    """Names by rank; folding loads what folds."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, rank: int) -> str:
        return self._names[rank]

    def fold(self, ranks: Iterable[int]) -> str:
        from karun.nodes import Names

        return Names(self._names).fold(ranks)


class _Client:
    """One command."""

    def __init__(self, sock: Socket, options: Options) -> None:
        self._socket = sock
        self._options = options
        self._decoder = frames.Decoder()
        self._input = not options.no_stdin and not os.isatty(0)
        self._room = True

    def run(self, nodes: str) -> int:
        options = self._options
        argv, line = options.words()
        flags = ("s" if line else "") + ("p" if options.pty else "") + ("i" if self._input else "")
        self._send(
            RUN, flags, int(options.limit_s * 1000), options.cwd, frames.pack(*argv),
            frames.pack(*options.env), nodes,
        )  # fmt: skip
        names = next(self._frames())[2]
        with printing(options, _LazyNames(list(map(frames.text, names)))) as printer:
            return self._serve(printer)

    def _serve(self, printer: Printer) -> int:
        interrupted = False
        while True:
            try:
                for kind, rank, fields in self._frames():
                    if kind == DONE:
                        return printer.finish()
                    self._told(printer, kind, rank, fields)
                    if not TERMINAL.has_reader:
                        return printer.finish()
            except KeyboardInterrupt:
                if interrupted or not os.isatty(2):
                    printer.finish()
                    return INTERRUPTED
                interrupted = True
                waiting = printer.results.waiting()
                line = f"karun: waiting for {len(waiting)} nodes; ^C again stops\n"
                TERMINAL.write(2, line.encode())

    def _told(self, printer: Printer, kind: int, rank: int, fields: list[bytes]) -> None:
        if kind == OUTPUT:
            printer.output(rank, frames.number(fields[0]), fields[1])
        elif kind == EXITED:
            printer.exited(rank, frames.number(fields[0]), frames.number(fields[1]))
        elif kind == FAILED:
            printer.failed(rank, frames.text(fields[1]), frames.text(fields[0]))
        elif kind == ROOM:
            self._room = True

    def _frames(self) -> Iterator[tuple[int, int, list[bytes]]]:
        """Yield what the session says, feeding it standard input meanwhile; raises KaError."""
        data = b""  # what an earlier call has received and not yielded comes first
        while True:
            for kind, rank, payload in self._decoder.feed(data):
                fields = frames.unpack(payload)
                if kind == REFUSED:
                    raise KaError(Code.USAGE, frames.text(fields[0]))
                yield kind, rank, fields
            data = b""
            sources = [self._socket.fileno(), *([0] if self._input and self._room else [])]
            ready = select.select(sources, [], [])[0]
            if 0 in ready:
                self._feed()
            if self._socket.fileno() not in ready:
                continue
            data = self._socket.recv(READ_SIZE)
            if not data:
                raise KaError(Code.UNREACHABLE, "the session has ended")

    def _feed(self) -> None:
        data = os.read(0, INPUT_SIZE)
        if data:
            self._room = False
            self._send(INPUT, data)
        else:
            self._input = False
            self._send(INPUT_END)

    def _send(self, kind: int, *fields: bytes | str | int) -> None:
        self._socket.sendall(frames.encode(kind, 0, frames.pack(*fields)))
