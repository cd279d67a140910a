"""Descriptions, disks, partitions, post-install: what a plan is made of, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from kadeploy import bootentries, orders, planview, postinstall
from kadeploy.disks import (
    ExistingPartition,
    facts_from_json,
    partition_number,
    partition_path,
    select_disk,
)
from kadeploy.environment import MIB, DiskSpec, Label, PartitionSpec, PostStep
from kadeploy.nodes import NodeDisk, NodeSpec
from kadeploy.partitions import grow_last, lay_out, render_sfdisk, size_needed
from kadeploy.plan import NodePlan, make_plan
from tests.support import deploy

SFDISK = shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin")


def plan(text: str = deploy.LINUX, **changes: Any) -> NodePlan:
    nodes = deploy.nodes()
    return make_plan(
        deploy.environment(text),
        nodes.get("pc1"),
        nodes,
        deploy.facts(**changes),
        read=deploy.read_template,
        stored_sizes={"debian.tar.zst": 800 * MIB},
    )


def refusal(text: str) -> str:
    with pytest.raises(KaError) as caught:
        deploy.environment(text)
    assert caught.value.code is Code.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 3", "vresion: 3", "unknown key 'vresion' (did you mean 'version'?)"),
        ("version: 3", "version: three", "'version' must be a whole number"),
        ("kind: tar", "kind: tra", "'kind' must be one of tar, raw, partclone, wim"),
        ("partition: root", "partition: boot", "no partition 'boot'"),
        ("size: 256MiB", "size: 256000", "whole MiB"),
        ("mount: /boot/efi", "mount: /", "mount point '/' occurs twice"),
        ("name: swap", "name: esp", "partition 'esp' occurs twice"),
        ("sha256:", "md5:", "checksum must be sha256"),
        ("format: ext4", "format: zfs", "'format' must be one of"),
        ("console=ttyS0", "console=$(reboot)", "characters that a boot loader would read"),
        ("dest: /etc/motd", "dest: ../etc/motd", "must be an absolute path"),
        ("name: debian12", "name: debian12\nname: twice", "key 'name' is there twice"),
        ("name: debian12", "name: &a debian12\ndescription: *a", "aliases are not taken"),
        ("name: debian12", "name: !!python/name:os.system x", "could not determine a constructor"),
        ("version: 3", "version: !!bool maybe", "a value cannot be read: 'maybe'"),
        ("version: 3", "version: !!int ''", "a value cannot be read: "),
        ("name: debian12", "name: !!map [debian12]", "a value cannot be read: "),
        ("name: debian12", "name: !!timestamp today", "a value cannot be read: "),
        ("name: debian12", 'name: "\\Uffffffff"', "a value cannot be read: "),
    ],
)
def test_a_fault_in_a_description_is_one_line_that_names_it(old: str, new: str, said: str) -> None:
    assert said in refusal(deploy.LINUX.replace(old, new, 1))


def test_only_the_last_partition_takes_the_rest() -> None:
    assert "only the last" in refusal(deploy.LINUX.replace(", size: 1GiB", ""))


def test_linux_and_windows_live_in_one_description() -> None:
    found = deploy.environment(deploy.DUAL)
    roots = [found.root_of(system) for system in found.systems]
    assert [part.name for part in roots if part] == ["root", "windows"]


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_one_line(data: bytes) -> None:
    with pytest.raises(KaError) as caught:
        deploy.environment(data.decode("latin-1"))
    assert caught.value.code is Code.USAGE


# ---------------------------------------------------------------- disks


def test_a_disk_is_chosen_by_its_serial() -> None:
    (layout,) = plan().layouts
    assert layout.disk.path == "/dev/sda"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"serial": "OTHER"}, "no disk has serial SN0001. There: /dev/sda 64GiB"),
        ({"serial": None}, "no disk has serial SN0001"),
        ({"size": 4 * deploy.GIB}, "8GiB are needed"),
    ],
)
def test_a_disk_that_does_not_match_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(KaError) as caught:
        plan(**change)
    assert said in str(caught.value)


@pytest.mark.parametrize("spoil", ["mounted", "swap-in-lvm", "read-only", "twice"])
def test_a_disk_that_is_doubtful_is_refused(spoil: str) -> None:
    raw = deploy.raw_facts()
    disk = raw["lsblk"]["blockdevices"][0]
    if spoil == "mounted":
        disk["children"][0]["mountpoints"] = ["/home"]
    elif spoil == "swap-in-lvm":
        disk["children"][0]["children"] = [{"path": "/dev/dm-0", "mountpoints": ["[SWAP]"]}]
    elif spoil == "read-only":
        disk["ro"] = True
    else:
        raw["lsblk"]["blockdevices"].append({**disk, "path": "/dev/sdb"})
    spec = deploy.environment().disks[0]
    with pytest.raises(KaError, match="refused"):
        select_disk(deploy.nodes().get("pc1"), spec, facts_from_json(raw).disks, 0)


@pytest.mark.parametrize(
    "change", [{"log-sec": 0}, {"log-sec": float("inf")}, {"size": float("inf")}]
)
def test_numbers_that_no_disk_has_are_refused(change: dict[str, Any]) -> None:
    raw = deploy.raw_facts()
    raw["lsblk"]["blockdevices"][0].update(change)
    with pytest.raises(KaError, match="not the facts of a node"):
        facts_from_json(raw)


def test_a_serial_in_two_lines_of_the_nodes_file_is_refused() -> None:
    one = NodeSpec("pc1", (NodeDisk("system", "S"),))
    two = NodeSpec("pc2", (NodeDisk("system", "S"),))
    with pytest.raises(ValueError, match="both pc1's and pc2's"):
        type(deploy.nodes())((one, two)).validate()


@pytest.mark.parametrize("key", ["lsblk", "sfdisk", "firmware"])
def test_facts_that_are_none_are_the_nodes_fault(key: str) -> None:
    raw = {**deploy.raw_facts(), key: 3}
    with pytest.raises(KaError) as caught:
        facts_from_json(raw)
    assert caught.value.code is Code.PROTOCOL


# ---------------------------------------------------------------- partitions


def layouts() -> st.SearchStrategy[tuple[DiskSpec, int, int]]:
    sizes = st.lists(st.integers(1, 300), min_size=1, max_size=9)

    @st.composite
    def make(draw: st.DrawFn) -> tuple[DiskSpec, int, int]:
        parts = [
            PartitionSpec(f"p{index}", size=size * MIB) for index, size in enumerate(draw(sizes))
        ]
        if draw(st.booleans()):
            parts.append(PartitionSpec("rest"))
        label = draw(st.sampled_from(Label))
        sector = draw(st.sampled_from([512, 4096]))
        return DiskSpec("system", label, partitions=tuple(parts)), sector, draw(st.integers(0, 99))

    return make()


@given(layouts())
def test_partitions_are_aligned_apart_and_inside_the_disk(case: tuple[DiskSpec, int, int]) -> None:
    spec, sector, more = case
    disk = deploy.facts(size=size_needed(spec) + more * MIB, sector=sector).disks[0]
    layout = lay_out(spec, disk, "test")
    end = MIB
    for one in layout.partitions:
        assert one.start % MIB == 0
        assert one.size >= MIB
        assert one.start >= end
        if one.spec is not None:
            assert one.spec.size in (None, one.size)
            end = one.start + one.size
    assert end <= disk.size - (MIB if spec.label is Label.GPT else 0)
    assert layout == lay_out(spec, disk, "test")


def test_what_does_not_fit_is_refused() -> None:
    spec = DiskSpec("system", partitions=(PartitionSpec("a", size=65 * deploy.GIB),))
    with pytest.raises(KaError, match="does not fit"):
        lay_out(spec, deploy.facts().disks[0], "test")


@given(layouts(), st.integers(0, 5000), st.integers(0, MIB))
def test_the_last_partition_grows_to_where_a_new_one_would_end(
    case: tuple[DiskSpec, int, int], more: int, odd: int
) -> None:
    """Of a table that was laid out for a smaller disk; never over another, never smaller."""
    spec, sector, spare = case
    parts = spec.partitions[:4]  # what follows is logical
    spec = replace(spec, partitions=parts)
    small = size_needed(spec) + spare * MIB
    layout = lay_out(spec, deploy.facts(size=small, sector=sector).disks[0], "test")
    there = tuple(
        ExistingPartition(one.path, one.start, one.size, one.type, "", "", False)
        for one in layout.partitions
    )
    label = "gpt" if spec.label is Label.GPT else "dos"
    odd = odd // sector * sector
    disk = replace(layout.disk, size=small + more * MIB + odd, label=label, partitions=there[::-1])
    grown = grow_last(disk)
    last = layout.partitions[-1]
    assert (grown.number, grown.start, grown.size) == (last.number, last.start, last.size)
    rest = replace(spec, partitions=(*parts[:-1], replace(parts[-1], size=None)))
    assert grown.new_size == lay_out(rest, disk, "test").partitions[-1].size
    assert grown.new_size >= grown.size
    filled = replace(there[-1], size=grown.new_size)
    again = grow_last(replace(disk, partitions=(*there[:-1], filled)))
    assert again.new_size == again.size


@pytest.mark.parametrize(
    ("partitions", "said"),
    [
        ([], "brought no partition"),
        ([(1, "EE")], "sectors of another size"),
        ([(1, "83"), (2, "5")], "a logical one"),
        ([(1, "83"), (2, "F"), (5, "83")], "a logical one"),
    ],
)
def test_a_table_whose_last_partition_cannot_grow_is_refused(
    partitions: list[tuple[int, str]], said: str
) -> None:
    there = tuple(
        ExistingPartition(f"/dev/sda{number}", number * MIB, MIB, kind, "", "", False)
        for number, kind in partitions
    )
    disk = replace(deploy.facts().disks[0], label="dos", partitions=there)
    with pytest.raises(KaError, match=said):
        grow_last(disk)


def test_a_partition_is_told_by_its_number_whatever_the_disk_is_called() -> None:
    for disk in ("/dev/sda", "/dev/nvme0n1", "/dev/loop17", "/dev/mmcblk0"):
        assert partition_number(disk, partition_path(disk, 12)) == 12


@pytest.mark.skipif(SFDISK is None, reason="no sfdisk")
@pytest.mark.parametrize("label", Label)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_sfdisk_makes_of_the_script_what_the_plan_says(
    tmp_path: Path, label: Label, count: int
) -> None:
    parts = tuple(PartitionSpec(f"p{index}", size=3 * MIB) for index in range(count))
    spec = DiskSpec("system", label, partitions=(*parts, PartitionSpec("rest")))
    layout = lay_out(spec, deploy.facts(size=128 * MIB).disks[0], "test")
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(128 * MIB)
    assert SFDISK is not None
    command = [SFDISK, "--no-reread", "--quiet", str(image)]
    subprocess.run(command, input=render_sfdisk(layout), text=True, check=True)
    made = json.loads(subprocess.run([SFDISK, "--json", image], stdout=-1, check=True).stdout)
    table = made["partitiontable"]
    assert table["id"].upper() == layout.disk_id.upper()
    there = [
        (one["start"] * 512, one["size"] * 512, one["type"].upper()) for one in table["partitions"]
    ]
    assert there == [(one.start, one.size, one.type) for one in layout.partitions]
    if label is Label.GPT:
        uuids = [one["uuid"].lower() for one in table["partitions"]]
        assert uuids == [one.part_uuid for one in layout.partitions]


def test_windows_finds_its_guids_again() -> None:
    (layout,) = plan(deploy.DUAL).layouts
    assert "label-id: 11111111-2222-3333-4444-555555555555" in render_sfdisk(layout)
    assert "AAAAAAAA-0000-4000-8000-BBBBBBBBBBBB" in render_sfdisk(layout)


# ---------------------------------------------------------------- plan


def test_the_plan_says_what_goes_and_what_comes() -> None:
    text = "\n".join(planview.describe(plan()))
    assert "serial SN0001 (HOLDS DATA)" in text
    assert "- /dev/sda1 at 1MiB, 1GiB: ext4 old" in text
    assert "+ /dev/sda4 at 1.3GiB, 62.7GiB: root ext4 on /" in text
    assert "boot by UEFI: GRUB with a firmware entry 'debian'" in text
    assert "800MiB to send, 2GiB to write" in text
    json.dumps(planview.to_dict(plan()))


def test_what_an_image_brings_is_fitted_to_its_place_and_the_plan_says_so() -> None:
    for old, said in [
        ("", "move the copy of the table, if it is a GPT, to the end of /dev/sda"),
        (", grow: ext4", "grow the last partition and its ext4 to the end of /dev/sda"),
    ]:
        made = plan(deploy.WHOLE.replace(", grow: ext4", old))
        assert f"  {said}\n" in "\n".join(planview.describe(made))
    part = deploy.DUAL.replace(
        f'debian.tar, kind: tar, checksum: "{deploy.SUM}"',
        f'debian.img, kind: raw, checksum: "{deploy.SUM}", grow: ext4',
    )
    made = plan(part)
    assert "  grow ext4 to 23.7GiB, all of /dev/sda4\n" in "\n".join(planview.describe(made))
    assert isinstance(made.finish[0], orders.Fit)  # what is mounted later has its size by then
    assert not any(isinstance(one, orders.Fit) for one in plan().finish)


@pytest.mark.parametrize(
    ("text", "old", "new", "said"),
    [
        (deploy.LINUX, "size: 2GiB}", "grow: ext4}", "a tar fills its partition anyway"),
        (deploy.WHOLE, "grow: ext4", "grow: vfat", "grow takes ext4, xfs, btrfs or ntfs"),
        (deploy.WHOLE, "grow: ext4", "grow: true", "'grow' must be one of ext4"),
        (deploy.DUAL, "kind: tar,", "kind: raw, grow: xfs,", "grow says xfs, partition root has"),
    ],
)
def test_a_growth_that_cannot_be_is_refused(text: str, old: str, new: str, said: str) -> None:
    assert said in refusal(text.replace(old, new, 1))


def test_every_order_survives_the_way_to_the_node() -> None:
    for text in (deploy.LINUX, deploy.DUAL, deploy.WHOLE):
        made = plan(text)
        all_orders = [*made.prepare, *(job.order for job in made.images), *made.finish, made.start]
        for order in all_orders:
            wire = json.loads(json.dumps(orders.to_json(order)))
            assert orders.from_json(wire) == order


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=4))
def test_no_object_makes_a_node_do_what_is_no_order(content: dict[str, Any]) -> None:
    with pytest.raises(KaError):
        orders.from_json(content)


def test_grub_by_bios_on_gpt_without_its_partition_is_refused() -> None:
    text = deploy.LINUX.replace("      - {name: bios, type: bios-boot, size: 1MiB}\n", "")
    with pytest.raises(KaError, match="needs a bios-boot"):
        plan(text, firmware="bios")


def test_the_default_system_of_a_dual_boot_is_next() -> None:
    boots = [one for one in plan(deploy.DUAL).finish if isinstance(one, orders.InstallBoot)]
    assert [(one.title, one.boot_next) for one in boots] == [("Windows", False), ("debian", True)]
    assert boots[0].efi_path == "\\EFI\\Microsoft\\Boot\\bootmgfw.efi"


# ---------------------------------------------------------------- post-install


def custom(
    *steps: PostStep, texts: dict[str, str] | None = None, description: str = deploy.LINUX
) -> dict[str, str]:
    nodes = deploy.nodes()
    made = postinstall.render(
        steps,
        nodes.get("pc1"),
        nodes,
        plan(description).layouts,
        environment="debian12",
        read=(texts or {}).__getitem__,
    )
    return {new.path: new.data.decode() for new in made.files}


def test_fstab_names_file_systems_not_devices() -> None:
    text = custom(PostStep(builtin="fstab"))["/etc/fstab"]
    root = plan().layouts[0].named("root")
    assert root is not None
    assert f"UUID={root.filesystem_uuid} / ext4 defaults 0 1\n" in text
    assert " none swap sw 0 0\n" in text
    assert "/dev/" not in text


@pytest.mark.parametrize("builtin", sorted(postinstall.BUILTINS))
def test_every_builtin_renders(builtin: str) -> None:
    custom(PostStep(builtin=builtin), description=deploy.DUAL)


def test_a_name_in_xml_is_escaped() -> None:
    texts = {"a.xml.j2": "<a>{{ vars.room + '<&' }}</a>"}
    step = PostStep(template="a.xml.j2", dest="/a.xml")
    assert custom(step, texts=texts)["/a.xml"] == "<a>E12&lt;&amp;</a>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ node.nam }}", "t: 'dict object' has no attribute 'nam'"),
        ("\n{% if %}", "t: line 2"),
        ("{{ ''.__class__.__mro__ }}", "t: "),
        ("{{ 1 / 0 }}", "t: division by zero"),
    ],
)
def test_a_fault_in_a_template_stops_the_plan(text: str, said: str) -> None:
    with pytest.raises(KaError) as caught:
        custom(PostStep(template="t", dest="/t"), texts={"t": text})
    assert caught.value.code is Code.USAGE
    assert said in str(caught.value)


# ---------------------------------------------------------------- boot entries


def test_boot_entries_are_read_as_efibootmgr_prints_them() -> None:
    text = (
        "BootCurrent: 0001\nTimeout: 0 seconds\nBootOrder: 0001,0000\n"
        "Boot0000* UiApp\tFvVol(7cb8bdc9)/FvFile(462caa21)\n"
        "Boot0001* debian\tHD(1,GPT,aaaa)/File(\\EFI\\debian\\grubx64.efi)\n"
        "Boot000A  Windows Boot Manager\n"
    )
    found = bootentries.parse_entries(text)
    assert [(one.number, one.active, one.label) for one in found] == [
        ("0000", True, "UiApp"),
        ("0001", True, "debian"),
        ("000A", False, "Windows Boot Manager"),
    ]
    assert [one.number for one in bootentries.entries_named(found, "debian")] == ["0001"]


def test_the_network_stays_before_the_disk_in_the_boot_order() -> None:
    text = "BootCurrent: 0002\nBootOrder: 0001,0002,0003\n"
    assert bootentries.boot_order(text, "0004") == ["0001", "0002", "0004", "0003"]
    assert bootentries.boot_order(text, "0001") == ["0002", "0001", "0003"]
    assert bootentries.boot_order("", "0004") == ["0004"]


def test_grub_finds_the_root_by_its_own_identifier() -> None:
    text = bootentries.grub_config(
        root="abcd", holder="ef01", kernel="/vmlinuz", initrd="", arguments="quiet", title="debian"
    )
    assert "search --no-floppy --fs-uuid --set=root ef01" in text
    assert "linux /vmlinuz root=UUID=abcd ro quiet" in text
    assert "initrd" not in text
