"""A UEFI machine without a network: its firmware's variables are a file that others can read.

QEMU without KVM.  A machine runs until it switches itself off; one that does not in time is ended.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BootEntry", "Machine", "lacking"]

CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
READER = Path(sys.executable).with_name("virt-fw-vars")
TOOLS = ("qemu-system-x86_64", "mmdebstrap", "cpio", "grub-mkstandalone", "wimcapture",
         "mkntfs", "ntfscat", "hivexregedit", "mcopy")  # fmt: skip
HARD_DRIVE = b"\x04\x01\x2a\x00"
"""Head of the device path node that names a partition: UEFI 2.10, 10.3.5.1."""


def lacking() -> str | None:
    """Return what keeps such machines from running here."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    absent += [str(file) for file in (CODE, VARS, READER) if not file.exists()]
    return f"not there: {', '.join(absent)}" if absent else None


@dataclass(frozen=True, slots=True)
class BootEntry:
    number: int
    label: str
    partition: str
    """GUID of the partition that it starts from; empty if it names none."""
    path: str


class Machine:
    """A disk and a firmware's memory; they stay from one start to the next."""

    def __init__(self, directory: Path, disk: Path, serial: str) -> None:
        self._directory = directory
        self._disk = disk
        self._serial = serial
        self._vars = directory / "vars.fd"
        self._starts = 0
        shutil.copyfile(VARS, self._vars)

    def run(self, *options: str | Path, timeout_s: float, memory_mib: int = 512) -> str:
        """Switch on; return what was on the console when it had switched itself off."""
        self._starts += 1
        console = self._directory / f"console{self._starts}"
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
            "-m", str(memory_mib), "-machine", "q35", "-display", "none", "-no-reboot",
            "-monitor", "none", "-serial", f"file:{console}", "-nic", "none",
            "-drive", f"if=pflash,format=raw,readonly=on,file={CODE}",
            "-drive", f"if=pflash,format=raw,file={self._vars}",
            "-drive", f"if=none,id=disk,format=raw,file={self._disk}",
            "-device", f"virtio-blk-pci,drive=disk,serial={self._serial},bootindex=1",
            *map(str, options),
        ]  # fmt: skip
        ended = False
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s)
            ended = done.returncode == 0
        except subprocess.TimeoutExpired:
            pass
        text = console.read_text(errors="replace") if console.exists() else ""
        assert ended, f"the machine did not switch itself off:\n{text[-4000:]}"
        return text

    def variables(self) -> dict[str, bytes]:
        """Return the firmware's variables, as virt-firmware finds them in its flash."""
        listing = self._directory / "vars.json"
        words = [READER, "--input", self._vars, "--output-json", listing]
        subprocess.run(words, check=True, capture_output=True)
        found = json.loads(listing.read_text())["variables"]
        return {one["name"]: bytes.fromhex(one["data"]) for one in found}

    def boot_next(self) -> int | None:
        data = self.variables().get("BootNext")
        return None if data is None else int.from_bytes(data, "little")

    def boot_order(self) -> list[BootEntry]:
        variables = self.variables()
        order = variables["BootOrder"]
        numbers = struct.unpack(f"<{len(order) // 2}H", order)
        return [_entry(number, variables[f"Boot{number:04X}"]) for number in numbers]


def _entry(number: int, option: bytes) -> BootEntry:
    """Read a load option: UEFI 2.10, 3.1.3."""
    end = 6
    while option[end : end + 2] != b"\0\0":
        end += 2
    label = option[6:end].decode("utf-16-le")
    path = option[end + 2 :][: int.from_bytes(option[4:6], "little")]
    if not path.startswith(HARD_DRIVE):
        return BootEntry(number, label, "", "")
    partition = uuid.UUID(bytes_le=path[24:40])
    file = path[42:]  # the next node is the file's
    size = int.from_bytes(file[2:4], "little")
    return BootEntry(number, label, str(partition), file[4 : size - 2].decode("utf-16-le"))
