"""Machines that boot over the network through kaboot: real firmware, kernels and servers.

A boot takes some 20 s without KVM, most of it the firmware's; two at a time keep two cores busy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import boot_image, boot_lab
from tests.support.boot_lab import Lab, Vm

pytestmark = pytest.mark.vm

INVENTORY = """
[site]
address = "10.78.0.1"
network = "10.78.0.0/24"
interface = "br0"
files = "files"
state = "state"
{site}

[[profile]]
name = "install"
kernel = "vmlinuz"
initrds = ["initrd.gz"]
arguments = ["console=ttyS0", "quiet", "panic=-1", "ka.report={report}"]

[[node]]
name = "bios"
macs = ["52:54:00:00:00:01"]
address = "10.78.0.11"
firmware = "bios"
step = "install"

[[node]]
name = "uefi"
macs = ["52:54:00:00:00:02"]
address = "10.78.0.12"
firmware = "uefi"
step = "{uefi}"
{node}
"""
POOL = 'pool = "10.78.0.100-10.78.0.199"'
BIOS_MAC, UEFI_MAC, STRANGER_MAC = (f"52:54:00:00:00:{number:02}" for number in (1, 2, 99))
ON_ITS_DISK = "ka-guest: booted from its own disk"

# Writes what follows it to the first serial port, then halts: lodsb, test, out to 0x3f8.
BOOT_SECTOR = bytes.fromhex("31c08ed8be157cac84c07406baf803eeebf5f4ebfd")
GRUB_CONFIG = f'echo "{ON_ITS_DISK}"\nsleep 60\n'

SIGNED_GRUB = "/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"
SHIM = "/usr/lib/shim/shimx64.efi.signed"


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
def _lab(short_path: Path, files: Path) -> Iterator[Lab]:
    # kaboot becomes a user who must get at the files.
    short_path.chmod(0o755)
    shutil.copytree(files, short_path / "files")
    (short_path / "files").chmod(0o755)
    with boot_lab.lab(short_path) as lab:
        yield lab


def serve(
    lab: Lab, *, site: str = POOL, report: str = "up", uefi: str = "install", node: str = ""
) -> None:
    lab.serve(INVENTORY.format(site=site, report=report, uefi=uefi, node=node))


def boot_bios(lab: Lab, name: str, mac: str, *options: str) -> Vm:
    """Switch on a machine with a disk that says so when it is booted from."""
    disk = lab.directory / f"{name}.disk"
    sector = BOOT_SECTOR + f"\r\n{ON_ITS_DISK}\r\n\0".encode()
    disk.write_bytes(sector.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return lab.boot(
        name, mac, "-drive", f"file={disk},format=raw,if=none,id=d0",
        "-device", "virtio-blk-pci,drive=d0,bootindex=1", *options,
    )  # fmt: skip


def boot_uefi(
    lab: Lab,
    name: str,
    mac: str,
    *,
    secure: bool,
    disk: bool = False,
    options: Sequence[str] = (),
) -> Vm:
    """Switch on a machine with OVMF, with Microsoft's keys in it if secure."""
    options = [*options, *lab.uefi(name, secure=secure)]
    if disk:
        system = lab.directory / f"{name}.esp/EFI/debian"
        system.mkdir(parents=True)
        shutil.copy(SHIM, system / "shimx64.efi")
        shutil.copy(SIGNED_GRUB, system / "grubx64.efi")
        (system / "grub.cfg").write_text(GRUB_CONFIG)
        # Where firmware looks on a disk it has no entry for.
        shutil.copytree(system, system.with_name("BOOT"))
        (system.with_name("BOOT") / "shimx64.efi").rename(system.with_name("BOOT") / "BOOTX64.EFI")
        # QEMU makes a disk with a FAT file system of a directory.
        options += [
            "-drive", f"file=fat:rw:{system.parents[1]},format=raw,if=none,id=d0",
            "-device", "virtio-blk-pci,drive=d0,bootindex=1",
        ]  # fmt: skip
    return lab.boot(name, mac, *options, memory_mib=1024)


def until_says(lab: Lab, vm: Vm, text: str) -> None:
    lab.until(lambda: text in vm.text(), f"{vm.console.name}: {text}", 300)


