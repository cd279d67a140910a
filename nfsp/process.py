"""Processes: what every daemon of nfsp does around its work, and how others find and stop it.

A running daemon holds a lock on its pid file, so a stale file is never taken for a process.
Starting in the background waits for the daemon's word that it is ready, or for its end: then the
reason is the last line of its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pwd
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import trio

from common import log
from common.errors import Code, KaError, first_error
from common.signals import ending, on_signal

__all__ = ["PidFile", "drop_privileges", "run_until_signal", "spawn", "stop"]

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
END_TIMEOUT_S = 5.0
"""What a process that is given up at its start gets to clean up."""
OPEN_FILES = 65536
MALLOC_MAP_SIZE = 32 << 20
MALLOC_KEEP_SIZE = 128 << 20
_PR_SET_NO_NEW_PRIVS = 38
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_BY_EXIT_CODE = {
    code.exit_code: code
    for code in (Code.USAGE, Code.UNREACHABLE, Code.AUTH, Code.ENGINE_DAMAGED)
}
"""How an ended process's exit code is handed on."""

_log = log.get("nfsp.process")


class PidFile:
    """A pid file whose lock lives as long as the process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file for the length of a with block; raises EBUSY if another process does."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise KaError(Code.EBUSY, f"already running: {self._path.stem}") from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            yield
            with contextlib.suppress(OSError):
                self._path.unlink()
        finally:
            os.close(fd)

    def owner(self) -> int | None:
        """Return the pid of the process that holds the file, if one does."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            text = os.pread(fd, 32, 0).strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(fd)


def drop_privileges(user: str) -> None:
    """Give up what a daemon does not need: root, if *user* is named, and gaining privileges."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not user or os.geteuid() != 0:
        return
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise KaError(Code.USAGE, f"no such user: {user}") from None
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def run_until_signal(
    work: Callable[[Callable[[], None]], Awaitable[None]], *, ready_fd: int | None
) -> None:
    """Run `work(ready)` until it ends or a signal asks for the end."""
    _keep_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)

    async def supervised() -> None:
        async with trio.open_nursery() as nursery:

            def stop(number: signal.Signals) -> None:
                _log.info("process.stopping", signal=number.name)
                nursery.cancel_scope.cancel()

            await nursery.start(on_signal, stop)
            await work(ready)
            nursery.cancel_scope.cancel()

    try:
        trio.run(supervised, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        raise first_error(group) from None


def _keep_memory() -> None:
    """Let malloc keep freed megabytes: mapping them anew costs more than copying into them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MALLOC_MAP_SIZE)
        libc.mallopt(_M_TRIM_THRESHOLD, MALLOC_KEEP_SIZE)


def spawn(arguments: list[str], log_path: Path) -> int:
    """Start `nfsp ARGUMENTS --ready-fd N` in the background; return its pid when it is ready.

    Raises KaError with the last line of its log, and its exit code, when it ends before that.
    Interrupted or too late, it leaves no process behind.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    process: subprocess.Popen[bytes] | None = None
    try:
        with open(log_path, "ab") as sink, signals_held():
            start = sink.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "nfsp", *arguments, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=(writer,),
                start_new_session=True,
            )
        os.close(writer)
        writer = -1
        os.set_blocking(reader, False)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                word = os.read(reader, 16)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            if word:
                process.returncode = 0  # it lives on: nobody here waits for it
                return process.pid
            words = _last_words(process, log_path, start)
            raise KaError(_BY_EXIT_CODE.get(process.returncode, Code.INTERNAL), words)
        raise KaError(Code.TIMEOUT, f"not ready after {START_TIMEOUT_S:.0f} s; see {log_path}")
    except BaseException:
        if process is not None:
            _end(process)
        raise
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let what asks us to end wait for the end of the block; in the main thread, that is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = ending()
    before = [signal.signal(number, lambda number, frame: caught.append(number))
              for number in numbers]  # fmt: skip
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child that is not wanted any more, gently if it lets us."""
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(process: subprocess.Popen[bytes], log_path: Path, start: int) -> str:
    code = process.wait(STOP_TIMEOUT_S)
    with open(log_path, "rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    if not lines:
        return f"ended with {code} and no word; see {log_path}"
    return lines[-1].removeprefix("nfsp: ")


def stop(pid: int, owner: Callable[[], int | None]) -> bool:
    """End a process gently, then by force; return whether gently was enough.

    *owner* says who holds its pid file: it has done its work when it no longer does.  Then it is
    waited for, so that nothing is left when a command says so.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        if owner() != pid and not _is_alive(pid):
            return True
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while owner() == pid:
        time.sleep(0.02)
    return False


def _is_alive(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry its parent has not read."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
