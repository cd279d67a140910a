"""What the tests of karun share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

__all__ = ["Collect", "Shell", "is_running", "resident_size"]


class Collect:
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, int], bytes] = {}
        self.told: Counter[int] = Counter()
        self.failures: dict[int, tuple[str, str]] = {}

    def output(self, rank: int, stream: int, data: bytes) -> None:
        assert not self.told[rank], "output after the end"
        self.outputs[rank, stream] = self.outputs.get((rank, stream), b"") + data

    def exited(self, rank: int, code: int, signal: int) -> None:
        self.told[rank] += 1

    def failed(self, rank: int, stage: str, reason: str) -> None:
        self.told[rank] += 1
        self.failures[rank] = (stage, reason)


class Shell:
    """The command line, with a runtime directory of its own."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        top = str(Path(__file__).parents[2])
        self.env = os.environ | {"XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": top}

    def __call__(
        self, *words: str, stdin: bytes = b"", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*words), input=stdin, capture_output=True, timeout=60,
                              env=self.env, cwd=cwd, check=False)  # fmt: skip

    def start(
        self, *words: str, stdout: int = subprocess.PIPE, stderr: int | None = None
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*words), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env=self.env,
        )  # fmt: skip

    @staticmethod
    def command(*words: str) -> list[str]:
        return [sys.executable, "-m", "karun.entry", *words]


def is_running(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def resident_size(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10
