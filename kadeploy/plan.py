"""The plan: all that a deployment would do to one node, before anything is touched.

Pure: environment, node and the node's own facts in; the orders that `run` would give out, and what
`plan` prints.  There is one way to an order, and it leads through here: what was not shown cannot
be done.

Not here: reading files and asking nodes (deploying.py), what the times of steps are (steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from common.errors import Code, KaError
from kadeploy import postinstall
from kadeploy.disks import Facts, select_disk
from kadeploy.environment import (
    Environment,
    Firmware,
    Image,
    ImageKind,
    Loader,
    OsKind,
    PartitionType,
    System,
)
from kadeploy.nodes import Nodes, NodeSpec
from kadeploy.orders import (
    TOKEN_PATH,
    Customize,
    Fit,
    Format,
    InstallBoot,
    MountPoint,
    NewFile,
    Order,
    Partition,
    Place,
    Start,
    WriteImage,
)
from kadeploy.partitions import DiskLayout, Placed, lay_out, render_sfdisk, size_needed

__all__ = ["ImageJob", "NodePlan", "Rates", "make_plan"]


@dataclass(frozen=True, slots=True)
class Rates:
    """What a node's link and disk are trusted to do, bytes/s, for the expected time."""

    link: float = 110e6
    disk: float = 150e6


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image on its way to one place of this node."""

    image: Image
    order: WriteImage


@dataclass(frozen=True, slots=True)
class NodePlan:
    node: str
    layouts: tuple[DiskLayout, ...]
    prepare: tuple[Order, ...]
    """Before the images: tables and file systems."""
    images: tuple[ImageJob, ...]
    finish: tuple[Order, ...]
    """After the images: customisation and boot loaders."""
    start: Start
    kexec: Start | None
    stored_size: int
    """Bytes over the network."""
    written_size: int
    """Bytes to disk, as far as the images tell."""
    expected_s: float
    """Transfer and read-back alone; firmware and reboots come on top."""
    firmware: Firmware


def make_plan(
    environment: Environment,
    node: NodeSpec,
    nodes: Nodes,
    facts: Facts,
    *,
    read: Callable[[str], str],
    stored_sizes: Mapping[str, int],
    token: str = "",
    rates: Rates | None = None,
) -> NodePlan:
    """Return the plan for a node; raises USAGE with what does not fit.

    *read*: the text of a template of the environment; *stored_sizes*: bytes of each image file;
    *token*: what a Linux system is to answer when it is asked which deployment it is from.
    """
    rates = rates or Rates()
    layouts = _layouts(environment, node, facts)
    prepare: list[Order] = []
    for layout in layouts:
        if script := render_sfdisk(layout):
            prepare.append(Partition(_whole(layout), script))
    prepare += _formats(layouts, _brought(environment))
    images = [_image_job(image, layouts) for image in environment.images()]
    finish: list[Order] = [*_fits(images)]
    # The default's boot entry is made last: so it comes first in the firmware's order.
    for system in sorted(environment.systems, key=lambda one: one is environment.default_system):
        finish += _finish(environment, system, node, nodes, layouts, facts, read, token)
    stored = sum(stored_sizes.get(image.file, 0) for image in environment.images())
    written = max(environment.image_size, stored)
    expected = max(stored / rates.link, written / rates.disk) + written / rates.disk
    return NodePlan(
        node.name,
        tuple(layouts),
        tuple(prepare),
        tuple(images),
        tuple(finish),
        Start("reboot"),
        _kexec(environment, layouts),
        stored,
        written,
        expected,
        facts.firmware,
    )


def _layouts(environment: Environment, node: NodeSpec, facts: Facts) -> list[DiskLayout]:
    layouts = []
    for spec in environment.disks:
        whole = sum(image.size for image in environment.images() if image.disk == spec.name)
        disk = select_disk(node, spec, facts.disks, max(size_needed(spec), whole))
        identity = f"{environment.name}/{node.name}/{disk.serial}"
        layouts.append(_unnamed(lay_out(spec, disk, identity), _brought(environment)))
    for image in environment.images():
        _, placed = _placed(layouts, image)
        if placed is not None and image.size > placed.size:
            raise KaError(
                Code.USAGE,
                f"{node.name}: image {image.file} needs {image.size} bytes, partition"
                f" {image.partition} has {placed.size}",
            )
    return layouts


def _brought(environment: Environment) -> set[str]:
    """Return the partitions whose file system an image brings: nothing is to be made there."""
    kinds = (ImageKind.RAW, ImageKind.PARTCLONE)
    return {one.partition for one in environment.images() if one.partition and one.kind in kinds}


def _unnamed(layout: DiskLayout, brought: set[str]) -> DiskLayout:
    """Forget file systems' identifiers that only an image knows."""
    placed = tuple(
        replace(one, filesystem_uuid="") if one.spec and one.spec.name in brought else one
        for one in layout.partitions
    )
    return replace(layout, partitions=placed)


