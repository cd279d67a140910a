"""Built-ins for Windows: its answer file, its first commands, its registry and its boot store.

Pure.  Windows makes a copy its own by `sysprep /generalize` on the golden machine and an answer
file on each node (unattend, setup-complete).  What these do not reach is edited from outside:

  computer-name   the name in the registry, for a golden machine that was not generalised
  drive-letters   SYSTEM\\MountedDevices: letters follow this node's partitions, others go
  boot-store      the device elements of the BCD on the ESP name this node's disk and partitions

Both of the latter change GUIDs that the images have (`image_guid`, `image_disk_id`, else the ones
that are kept) into this node's.  They stand as 16 bytes in the middle of binary values: device
elements (those inside a ramdisk's too) and "DMIO:ID:" of MountedDevices alike, so they are found
by what they are, not by where they stand.

No password is written anywhere.  The built-in administrator gets a random one that nobody knows and
is disabled; who has a key enters by ssh; a local account (variable `windows_user`) has no password,
so works at the console only, and whoever first sits there chooses one.

Not here: what Windows makes of all this: docs/kadeploy.md has the list to try.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_interface

from common.errors import Code, KaError
from kadeploy.builtin import Customization, Work, rendered
from kadeploy.environment import Label
from kadeploy.nodes import NodeSpec
from kadeploy.orders import HiveEdit, HiveValue, IdChange, NewFile
from kadeploy.partitions import DiskLayout

__all__ = ["BUILTINS"]

SYSTEM_HIVE = "/Windows/System32/config/SYSTEM"
BOOT_STORE = "/EFI/Microsoft/Boot/BCD"
COMPUTER_NAME_LENGTH_MAX = 15
"""NetBIOS' limit, which setup enforces."""
USER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,19}")

_UNATTEND = """<?xml version="1.0" encoding="utf-8"?>
{%- set every %}processorArchitecture="amd64"
      publicKeyToken="31bf3856ad364e35" language="neutral" versionScope="nonSxS"{% endset %}
<!-- Written by kadeploy. -->
<unattend xmlns="urn:schemas-microsoft-com:unattend"
  xmlns:wcm="http://schemas.microsoft.com/WMIConfig/2002/State">
  <settings pass="specialize">
    <component name="Microsoft-Windows-Shell-Setup" {{ every }}>
      <ComputerName>{{ computer_name }}</ComputerName>
{%- if vars.windows_timezone is defined %}
      <TimeZone>{{ vars.windows_timezone }}</TimeZone>
{%- endif %}
    </component>
{%- if node.address %}
    <component name="Microsoft-Windows-TCPIP" {{ every }}>
      <Interfaces>
        <Interface wcm:action="add">
          <Identifier>{{ interface }}</Identifier>
          <Ipv{{ ip_version }}Settings>
            <DhcpEnabled>false</DhcpEnabled>
          </Ipv{{ ip_version }}Settings>
          <UnicastIpAddresses>
            <IpAddress wcm:action="add" wcm:keyValue="1">{{ node.address }}</IpAddress>
          </UnicastIpAddresses>
{%- if node.gateway %}
          <Routes>
            <Route wcm:action="add">
              <Identifier>0</Identifier>
              <Prefix>{{ "0.0.0.0/0" if ip_version == 4 else "::/0" }}</Prefix>
              <NextHopAddress>{{ node.gateway }}</NextHopAddress>
            </Route>
          </Routes>
{%- endif %}
        </Interface>
      </Interfaces>
    </component>
{%- if node.dns %}
    <component name="Microsoft-Windows-DNS-Client" {{ every }}>
      <Interfaces>
        <Interface wcm:action="add">
          <Identifier>{{ interface }}</Identifier>
          <DNSServerSearchOrder>
{%- for server in node.dns %}
            <IpAddress wcm:action="add" wcm:keyValue="{{ loop.index }}">{{ server }}</IpAddress>
{%- endfor %}
          </DNSServerSearchOrder>
        </Interface>
      </Interfaces>
    </component>
{%- endif %}
{%- endif %}
  </settings>
  <settings pass="oobeSystem">
{%- if vars.windows_locale is defined %}
    <component name="Microsoft-Windows-International-Core" {{ every }}>
      <InputLocale>{{ vars.windows_locale }}</InputLocale>
      <SystemLocale>{{ vars.windows_locale }}</SystemLocale>
      <UILanguage>{{ vars.windows_locale }}</UILanguage>
      <UserLocale>{{ vars.windows_locale }}</UserLocale>
    </component>
{%- endif %}
    <component name="Microsoft-Windows-Shell-Setup" {{ every }}>
      <OOBE>
        <HideEULAPage>true</HideEULAPage>
        <HideOEMRegistrationScreen>true</HideOEMRegistrationScreen>
        <HideOnlineAccountScreens>true</HideOnlineAccountScreens>
        <HideWirelessSetupInOOBE>true</HideWirelessSetupInOOBE>
        <ProtectYourPC>3</ProtectYourPC>
      </OOBE>
{%- if vars.windows_user is defined %}
      <UserAccounts>
        <LocalAccounts>
          <LocalAccount wcm:action="add">
            <Name>{{ vars.windows_user }}</Name>
            <Group>Administrators</Group>
            <Password>
              <Value></Value>
              <PlainText>true</PlainText>
            </Password>
          </LocalAccount>
        </LocalAccounts>
      </UserAccounts>
{%- endif %}
    </component>
  </settings>
</unattend>
"""