def stages(lab: Lab, who: str) -> list[str]:
    with lab.control() as control:
        return [event.stage for event in control.events(node=who)]


def test_boot_vm_bios_installs_then_boots_its_disk_and_an_unknown_one_only_its_disk(
    lab: Lab,
) -> None:
    serve(lab, report="installed")
    node = boot_bios(lab, "bios", BIOS_MAC)
    stranger = boot_bios(lab, "stranger", STRANGER_MAC)
    # The node: kernel and initramfs over iPXE; its report moves it on; the next boot is its disk's.
    lab.until_stage("bios", "report", "installed", timeout_s=300)
    found = stages(lab, "bios")
    order = ["discover", "lease", "script", "kernel", "initrd", "report"]
    assert sorted(order, key=found.index) == order
    assert ON_ITS_DISK not in node.text()
    with lab.control() as control:
        assert control.nodes()[0].assignment.step.value == "deployed"
    lab.until(lambda: node.process.poll() is not None, "switched off", 20)
    again = boot_bios(lab, "bios", BIOS_MAC)
    # The stranger: recorded, sent to its disk, given nothing to load.
    until_says(lab, stranger, ON_ITS_DISK)
    lab.until_stage(STRANGER_MAC, "script", "discover ipxe")
    with lab.control() as control:
        (row,) = control.unknown()
        assert row.machine.mac == STRANGER_MAC
        assert row.machine.platform == "pcbios"
        assert row.machine.product.startswith("Standard PC")
    assert not {"kernel", "initrd"} & set(stages(lab, STRANGER_MAC))
    until_says(lab, again, ON_ITS_DISK)


def test_boot_vm_secure_boot_by_shim_to_a_signed_kernel_and_an_unknown_one_by_menu_to_its_disk(
    lab: Lab,
) -> None:
    serve(lab, site=f'{POOL}\nunknown = "menu"\nmenu_timeout_s = 2')
    installs = boot_uefi(lab, "uefi", UEFI_MAC, secure=True)
    stranger = boot_uefi(lab, "stranger", STRANGER_MAC, secure=True, disk=True)
    until_says(lab, stranger, ON_ITS_DISK)
    assert "Boot from the disk" in stranger.text()
    lab.until_stage(STRANGER_MAC, "script", "menu grub")
    assert not {"kernel", "initrd"} & set(stages(lab, STRANGER_MAC))
    with lab.control() as control:
        assert [row.machine.mac for row in control.unknown()] == [STRANGER_MAC]
    event = lab.until_stage("uefi", "report", "up")
    assert event.detail.startswith("up kernel 6.")
    assert "ka-guest: secure boot" in installs.text()
    found = stages(lab, "uefi")
    order = ["lease", "loader", "script", "kernel", "initrd", "report"]
    assert sorted(order, key=found.index) == order


def test_boot_vm_http_boot_gets_ipxe_which_leaves_the_disk_to_the_firmware(lab: Lab) -> None:
    serve(lab, uefi="local")
    only_http = [
        word
        for version in (4, 6)
        for word in ("-fw_cfg", f"name=opt/org.tianocore/IPv{version}PXESupport,string=n")
    ]
    vm = boot_uefi(lab, "uefi", UEFI_MAC, secure=False, disk=True, options=only_http)
    until_says(lab, vm, ON_ITS_DISK)
    lab.until_stage("uefi", "loader", "snponly.efi")
    lab.until_stage("uefi", "script", "local ipxe")


def test_boot_vm_beside_a_foreign_dhcp_server_with_bios_and_uefi(lab: Lab) -> None:
    lab.foreign_dhcp()
    serve(lab, site='mode = "proxy"')
    boot_bios(lab, "bios", BIOS_MAC)
    boot_uefi(lab, "uefi", UEFI_MAC, secure=False)
    for name in ("bios", "uefi"):
        lab.until_stage(name, "report", "up", timeout_s=300)
        found = stages(lab, name)
        assert "pxe" in found
        assert "lease" not in found, "addresses are the foreign server's"
        with lab.control() as control:
            (row,) = [status.seen for status in control.nodes() if status.node.name == name]
        assert row is not None
        assert 50 <= int(row.machine.address.rpartition(".")[2]) <= 60
