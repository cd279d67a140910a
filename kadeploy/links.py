"""How the head reaches a node: OpenSSH, one process for each call.

The interface is small (`Link`), so that another way can take its place.  A node in the deployment
environment shows the host key that `mkenv` gave it, if the head knows one; the system that was
deployed makes its own key, and is only asked who it is.

A machine may say what it likes: of its answers no more than `ANSWER_SIZE_MAX` is taken.

Not here: what is asked (deploying.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from common.errors import Code, KaError, first_error, from_number
from kadeploy import archive
from kadeploy.orders import TOKEN_PATH, Order, to_json

__all__ = ["Identity", "Link", "SshLink", "SshOptions"]

PROGRAM = "/run/kadeploy-node.pyz"
MARKER = "/etc/kadeploy-environment"
"""Is there in the deployment environment only."""
COPY_SIZE = 1 << 20
ANSWER_SIZE_MAX = 16 << 20
SSH_FAILURE = 255


@dataclass(frozen=True, slots=True)
class Identity:
    """What a machine says it is."""

    deployment_environment: bool
    token: str
    boot_id: str


class Link(Protocol):
    async def identify(self) -> Identity:
        """Return what the node is; raises UNREACHABLE."""

    async def ask(self, verb: str, *orders: Order, image: Path | None = None) -> dict[str, Any]:
        """Let the node's program do something; raises what it answers with.

        *image*: what the last order writes.
        """

    async def reboot(self) -> None:
        """Tell the system that runs there to reboot."""


@dataclass(frozen=True, slots=True)
class SshOptions:
    key: Path | None = None
    port: int = 22
    config: Path | None = None
    known_hosts: Path | None = None
    """Of the deployment environment, under the name `kadeploy-environment`."""
    wrapper: tuple[str, ...] = ()
    """Words before `ssh`: a network namespace, a jump."""
    connect_s: int = 15
    """Until the node's ssh server has said its name: while many machines start it may be slow."""

    def words(self, address: str, *, environment: bool) -> list[str]:
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(self.connect_s),
            "ServerAliveInterval": "15",
            "LogLevel": "ERROR",
            "GlobalKnownHostsFile": "/dev/null",
        }
        if environment and self.known_hosts:
            options |= {
                "HostKeyAlias": "kadeploy-environment",
                "UserKnownHostsFile": str(self.known_hosts),
                "StrictHostKeyChecking": "yes",
            }
        else:
            options |= {"UserKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "no"}
        words = [*self.wrapper, "ssh", "-p", str(self.port)]
        words += ["-F", str(self.config)] if self.config else []
        words += ["-i", str(self.key), "-o", "IdentitiesOnly=yes"] if self.key else []
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        return [*words, f"root@{address}", "--"]


class SshLink:
    """A node by ssh, as root."""

    def __init__(self, address: str, options: SshOptions, *, environment: bool = True) -> None:
        """*environment*: only the deployment environment will be talked to, besides `identify`."""
        self._address = address
        self._options = options
        self._environment = environment
        self._pushed_to = ""

    async def identify(self) -> Identity:
        ask = f"test -e {MARKER} && echo yes || echo no; cat {TOKEN_PATH} 2>/dev/null || echo;"
        ask += "cat /proc/sys/kernel/random/boot_id"
        said = await self._run(ask, environment=False)
        lines = said.decode(errors="replace").splitlines()
        if len(lines) != 3:
            raise KaError(Code.PROTOCOL, f"{self._address} does not say what it is")
        return Identity(lines[0] == "yes", lines[1].strip()[:200], lines[2].strip())

    async def ask(self, verb: str, *orders: Order, image: Path | None = None) -> dict[str, Any]:
        await self.push()
        async with self.started(verb) as process:
            assert process.stdin is not None
            with contextlib.suppress(trio.BrokenResourceError):  # its answer says why
                for order in orders:
                    await process.stdin.send_all(json.dumps(to_json(order)).encode() + b"\n")
                if image is not None:
                    await _copy(image, process.stdin)
            await process.stdin.aclose()
            assert process.stdout is not None
            said = await _read(process.stdout)
            await process.wait()
            return self.answer(process, said)

    def answer(self, process: trio.Process, said: bytes) -> dict[str, Any]:
        """Return what the node's program said in its last line; raises what it says failed."""
        try:
            content: dict[str, Any] = json.loads(said.splitlines()[-1])
            good, code = content["ok"], from_number(content.get("code", 0))
        except (IndexError, ValueError, KeyError, TypeError, RecursionError):
            if process.returncode == SSH_FAILURE:
                raise KaError(Code.UNREACHABLE, f"{self._address} cannot be reached") from None
            message = f"{self._address}: no answer ({process.returncode})"
            raise KaError(Code.PROTOCOL, message) from None
        if not good:
            raise KaError(code, _line(content.get("error", "failed")))
        return content

    async def push(self) -> None:
        """See to it that the node has the program; it forgets with every boot."""
        identity = await self.identify()
        if identity.boot_id != self._pushed_to:
            await self._run(f"cat > {PROGRAM}", stdin=archive.build())
            self._pushed_to = identity.boot_id

    @asynccontextmanager
    async def started(self, *words: str) -> AsyncIterator[trio.Process]:
        """Yield the node's program, started with pipes; killed if left early.

        It has mounts of its own, which end with its last process, however that ends.
        """
        command = ["unshare", "--mount", "python3", PROGRAM, *words]
        ssh = self._options.words(self._address, environment=self._environment)
        try:
            process = await trio.lowlevel.open_process(
                [*ssh, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise _not_started(ssh, error) from None
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def reboot(self) -> None:
        # In the background, so that ssh gets an answer before the network goes.
        ask = "(sleep 1; systemctl reboot || reboot -f) >/dev/null 2>&1 </dev/null &"
        await self._run(ask, environment=False)

    async def _run(
        self, command: str, *, stdin: bytes = b"", environment: bool | None = None
    ) -> bytes:
        place = self._environment if environment is None else environment
        words = [*self._options.words(self._address, environment=place), command]
        start = functools.partial(
            trio.run_process, words, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            check=False,
        )  # fmt: skip
        said: list[bytes] = [b"", b""]

        async def read(index: int, source: trio.abc.ReceiveStream) -> None:
            said[index] = await _read(source)

        try:
            async with trio.open_nursery() as nursery:
                process: trio.Process = await nursery.start(start)
                assert process.stdout is not None
                assert process.stderr is not None
                nursery.start_soon(read, 0, process.stdout)
                nursery.start_soon(read, 1, process.stderr)
        except BaseExceptionGroup as group:
            error = first_error(group)
            if isinstance(error, OSError):
                error = _not_started(words, error)
            raise error from None
        if process.returncode != 0:
            lines = said[1].decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else process.returncode
            raise KaError(Code.UNREACHABLE, f"{self._address}: {reason}")
        return said[0]


def _not_started(words: Sequence[str], error: OSError) -> KaError:
    return KaError(Code.UNREACHABLE, f"{words[0]} cannot be started: {error.strerror}")


def _line(said: object) -> str:
    """What a machine says ends up on terminals: printable, in one line."""
    return "".join(char if char.isprintable() else "?" for char in str(said))


async def _copy(path: Path, sink: trio.abc.SendStream) -> None:
    try:
        async with await trio.open_file(path, "rb") as file:
            while data := await file.read(COPY_SIZE):
                await sink.send_all(data)
    except OSError as error:
        raise KaError(Code.EIO, f"image {path}: {error.strerror}") from None


async def _read(source: trio.abc.ReceiveStream) -> bytes:
    said = bytearray()
    async for data in source:
        said += data
        if len(said) > ANSWER_SIZE_MAX:
            raise KaError(Code.PROTOCOL, "the node's answer does not end")
    return bytes(said)
