"""Ways to send one file to many nodes: Ka's, and its peers as Debian packs them.

Each runs in the namespaces of a `NetLab`, node 0 sending.  Receivers are started first; the clock
runs from the moment the sender may begin until the last process that takes part has ended.
Processor time is that of all processes of the way, less what Ka's interpreters used to start.
Files are written to memory (tmpfs), so that one disk does not serve all the nodes.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from bench.netlab import NetLab
from bench.systems import command, wait_until
from common.broadcast.cost import Network
from common.broadcast.job import encode_job
from common.broadcast.node import HopOptions
from common.broadcast.planner import Request, make_plan
from common.broadcast.topology import Kind, Shape
from common.broadcast.transfer import new_job
from common.errors import Code, KaError

__all__ = ["WAYS", "Broadcast", "Copied", "Run", "Setting", "Way"]

READY_S = 1.0
"""Peers do not say when their receivers listen."""
READY_TIMEOUT_S = 20.0
END_TIMEOUT_S = 120.0
"""A way that takes longer has failed."""
TOO_EARLY = "a process of the copy ended too early; see ka.log"
PORT = 7007
UNSHAPED_MBIT = 10_000.0
"""What a link is taken for that is not shaped."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be copied, and where."""

    lab: NetLab
    source: Path
    directory: Path
    racks: tuple[int, ...]
    """Receivers in each rack."""
    rate_mbit: float
    uplink_mbit: float

    @property
    def nodes(self) -> range:
        return range(1, sum(self.racks) + 1)

    def target(self, node: int) -> Path:
        return self.directory / str(node) / "copy"


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of one copy."""

    seconds: float
    cpu_s: float
    """Of all processes, the sender's among them."""
    remark: str = ""


class Way(ABC):
    """One way to copy."""

    name: ClassVar[str]
    programs: ClassVar[Mapping[str, str]] = {}
    """Program -> Debian package."""

    @abstractmethod
    def copy(self, setting: Setting) -> Copied:
        """Copy `setting.source` to every node's target; raises KaError when it fails."""


