"""What Windows is told: its answer file by another's XML parser, its commands, its registry."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from itertools import zip_longest
from uuid import UUID
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import Code, KaError
from kadeploy import planview, postinstall
from kadeploy.builtin import Customization
from kadeploy.environment import PostStep
from kadeploy.node.hives import GuidChange
from kadeploy.nodes import NodeSpec, Variable
from kadeploy.orders import Customize, Format, HiveEdit, IdChange, from_json, to_json
from kadeploy.plan import NodePlan, make_plan
from tests.support import deploy

SPACE = {"": "urn:schemas-microsoft-com:unattend"}
ADD = "{http://schemas.microsoft.com/WMIConfig/2002/State}action"
IMAGE_ESP = "CCCCCCCC-0000-4000-8000-DDDDDDDDDDDD"
MOVED = deploy.DUAL.replace(
    "{name: esp, type: esp,", f"{{name: esp, type: esp, image_guid: {IMAGE_ESP},"
).replace("{builtin: unattend}", "{builtin: boot-store}, {builtin: drive-letters}")
NODE = replace(
    deploy.nodes().nodes[0],
    mac="02:00:00:00:00:0a",
    gateway="10.0.0.254",
    dns=("10.0.0.2", "10.0.0.3"),
)


def custom(builtin: str, node: NodeSpec = NODE) -> Customization:
    layouts = plan(deploy.DUAL).layouts
    step = PostStep(builtin=builtin)
    return postinstall.render([step], node, deploy.nodes(), layouts, environment="e", read=str)


def plan(description: str) -> NodePlan:
    return make_plan(
        deploy.environment(description),
        NODE,
        deploy.nodes(),
        deploy.facts(),
        read=deploy.read_template,
        stored_sizes={},
    )


def with_variables(**values: str) -> NodeSpec:
    return replace(NODE, variables=tuple(Variable(name, value) for name, value in values.items()))


def answers(node: NodeSpec = NODE) -> ElementTree.Element:
    """Return the answer file, once xmllint has read it, too."""
    (new,) = custom("unattend", node).files
    assert new.path == "/Windows/Panther/unattend.xml"
    if shutil.which("xmllint"):
        words = ["xmllint", "--noout", "--nonet", "-"]
        done = subprocess.run(words, input=new.data, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    return ElementTree.fromstring(new.data)


def component(root: ElementTree.Element, settings: str, name: str) -> ElementTree.Element:
    found = root.find(f"settings[@pass='{settings}']/component[@name='{name}']", SPACE)
    assert found is not None, (settings, name)
    assert found.get("processorArchitecture") == "amd64"
    assert found.get("publicKeyToken") == "31bf3856ad364e35"
    return found


def text(root: ElementTree.Element, path: str) -> str | None:
    return root.findtext(path, None, SPACE)


def test_answer_file_gives_name_and_network() -> None:
    root = answers()
    shell = component(root, "specialize", "Microsoft-Windows-Shell-Setup")
    assert text(shell, "ComputerName") == "pc1"
    assert text(shell, "TimeZone") is None
    card = component(root, "specialize", "Microsoft-Windows-TCPIP").find(
        "Interfaces/Interface", SPACE
    )
    assert card is not None
    assert card.get(ADD) == "add"
    assert text(card, "Identifier") == "02-00-00-00-00-0A"
    assert text(card, "Ipv4Settings/DhcpEnabled") == "false"
    assert text(card, "UnicastIpAddresses/IpAddress") == "10.0.0.1/24"
    assert text(card, "Routes/Route/Prefix") == "0.0.0.0/0"
    assert text(card, "Routes/Route/NextHopAddress") == "10.0.0.254"
    names = component(root, "specialize", "Microsoft-Windows-DNS-Client")
    servers = names.findall("Interfaces/Interface/DNSServerSearchOrder/IpAddress", SPACE)
    assert [one.text for one in servers] == ["10.0.0.2", "10.0.0.3"]


def test_answer_file_without_an_address_leaves_the_network_to_dhcp() -> None:
    root = answers(NodeSpec("pc1"))
    names = [one.get("name") for one in root.iterfind("settings/component", SPACE)]
    assert names == ["Microsoft-Windows-Shell-Setup"] * 2


def test_answer_file_for_ipv6_has_its_own_settings() -> None:
    root = answers(replace(NODE, address="fd00::1/64", gateway="fd00::fe", dns=()))
    card = component(root, "specialize", "Microsoft-Windows-TCPIP").find(
        "Interfaces/Interface", SPACE
    )
    assert card is not None
    assert text(card, "Ipv6Settings/DhcpEnabled") == "false"
    assert text(card, "Routes/Route/Prefix") == "::/0"


def test_answer_file_makes_an_account_only_when_told_and_without_a_password() -> None:
    assert answers().find(".//UserAccounts", SPACE) is None
    root = answers(with_variables(windows_user="teacher"))
    account = root.find(".//LocalAccounts/LocalAccount", SPACE)
    assert account is not None
    assert text(account, "Name") == "teacher"
    assert text(account, "Password/Value") == ""
    (new,) = custom("setup-complete", with_variables(windows_user="teacher")).files
    assert b"net user teacher /logonpasswordchg:yes\r\n" in new.data


@pytest.mark.parametrize("user", ["a b", "a&calc", "%PATH%", "1st", "", "a" * 21, '"'])
def test_a_user_name_that_a_shell_would_read_is_refused(user: str) -> None:
    for builtin in ("unattend", "setup-complete"):
        with pytest.raises(KaError) as caught:
            custom(builtin, with_variables(windows_user=user))
        assert caught.value.code is Code.USAGE


@given(zone=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20))
def test_a_variable_of_any_text_leaves_the_answer_file_well_formed(zone: str) -> None:
    (new,) = custom("unattend", with_variables(windows_timezone=zone)).files
    shell = component(
        ElementTree.fromstring(new.data), "specialize", "Microsoft-Windows-Shell-Setup"
    )
    assert text(shell, "TimeZone") == zone


@pytest.mark.parametrize("name", ["a-name-of-sixteen", "12345"])
@pytest.mark.parametrize("builtin", ["unattend", "setup-complete", "computer-name"])
def test_a_name_that_windows_refuses_stops_the_plan(builtin: str, name: str) -> None:
    with pytest.raises(KaError, match="at most 15 characters") as caught:
        custom(builtin, replace(NODE, name=name))
    assert caught.value.code is Code.USAGE


def test_first_commands_are_dos_lines_that_end_with_a_mark() -> None:
    (new,) = custom("setup-complete").files
    assert new.path == "/Windows/Setup/Scripts/SetupComplete.cmd"
    lines = new.data.decode("ascii").split("\r\n")
    assert lines[0] == "@echo off"
    assert lines[-2:] == ["echo deployed as pc1> %SystemRoot%\\kadeploy.txt", ""]
    assert all("\n" not in line and len(line) < 8191 for line in lines)  # cmd.exe's limit


def changes(edit: HiveEdit) -> dict[str, str]:
    return {one.old: one.new for one in edit.ids}


def test_boot_store_edit_maps_what_images_say_to_what_the_table_has() -> None:
    made = plan(MOVED)
    (layout,) = made.layouts
    esp, windows = layout.named("esp"), layout.named("windows")
    assert esp is not None
    assert windows is not None
    on_windows, on_esp = (one for one in made.finish if isinstance(one, Customize) and one.hives)
    (store,) = on_esp.hives
    assert (store.path, store.ids_needed) == ("/EFI/Microsoft/Boot/BCD", True)
    assert on_esp.mounts[0].place.number == esp.number
    assert changes(store) == {
        layout.disk_id.lower(): layout.disk_id.lower(),
        windows.part_uuid: windows.part_uuid,
        IMAGE_ESP.lower(): esp.part_uuid,
    }
    (letters,) = on_windows.hives
    assert letters.drop_others
    assert changes(letters) == changes(store)


def test_plan_shows_what_is_edited() -> None:
    text = "\n".join(planview.describe(plan(MOVED)))
    assert "registry /Windows/System32/config/SYSTEM: MountedDevices" in text
    assert "registry /EFI/Microsoft/Boot/BCD: Objects" in text


def test_hive_edits_survive_the_wire() -> None:
    for order in plan(MOVED).finish:
        assert from_json(json.loads(json.dumps(to_json(order)))) == order


GUIDS = st.uuids().map(str)


@given(
    pairs=st.lists(st.tuples(GUIDS, GUIDS), max_size=4, unique_by=(lambda one: one[0])),
    rest=st.lists(st.binary(max_size=8), min_size=5, max_size=5),
)
def test_guids_change_wherever_they_stand_and_nothing_else_does(
    pairs: list[tuple[str, str]], rest: list[bytes]
) -> None:
    def value(guids: list[str]) -> bytes:
        words = [UUID(guid).bytes_le for guid in guids]
        return b"".join(a + b for a, b in zip_longest(rest, words, fillvalue=b""))

    assume(len({guid for pair in pairs for guid in pair}) == 2 * len(pairs))
    change = GuidChange([IdChange(*pair) for pair in pairs])
    old, new = value([one for one, _ in pairs]), value([one for _, one in pairs])
    assert change.applied(old) == (new, bool(pairs))
    assert change.applied(new) == (new, bool(pairs))
    assert change.applied(b"".join(rest)) == (b"".join(rest), False)
    assert change.found is bool(pairs)


def test_boot_store_needs_to_know_what_the_images_say() -> None:
    unknown = "\n".join(
        line for line in MOVED.splitlines() if "disk_id" not in line and "guid: AAAA" not in line
    ).replace(f"image_guid: {IMAGE_ESP}, ", "")
    unknown = unknown.replace("size: 40GiB, format: ntfs,", "size: 40GiB, format: ntfs}")
    with pytest.raises(KaError, match="image_disk_id, image_guid"):
        plan(unknown)


def test_a_guid_belongs_to_one_partition() -> None:
    windows = "AAAAAAAA-0000-4000-8000-BBBBBBBBBBBB"
    with pytest.raises(KaError, match="occurs twice"):
        deploy.environment(MOVED.replace(IMAGE_ESP, windows.lower()))


def test_what_an_image_brings_is_not_formatted_and_named_by_its_partition() -> None:
    """The identifier of a file system that partclone writes is the image's, not ours."""
    esp = f'{{file: esp.img, kind: partclone, checksum: "{deploy.SUM}", partition: esp}}'
    text = deploy.DUAL.replace("    os: windows\n", "    os: windows\n    root: windows\n")
    made = plan(text.replace("      - {file: win.wim", f"      - {esp}\n      - {{file: win.wim"))
    (layout,) = made.layouts
    formatted = [one.place.number for one in made.prepare if isinstance(one, Format)]
    assert formatted == [3, 4]
    placed = layout.named("esp")
    assert placed is not None
    assert f"PARTUUID={placed.part_uuid} /boot/efi vfat" in postinstall.fstab(made.layouts)


def test_windows_is_customised_on_its_own_partition_alone() -> None:
    """What the other system calls / is not below this one."""
    for made in (one for one in plan(deploy.DUAL).finish if isinstance(one, Customize)):
        of_windows = any("Panther" in new.path for new in made.files)
        places = [(mount.path, mount.place.number) for mount in made.mounts]
        assert places == ([("/", 3)] if of_windows else [("/", 4), ("/boot/efi", 1)])
