"""The guest kernel that other tests rely on: it runs, it serves NFS, it cannot hurt the host."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import uml

pytestmark = pytest.mark.uml
ROOT = Path(__file__).parent.parent.parent


def test_a_guest_serves_nfs_3_and_4_2_to_itself(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.support.guest_nfs"]
    outcome = uml.boot(program, share=tmp_path / "share", working_directory=ROOT)
    assert "served over NFS 3 4.2" in outcome.check()


def test_a_guest_can_change_nothing_on_the_host(tmp_path: Path) -> None:
    target = tmp_path / "outside"
    script = f"echo >{target}; echo >/etc/ka-guest && test -e /etc/ka-guest && exit 7"
    outcome = uml.boot(["sh", "-c", script], share=tmp_path / "share", working_directory=ROOT)
    assert outcome.status == 7, outcome
    assert "Read-only file system" in outcome.output
    assert not target.exists()
    assert not Path("/etc/ka-guest").exists()


def test_a_guest_that_hangs_is_ended_at_its_time_limit(tmp_path: Path) -> None:
    outcome = uml.boot(
        ["sleep", "600"], share=tmp_path / "share", working_directory=ROOT, time_limit_s=3
    )
    assert outcome.status is None
    assert outcome.elapsed_s < 30
    with pytest.raises(AssertionError, match="ended with None"):
        outcome.check()
