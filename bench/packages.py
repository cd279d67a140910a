"""Debian packages of the peers: what is missing is installed, and said.

Installing must not start anything: the peers' own services would take ports and keep running.  A
policy-rc.d that denies service starts is put in place for the time of the installation, unless the
machine has one already (then that one decides, and is left alone).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.errors import Code, KaError

__all__ = ["ensure"]

_POLICY = Path("/usr/sbin/policy-rc.d")
_POLICY_TEXT = "#!/bin/sh\n# ka-bench: only while it installs packages\nexit 101\n"


def ensure(programs: Mapping[str, str], *, may_install: bool) -> None:
    """Have each program (key) on the machine, from its Debian package (value).

    Raises KaError when one is missing and cannot be installed.
    """
    missing = sorted({package for name, package in programs.items() if not shutil.which(name)})
    if not missing:
        return
    wanted = " ".join(missing)
    if not may_install:
        raise KaError(Code.USAGE, f"not installed: {wanted} (leave out --no-install)")
    if not shutil.which("apt-get"):
        raise KaError(Code.USAGE, f"no apt-get here; install by hand: {wanted}")
    print(f"installing Debian packages: {wanted}", flush=True)
    with _no_service_starts():
        done = _apt_get("install", "--no-install-recommends", *missing)
        if done.returncode:
            # The lists may be old or absent; only then is the network worth the time.
            _apt_get("update")
            done = _apt_get("install", "--no-install-recommends", *missing)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise KaError(Code.USAGE, f"apt-get could not install {wanted}: {last}")


def _apt_get(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["apt-get", "-y", "-q", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def _no_service_starts() -> Iterator[None]:
    # One with our own text was left by a run that was killed: it is ours to remove.
    if _POLICY.exists() and _POLICY.read_text(errors="replace") != _POLICY_TEXT:
        yield
        return
    _POLICY.write_text(_POLICY_TEXT)
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