# Accounts are told by their SIDs: their names are translated.  Without hibernation (and the fast
# start made of it) a volume is left clean, which the other system and the next deployment need.
# A volume that came by partclone has its old size: it grows to its partition's.
_SETUP_COMPLETE = """@echo off
rem Written by kadeploy.
set keys=%ProgramData%\\ssh\\administrators_authorized_keys
if exist %keys% icacls %keys% /inheritance:r /grant *S-1-5-32-544:F /grant *S-1-5-18:F
if exist %keys% sc config sshd start= auto
if exist %keys% sc start sshd
powershell -NoProfile -Command "$p = ConvertTo-SecureString ([guid]::NewGuid().ToString() + \
[guid]::NewGuid().ToString()) -AsPlainText -Force; Get-LocalUser | Where-Object SID -like \
'S-1-5-21-*-500' | ForEach-Object { \
Set-LocalUser -InputObject $_ -Password $p; Disable-LocalUser -InputObject $_ }"
{% if vars.windows_user is defined %}net user {{ vars.windows_user }} /logonpasswordchg:yes
{% endif %}powercfg /hibernate off
(echo select volume %SystemDrive%& echo extend filesystem) | diskpart
del /q %SystemRoot%\\Panther\\unattend.xml
echo deployed as {{ computer_name }}> %SystemRoot%\\kadeploy.txt
"""


def _computer_name(node: NodeSpec) -> str:
    if len(node.name) > COMPUTER_NAME_LENGTH_MAX or node.name.isdigit():
        raise KaError(
            Code.USAGE,
            f"{node.name}: Windows wants a name of at most {COMPUTER_NAME_LENGTH_MAX} characters,"
            " not digits alone",
        )
    return node.name


def _text(name: str, template: str, work: Work) -> str:
    user = work.context["vars"].get("windows_user")
    if user is not None and not USER_NAME.fullmatch(user):
        raise KaError(Code.USAGE, f"{work.node.name}: not a windows_user: {user!r}")
    node = work.node
    more = {
        "computer_name": _computer_name(node),
        "interface": node.mac.replace(":", "-").upper() or "Ethernet",
        "ip_version": ip_interface(node.address).version if node.address else 4,
    }
    return rendered(name, template, {**work.context, **more})


def _unattend(work: Work) -> Customization:
    text = _text("unattend.xml", _UNATTEND, work)
    return Customization(files=(NewFile.of("/Windows/Panther/unattend.xml", text.encode()),))


def _setup_complete(work: Work) -> Customization:
    text = _text("SetupComplete.cmd", _SETUP_COMPLETE, work).replace("\n", "\r\n")
    path = "/Windows/Setup/Scripts/SetupComplete.cmd"
    return Customization(files=(NewFile.of(path, text.encode()),))


def _ssh_keys(work: Work) -> Customization:
    if not work.nodes.ssh_keys:
        raise KaError(Code.USAGE, "built-in windows-ssh-keys: the nodes file has no ssh_keys")
    text = "".join(f"{key}\r\n" for key in work.nodes.ssh_keys)
    path = "/ProgramData/ssh/administrators_authorized_keys"
    return Customization(files=(NewFile.of(path, text.encode()),))


def _computer_name_edit(work: Work) -> Customization:
    name = _computer_name(work.node)
    control = "CurrentControlSet\\Control\\ComputerName\\ComputerName"
    network = "CurrentControlSet\\Services\\Tcpip\\Parameters"
    return Customization(
        hives=(
            HiveEdit(SYSTEM_HIVE, control, (HiveValue("ComputerName", name.upper()),)),
            HiveEdit(
                SYSTEM_HIVE, network, (HiveValue("Hostname", name), HiveValue("NV Hostname", name))
            ),
        )
    )


def _drive_letters(work: Work) -> Customization:
    edit = HiveEdit(SYSTEM_HIVE, "MountedDevices", ids=_ids(work.layouts), drop_others=True)
    return Customization(hives=(edit,))


def _boot_store(work: Work) -> Customization:
    ids = _ids(work.layouts)
    if not ids:
        raise KaError(
            Code.USAGE,
            "built-in boot-store: say what the images call the disk and its partitions"
            " (image_disk_id, image_guid)",
        )
    return Customization(esp_hives=(HiveEdit(BOOT_STORE, "Objects", ids=ids, ids_needed=True),))


def _ids(layouts: Sequence[DiskLayout]) -> tuple[IdChange, ...]:
    """Return what the images call disks and partitions, and what this node calls them."""
    made: list[IdChange] = []
    for layout in layouts:
        if layout.spec.label is not Label.GPT:
            continue
        if old := layout.spec.image_disk_id or layout.spec.disk_id:
            made.append(IdChange(old.lower(), layout.disk_id.lower()))
        for one in layout.partitions:
            if one.spec is not None and (old := one.spec.image_guid or one.spec.guid):
                made.append(IdChange(old.lower(), one.part_uuid.lower()))
    return tuple(made)


BUILTINS: dict[str, Callable[[Work], Customization]] = {
    "boot-store": _boot_store,
    "computer-name": _computer_name_edit,
    "drive-letters": _drive_letters,
    "setup-complete": _setup_complete,
    "unattend": _unattend,
    "windows-ssh-keys": _ssh_keys,
}
