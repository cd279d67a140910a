"""What a URL asks for: method and target in, a typed request out.

Pure.  Boot firmware is the client, and anybody else on the network: whatever is not understood is
`BadRequest` with an HTTP status, and nothing from outside is longer than its limit, or anything
but printable ASCII, behind this module.

  GET /boot.ipxe                                   the first script of iPXE
  GET /ipxe/MAC?platform=&arch=&serial=&product=   a machine's iPXE script
  GET /loader/NAME                                 boot programs, for HTTP boot
  GET /files/PATH                                  kernels, initrds, images
  GET or POST /report/MAC/REPORT?detail=           what the booted system says
  GET /health                                      whether kaboot lives
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from common.errors import KaError
from kaboot.dhcp import TFTP_FILES
from kaboot.model import Machine
from kaboot.steps import Report
from kaboot.words import check_path, parse_mac, printable

__all__ = [
    "BadRequest",
    "EntryRequest",
    "FileRequest",
    "HealthRequest",
    "LoaderRequest",
    "ReportRequest",
    "Request",
    "ScriptRequest",
    "parse_range",
    "parse_request",
]

TARGET_SIZE_MAX = 2048
FACT_SIZE_MAX = 64
DETAIL_SIZE_MAX = 200


class BadRequest(Exception):
    """The request is refused; the status and one line for the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EntryRequest:
    pass


@dataclass(frozen=True, slots=True)
class ScriptRequest:
    machine: Machine


@dataclass(frozen=True, slots=True)
class FileRequest:
    path: str


@dataclass(frozen=True, slots=True)
class LoaderRequest:
    name: str


@dataclass(frozen=True, slots=True)
class ReportRequest:
    mac: str
    report: Report
    detail: str


@dataclass(frozen=True, slots=True)
class HealthRequest:
    pass


Request = EntryRequest | ScriptRequest | FileRequest | LoaderRequest | ReportRequest | HealthRequest


def parse_request(method: bytes, target: bytes) -> Request:
    """Return what is asked for; raises BadRequest."""
    if len(target) > TARGET_SIZE_MAX:
        raise BadRequest(414, "too long")
    try:
        text = target.decode("ascii")
    except UnicodeDecodeError:
        raise BadRequest(400, "not ASCII") from None
    path, _, query = text.partition("?")
    # Some firmwares send the whole URL.
    if path.startswith("http://"):
        path = "/" + path[len("http://") :].partition("/")[2]
    path = urllib.parse.unquote(path, errors="replace")
    if not path.startswith("/"):
        raise BadRequest(400, "not a path")
    parts = path[1:].split("/")
    reports = parts[0] == "report"
    if method not in ((b"GET", b"POST") if reports else (b"GET", b"HEAD")):
        raise BadRequest(405, "only GET")
    request = _parse(parts, _query(query))
    if request is None:
        raise BadRequest(404, "no such page")
    return request


def _parse(parts: list[str], query: dict[str, str]) -> Request | None:
    match parts:
        case ["boot.ipxe"]:
            return EntryRequest()
        case ["ipxe", mac]:
            facts = {key: printable(value, FACT_SIZE_MAX) for key, value in query.items()}
            machine = Machine(
                _mac(mac),
                platform=facts.get("platform", ""),
                arch=facts.get("arch", ""),
                serial=facts.get("serial", ""),
                product=facts.get("product", ""),
            )
            return ScriptRequest(machine)
        case ["files", *rest] if rest:
            try:
                return FileRequest(check_path("/".join(rest), "path"))
            except KaError:
                raise BadRequest(404, "no such file") from None
        case ["loader", name] if name in TFTP_FILES:
            return LoaderRequest(name)
        case ["report", mac, word]:
            return ReportRequest(_mac(mac), _report(word), _detail(query))
        case ["health"]:
            return HealthRequest()
    return None


def _mac(text: str) -> str:
    try:
        return parse_mac(text)
    except KaError:
        raise BadRequest(400, "not a MAC address") from None


def _report(word: str) -> Report:
    try:
        return Report(word)
    except ValueError:
        raise BadRequest(400, f"a report is one of {', '.join(r.value for r in Report)}") from None


def _detail(query: dict[str, str]) -> str:
    return printable(query.get("detail", ""), DETAIL_SIZE_MAX)


def _query(text: str) -> dict[str, str]:
    try:
        return dict(urllib.parse.parse_qsl(text, errors="replace", max_num_fields=16))
    except ValueError:
        raise BadRequest(400, "too many parameters") from None


def parse_range(header: bytes | None, size: int) -> tuple[int, int] | None:
    """Return offset and length of the one range asked for; None for the whole file.

    As RFC 9110 has it, what is not understood, or several ranges, is as if nothing was asked for;
    a range beyond the end raises BadRequest 416.
    """
    if header is None or not header.startswith(b"bytes=") or b"," in header:
        return None
    low, dash, high = header[len(b"bytes=") :].strip().partition(b"-")
    if not dash or any(part and not (part.isdigit() and len(part) < 20) for part in (low, high)):
        return None
    if not low:
        if not high:
            return None
        if int(high) == 0 or size == 0:
            raise BadRequest(416, "no such range")
        length = min(int(high), size)
        return size - length, length
    first = int(low)
    if high and int(high) < first:
        return None
    if first >= size:
        raise BadRequest(416, "no such range")
    last = min(int(high), size - 1) if high else size - 1
    return first, last - first + 1
