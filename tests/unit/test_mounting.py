"""Unmounting: what is said while the mount's process still writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import Code, KaError
from nfsp import mounting
from tests.support.running import wait_until


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like one that serves a mount, and ends when its input does."""
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "mount", str(tmp_path)]
    with subprocess.Popen([*words, "--foreground"], stdin=subprocess.PIPE) as process:
        # The kernel says that the program has begun before it shows its words.
        wait_until(lambda: mounting._is_ours(process.pid), "the process has its command line")
        yield process
        process.kill()


def test_who_unmounts_hears_what_it_waits_for(
    tmp_path: Path, writer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        writer.communicate()

    monkeypatch.setattr(mounting, "UNMOUNT_NOTICE_S", 0.1)
    mounting.unmount(tmp_path, say=say)
    (text,) = said
    assert f"process {writer.pid} still writes data: waiting" in text


def test_one_that_never_ends_is_not_waited_for_for_ever(
    tmp_path: Path, writer: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(KaError, match=f"process {writer.pid} still writes data") as caught:
        mounting.unmount(tmp_path, timeout_s=0.2)
    assert caught.value.code is Code.TIMEOUT


def test_who_uses_what_was_detached_is_waited_for_less_long(
    tmp_path: Path, writer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounting, "LAZY_TIMEOUT_S", 0.2)
    with pytest.raises(KaError, match=f"process {writer.pid} is still in use"):
        mounting.unmount(tmp_path, lazy=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_kernel_that_does_not_let_go_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    program = tmp_path / ("umount" if os.geteuid() == 0 else "fusermount3")
    program.write_text("#!/bin/sh\necho $$ >\"$(dirname \"$0\")\"/pid\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(mounting, "_mount_entry", lambda mountpoint: "fuse.nfsp")
    monkeypatch.setattr(mounting, "DETACH_TIMEOUT_S", 1.0)
    if lazy:
        mounting.detach(tmp_path)  # it has a deadline of its own, and tells nobody
    else:
        with pytest.raises(KaError, match="still has data to write") as caught:
            mounting.unmount(tmp_path, timeout_s=1.0)
        assert caught.value.code is Code.TIMEOUT
    process = Path("/proc") / (tmp_path / "pid").read_text().strip()
    wait_until(lambda: not process.exists(), "umount is ended, and its exit code taken")
