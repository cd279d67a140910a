"""`make demo`: a whole nfsp cluster on this machine, real data through it, every byte compared.

A metadata server and three data servers are started by the `nfsp` command, as a user would start
them; a tree of the machine's own files is copied in; the file system is mounted anew and every
file is compared with what was written; it is shown where the bytes lie; a large file is written
and read cold; fsck must find nothing; all is torn down.

Exit code: 0 if everything was equal and clean; 1 if anything was not, or failed; 2 if it could not
begin; 130 or 143 when interrupted.  In every case nothing is left running, mounted or stored.

Not here: what is copied and compared (demo_data), the place and its clearing (demo_place).
Figures of one run on one machine are no benchmark: that is `make bench`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import demo_data
from bench.demo_data import Tree, sources
from bench.demo_place import DISK_SPARE_SIZE, Place, choose_base, place
from common.config import format_size, parse_size
from common.errors import EXIT_FAILURE, EXIT_USAGE, Code, KaError

__all__ = ["Options", "Sheet", "main", "parse", "run"]

IODS = 3
FILES_MIN = 5000
TREE_SIZE_MIN = 300_000_000
LARGE_SIZE = "1GiB"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    files_min: int
    tree_size_min: int
    large_size: int
    directory: Path | None


@dataclass(slots=True)
class Sheet:
    """What was found: the rows of the final table, and whatever differed."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(what, result, rate)"""
    differences: list[str] = field(default_factory=list)

    def add(self, what: str, result: str, rate: str = "") -> None:
        self.rows.append((what, result, rate))

    def lay_out(self) -> str:
        """Return the table."""
        widths = [max(len(row[column]) for row in self.rows) for column in range(2)]
        lines = [
            f"  {what:<{widths[0]}}  {result:<{widths[1]}}  {rate}".rstrip()
            for what, result, rate in self.rows
        ]
        return "\n".join(lines)


class Screen:
    """Progress: a line that is overwritten on a terminal, and only finished lines in a pipe."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._shown_at = 0.0
        self._width = 0

    def say(self, text: str) -> None:
        """Print a line."""
        self._wipe()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        """Show how far a step is; at most ten times a second."""
        now = time.monotonic()
        if not self._is_terminal or now < self._shown_at + 0.1:
            return
        self._wipe()
        self._shown_at = now
        self._width = len(text) + 2
        print(f"  {text}", end="", flush=True)

    def _wipe(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="")
            self._width = 0


class _Step:
    """A step under way: how long it takes, and what comes of it."""

    def __init__(self, screen: Screen, title: str) -> None:
        self._screen = screen
        self._title = title
        self._started_at = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started_at, 1e-6)

    def of(self, whole: int) -> Callable[[int], None]:
        """Return a function that shows a part of the whole as percent."""
        return lambda part: self._screen.progress(f"{self._title} {100 * part // max(whole, 1)} %")

    def rate(self, size: int) -> str:
        return f"{size / self.seconds / 1e6:.0f} MB/s"


@contextmanager
def _step(screen: Screen, title: str) -> Iterator[_Step]:
    screen.progress(title)
    step = _Step(screen, title)
    yield step
    screen.say(f"{title}: {step.seconds:.1f} s")


# ---------------------------------------------------------------- the steps


def run(options: Options, screen: Screen) -> int:
    """Do everything; return the exit code."""
    needed = options.tree_size_min + options.large_size + DISK_SPARE_SIZE
    base = choose_base(options.directory, needed)
    sheet = Sheet()
    with place(base, say=screen.say) as where:
        _start(where, screen)
        tree = _copy_in(where, options, screen, sheet)
        _compare(where, tree, screen, sheet)
        _show_shares(where, screen, sheet)
        _large_file(where, options.large_size, screen, sheet)
        _check(where, screen, sheet)
    for line in sheet.differences:
        print(f"demo: {line}", file=sys.stderr)
    screen.say("")
    screen.say(sheet.lay_out())
    if sheet.differences:
        screen.say("\nNot as it should be: see above.")
        return EXIT_FAILURE
    screen.say("\nEverything written was read back equal; fsck found nothing; all is torn down.")
    return 0


def _start(where: Place, screen: Screen) -> None:
    with _step(screen, f"starting 1 mds and {IODS} iods below {where.directory}, mounting"):
        where.nfsp(
            "up", str(where.cluster), "--iods", str(IODS), "--mount", str(where.mount), "--daemon"
        )


def _copy_in(where: Place, options: Options, screen: Screen, sheet: Sheet) -> Tree:
    screen.progress("choosing files of this machine")
    picked = demo_data.pick(sources(), options.files_min, options.tree_size_min)
    total = sum(one.size for one in picked)
    if not picked or total < options.tree_size_min:
        raise KaError(Code.USAGE, f"this machine has only {total / 1e6:.0f} MB of files to copy")
    with _step(screen, "copying a real tree in") as step:
        tree = demo_data.copy_in(picked, where.mount / "tree", step.of(total))
    size = tree.size
    sheet.add(
        "real tree copied in",
        f"{tree.file_count:,} files, {size / 1e6:.0f} MB in {step.seconds:.1f} s",
        f"{step.rate(size)}, {tree.file_count / step.seconds:.0f} files/s",
    )
    return tree


def _compare(where: Place, tree: Tree, screen: Screen, sheet: Sheet) -> None:
    _remount(where, screen)
    with _step(screen, "comparing every file by checksum") as step:
        differences = demo_data.compare(tree, where.mount / "tree", step.of(tree.size))
    sheet.differences += differences
    equal = "all equal" if not differences else f"{len(differences)} DIFFER"
    sheet.add(
        "compared after remounting",
        f"{tree.file_count:,} files by SHA-256 in {step.seconds:.1f} s: {equal}",
        step.rate(tree.size),
    )


def _remount(where: Place, screen: Screen) -> None:
    """Nothing is in any cache afterwards: not the client's, nor the kernel's."""
    with _step(screen, "unmounting, dropping the caches, mounting again"):
        where.nfsp("umount", str(where.mount))
        where.drop_caches()
        where.nfsp("-c", str(where.config), "mount", str(where.mount))


def _show_shares(where: Place, screen: Screen, sheet: Sheet) -> None:
    """Show that every iod holds its share of the tree."""
    shares = [where.share(iod) for iod in range(1, IODS + 1)]
    total = sum(share.size for share in shares) or 1
    for share in shares:
        sheet.add(
            f"stored by iod{share.iod}",
            f"{share.file_count:,} chunk files, {share.size / 1e6:.0f} MB",
            f"{100 * share.size / total:.0f} % of the tree",
        )
        if not share.size:
            sheet.differences.append(f"iod{share.iod} holds nothing")
    one = shares[0]
    screen.say(f"iod1 holds {one.file_count:,} chunk files below {where.cluster}/iod1, such as")
    for name, size in one.largest:
        screen.say(f"    {name:<24} {format_size(size)}")


def _large_file(where: Place, size: int, screen: Screen, sheet: Sheet) -> None:
    path = where.mount / "large"
    with _step(screen, f"writing a file of {format_size(size)}") as step:
        sums = demo_data.write_large(path, size, step.of(size))
    sheet.add(
        f"{format_size(size)} written, fsynced", f"in {step.seconds:.1f} s", step.rate(size)
    )
    _show_layout(where, path, screen, sheet)
    _remount(where, screen)
    with _step(screen, "reading it back") as step:
        wrong = demo_data.read_large(path, sums, step.of(size))
    if wrong:
        sheet.differences.append(f"{path.name}: {wrong} of {len(sums)} MiB differ")
    equal = "all equal" if not wrong else f"{wrong} MiB DIFFER"
    sheet.add("read cold", f"in {step.seconds:.1f} s: {equal}", step.rate(size))


def _show_layout(where: Place, path: Path, screen: Screen, sheet: Sheet) -> None:
    """Show where the large file's chunks lie: what the layout says, and the chunk files."""
    ino = path.stat().st_ino
    screen.say(f"$ nfsp layout {path}")
    rule = where.nfsp("layout", str(path))
    screen.say(rule)
    chunk_size, chains = demo_data.parse_layout(rule)
    for column, chain in enumerate(chains):
        chunks = ", ".join(str(column + row * len(chains)) for row in range(3))
        found = where.chunk_file(chain, ino, column)
        if found is None:
            sheet.differences.append(f"iod{chain} has no chunk file of inode {ino}")
            continue
        name, stored = found
        screen.say(f"    chunks {chunks}, ... on iod{chain}: {name}, {format_size(stored)}")
    sheet.add(
        "its chunks",
        f"of {format_size(chunk_size)} on {', '.join(f'iod{chain}' for chain in chains)} in turn",
    )


