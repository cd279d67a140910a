"""What all tests share: what they need, which may run side by side, what they must not leave.

* A test marked `fuse`, `uml` or `vm` is skipped, with the reason, where the machine cannot run it.
* With xdist (`make test`) a module stays on one worker, so its cluster is made once; all tests
  that boot one kind of kernel share one worker, which bounds memory.  Long groups start first.
  A worker of root's has mounts of its own: what another one starts in a mount namespace would keep
  its file systems mounted, and their devices busy.
* After each module nothing may be left mounted or running; what is left fails the module and is
  then removed, so that later tests do not suffer from it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import boot_lab, leaks, own_mounts

TOKEN = uuid.uuid4().hex[:8]
UML_TOOLS = ("linux.uml", "rpcbind", "exportfs", "mount.nfs")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") and os.geteuid() == 0:
        own_mounts.unshare()
    # How long an example takes says more about the machine than about the code.
    settings.register_profile("ka", deadline=None, print_blob=True)
    settings.load_profile("ka")
    os.environ[leaks.TOKEN_VARIABLE] = TOKEN


def _lacking_for_fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"cannot open /dev/fuse: {error.strerror}"
    return None if shutil.which("fusermount3") else "fusermount3 is not installed"


def _lacking_for_uml() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [tool for tool in UML_TOOLS if shutil.which(tool, path=path) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {"fuse": _lacking_for_fuse(), "uml": _lacking_for_uml(), "vm": boot_lab.lacking()}
    for item in items:
        for kind, reason in lacking.items():
            if reason and item.get_closest_marker(kind):
                item.add_marker(pytest.mark.skip(reason=f"{kind}: {reason}"))
        if item.get_closest_marker("xdist_group") is None:
            module = item.nodeid.partition("::")[0]
            group = next((kind for kind in ("uml", "vm") if item.get_closest_marker(kind)), module)
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_weight)


def _weight(item: pytest.Item) -> int:
    for weight, kind in enumerate(("uml", "vm", "slow", "fuse")):
        if item.get_closest_marker(kind):
            return weight
    return 4


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory whose path leaves room for a socket's 107 bytes."""
    with tempfile.TemporaryDirectory(prefix=f"ka-{TOKEN}-") as name:
        yield Path(name)


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    prefix = str(Path(tempfile.gettempdir()) / f"ka-{TOKEN}-")
    own = [Path(name) for name in Path(tempfile.gettempdir()).glob(Path(prefix).name + "*")]
    mounts = leaks.mounts_below(tmp_path_factory.getbasetemp(), *own)
    left = [f"process {line}" for line in leaks.end_processes(TOKEN)]
    for point in mounts:
        left.append(f"mount {point}")
        leaks.unmount(point)
    for directory in own:
        left.append(f"directory {directory}")
        shutil.rmtree(directory, ignore_errors=True)
    if left:
        pytest.fail("left behind: " + "; ".join(left))
