"""Launching side by side: karun, clush, pdsh, parallel-ssh and TakTuk run `true` over ssh.

`python -m bench.launch --nodes 200 --runs 3` starts one sshd that answers on many loopback
addresses, lets the systems take turns, and prints for each the wall time and the CPU time of
everything: clients, sshd and what runs on the nodes, which on one machine is what decides.  Then
the second command: in a karun session, where the others have nothing of the kind.

All get the same ssh configuration and a window of the same size; their defaults are left alone
otherwise.  TakTuk runs flat: its tree needs keys on the nodes, and more time here.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import facts, packages
from bench.sshd import Sshd, addresses
from common.errors import Code, KaError

__all__ = ["main"]

PROGRAMS: Mapping[str, str] = {
    "clush": "clustershell",
    "pdsh": "pdsh",
    "parallel-ssh": "pssh",
    "taktuk": "taktuk",
    "sshd": "openssh-server",
}
KARUN = str(Path(sys.executable).with_name("karun"))
"""As its users start it."""
LIMIT_S = 600.0
PROGRAM = """
import sys, time
import karun, trio

async def main():
    async with karun.Joined("default") as nodes:
        for _ in range(int(sys.argv[1])):
            start_s = time.monotonic()
            await nodes.command(["true"])
            print(time.monotonic() - start_s)

trio.run(main)
"""
"""What a program that has joined a session does."""
ELF_X86_64 = bytes.fromhex(
    "7f454c46020101000000000000000000"  # 64 bits, little-endian, version 1
    "02003e0001000000" "7800400000000000" "4000000000000000" "0000000000000000"
    "00000000" "4000380001000000" "00000000"
    "0100000005000000" "0000000000000000" "0000400000000000" "0000400000000000"
    "8100000000000000" "8100000000000000" "0010000000000000"
    "b83c000000" "31ff" "0f05"  # mov eax, 60; xor edi, edi; syscall: exit(0)
)  # fmt: skip
"""The least program: what a process costs without the start of a C library."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One launch."""

    wall_s: float
    cpu_s: float
    is_good: bool


def commands(nodes: Sequence[str], config: Path, window: int) -> dict[str, list[str]]:
    """Return each system's command line."""
    names = ",".join(nodes)
    launch = [KARUN, "run", "-w", names, "--ssh-config", str(config)]
    hosts = config.with_name("hosts")
    hosts.write_text("".join(f"{node}\n" for node in nodes))
    return {
        "karun": [*launch, "-f", str(window), "-b", "-S", "--", "true"],
        "karun, ssh's own key exchange": [
            *launch, "--no-fast-ssh", "-f", str(window), "-b", "-S", "--", "true",
        ],
        "clush": ["clush", "-w", names, "-f", str(window), "-o", f"-F {config}", "-bS", "true"],
        "pdsh": ["pdsh", "-R", "ssh", "-w", names, "-f", str(window), "-S", "true"],
        "parallel-ssh": [
            "parallel-ssh", "-h", str(hosts), "-p", str(window), "-t", "0",
            "-x", f"-F {config}", "true",
        ],
        "taktuk": [
            "taktuk", "-d", "-1", "-w", str(window), "-c", f"ssh -F {config}",
            "-f", str(hosts), "broadcast", "exec", "[", "true", "]",
        ],
    }  # fmt: skip


