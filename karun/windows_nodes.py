"""Windows nodes: each is called by this machine with ssh and sftp; nothing of ours runs there.

What works: `command` without standard input and terminal, and `copy` into a directory, checked
there by SHA-256.  The window of calls is that of every run; there is no tree.

A node that stops answering is noticed by ssh's own probes, one that answers and does nothing by
the time that a copy may take; a command has the time that its user gives it.  Of what a call says
to explain itself a few KiB are kept.  Cancelled: the ssh processes end; what
their commands on the nodes do then is up to the node's ssh server.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE

import trio

from common.errors import Code, KaError, first_error
from karun import windows
from karun.copied import Copied, CopyOptions, Step
from karun.crew import Outcome
from karun.lines import STDERR, STDOUT
from karun.orders import TIMEOUT, Sink
from karun.reasons import explain

__all__ = ["WindowsNodes"]

READ_SIZE = 64 << 10
WORDS_SIZE_MAX = 4096
"""Of standard error, kept to explain why a call failed."""
EXIT_SSH = 255
ALIVE_S = 15
GRACE_S = 120.0
RATE_MIN = 64 << 10
"""Bytes a second: a copy or its check that is slower, after `GRACE_S`, is given up."""


class WindowsNodes:
    """The Windows nodes of one command; an async context manager, as `api.Run` is."""

    def __init__(
        self,
        nodes: Sequence[str],
        *,
        user: str | None = None,
        ssh_config: str | None = None,
        options: Sequence[str] = (),
        connect_s: float,
        window: int,
    ) -> None:
        self.nodes = list(nodes)
        self._window = trio.CapacityLimiter(window)
        self._options = [
            "-oBatchMode=yes", f"-oConnectTimeout={max(1, round(connect_s))}",
            f"-oServerAliveInterval={ALIVE_S}", *(f"-o{option}" for option in options),
        ]  # fmt: skip
        if ssh_config:
            self._options += ["-F", ssh_config]
        if user:
            self._options.append(f"-oUser={user}")

    async def __aenter__(self) -> WindowsNodes:
        return self

    async def __aexit__(self, *_error: object) -> None:
        pass

    async def command(
        self,
        argv: Sequence[str],
        *,
        sink: Sink | None = None,
        stdin: AsyncIterable[bytes] | None = None,
        line: bool = False,
        pty: bool = False,
        cwd: str = "",
        env: Mapping[str, str] | None = None,
        limit_s: float = 0.0,
        sudo: bool = False,
    ) -> list[Outcome]:
        """Run a program, or with *line* a line of PowerShell, on all nodes; as `Run.command`."""
        if stdin is not None or pty or sudo:
            what = "sudo" if sudo else "terminal" if pty else "standard input: run it with -n"
            raise KaError(Code.USAGE, f"commands on Windows nodes get no {what}")
        script = windows.run_script(argv, line=line, cwd=cwd, env=env or {})
        remote = windows.remote_command(script)
        ends: dict[int, Outcome] = {}

        async def one(rank: int) -> None:
            outcome, _ = await self._run(rank, remote, sink, limit_s)
            ends[rank] = outcome
            if sink is None:
                return
            if outcome.reason is not None:
                sink.failed(rank, outcome.stage, outcome.reason)
            else:
                sink.exited(rank, outcome.code or 0, 0)

        await self._on_each(one)
        return [ends[rank] for rank in range(len(self.nodes))]

    async def copy(
        self,
        sources: Sequence[str],
        destination: str,
        *,
        options: CopyOptions | None = None,
        on_progress: Callable[[Step], None] | None = None,
        on_output: Callable[[int, bytes], None] | None = None,
    ) -> list[Copied]:
        """Copy files and directories into *destination*, a directory that is made; as `Run.copy`.

        Everything is sent to each node, in place.  Raises KaError when a source cannot be read.
        """
        if options not in (None, CopyOptions()):
            raise KaError(
                Code.USAGE, "to Windows nodes files are copied one node at a time: "
                "no --command, --topology, --link, --rate, --rack-size, --chunk-size or --sudo",
            )  # fmt: skip
        sums, size = await trio.to_thread.run_sync(_sums, sources, abandon_on_cancel=True)
        name = f".karun-{secrets.token_hex(8)}"
        results: dict[int, Copied] = {}

        def tell() -> None:
            if on_progress is not None:
                done = sum(one.reason is None for one in results.values())
                on_progress(Step("copy", size, len(self.nodes), done, done * size, done * size))

        with tempfile.NamedTemporaryFile("w", prefix="karun-", encoding="utf-8") as file:
            file.write(sums)
            file.flush()

            async def one(rank: int) -> None:
                target = destination.replace("%h", self.nodes[rank])
                reason = await self._copy_one(rank, sources, target, (file.name, name), size)
                results[rank] = Copied(rank, self.nodes[rank], reason)
                tell()

            tell()
            await self._on_each(one)
        return [results[rank] for rank in range(len(self.nodes))]

    async def _copy_one(
        self, rank: int, sources: Sequence[str], directory: str, sums: tuple[str, str], size: int
    ) -> str | None:
        """Return why the node does not have everything."""
        node = self.nodes[rank]
        batch = windows.put_batch(sources, directory, sums).encode()
        said = _Said(rank, None)
        limit_s = GRACE_S + size / RATE_MIN
        with trio.move_on_after(limit_s) as scope:
            code = await _call(["sftp", "-q", "-b", "-", *self._options, "--", node], said, batch)
        if scope.cancelled_caught:
            return f"not sent within {limit_s:.0f} s"
        if code:
            return explain("connect:connector ended", bytes(said.words), code)
        remote = windows.remote_command(windows.check_script(directory, sums[1]))
        outcome, words = await self._run(rank, remote, None, limit_s)
        if outcome.stage == TIMEOUT:
            return f"not checked within {limit_s:.0f} s"
        if outcome.reason is not None:
            return outcome.reason
        if outcome.code:
            lines = words.decode("utf-8", "replace").splitlines() or ["not verified"]
            return lines[0] + " and others" * (len(lines) > 1)
        return None

    async def _on_each(self, act: Callable[[int], Awaitable[None]]) -> None:
        async def one(rank: int) -> None:
            async with self._window:
                await act(rank)

        try:
            async with trio.open_nursery() as nursery:
                for rank in range(len(self.nodes)):
                    nursery.start_soon(one, rank)
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _run(
        self, rank: int, remote: str, sink: Sink | None, limit_s: float
    ) -> tuple[Outcome, bytes]:
        """Run the remote command line on a node; return its end, and its first words on stderr."""
        node = self.nodes[rank]
        said = _Said(rank, sink)
        argv = ["ssh", "-n", "-T", "-x", *self._options, "--", node, remote]
        with trio.move_on_after(limit_s or float("inf")) as scope:
            code = await _call(argv, said)
        words = bytes(said.words)
        if scope.cancelled_caught:
            said.release()
            return Outcome(rank, node, None, stage=TIMEOUT, reason=f"after {limit_s:g} s"), words
        if code == EXIT_SSH and not said.is_released:
            reason = explain("connect:connector ended", words, code)
            return Outcome(rank, node, None, stage="connect", reason=reason), words
        said.release()
        return Outcome(rank, node, code), words


class _Said:
    """What one call has written: ssh's own words are told from the command's only by its end.

    So standard error is held back until there is more of it than ssh would say, or other output.
    """

    def __init__(self, rank: int, sink: Sink | None) -> None:
        self.words = bytearray()
        self.is_released = False
        self._rank = rank
        self._sink = sink

    def took(self, stream: int, data: bytes) -> None:
        if stream == STDERR and not self.is_released:
            self.words += data
            if len(self.words) > WORDS_SIZE_MAX:
                self.release()
            return
        self.release()
        self._give(stream, data)

    def release(self) -> None:
        """The words are the command's: pass them on."""
        if not self.is_released:
            self.is_released = True
            if self.words:
                self._give(STDERR, bytes(self.words))

    def _give(self, stream: int, data: bytes) -> None:
        if self._sink is not None:
            self._sink.output(self._rank, stream, data)