def _placed(layouts: Sequence[DiskLayout], image: Image) -> tuple[DiskLayout, Placed | None]:
    for layout in layouts:
        if image.disk == layout.spec.name:
            return layout, None
        if image.partition is not None and (found := layout.named(image.partition)):
            return layout, found
    raise AssertionError("an environment's images have targets")


def _whole(layout: DiskLayout) -> Place:
    return Place(layout.disk.path, layout.disk.serial, layout.disk.size)


def _part(layout: DiskLayout, placed: Placed) -> Place:
    disk = layout.disk
    return Place(disk.path, disk.serial, disk.size, placed.number, placed.start, placed.size)


def _formats(layouts: Sequence[DiskLayout], brought: set[str]) -> list[Order]:
    made: list[Order] = []
    for layout in layouts:
        for one in layout.partitions:
            if one.spec is None or one.spec.name in brought:
                continue
            kind = one.spec.filesystem
            if kind is not None:
                label = one.spec.name[:11]  # the shortest limit, vfat's
                place = _part(layout, one)
                made.append(Format(place, kind.value, one.filesystem_uuid, label))
    return made


def _image_job(image: Image, layouts: Sequence[DiskLayout]) -> ImageJob:
    layout, placed = _placed(layouts, image)
    kind = placed.spec.format if placed is not None and placed.spec is not None else None
    return ImageJob(
        image,
        WriteImage(
            _whole(layout) if placed is None else _part(layout, placed),
            image.kind.value,
            image.compression.value,
            image.checksum,
            image.size,
            image.index,
            kind.value if kind is not None else "",
        ),
    )


def _fits(jobs: Sequence[ImageJob]) -> Iterator[Fit]:
    for job in jobs:
        grow = job.image.grow
        if grow is not None or job.image.disk is not None:
            yield Fit(job.order.place, grow.value if grow is not None else "")


def _mount(layout: DiskLayout, placed: Placed, path: str) -> MountPoint:
    kind = placed.spec.format if placed.spec is not None else None
    return MountPoint(_part(layout, placed), path, kind.value if kind is not None else "")


def _mounts(
    environment: Environment, system: System, layouts: Sequence[DiskLayout]
) -> tuple[MountPoint, ...]:
    """Return what makes up a system's tree, root first."""
    root = environment.root_of(system)
    assert root is not None, "whole-disk systems are not mounted"
    found: list[MountPoint] = []
    for layout in layouts:
        for one in layout.partitions:
            if one.spec is None:
                continue
            if one.spec.name == root.name:
                found.append(_mount(layout, one, "/"))
            elif system.os is OsKind.LINUX and one.spec.mount and one.spec.mount != "/":
                found.append(_mount(layout, one, one.spec.mount))
    return tuple(sorted(found, key=lambda mount: mount.path))


