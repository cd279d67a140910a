"""Machines that boot over the network through kaboot: real firmware, kernels and servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import boot_image, boot_lab

pytestmark = pytest.mark.vm

INVENTORY = """
[site]
address = "10.78.0.1"
network = "10.78.0.0/24"
interface = "br0"
pool = "10.78.0.100-10.78.0.199"
files = "files"
state = "state"

[[profile]]
name = "install"
kernel = "vmlinuz"
initrds = ["initrd.gz"]
arguments = ["console=ttyS0", "quiet", "panic=-1"]

[[node]]
name = "pc1"
macs = ["52:54:00:00:00:01"]
address = "10.78.0.11"
step = "install"
"""


@pytest.fixture(scope="module", name="files")
def _files(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a kernel and an initramfs, as kaboot serves them."""
    kernel = boot_image.unpack_kernel(Path(pytestconfig.cache.mkdir("boot")))
    directory = tmp_path_factory.mktemp("files")
    (image,) = (kernel / "boot").glob("vmlinuz-*")
    shutil.copy(image, directory / "vmlinuz")
    (directory / "initrd.gz").write_bytes(boot_image.make_initrd(kernel))
    for file in directory.iterdir():
        file.chmod(0o644)
    return directory


@pytest.fixture(name="lab")
def _lab(short_path: Path, files: Path) -> Iterator[boot_lab.Lab]:
    # kaboot becomes a user who must get at the files.
    short_path.chmod(0o755)
    shutil.copytree(files, short_path / "files")
    (short_path / "files").chmod(0o755)
    with boot_lab.lab(short_path) as lab:
        yield lab


def test_a_bios_machine_boots_over_ipxe_and_reports(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    vm = lab.boot("pc1", "52:54:00:00:00:01", "-boot", "n")
    lab.until_stage("pc1", "report", "hello")
    with lab.control() as control:
        stages = [event.stage for event in control.events(node="pc1")]
    order = ["discover", "lease", "script", "kernel", "initrd", "report"]
    assert [stage for stage in order if stage in stages] == order
    assert stages.index("script") < stages.index("kernel") < stages.index("report")
    lab.until(lambda: vm.process.poll() is not None, "switched off", 10)