async def _call(argv: Sequence[str], said: _Said, stdin: bytes = b"") -> int:
    """Run ssh or sftp to its end; cancelled: it is killed."""
    start = partial(trio.run_process, argv, stdin=stdin, stdout=PIPE, stderr=PIPE, check=False)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(start)
        for stream, pipe in ((STDOUT, process.stdout), (STDERR, process.stderr)):
            assert pipe is not None
            nursery.start_soon(_pass_on, pipe, said, stream)
    assert process.returncode is not None
    return process.returncode


async def _pass_on(pipe: trio.abc.ReceiveStream, said: _Said, stream: int) -> None:
    async with pipe:
        while data := await pipe.receive_some(READ_SIZE):
            said.took(stream, bytes(data))


def _sums(sources: Sequence[str]) -> tuple[str, int]:
    """Return the file of sums for what sftp will put, and the size of all; raises KaError.

    As sftp does, it takes directories and regular files, and leaves out everything else.
    """
    lines, size = [], 0
    for source in map(Path, sources):
        try:
            files = [source] if source.is_file() else sorted(_files(source))
            for file in files:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                size += file.stat().st_size
                lines.append(f"{digest} {file.relative_to(source.parent).as_posix()}\n")
        except OSError as error:
            raise KaError(Code.USAGE, f"{error.filename}: {error.strerror}") from None
    return "".join(lines), size


def _files(directory: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for where, _, names in os.walk(directory, onerror=refuse):
        for path in (Path(where, name) for name in names):
            if path.is_file() and not path.is_symlink():
                yield path