class Run:
    """Processes of one way, and what they used; killed when they take too long."""

    def __init__(self, log: Path, *, timeout_s: float = END_TIMEOUT_S) -> None:
        self._log = log
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.cpu_s = 0.0
        self._alarm = threading.Timer(timeout_s, self._kill)
        self._alarm.start()

    def start(self, arguments: Sequence[str], *, talks: bool = False) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                list(arguments),
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append((shlex.join(arguments[4:6]), process))
        return process

    def wait(self, *, last_only: bool = False) -> None:
        """Wait for all, with what their own children used; raises KaError if one fails.

        *last_only*: the others are daemons, and are ended when the last has ended.
        """
        failed = ""
        for name, process in reversed(self._running):
            if last_only and process is not self._running[-1][1]:
                os.killpg(process.pid, signal.SIGTERM)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            _close(process)
            self.cpu_s += usage.ru_utime + usage.ru_stime
            if process.returncode and not (last_only and process is not self._running[-1][1]):
                failed = failed or f"{name} ended with {process.returncode}"
        self._running.clear()
        if failed:
            raise KaError(Code.UNREACHABLE, f"{failed}; see {self._log}")

    def end(self) -> None:
        """End what is left, with its children."""
        self._alarm.cancel()
        self._kill()
        for _, process in self._running:
            process.wait()
            _close(process)
        self._running.clear()

    def _kill(self) -> None:
        for _, process in self._running:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _close(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


class Broadcast:
    """The processes of one broadcast, which wait for their job."""

    def __init__(self, run: Run, setting: Setting, chunk_size: int, *options: str) -> None:
        """*options*: more of a node's command line.  Raises KaError when one does not start."""
        what = [["source", "--from", str(setting.source), "--chunk-size", str(chunk_size)]]
        for node in setting.nodes:
            what.append(["node", "--rank", str(node), "--to", str(setting.target(node)), *options])
        lab = setting.lab
        self.processes = [
            run.start(
                lab.inside(node, sys.executable, "-m", "common.broadcast", *words,
                           "--listen", f"{lab.address(node)}:0"),
                talks=True,
            )
            for node, words in enumerate(what)
        ]  # fmt: skip
        self._addresses = [_line(process.stdout) for process in self.processes]

    def begin(self, shape: Shape, options: HopOptions) -> float:
        """Give all their job; return when; raises KaError when one is gone."""
        text = encode_job(new_job(shape, self._addresses, options))
        began_s = time.monotonic()
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(base64.b64encode(text) + b"\n")
                process.stdin.flush()
            except OSError:
                raise KaError(Code.UNREACHABLE, TOO_EARLY) from None
        return began_s


class KaCopy(Way):
    """The broadcast engine, with the shape that the planner chooses."""

    name = "ka"
    kind: ClassVar[Kind | None] = None

    def copy(self, setting: Setting) -> Copied:
        rate = (setting.rate_mbit or UNSHAPED_MBIT) * 1e6 / 8
        network = Network(up_rate=rate, down_rate=rate, uplink_rate=setting.uplink_mbit * 1e6 / 8)
        size = setting.source.stat().st_size
        plan = make_plan(Request(size, setting.racks, network, kind=self.kind)).chosen
        run = Run(setting.directory / "ka.log")
        try:
            broadcast = Broadcast(run, setting, plan.chunk_size)
            options = HopOptions(expected_rate=rate if setting.rate_mbit else 0.0)
            began_s = broadcast.begin(plan.shape, options)
            reports = [json.loads(_line(process.stdout)) for process in broadcast.processes]
            seconds = time.monotonic() - began_s
            run.wait()
        finally:
            run.end()
        notes = f", {len(reports[0]['notes'])} notes" if reports[0]["notes"] else ""
        remark = f"{plan.name}, chunks of {plan.chunk_size >> 10} KiB{notes}"
        return Copied(seconds, sum(report["cpu_s"] for report in reports), remark)


class KaStripes(KaCopy):
    name = "ka-stripes"
    kind = Kind.STRIPES


class KaMulticast(KaCopy):
    """A pass by UDP multicast, and connections for what it does not bring."""

    name = "ka-multicast"
    kind = Kind.MULTICAST


def _line(stream: IO[bytes] | None) -> str:
    assert stream is not None
    line = stream.readline()
    if not line:
        raise KaError(Code.UNREACHABLE, TOO_EARLY)
    return line.decode().strip()


class _Peer(Way):
    """Receivers, a moment, then the sender."""

    def copy(self, setting: Setting) -> Copied:
        run = Run(setting.directory / f"{self.name}.log")
        try:
            for node in reversed(setting.nodes):
                run.start(setting.lab.inside(node, *self.receiver(setting, node)))
                self.await_receiver(setting, node)
            time.sleep(READY_S)
            began_s = time.monotonic()
            run.start(setting.lab.inside(0, *self.sender(setting)))
            self.finish(run)
            return Copied(time.monotonic() - began_s, run.cpu_s)
        finally:
            run.end()

    @abstractmethod
    def receiver(self, setting: Setting, node: int) -> list[str]:
        """Return a node's command line."""

    @abstractmethod
    def sender(self, setting: Setting) -> list[str]:
        """Return the sender's command line."""

    def await_receiver(self, setting: Setting, node: int) -> None:
        """Wait until the next receiver may be started."""

    def finish(self, run: Run) -> None:
        run.wait()


class NcTee(_Peer):
    """A chain of nc | tee: no sums, no healing, nobody is told."""

    name = "nc+tee"
    programs: ClassVar[Mapping[str, str]] = {"nc": "netcat-openbsd"}

    def await_receiver(self, setting: Setting, node: int) -> None:
        listing = setting.lab.inside(node, "ss", "-Hltn", "sport", "=", f":{PORT}")
        wait_until(lambda: bool(command(*listing)), f"node {node}'s nc", timeout_s=READY_TIMEOUT_S)

    def receiver(self, setting: Setting, node: int) -> list[str]:
        target = shlex.quote(str(setting.target(node)))
        line = f"nc -l {PORT} > {target}"
        if node + 1 in setting.nodes:
            line = f"nc -l {PORT} | tee {target} | nc -N {setting.lab.address(node + 1)} {PORT}"
        return ["bash", "-c", line]

    def sender(self, setting: Setting) -> list[str]:
        source = shlex.quote(str(setting.source))
        return ["bash", "-c", f"nc -N {setting.lab.address(1)} {PORT} < {source}"]


class Flat(_Peer):
    """The sender sends to each by itself, all at once, as a loop around scp or rsync does."""

    name = "flat"
    programs: ClassVar[Mapping[str, str]] = {"nc": "netcat-openbsd"}

    def receiver(self, setting: Setting, node: int) -> list[str]:
        return ["bash", "-c", f"nc -l {PORT} > {shlex.quote(str(setting.target(node)))}"]

    def sender(self, setting: Setting) -> list[str]:
        source = shlex.quote(str(setting.source))
        sends = [f"nc -N {setting.lab.address(n)} {PORT} < {source} &" for n in setting.nodes]
        return ["bash", "-c", " ".join([*sends, "wait"])]


class Udpcast(_Peer):
    """UDP multicast with NACKs, told to stay a little below the rate of the links."""

    name = "udpcast"
    programs: ClassVar[Mapping[str, str]] = {
        "udp-sender": "udpcast",
        "udp-receiver": "udpcast",
    }

    def receiver(self, setting: Setting, node: int) -> list[str]:
        return ["udp-receiver", "--interface", "eth0", "--nokbd", "--file",
                str(setting.target(node)), "--start-timeout", "30"]  # fmt: skip

    def sender(self, setting: Setting) -> list[str]:
        count = str(len(setting.nodes))
        return ["udp-sender", "--interface", "eth0", "--nokbd", "--full-duplex", "--file",
                str(setting.source), "--min-receivers", count, "--max-wait", "20",
                "--max-bitrate", f"{int((setting.rate_mbit or UNSHAPED_MBIT) * 950)}k"]  # fmt: skip


class Uftp(_Peer):
    """UDP multicast with NACKs, another one; its receivers are daemons."""

    name = "uftp"
    programs: ClassVar[Mapping[str, str]] = {"uftp": "uftp", "uftpd": "uftp"}

    def receiver(self, setting: Setting, node: int) -> list[str]:
        directory = str(setting.target(node).parent)
        return ["uftpd", "-d", "-I", "eth0", "-D", directory, "-U", f"0x{node:08X}"]

    def sender(self, setting: Setting) -> list[str]:
        rate_kbit = str(int((setting.rate_mbit or UNSHAPED_MBIT) * 950))
        # Without the list it would wait for more receivers for many seconds.
        hosts = ",".join(f"0x{node:08X}" for node in setting.nodes)
        return ["uftp", "-I", "eth0", "-R", rate_kbit, "-D", "copy", "-H", hosts,
                str(setting.source)]  # fmt: skip

    def finish(self, run: Run) -> None:
        run.wait(last_only=True)


WAYS: tuple[type[Way], ...] = (KaCopy, KaStripes, KaMulticast, NcTee, Udpcast, Uftp, Flat)