def measure(name: str, count: int, window: int) -> Sample:
    """Launch once, with an sshd of its own so that its CPU time is counted."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(prefix="ka-launch-") as place, Sshd(Path(place)) as sshd:
        command = commands(addresses(count), sshd.config, window)[name]
        environment = os.environ | {"PDSH_SSH_ARGS_APPEND": f"-F {sshd.config}"}
        code, wall_s = timed(command, environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(wall_s, cpu_s, code == 0)


def timed(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, float]:
    """Run a command; return its exit code and the seconds to its end.

    Its end is waited for here: subprocess, given a time limit, looks for it every 50 ms only.
    """
    null = subprocess.DEVNULL
    start_s = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdin=null, stdout=null, stderr=null
    ) as process:
        fd = os.pidfd_open(process.pid)
        try:
            if not select.select([fd], [], [], LIMIT_S)[0]:
                process.kill()
            return process.wait(), time.monotonic() - start_s
        finally:
            os.close(fd)


def second_commands(count: int, window: int, runs: int) -> dict[str, list[float]]:
    """Return wall times of commands in sessions, over ssh and direct, the client's start included.

    And what they are made of: the same on one node, without that start, the commands alone, and the
    commands in shells that stand at the end of ssh connections, without anything of karun
    (`Shells`); `true` first, and then the least program that there is.
    """
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ka-launch-") as place, Sshd(Path(place)) as sshd:
        nodes = addresses(count)
        programs = {"": shutil.which("true") or "/bin/true"}
        if platform.machine() == "x86_64":
            least = Path(place) / "least"
            least.write_bytes(ELF_X86_64)
            least.chmod(0o755)
            programs[", least program"] = str(least)
        with Shells(nodes, sshd.config, window) as shells:
            for which, program in programs.items():
                name = f"shells behind ssh{which}"
                times[name] = [shells.run(program) for _ in range(runs)]
        for which, program in programs.items():
            times[f"processes alone{which}"] = [processes(program, count) for _ in range(runs)]
        for kind in ("", "--direct"):
            for name, took_s in in_session(kind, nodes, programs, sshd, window, runs).items():
                times[f"{name} {kind}".strip()] = took_s
    return times


def in_session(
    kind: str,
    nodes: Sequence[str],
    programs: Mapping[str, str],
    sshd: Sshd,
    window: int,
    runs: int,
) -> dict[str, list[float]]:
    """Return wall times of commands in one session; *kind*: an option of its start, or none."""
    environment = os.environ | {"XDG_RUNTIME_DIR": str(sshd.config.parent)}
    start = [
        "session", "start", *kind.split(), "-w", ",".join(nodes),
        "--ssh-config", str(sshd.config), "-f", str(window),
    ]  # fmt: skip
    subprocess.run(
        [KARUN, *start], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT_S
    )
    run = [KARUN, "run", "--session", "default", "-n", "-b", "-S"]
    commands = {f"all nodes{which}": ["--", program] for which, program in programs.items()}
    commands["one node"] = ["-w", nodes[0], "--", programs[""]]
    times: dict[str, list[float]] = {}
    try:
        for name, words in commands.items():
            for _ in range(runs):
                code, took_s = timed([*run, *words], environment)
                if code:
                    raise KaError(Code.UNREACHABLE, f"a command in a session ended with {code}")
                times.setdefault(name, []).append(took_s)
        told = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(runs)],
            env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S,
        ).stdout  # fmt: skip
        times["all nodes, from a program"] = [float(took_s) for took_s in told.split()]
    finally:
        subprocess.run([KARUN, "session", "stop"], env=environment, check=False, timeout=LIMIT_S)
    return times


def processes(program: str, count: int) -> float:
    """Return the time in which this process starts *count* others and sees their ends."""
    environment = dict(os.environ)
    start_s = time.monotonic()
    for _ in range(count):
        os.posix_spawn(program, [program], environment)
    for _ in range(count):
        os.wait()
    return time.monotonic() - start_s


class Shells:
    """A shell on each node, at the end of an ssh connection that stands.

    What ssh and a command cost by themselves: one line to each, a process there, one line back.
    """

    def __init__(self, nodes: Sequence[str], config: Path, window: int) -> None:
        self._shells: list[subprocess.Popen[bytes]] = []
        try:
            for begin in range(0, len(nodes), window):
                fresh = [
                    subprocess.Popen(
                        ["ssh", "-F", str(config), node, "exec sh"],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                    )
                    for node in nodes[begin : begin + window]
                ]  # fmt: skip
                self._shells += fresh
                self._ask(fresh, b"echo 0\n")
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Shells:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, program: str) -> float:
        """Return the time in which all run a program and say how it ended."""
        start_s = time.monotonic()
        self._ask(self._shells, f"{shlex.quote(program)}; echo $?\n".encode())
        return time.monotonic() - start_s

    def _ask(self, shells: Sequence[subprocess.Popen[bytes]], line: bytes) -> None:
        poll = select.epoll()
        waiting = {}
        for shell in shells:
            assert shell.stdin is not None
            assert shell.stdout is not None
            waiting[shell.stdout.fileno()] = shell.stdout
            poll.register(shell.stdout.fileno(), select.EPOLLIN)
            shell.stdin.write(line)
        with poll:
            while waiting:
                said = poll.poll(LIMIT_S)
                for fd, _events in said:
                    poll.unregister(fd)
                    if waiting.pop(fd).read(16) != b"0\n":
                        said = []
                if not said:
                    raise KaError(Code.INTERNAL, "a shell at the end of ssh does not answer")

    def _end(self) -> None:
        for shell in self._shells:
            shell.kill()
            shell.communicate()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options, install what is missing, measure; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.launch", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--systems", default="", help="comma-separated; all without")
    parser.add_argument("--no-install", action="store_true")
    options = parser.parse_args(arguments)
    if min(options.nodes, options.runs, options.window) < 1:
        parser.error("--nodes, --runs and --window take whole numbers from 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that sshd and its keys go
    try:
        packages.ensure(PROGRAMS, may_install=not options.no_install)
        return compare(options)
    except KaError as error:
        print(f"bench.launch: {error}", file=sys.stderr)
        return error.code.exit_code
    except (OSError, subprocess.SubprocessError) as error:
        print(f"bench.launch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # everything is down by now
        return 130


def compare(options: argparse.Namespace) -> int:
    """Measure and print what the options choose; return 1 if something failed."""
    for name, fact in facts.gather(Path(tempfile.gettempdir())).items():
        print(f"{name}: {fact}")
    with tempfile.TemporaryDirectory() as place:
        known = list(commands(["n"], Path(place) / "config", 1))
    chosen = [name for name in known if not options.systems or name in options.systems.split(",")]
    samples: dict[str, list[Sample]] = {name: [] for name in chosen}
    for _ in range(options.runs):
        for name in chosen:
            sample = measure(name, options.nodes, options.window)
            samples[name].append(sample)
            print(f"  {name}: {sample.wall_s:.2f} s", file=sys.stderr, flush=True)
    print(f"\n`true` on {options.nodes} ssh nodes, cold; median of {options.runs}")
    for name, found in samples.items():
        wall_s = statistics.median(one.wall_s for one in found)
        cpu_ms = 1000 * statistics.median(one.cpu_s for one in found) / options.nodes
        failed = "" if all(one.is_good for one in found) else "  FAILED"
        print(f"{name:32} {wall_s:8.2f} s {cpu_ms:8.0f} ms of CPU a node{failed}")
    if "karun" in chosen:
        print("\n`true` in a karun session, and what it is made of; median of 9")
        for name, found_s in second_commands(options.nodes, options.window, 9).items():
            print(f"{name:36} {1000 * statistics.median(found_s):8.0f} ms")
    return 0 if all(one.is_good for found in samples.values() for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