def _esp(
    environment: Environment, system: System, layouts: Sequence[DiskLayout]
) -> tuple[DiskLayout, Placed | None]:
    """Return the disk that a system is on, and the EFI system partition there."""
    root = environment.root_of(system)
    assert root is not None, "whole-disk systems bring what they boot with"
    layout = next(one for one in layouts if one.named(root.name))
    found = (one for one in layout.partitions if one.spec and one.spec.type is PartitionType.ESP)
    return layout, next(found, None)


def _finish(
    environment: Environment,
    system: System,
    node: NodeSpec,
    nodes: Nodes,
    layouts: Sequence[DiskLayout],
    facts: Facts,
    read: Callable[[str], str],
    token: str,
) -> list[Order]:
    if environment.root_of(system) is None:
        return []
    made: list[Order] = []
    mounts = _mounts(environment, system, layouts)
    custom = postinstall.render(
        system.post_install, node, nodes, layouts, environment=environment.name, read=read
    )
    files = custom.files
    if system.os is OsKind.LINUX:
        files = (*files, NewFile.of(TOKEN_PATH, f"{token}\n".encode()))
    if files or system.post_install:
        made.append(
            Customize(
                mounts, custom.remove, files, custom.scripts, custom.ssh_host_keys, custom.hives
            )
        )
    if custom.esp_hives:
        layout, esp = _esp(environment, system, layouts)
        if esp is None:
            raise KaError(Code.USAGE, f"system {system.name}: a boot store is on an esp partition")
        mount = _mount(layout, esp, "/")
        made.append(Customize((mount,), (), (), (), hives=custom.esp_hives))
    if boot := _boot(environment, system, layouts, facts, mounts):
        made.append(boot)
    return made


def _boot(
    environment: Environment,
    system: System,
    layouts: Sequence[DiskLayout],
    facts: Facts,
    mounts: tuple[MountPoint, ...],
) -> InstallBoot | None:
    spec = system.boot
    firmware = facts.firmware if spec.firmware is Firmware.AUTO else spec.firmware
    if spec.loader is Loader.NONE and not spec.efi_path:
        return None
    layout, esp = _esp(environment, system, layouts)
    if firmware is Firmware.UEFI and esp is None:
        raise KaError(Code.USAGE, f"system {system.name}: a UEFI machine needs an esp partition")
    grub = spec.loader is Loader.GRUB
    if grub and firmware is Firmware.BIOS and layout.spec.label.value == "gpt":
        types = {one.spec.type for one in layout.partitions if one.spec}
        if PartitionType.BIOS_BOOT not in types:
            raise KaError(
                Code.USAGE,
                f"system {system.name}: GRUB on a GPT disk of a BIOS machine needs a bios-boot"
                " partition",
            )
    if firmware is Firmware.BIOS and not grub:
        return None
    path = spec.efi_path or (
        "\\EFI\\Microsoft\\Boot\\bootmgfw.efi" if spec.loader is Loader.WINDOWS else ""
    )
    return InstallBoot(
        mounts=mounts,
        firmware=firmware.value,
        disk=_whole(layout),
        grub=grub,
        kernel=spec.kernel,
        initrd=spec.initrd,
        arguments=spec.arguments,
        title=spec.label or system.name,
        esp_number=esp.number if esp is not None else 0,
        efi_path=path,
        boot_next=system is environment.default_system,
    )


def _kexec(environment: Environment, layouts: Sequence[DiskLayout]) -> Start | None:
    system = environment.default_system
    root = environment.root_of(system)
    if root is None or system.os is not OsKind.LINUX:
        return None
    placed = next(found for one in layouts if (found := one.named(root.name)))
    source = f"UUID={placed.filesystem_uuid}"
    if not placed.filesystem_uuid:
        source = f"PARTUUID={placed.part_uuid}"
    mounts = tuple(
        mount for mount in _mounts(environment, system, layouts) if mount.path in ("/", "/boot")
    )
    line = f"root={source} ro {system.boot.arguments}".rstrip()
    return Start("kexec", mounts, system.boot.kernel, system.boot.initrd, line)
