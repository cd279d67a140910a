"""kaboot's server in a room of its own: DHCP as clients see it, dnsmasq, privileges, restarts.

No machine is booted here; a DHCP client plays its firmware.  Those that are: test_boot_vm.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kaboot import dhcp
from tests.support import boot_image, boot_lab
from tests.support.boot_site import write_site

pytestmark = pytest.mark.vm

MAC = boot_lab.FOREIGN_MAC
INVENTORY = f"""
[site]
address = "{boot_lab.ADDRESS}"
network = "10.78.0.0/24"
interface = "br0"
pool = "10.78.0.100-10.78.0.199"
files = "files"
state = "state"

[[profile]]
name = "install"
kernel = "vmlinuz"

[[node]]
name = "pc1"
macs = ["52:54:00:00:00:01"]
address = "10.78.0.11"

[[group]]
nodes = "pc[2-3]"
first_address = "10.78.0.12"
"""
HTTP = f"http://{boot_lab.ADDRESS}:8069"
IPXE = ("-x", "0xaf:01", "-x", "0x4d:69505845")
"""What iPXE adds to its requests: its own options, and its user class."""


@pytest.fixture(name="lab")
def _lab(short_path: Path) -> Iterator[boot_lab.Lab]:
    short_path.chmod(0o755)
    (short_path / "files").mkdir(mode=0o755)
    (short_path / "files/vmlinuz").write_bytes(b"kernel" * 1000)
    with boot_lab.lab(short_path) as lab:
        yield lab


def fetch(lab: boot_lab.Lab, path: str) -> str:
    """GET from the foreign server's address; the status's line first if it is not 200."""
    command = lab.inside(["busybox", "wget", "-q", "-O", "-", f"{HTTP}{path}"], foreign=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return result.stdout or result.stderr


WANTED = [
    (0, (), "undionly.kpxe"),
    (7, (), "shimx64.efi"),
    (9, (), "shimx64.efi"),
    (11, (), "shimaa64.efi"),
    (16, (), f"{HTTP}/loader/snponly.efi"),
    (0, IPXE, f"{HTTP}/boot.ipxe"),
    (7, IPXE, f"{HTTP}/boot.ipxe"),
]


def check_clients(lab: boot_lab.Lab) -> None:
    for arch, options, program in WANTED:
        told = lab.ask_dhcp(arch, *options)
        assert told["program"] == program, (arch, options, told)
        if not program.startswith("http"):
            assert told["siaddr"] == boot_lab.ADDRESS


def test_each_kind_of_firmware_is_given_its_program(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    check_clients(lab)
    assert 100 <= int(lab.ask_dhcp(0)["ip"].rpartition(".")[2]) <= 199


def test_a_node_may_wish_for_another_loader_and_gets_its_own_address(lab: boot_lab.Lab) -> None:
    extra = f'[[node]]\nname = "odd"\nmacs = ["{MAC}"]\naddress = "10.78.0.77"\nloader = "ipxe"\n'
    lab.serve(INVENTORY + extra)
    told = lab.ask_dhcp(7)
    assert (told["ip"], told["program"]) == ("10.78.0.77", "snponly.efi")


def test_isc_dhcpd_with_our_lines_gives_each_kind_its_program(
    lab: boot_lab.Lab, pytestconfig: pytest.Config
) -> None:
    unpacked = boot_image.unpack(Path(pytestconfig.cache.mkdir("boot")), "isc-dhcp-server")
    _, inventory = write_site(lab.directory, INVENTORY)
    config, leases = lab.directory / "dhcpd.conf", lab.directory / "leases"
    config.write_text(
        dhcp.site_lines(inventory, "isc")
        + "subnet 10.78.0.0 netmask 255.255.255.0 { range 10.78.0.100 10.78.0.199; }\n"
        + "authoritative;\n"
    )
    leases.touch()
    program = unpacked / "usr/sbin/dhcpd"
    command = [program, "-f", "-cf", config, "-lf", leases, "-pf", lab.directory / "pid", "br0"]
    lab.start(command, "dhcpd.log")
    check_clients(lab)


def test_kea_with_our_lines_gives_each_kind_its_program(
    lab: boot_lab.Lab, pytestconfig: pytest.Config
) -> None:
    packages = ("kea-dhcp4-server", "kea-common", "liblog4cplus-2.0.5", "libmariadb3", "libpq5")
    unpacked = boot_image.unpack(Path(pytestconfig.cache.mkdir("boot")), *packages)
    _, inventory = write_site(lab.directory, INVENTORY)
    text = dhcp.site_lines(inventory, "kea")
    rest = """{"Dhcp4": {
        "interfaces-config": {"interfaces": ["br0"]},
        "lease-database": {"type": "memfile", "persist": false},
        "subnet4": [{"subnet": "10.78.0.0/24", "pools": [{"pool": "10.78.0.100-10.78.0.199"}],
                     "match-client-id": false}],
        "reservations-global": true,"""
    config = lab.directory / "kea.json"
    config.write_text(re.sub(r'^\{\n  "Dhcp4": \{', lambda match: rest, text, flags=re.MULTILINE))
    libraries = unpacked / "usr/lib/x86_64-linux-gnu"
    (lab.directory / "run").mkdir()
    environment = [
        f"LD_LIBRARY_PATH={libraries}", f"KEA_PIDFILE_DIR={lab.directory}/run",
        f"KEA_LOCKFILE_DIR={lab.directory}/run",
    ]  # fmt: skip
    lab.start(["env", *environment, unpacked / "usr/sbin/kea-dhcp4", "-c", config], "kea.log")
    check_clients(lab)


def test_in_mode_site_only_files_are_served_and_no_address_is_given(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY.replace("[site]", '[site]\nmode = "site"'))
    with pytest.raises(AssertionError, match="no answer"):
        lab.ask_dhcp(0)
    for name in (
        "shimx64.efi",
        "grub/grub.cfg",
        "grub/node/52:54:00:00:00:01.cfg",
        "files/vmlinuz",
    ):
        copy = lab.directory / "copy"
        command = ["busybox", "tftp", "-g", "-r", name, "-l", copy, boot_lab.ADDRESS]
        subprocess.run(lab.inside(command, foreign=True), check=True, timeout=20)
        assert copy.read_bytes() == (lab.directory / "state/tftp" / name).read_bytes()


# Asks again and again: a card's IPv6 address is not usable at once.
ASK_FOR_A_ROUTER = """
import socket, time
asker = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
asker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, int({hops}))
asker.settimeout(0.5)
for _ in range({tries}):
    try:
        asker.sendto(bytes([133, 0, 0, 0, 0, 0, 0, 0]), ("ff02::2%eth0", 0))
        while (packet := asker.recv(1500))[0] != 134:
            pass
        print(packet[:2].hex(), packet[4:].hex())
        break
    except OSError:
        time.sleep(0.2)
"""


def router_of(lab: boot_lab.Lab, *, hops: int = 255, tries: int = 20) -> str:
    script = ASK_FOR_A_ROUTER.format(hops=hops, tries=tries)
    command = lab.inside([sys.executable, "-c", script], foreign=True)
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_who_asks_for_an_ipv6_router_is_told_that_there_is_none(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    assert router_of(lab) == f"8600 {bytes(12).hex()}\n"
    assert router_of(lab, hops=254, tries=2) == "", "it may come from another network"


def test_in_a_network_of_another_dhcp_server_nobody_is_told_of_routers(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY.replace('state = "state"', 'state = "state"\nmode = "proxy"'))
    assert router_of(lab, tries=6) == ""


def problems(lab: boot_lab.Lab) -> list[str]:
    """What `kaboot check` in the room finds of DHCP servers."""
    command = [sys.executable, "-c", "from kaboot.cli import main; main()"]
    result = subprocess.run(
        lab.inside([*command, "-c", lab.config, "check"]),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=boot_lab.ROOT,
    )
    assert "Traceback" not in result.stderr
    return [line for line in result.stdout.splitlines() if "DHCP" in line or "addresses" in line]


def test_check_finds_a_second_dhcp_server_or_misses_the_first(lab: boot_lab.Lab) -> None:
    proxy = INVENTORY.replace("[site]", '[site]\nmode = "proxy"')
    lab.config.write_text(proxy)
    assert problems(lab) == ["problem: no DHCP server answers here, and in mode proxy one must"]
    lab.serve(INVENTORY)
    assert problems(lab) == [], "our own is not another"
    lab.foreign_dhcp()
    wrong = "problem: another DHCP server answers here, 10.78.0.2: end it, or mode = proxy or site"
    lab.until(lambda: problems(lab) == [wrong], "the foreign server", 30)


def status(pid: int, field: str) -> str:
    match = re.search(rf"^{field}:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_server_and_its_dnsmasq_are_not_root_and_keep_three_capabilities(
    lab: boot_lab.Lab,
) -> None:
    server = lab.serve(INVENTORY)
    (dnsmasq,) = children(server.pid)
    for pid in (server.pid, dnsmasq):
        assert "0" not in status(pid, "Uid").split()
        assert int(status(pid, "CapEff"), 16) & ~((1 << 10) | (1 << 12) | (1 << 13)) == 0
        assert status(pid, "NoNewPrivs") == "1"
    for file in (lab.directory / "state").glob("kaboot.db*"):
        assert file.stat().st_mode & 0o077 == 0


def test_root_may_set_steps_while_the_server_is_not_root(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    with lab.control() as control:
        control.assign(["pc1"], "install")
    assert "/files/vmlinuz" in fetch(lab, "/ipxe/52-54-00-00-00-01")
    grub = lab.directory / "state/tftp/grub/node/52:54:00:00:00:01.cfg"
    lab.until(lambda: "/files/vmlinuz" in grub.read_text(), "the file for GRUB", 10)


def test_a_dnsmasq_that_dies_is_started_again(lab: boot_lab.Lab) -> None:
    server = lab.serve(INVENTORY)
    (first,) = children(server.pid)
    os.kill(first, signal.SIGKILL)
    lab.until(lambda: children(server.pid) not in ([first], []), "a new dnsmasq", 10)
    assert lab.ask_dhcp(0)["program"] == "undionly.kpxe"


def test_a_server_that_is_killed_takes_its_dnsmasq_along_and_starts_again(
    lab: boot_lab.Lab,
) -> None:
    server = lab.serve(INVENTORY)
    (dnsmasq,) = children(server.pid)
    fetch(lab, "/ipxe/52-54-00-00-00-99")
    server.kill()
    server.wait()
    lab.until(lambda: not Path(f"/proc/{dnsmasq}").exists(), "the end of dnsmasq", 10)
    lab.serve(INVENTORY)
    assert lab.ask_dhcp(0)["program"] == "undionly.kpxe"
    with lab.control() as control:
        assert [row.machine.mac for row in control.unknown()] == ["52:54:00:00:00:99"]


def test_a_second_server_is_refused(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    with pytest.raises(AssertionError, match="a kaboot already serves from"):
        lab.serve(INVENTORY)


def test_a_dnsmasq_that_cannot_start_is_one_line_and_the_end(lab: boot_lab.Lab) -> None:
    with pytest.raises(AssertionError) as caught:
        lab.serve(INVENTORY.replace('"br0"', '"br7"'))
    last = str(caught.value).splitlines()[-1]
    assert last == "kaboot: dnsmasq does not start: dnsmasq: unknown interface br7"
    assert "Traceback" not in lab.log()


def test_what_the_state_directory_links_to_keeps_its_owner(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    assert (lab.directory / "files/vmlinuz").stat().st_uid == os.getuid()
    assert (lab.directory / "state/tftp/undionly.kpxe").stat().st_uid != os.getuid()


def test_a_machine_that_appears_while_learning_gets_the_next_name_and_its_address(
    lab: boot_lab.Lab,
) -> None:
    lab.serve(INVENTORY)
    first = lab.ask_dhcp(0)["ip"]
    with lab.control() as control:
        control.start_learning(["pc2", "pc3"])
    mac = MAC.replace(":", "-")
    assert "pc2" in fetch(lab, f"/ipxe/{mac}?platform=pcbios&serial=S1")
    with lab.control() as control:
        assert control.learning() == ["pc3"]
        assert control.node("pc2").macs == (MAC,)
        stages = [event.stage for event in control.events(node="pc2")]
        assert stages[0] == "discover", "what came before its name is its own too"
        assert "learned" in stages
    hosts = lab.directory / "state/hosts"
    lab.until(lambda: MAC in hosts.read_text(), "the hosts file", 10)
    lab.until(lambda: lab.ask_dhcp(0)["ip"] == "10.78.0.12", "its address", 10)
    assert first != "10.78.0.12"


def test_a_changed_inventory_is_taken_and_a_broken_one_is_not(lab: boot_lab.Lab) -> None:
    lab.serve(INVENTORY)
    lab.config.write_text(INVENTORY.replace('"52:54:00:00:00:01"', '"52:54:00:00:00:0'))
    lab.until(lambda: "inventory.refused" in lab.log(), "refusal", 10)
    assert "pc1" in fetch(lab, "/ipxe/52-54-00-00-00-01")
    extra = f'[[node]]\nname = "late"\nmacs = ["{MAC}"]\naddress = "10.78.0.88"\n'
    lab.config.write_text(INVENTORY + extra)
    lab.until(lambda: "inventory.read nodes=4" in lab.log(), "reading", 10)
    lab.until(lambda: lab.ask_dhcp(0)["ip"] == "10.78.0.88", "its address", 10)


def test_it_ends_in_peace_when_asked_to(lab: boot_lab.Lab) -> None:
    server = lab.serve(INVENTORY)
    server.terminate()
    assert server.wait(10) == 0
    assert "Traceback" not in lab.log()
