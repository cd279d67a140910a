"""The inventory file: what it becomes, and that what is wrong is said in one clear line."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from kaboot import inventory
from kaboot.model import Assignment, Machine, Step
from kaboot.naming import check_queue, name_for
from kaboot.words import check_argument, check_label, check_path, check_title, parse_mac
from tests.support.boot_site import INVENTORY, write_site


def test_a_file_becomes_nodes_profiles_and_a_site(tmp_path: Path) -> None:
    _, made = write_site(tmp_path)
    assert list(made.nodes) == [f"pc{number}" for number in range(1, 9)]
    assert made.nodes["pc1"].macs == ("52:54:00:00:00:01", "52:54:00:00:01:01")
    assert made.by_mac["52:54:00:00:01:01"] is made.nodes["pc1"]
    assert made.nodes["pc8"].address == IPv4Address("10.78.0.18")
    assert made.nodes["pc8"].step is Step.INSTALL
    assert (made.nodes["pc2"].step, made.nodes["pc2"].profile) == (Step.CUSTOM, "diskless")
    assert made.site.files == str(tmp_path / "files")
    assert made.site.url == "http://10.78.0.1:8069"


def test_every_path_is_relative_to_the_file_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_site(tmp_path, f'{INVENTORY}\n[loaders]\nipxe_bios = "own/undionly.kpxe"\n')
    monkeypatch.chdir("/")
    site = inventory.load(tmp_path / "kaboot.toml").site
    assert site.loaders.ipxe_bios == str(tmp_path / "own/undionly.kpxe")
    assert site.files == str(tmp_path / "files")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('rack = "a"', 'wrack = "a"', "unknown key 'wrack' (did you mean 'rack'?)"),
        ('rack = "a"', 'rack = "a b"', "not a rack: 'a b'"),
        ('"pc1"', '"pc 1"', "not a node's name: 'pc 1'"),
        ('"pc1"', '"101"', "dnsmasq takes it for a time or an order"),
        ('"pc1"', '"12H"', "dnsmasq takes it for a time or an order"),
        ('"pc1"', '"ignore"', "dnsmasq takes it for a time or an order"),
        ('name = "pc2"', 'name = "pc1"', "node pc1 occurs twice"),
        ('name = "pc2"', 'name = "pc4"', "node pc4 occurs twice"),
        ('"52:54:00:00:00:02"', '"52:54:00:00:00:01"', "is the MAC of pc1 and pc2"),
        ('"52:54:00:00:00:02"', '"52:54:00:00:00"', "not a MAC address: '52:54:00:00:00'"),
        ('"52:54:00:00:00:02"', '"01:00:5e:00:00:01"', "not the MAC address of one machine"),
        ('"10.78.0.12"', '"10.78.0.11"', "10.78.0.11 is the address of pc1 and pc2"),
        ('"10.78.0.12"', '"10.78.0.1"', "10.78.0.1 is the address of the server and pc2"),
        ('"10.78.0.12"', '"10.79.0.12"', "pc2: 10.79.0.12 is not a host in 10.78.0.0/24"),
        ('"10.78.0.12"', '"10.78.0.150"', "pc2: 10.78.0.150 is in the pool"),
        ('"10.78.0.12"', '"10.78.0.x"', "'address': not an IPv4 address: '10.78.0.x'"),
        ('step = "install"', 'step = "instal"', "no step 'instal': there are install, deployed"),
        ('"custom:diskless"', '"custom"', "not a step: 'custom'; write custom:PROFILE"),
        ('"custom:diskless"', '"local:diskless"', "write plain local"),
        ('"custom:diskless"', '"custom:disk"', "pc2: no profile 'disk' in the inventory"),
        ('name = "install"', 'name = "instal"', "no profile 'install' in the inventory"),
        ('name = "memtest"', 'name = "menu"', "a profile cannot be called 'menu'"),
        ('firmware = "bios"', 'firmware = "coreboot"', "'firmware' is one of bios, uefi, any"),
        ('"quiet"', '"root=/dev/sda1 rw"', "not a kernel argument"),
        ('"quiet"', '"a;${boom}"', "not a kernel argument"),
        ('"quiet"', '"root_password=hunter2"', "a secret on a kernel command line"),
        ('"quiet"', '"url=http://me:hunter2@host/"', "a secret on a kernel command line"),
        ('"deploy/vmlinuz"', '"../vmlinuz"', "kernel: not a path below the served directory"),
        ('"deploy/vmlinuz"', '"/vmlinuz"', "kernel: not a path below the served directory"),
        ('"Rescue system"', '"Rescue\'; reboot"', "not a title"),
        ('"10.78.0.5:/mnt/debian"', '"gw:/mnt/debian"', "not an NFS root: 'gw:/mnt/debian'"),
        ('program = "memtest', 'kernel = "a"\nprogram = "memtest', "either a kernel or a program"),
        ('"10.78.0.0/24"', '"10.78.0.1/24"', "'network': not a network"),
        ('"10.78.0.100-10.78.0.199"', '"10.78.0.100"', "'pool': not an IPv4 address: ''"),
        ('"10.78.0.100-10.78.0.199"', '"10.78.0.9-10.78.0.2"', "is not a range of"),
        ('"br0"', '"br0\\ndhcp-script=/tmp/x"', "not a network interface"),
        ('domain = "room12.example"', 'domain = "a,b"', "not a domain: 'a,b'"),
        ('domain = "room12.example"', 'unknown = "install"', "strangers are not installed"),
        ('domain = "room12.example"', "lease_s = 5", "lease_s is 5; it must be 120 to"),
        ('state = "state"', 'state = "st ate"', "'state': this path has characters"),
        ('"pc[4-8]"', '"pc[4-"', "not a node set"),
        ('serial = "CZC1234567"', 'serial = "a\\tb"', "not a serial number"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    tmp_path: Path, before: str, after: str, complaint: str
) -> None:
    assert before in INVENTORY
    with pytest.raises(KaError) as caught:
        write_site(tmp_path, INVENTORY.replace(before, after, 1))
    assert complaint in str(caught.value)
    assert caught.value.code is Code.USAGE
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else_happens(
    tmp_path_factory: pytest.TempPathFactory, content: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.toml"
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    with pytest.raises(KaError):
        inventory.load(path)


VALUES = st.one_of(
    st.text(max_size=20), st.integers(), st.booleans(), st.sampled_from(["pc1", "custom:", "::"])
)


@given(
    st.sampled_from(["site", "profile", "node", "group"]),
    st.dictionaries(
        st.sampled_from(
            ["name", "macs", "address", "step", "nodes", "kernel", "program", "serial"]
        ),
        VALUES | st.lists(VALUES, max_size=3),
        max_size=5,
    ),
)
def test_any_value_at_any_key_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, table: str, values: dict[str, object]
) -> None:
    lines = [f"[[{table}]]" if table != "site" else "[other]"]
    lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    message = ""
    try:
        write_site(tmp_path_factory.getbasetemp(), INVENTORY + "\n".join(lines))
    except KaError as error:
        message = str(error)
    assert "\n" not in message


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        escaped = "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    return str(value)


FORBIDDEN = set(" \t\r\n'\"`$\\#|{}")


@given(st.text(max_size=40))
def test_what_passes_as_a_word_has_no_meaning_to_any_script(text: str) -> None:
    for check in (check_argument, lambda word: check_path(word, ""), lambda w: check_label(w, "")):
        try:
            word = check(text)
        except KaError:
            continue
        assert word.isascii()
        assert word.isprintable()
        assert not FORBIDDEN & set(word)
    try:
        title = check_title(text)
    except KaError:
        return
    assert not (FORBIDDEN - {" "}) & set(title)


@given(st.binary(min_size=6, max_size=6), st.sampled_from(":-"), st.booleans(), st.booleans())
def test_a_mac_has_one_form_however_it_is_written(
    data: bytes, separator: str, upper: bool, typed: bool
) -> None:
    text = ("01" + separator if typed else "") + data.hex(separator)
    text = text.upper() if upper else text
    if data[0] & 1 or not any(data):
        with pytest.raises(KaError):
            parse_mac(text)
    else:
        assert parse_mac(text) == data.hex(":")


def test_learned_names_join_the_inventory_but_do_not_change_what_the_file_says(
    tmp_path: Path,
) -> None:
    _, made = write_site(tmp_path)
    learned = {
        "52:54:00:00:00:04": "pc4",
        "52:54:00:00:00:01": "pc5",  # the file says it is pc1
        "52:54:00:00:00:99": "gone",  # not in the file any more
    }
    joined = made.with_learned(learned)
    assert joined.nodes["pc4"].macs == ("52:54:00:00:00:04",)
    assert joined.by_mac["52:54:00:00:00:01"].name == "pc1"
    assert "52:54:00:00:00:99" not in joined.by_mac
    assert made.nodes["pc4"].macs == ()


def test_a_serial_names_a_node_without_a_mac_before_the_queue_does(tmp_path: Path) -> None:
    _, made = write_site(tmp_path)
    stranger = Machine("52:54:00:00:00:77", serial="CZC1234567")
    assert name_for(made, stranger, ["pc4"]) == "pc3"
    assert name_for(made, Machine("52:54:00:00:00:77"), ["pc4", "pc5"]) == "pc4"
    assert name_for(made, Machine("52:54:00:00:00:77"), []) is None
    named = made.with_learned({"52:54:00:00:00:33": "pc3", "52:54:00:00:00:44": "pc4"})
    assert name_for(named, stranger, ["pc4", "pc5"]) == "pc5"
    assert name_for(named, Machine("52:54:00:00:00:33"), ["pc5"]) is None


def test_only_nodes_that_wait_for_a_mac_can_be_learned(tmp_path: Path) -> None:
    _, made = write_site(tmp_path)
    check_queue(made, ["pc3", "pc4"])
    for names, complaint in ((["pc1"], "has its MAC"), (["pc99"], "no node"), ([], "no names")):
        with pytest.raises(KaError, match=complaint):
            check_queue(made, names)


def test_install_cannot_be_assigned_without_a_profile(tmp_path: Path) -> None:
    _, made = write_site(tmp_path)
    made.check(Assignment(Step.DEPLOYED), "pc1")
    with pytest.raises(KaError, match="no profile 'nothing'"):
        made.check(Assignment(Step.CUSTOM, "nothing"), "pc1")
