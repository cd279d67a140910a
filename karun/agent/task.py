"""Tasks: what the agent does itself for a run, each in a child of its own.

A task is a module of the archive with `main(words) -> exit code`.  It is forked, not started
anew: Python is up and the archive is open, so a task begins in about a millisecond.  To everybody
else it is a command like any other: standard streams, signals, its own session, an end.

Which tasks there are is this table's to say; nothing that comes over the wire is ever code.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TASKS = ("place", "give", "relay", "watch")
CODE_BROKEN = 70


def fork(words: list[str], env: dict[str, str], ends: dict[int, int], cwd: str) -> int:
    """Begin a task with these standard streams (by number), others ours; return its process id.

    Raises OSError; FileNotFoundError when there is no such task.
    """
    if words[0] not in TASKS:
        raise FileNotFoundError(2, "no such task", words[0])
    pid = os.fork()
    if pid:
        return pid
    code = CODE_BROKEN
    try:
        os.setsid()
        gc.freeze()  # or what is collected here would close descriptors that are ours by then
        for target, end in ends.items():
            os.dup2(end, target)
        _close_others()
        os.environ.clear()
        os.environ.update(env)
        if cwd:
            os.chdir(cwd)
        code = run(words)
    finally:
        os._exit(code)


def run(words: list[str]) -> int:
    """Do a task here; return the exit code, having said what went wrong."""
    try:
        return _main_of(words[0])(words[1:])
    except Exception as error:
        os.write(2, f"karun: {words[0]}: {error!r}\n".encode("utf-8", "backslashreplace"))
        return CODE_BROKEN


def _main_of(name: str) -> Callable[[list[str]], int]:
    if name == "place":
        from . import place

        return place.main
    if name == "give":
        from . import give

        return give.main
    if name == "watch":
        from . import watch

        return watch.main
    if name == "relay":
        from . import heavy

        return heavy.relay
    raise FileNotFoundError(2, "no such task", name)


def _close_others() -> None:
    archive = sys.path[0]  # may be a file without a name: karun/agent/loader.py
    kept = archive.rpartition("/")[2] if archive.startswith("/proc/self/fd/") else ""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and name != kept:
            try:
                os.close(int(name))
            except OSError:
                pass  # it was the listing itself
