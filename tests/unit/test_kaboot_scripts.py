"""What machines are told: steps, scripts and DHCP configurations, compared with written-down ones.

`KA_GOLDEN=write python -m pytest tests/unit/test_kaboot_scripts.py` writes them anew; the
differences are then for a reviewer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import KaError
from kaboot import dhcp, scripts
from kaboot.check import find_dnsmasq
from kaboot.model import Assignment, Inventory, Step
from kaboot.steps import Kernel, Local, Report, Wait, after, decide, parse_assignment
from tests.support.boot_site import INVENTORY, write_site

GOLDEN = Path(__file__).parents[1] / "golden/kaboot"
MAC = "52:54:00:00:00:01"


@pytest.fixture(name="site", scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    _, made = write_site(tmp_path_factory.mktemp("site"))
    return made


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("KA_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    "step", ["install", "deployed", "local", "rescue", "menu", "discover", "custom:diskless",
             "custom:memtest"]
)  # fmt: skip
def test_each_step_is_told_as_written_down(site: Inventory, step: str) -> None:
    action = decide(site, MAC, site.nodes["pc1"], parse_assignment(step))
    name = step.replace(":", "-")
    golden(f"{name}.ipxe", scripts.to_ipxe(site, f"pc1: {step}", action))
    golden(f"{name}.grub", scripts.to_grub(site, f"pc1: {step}", action))


def test_the_first_scripts_and_waiting_are_as_written_down(site: Inventory) -> None:
    golden("entry.ipxe", scripts.entry_ipxe(site))
    golden("entry.grub", scripts.entry_grub(site))
    wait = Wait(5, "40 machines load, 3 wait before this one")
    golden("wait.ipxe", scripts.to_ipxe(site, "pc1", wait))
    golden("wait.grub", scripts.to_grub(site, "pc1", wait))


def test_an_unknown_machine_is_told_nothing_that_touches_its_disk(site: Inventory) -> None:
    action = decide(site, "52:54:00:00:00:99", None, Assignment(site.site.unknown))
    assert isinstance(action, Local)
    assert "52:54:00:00:00:99" in action.notice
    golden("unknown.ipxe", scripts.to_ipxe(site, "unknown", action))


def test_reports_move_a_node_along_and_repeated_ones_do_nothing() -> None:
    assert after(Step.INSTALL, Report.INSTALLED) is Step.DEPLOYED
    assert after(Step.DEPLOYED, Report.UP) is Step.LOCAL
    moved = {
        (step, report) for step in Step for report in Report if after(step, report) is not step
    }
    assert moved == {(Step.INSTALL, Report.INSTALLED), (Step.DEPLOYED, Report.UP)}


def test_a_step_whose_profile_went_from_the_file_boots_the_disk(site: Inventory) -> None:
    assert decide(site, MAC, None, Assignment(Step.CUSTOM, "gone")) == Local()


def test_nodes_take_turns_with_the_gateways_of_a_root_on_nfs(site: Inventory) -> None:
    def export(name: str) -> str:
        action = decide(site, MAC, site.nodes[name], Assignment(Step.CUSTOM, "diskless"))
        assert isinstance(action, Kernel)
        (word,) = [a for a in action.arguments if a.startswith("nfsroot=")]
        return word.partition("=")[2].partition(":")[0]

    assert [export(f"pc{n}") for n in range(1, 5)] == ["10.78.0.5", "10.78.0.6"] * 2


@given(st.text(max_size=60))
def test_no_step_from_outside_raises_anything_but_usage(text: str) -> None:
    try:
        parsed = parse_assignment(text)
    except KaError:
        return
    assert parse_assignment(str(parsed)) == parsed


@given(st.text(max_size=300))
def test_what_a_machine_says_cannot_end_a_comment_or_a_notice(text: str) -> None:
    hostile = Local(text, 1)
    site = _SITE[0]
    for write in (scripts.to_ipxe, scripts.to_grub):
        plain = write(site, "c", Local("x", 1)).splitlines()
        lines = write(site, text, hostile).splitlines()
        assert len(lines) in (len(plain), len(plain) - 1)
        notice = [line for line in lines if line.startswith("echo") and "again" not in line]
        assert all(not set(line[6:-1]) & set("$`\\'\"{}|&;#") for line in notice)


_SITE: list[Inventory] = []


@pytest.fixture(autouse=True, scope="module")
def _keep(site: Inventory) -> None:
    _SITE.append(site)  # hypothesis takes no function-scoped fixture


# ---------------------------------------------------------------- DHCP


@pytest.mark.parametrize("mode", ["dhcp", "proxy", "site"])
def test_our_dnsmasq_is_configured_as_written_down_and_it_takes_it(
    tmp_path: Path, mode: str
) -> None:
    _, made = write_site(tmp_path, INVENTORY.replace("[site]", f'[site]\nmode = "{mode}"'))
    text = dhcp.dnsmasq_conf(made, tftp_root="/s/tftp", hosts="/s/hosts", leases="/s/leases")
    golden(f"dnsmasq-{mode}.conf", text)
    hosts = dhcp.dnsmasq_hosts(made)
    golden(f"dnsmasq-{mode}.hosts", hosts)
    _dnsmasq_takes(tmp_path, text, hosts)


def _dnsmasq_takes(directory: Path, text: str, hosts: str) -> None:
    program = find_dnsmasq()
    if program is None:
        pytest.skip("dnsmasq is not installed")
    (directory / "hosts").write_text(hosts)
    (directory / "conf").write_text(
        text.replace("/s/hosts", str(directory / "hosts")).replace("/s/", f"{directory}/")
    )
    command = [program, "--test", f"--conf-file={directory / 'conf'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("server", dhcp.SITE_SERVERS)
def test_the_lines_for_a_sites_server_are_as_written_down(
    site: Inventory, server: str, tmp_path: Path
) -> None:
    text = dhcp.site_lines(site, server)
    golden(f"site-{server}.conf", text)
    if server == "dnsmasq":
        _dnsmasq_takes(tmp_path, text, "")
    elif server == "isc" and (program := shutil.which("dhcpd", path="/usr/sbin:/usr/bin")):
        (tmp_path / "dhcpd.conf").write_text(text)
        command = [program, "-t", "-cf", str(tmp_path / "dhcpd.conf")]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        assert result.returncode == 0, result.stderr
