"""Python's own regression tests: what they say on a mount is what they say on the local disk.

Each module of them runs twice, with its working and temporary directory on either; every single
test must have the same verdict.  They run as whoever runs this, and skip what that user may not.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("test.test_os") is None,
        reason="this Python comes without its test suite (Debian: libpython3.*-testsuite)",
    ),
]
TIME_LIMIT_S = 600

# Two groups, for two workers: the second is as long as all others together.
MODULES = {
    "cpython-1": (
        "test_os", "test_posix", "test_posixpath", "test_shutil", "test_tempfile", "test_pathlib",
        "test_glob", "test_fileio", "test_io", "test_mmap", "test_zipfile", "test_sqlite3",
        "test_dbm", "test_mailbox", "test_fcntl", "test_stat", "test_largefile",
    ),
    "cpython-2": ("test_tarfile",),
}  # fmt: skip


def _verdicts(module: str, directory: Path, report: Path) -> dict[str, str]:
    """Run a module with its files in *directory*; return each test's verdict."""
    directory.mkdir()
    environment = {**os.environ, "TMPDIR": str(directory), "PYTHONWARNINGS": ""}
    done = subprocess.run(
        [
            sys.executable, "-m", "test", "--tempdir", directory, "--junit-xml", report,
            "--timeout", str(TIME_LIMIT_S), module,
        ],
        cwd=directory, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if not report.exists():
        raise AssertionError(f"{module} in {directory}: exit {done.returncode}\n{done.stdout}")
    verdicts = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = {child.tag: child.text for child in case}
        kind = next((kind for kind in ("error", "failure", "skipped") if kind in found), "passed")
        text = f": {found[kind]}" if kind in ("error", "failure") else ""
        verdicts[case.attrib["name"]] = kind + text
    assert verdicts, done.stdout
    return verdicts


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(module, marks=pytest.mark.xdist_group(group))
        for group, modules in MODULES.items()
        for module in modules
    ],
)
def test_verdicts_are_those_of_the_local_disk(
    module: str, cluster: Cluster, short_path: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec(f"test.{module}") is None:
        pytest.skip("not among the tests that are installed with this interpreter")
    here = _verdicts(module, short_path / module, tmp_path / "local.xml")
    there = _verdicts(module, cluster.mount / module, tmp_path / "mount.xml")
    different = [
        f"{name}\n  local disk: {here.get(name, 'absent')}\n  mount: {there.get(name, 'absent')}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name, "absent").partition(":")[0]
        != there.get(name, "absent").partition(":")[0]
    ]
    assert not different, "\n".join(different)
