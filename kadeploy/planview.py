"""A plan for people and for programs: what would be done to a node, and what that would destroy.

Pure.  Lines that begin with `-` go, `+` come, `=` stay in place (their content still goes, if they
are formatted or written).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.sizes import format_size
from kadeploy.disks import Disk, partition_path
from kadeploy.orders import Customize, Fit, InstallBoot, to_json
from kadeploy.partitions import DiskLayout, render_sfdisk
from kadeploy.plan import NodePlan

__all__ = ["describe", "table_diff", "to_dict"]


def table_diff(layout: DiskLayout) -> list[str]:
    """Return how a disk's partition table changes, line by line."""
    disk = layout.disk
    old = {(one.start, one.size, one.type): one for one in disk.partitions}
    lines: list[str] = []
    if not layout.partitions:
        lines += [f"- {disk.label or disk.filesystem or 'empty'}: the whole disk is overwritten"]
        return lines
    wanted_label = "gpt" if layout.spec.label.value == "gpt" else "dos"
    if disk.label != wanted_label:
        if disk.label or disk.filesystem:
            lines.append(f"- {disk.label or disk.filesystem}")
        lines.append(f"+ {wanted_label}")
    kept = set()
    for one in layout.partitions:
        key = (one.start, one.size, one.type)
        place = f"{one.path} at {format_size(one.start)}, {format_size(one.size)}"
        name = "extended"
        what = ""
        if one.spec is not None:
            name = one.spec.name
            what = f" {one.spec.format.value}" if one.spec.format else ""
            what += f" on {one.spec.mount}" if one.spec.mount else ""
        if key in old and disk.label == wanted_label:
            kept.add(key)
        lines.append(f"{'=' if key in kept else '+'} {place}: {name}{what}")
    for key, there in old.items():
        if key not in kept:
            what = " ".join(filter(None, (there.filesystem, there.label))) or "no file system"
            lines.append(
                f"- {there.path} at {format_size(there.start)}, {format_size(there.size)}: {what}"
            )
    return lines


def describe(plan: NodePlan, *, script: bool = True) -> Iterator[str]:
    """Yield the lines that `kadeploy plan` prints for a node."""
    yield f"{plan.node}: {plan.firmware.value.upper()}"
    for layout in plan.layouts:
        yield f"  disk {layout.spec.name}: {layout.disk.describe()}{_state(layout.disk)}"
        for line in table_diff(layout):
            yield f"    {line}"
        text = render_sfdisk(layout)
        if script and text:
            yield "  sfdisk script:"
            for line in text.splitlines():
                yield f"    | {line}".rstrip()
    for job in plan.images:
        target = job.image.partition or job.image.disk
        yield f"  image {job.image.file} ({job.image.kind.value}) to {target}"
    for order in plan.finish:
        if isinstance(order, Customize):
            for new in order.files:
                yield f"  file {new.path} ({len(new.data)} bytes, mode {new.mode:04o})"
            for new in order.scripts:
                yield f"  script {new.path}"
            for pattern in order.remove:
                yield f"  remove /{pattern}"
            for edit in order.hives:
                names = ", ".join(one.name for one in edit.values)
                yield f"  registry {edit.path}: {edit.key}" + (f": {names}" if names else "")
        if isinstance(order, Fit):
            yield f"  {_fitting(order)}"
        if isinstance(order, InstallBoot):
            how = "GRUB" if order.grub else order.efi_path
            where = f" with a firmware entry {order.title!r}" if order.firmware == "uefi" else ""
            yield f"  boot by {order.firmware.upper()}: {how}{where}"
            if order.boot_next:
                yield f"  the next start is {order.title!r}"
    yield (
        f"  {format_size(plan.stored_size)} to send, {format_size(plan.written_size)} to write and"
        f" read back: about {plan.expected_s:.0f} s, and the reboots"
    )


def _fitting(order: Fit) -> str:
    place = order.place
    if place.number:
        path = partition_path(place.disk, place.number)
        return f"grow {order.filesystem} to {format_size(place.size)}, all of {path}"
    if order.filesystem:
        return f"grow the last partition and its {order.filesystem} to the end of {place.disk}"
    return f"move the copy of the table, if it is a GPT, to the end of {place.disk}"


def _state(disk: Disk) -> str:
    if disk.partitions or disk.filesystem:
        return " (HOLDS DATA)"
    return " (no data seen)"


def to_dict(plan: NodePlan) -> dict[str, Any]:
    """Return the plan as plain values, orders included."""
    return {
        "node": plan.node,
        "firmware": plan.firmware.value,
        "disks": [
            {
                "role": layout.spec.name,
                "path": layout.disk.path,
                "serial": layout.disk.serial,
                "size": layout.disk.size,
                "holds_data": bool(layout.disk.partitions or layout.disk.filesystem),
                "diff": table_diff(layout),
                "sfdisk": render_sfdisk(layout),
            }
            for layout in plan.layouts
        ],
        "orders": [
            to_json(order)
            for order in (
                *plan.prepare,
                *(job.order for job in plan.images),
                *plan.finish,
                plan.start,
            )
        ],
        "stored_size": plan.stored_size,
        "written_size": plan.written_size,
        "expected_s": round(plan.expected_s, 1),
    }
