"""The agent's archive, what it costs to start, and what starts it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from karun import archive

ALLOWED = {
    "_heapq", "_functools", "_socket", "_struct", "__future__", "heapq", "select", "time",
    "karun", "karun.agent",
    *(f"karun.agent.{name}" for name in (
        "channel", "frames", "keeper", "loop", "main", "member", "process", "setup",
    )),
}  # fmt: skip
"""What a leaf of the tree loads.  Adding to it costs every node of every run."""
AT_START = {
    "os", "os.path", "stat", "_stat", "posixpath", "genericpath", "_collections_abc", "zipimport",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    second = Path(f"/tmp/karun-{os.geteuid()}") / f"{archive.build().digest}.zip"
    second.unlink(missing_ok=True)
    yield
    second.unlink(missing_ok=True)


def python(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-I", "-S", *words], input=data, capture_output=True, timeout=30
    )


def test_archives_are_the_same_whoever_builds_them(tmp_path: Path) -> None:
    script = (
        "import os, sys; os.environ['XDG_CACHE_HOME'] = '/dev/null/none'\n"
        "for name in sys.argv[1:]: __import__(name)\n"
        "from karun import archive\n"
        "print(archive.build().digest, archive.build_heavy().digest)"
    )
    root = str(Path(archive.__file__).parent.parent)
    more = ("hypothesis", "pytest", "karun.api", "kadeploy.cli")
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, *others], capture_output=True, text=True, cwd=root,
            check=True, env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed, others in (("1", ()), ("2", more))
    }  # fmt: skip
    assert digests == {f"{archive.build().digest} {archive.build_heavy().digest}\n"}


def test_the_archive_is_kept_and_a_damaged_one_is_built_anew() -> None:
    first = archive.build()
    directory = archive.cache_directory()
    assert directory is not None
    (kept,) = directory.glob("agent-*.archive")
    assert archive.build() == first
    kept.write_bytes(b"damaged")
    assert archive.build() == first


def test_what_goes_over_the_wire_is_little_more_than_a_hundred_kibibytes() -> None:
    assert len(archive.build().data) < 144 << 10
    assert len(archive.build_heavy().data) < 1 << 20, "only where a copy needs it"
    assert len(archive.build().loader) < 8 << 10, "it is an argument, and an ssh packet"


def test_a_leaf_loads_few_modules(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    path.write_bytes(zlib.decompress(archive.build().data))
    script = (
        f"import sys; sys.path.insert(0, {str(path)!r}); before = set(sys.modules)\n"
        "import karun.agent.main; print(*sorted(set(sys.modules) - before))"
    )
    done = python("-c", script)
    assert set(done.stdout.decode().split()) <= ALLOWED | AT_START, done.stderr


def test_another_python_can_do_without_the_compiled_modules(tmp_path: Path) -> None:
    whole = zipfile.ZipFile(BytesIO(zlib.decompress(archive.build().data)))
    path = tmp_path / "agent.zip"
    with zipfile.ZipFile(path, "w") as stripped:
        for name in whole.namelist():
            if not name.endswith("c"):
                stripped.writestr(name, whole.read(name))
    script = f"import sys; sys.path.insert(0, {str(path)!r}); import karun.agent.hub"
    assert python("-c", script).returncode == 0


def load(data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return python("-c", archive.build().loader, data=data)


def kept_by_node() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "karun" / f"{archive.build().digest}.zip"


def test_a_node_asks_for_the_archive_once() -> None:
    data = archive.build().data
    assert load(data).stdout.startswith(b"KARUN1 need\nKARUN1 have\n")
    assert load().stdout.startswith(b"KARUN1 have\n")


def test_an_archive_with_a_flipped_bit_is_not_run() -> None:
    load(archive.build().data)
    path = kept_by_node()
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    assert load().stdout == b"KARUN1 need\n"
    damaged = zlib.compress(bytes(changed), 9).ljust(len(archive.build().data), b"\0")
    sent = damaged[: len(archive.build().data)]
    assert not load(sent).stdout.endswith(b"have\n")


def test_a_cache_that_others_can_write_is_not_used() -> None:
    load(archive.build().data)
    kept_by_node().parent.chmod(0o777)
    assert b"KARUN1 need\n" in load(archive.build().data).stdout


def test_a_cache_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    load(archive.build().data)
    path = kept_by_node()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert load().stdout == b"KARUN1 need\n"


def test_the_loader_reads_under_an_old_python() -> None:
    """No syntax younger than Python 3.6, so that an old one comes as far as to say it is old."""
    ast.parse(archive.loader_text(), feature_version=(3, 6))
