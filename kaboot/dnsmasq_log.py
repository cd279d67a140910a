"""dnsmasq's log lines: what they say of a machine's boot, as events.  And who is at an address.

Pure.  The lines are those of `log-dhcp` and TFTP.  Client texts in them (host names, vendor
classes, paths) are the client's own: they are matched strictly where they stand, at the end, and
nothing is taken from an odd line.  A line that says nothing of interest gives None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import KaError
from kaboot.words import parse_mac, printable

__all__ = ["LogEvent", "neighbour", "parse_line"]

LINE_SIZE_MAX = 1024
DETAIL_SIZE_MAX = 120
PATH_SIZE_MAX = 512

_PREFIX = re.compile(
    r"^(?:<\d+>)?(?:[A-Z][a-z]{2} [ 0-9]\d [0-9:]{8} )?dnsmasq(?:-dhcp|-tftp)?(?:\[\d+\])?: "
)
_DHCP = re.compile(
    r"^(?:\d+ )?(DHCPDISCOVER|DHCPREQUEST|DHCPACK|DHCPNAK|DHCPDECLINE|PXE)\(([^()\s]{1,15})\)"
    r"(?: (\d{1,3}(?:\.\d{1,3}){3}|proxy))? ([0-9A-Fa-f:]{17})(?: (.*))?$"
)
_SENT = re.compile(r"^sent (\S+) to (\d{1,3}(?:\.\d{1,3}){3})$")
_FAILED = re.compile(
    r"^(?:failed sending|error \d+ .*received from|file) (.*?)(?: to | not found for )?"
    r"(\d{1,3}(?:\.\d{1,3}){3})$"
)
_STAGES = {
    "DHCPDISCOVER": "discover",
    "DHCPREQUEST": "request",
    "DHCPACK": "lease",
    "DHCPNAK": "nak",
    "DHCPDECLINE": "decline",
    "PXE": "pxe",
}


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A stage of a boot, of the machine with this MAC or at this address.

    Of `tftp`, the detail is the path of the file that was sent.
    """

    stage: str
    mac: str = ""
    address: str = ""
    detail: str = ""


def parse_line(line: str) -> LogEvent | None:
    """Return what a line of dnsmasq's log says, if it is of interest."""
    if len(line) > LINE_SIZE_MAX:
        return None
    text = _PREFIX.sub("", line.rstrip("\n"), count=1)
    if match := _DHCP.match(text):
        word, _, address, mac, rest = match.groups()
        try:
            mac = parse_mac(mac)
        except KaError:
            return None
        detail = printable(rest or "", DETAIL_SIZE_MAX)
        address = "" if address in (None, "proxy") else address
        return LogEvent(_STAGES[word], mac=mac, address=address, detail=detail)
    if match := _SENT.match(text):
        return LogEvent("tftp", address=match[2], detail=printable(match[1], PATH_SIZE_MAX))
    if match := _FAILED.match(text):
        # That GRUB asks in vain for what it might find (module lists, a configuration by address)
        # is its way.
        if " not found for " in text and "/files/" not in text:
            return None
        return LogEvent("tftp-failed", address=match[2], detail=printable(text, DETAIL_SIZE_MAX))
    return None


def neighbour(table: str, address: str) -> str:
    """Return the MAC at an address by the text of /proc/net/arp; empty if it does not say."""
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) >= 4 and words[0] == address and words[2] != "0x0":
            try:
                return parse_mac(words[3])
            except KaError:
                return ""
    return ""