def _check(where: Place, screen: Screen, sheet: Sheet) -> None:
    with _step(screen, "fsck"):
        code, text = where.try_nfsp("-c", str(where.config), "fsck")
    if code:
        sheet.differences.append(f"fsck exits {code}: {text}")
    sheet.add("nfsp fsck", "clean" if not code else f"exit code {code}")


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str]) -> Options:
    """Return what the command line asks for; raises KaError USAGE."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Run an nfsp cluster on this machine, put real data through it, verify.",
        epilog="example: python -m bench.demo --files 500 --tree-size 20MB --size 64MiB",
    )
    # fmt: off
    parser.add_argument("--files", type=int, default=FILES_MIN,
                        help="at least so many are copied; default: %(default)s")
    parser.add_argument("--tree-size", default=f"{TREE_SIZE_MIN // 10**6}MB",
                        help="at least so much is copied; default: %(default)s")
    parser.add_argument("--size", default=LARGE_SIZE,
                        help="of the large file; default: %(default)s")
    parser.add_argument("--directory", type=Path, metavar="DIR",
                        help="where the cluster stores; default: /var/tmp or where there is room")
    # fmt: on
    given = parser.parse_args(arguments)
    if given.files < 1:
        raise KaError(Code.USAGE, "--files must be at least 1")
    large_size = parse_size(given.size)
    if large_size < 1:
        raise KaError(Code.USAGE, "--size must be at least 1")
    return Options(given.files, parse_size(given.tree_size), large_size, given.directory)


def _on_signal(number: int, _frame: types.FrameType | None) -> None:
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # once is enough: nothing may cut the clearing short
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)
    screen = Screen()
    try:
        return run(parse(sys.argv[1:] if arguments is None else arguments), screen)
    except KaError as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_USAGE if error.code in (Code.USAGE, Code.ENOSPC) else EXIT_FAILURE
    except OSError as error:  # what the mount answers: the very thing the demo is about
        print(f"demo: {error.filename or 'the mount'}: {os.strerror(error.errno or 0)}",
              file=sys.stderr)  # fmt: skip
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
