"""What comes from the network: URLs, ranges, dnsmasq's log.  And the gate."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaboot.dnsmasq_log import LogEvent, neighbour, parse_line
from kaboot.gate import DELAY_S, PATIENCE_S, Gate
from kaboot.model import Machine
from kaboot.probe import make_discover, parse_offer
from kaboot.requests import (
    BadRequest,
    EntryRequest,
    FileRequest,
    HealthRequest,
    LoaderRequest,
    ReportRequest,
    ScriptRequest,
    parse_range,
    parse_request,
)
from kaboot.steps import Report

MAC = "52:54:00:12:34:56"


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (b"/boot.ipxe", EntryRequest()),
        (b"/health", HealthRequest()),
        (b"http://10.0.0.1:8069/health", HealthRequest()),
        (b"/loader/shimx64.efi", LoaderRequest("shimx64.efi")),
        (b"/files/a/b%2Bc.gz", FileRequest("a/b+c.gz")),
        (
            b"/ipxe/52-54-00-12-34-56?platform=pcbios&arch=x86_64&serial=A%20B&product=",
            ScriptRequest(Machine(MAC, "pcbios", "x86_64", "A B")),
        ),
        (
            b"/report/52-54-00-12-34-56/failed?detail=disk%20too%20small%0a%1b[2J",
            ReportRequest(MAC, Report.FAILED, "disk too small??[2J"),
        ),
    ],
)
def test_a_url_is_understood(target: bytes, wanted: object) -> None:
    assert parse_request(b"GET", target) == wanted


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        (b"GET", b"/", 404),
        (b"GET", b"/files/", 404),
        (b"GET", b"/files/../kaboot.db", 404),
        (b"GET", b"/files/%2e%2e/kaboot.db", 404),
        (b"GET", b"/files/a%2f..%2f..%2fkaboot.db", 404),
        (b"GET", b"/files/a//b", 404),
        (b"GET", b"/files/a%00b", 404),
        (b"GET", b"/loader/kaboot.db", 404),
        (b"GET", b"/ipxe/52-54-00-12-34", 400),
        (b"GET", b"/report/52-54-00-12-34-56/reinstall", 400),
        (b"GET", b"boot.ipxe", 400),
        (b"GET", b"/\xff", 400),
        (b"GET", b"/" + b"a" * 3000, 414),
        (b"GET", b"/ipxe/52-54-00-12-34-56?" + b"&".join([b"a=b"] * 20), 400),
        (b"POST", b"/boot.ipxe", 405),
        (b"DELETE", b"/report/52-54-00-12-34-56/up", 405),
    ],
)
def test_a_url_that_is_not_ours_is_refused(method: bytes, target: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(method, target)
    assert caught.value.status == status


TARGETS = st.one_of(
    st.binary(max_size=200),
    st.tuples(
        st.sampled_from([b"/ipxe/", b"/files/", b"/report/", b"/loader/", b"/"]),
        st.binary(max_size=80),
        st.sampled_from([b"", b"?", b"?detail=", b"/up?detail=", b"/efi/x86_64"]),
        st.binary(max_size=80),
    ).map(b"".join),
    st.binary(max_size=60).map(lambda tail: b"/ipxe/52-54-00-12-34-56?serial=" + tail),
)


@given(st.sampled_from([b"GET", b"HEAD", b"POST", b"\x00"]), TARGETS)
def test_no_request_raises_anything_but_a_refusal_and_all_text_is_printable(
    method: bytes, target: bytes
) -> None:
    try:
        request = parse_request(method, target)
    except BadRequest:
        return
    assert repr(request).isascii()
    assert repr(request).isprintable()
    if isinstance(request, FileRequest):
        assert ".." not in request.path.split("/")
        assert not request.path.startswith("/")


@pytest.mark.parametrize(
    ("header", "size", "wanted"),
    [
        (None, 10, None),
        (b"bytes=0-", 10, (0, 10)),
        (b"bytes=2-3", 10, (2, 2)),
        (b"bytes=2-99", 10, (2, 8)),
        (b"bytes=-3", 10, (7, 3)),
        (b"bytes=-30", 10, (0, 10)),
        (b"bytes=0-1,4-5", 10, None),
        (b"bytes=5-2", 10, None),
        (b"bytes=-", 10, None),
        (b"lines=1-2", 10, None),
        (b"bytes=1-x", 10, None),
        (b"bytes=10-", 10, 416),
        (b"bytes=-0", 10, 416),
        (b"bytes=0-", 0, 416),
        (b"bytes=-1", 0, 416),
    ],
)
def test_ranges(header: bytes | None, size: int, wanted: object) -> None:
    if wanted == 416:
        with pytest.raises(BadRequest):
            parse_range(header, size)
    else:
        assert parse_range(header, size) == wanted


@given(st.binary(max_size=30).map(lambda tail: b"bytes=" + tail), st.integers(0, 100))
def test_a_range_lies_inside_the_file_whatever_was_asked(header: bytes, size: int) -> None:
    try:
        found = parse_range(header, size)
    except BadRequest:
        return
    if found is not None:
        offset, length = found
        assert 0 <= offset < offset + length <= size


# ---------------------------------------------------------------- dnsmasq's log


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "dnsmasq-dhcp: 1464228951 DHCPDISCOVER(br0) 52:54:00:12:34:56",
            LogEvent("discover", mac=MAC),
        ),
        (
            "dnsmasq-dhcp: 1464228951 DHCPACK(br0) 10.78.0.100 52:54:00:12:34:56 pc1",
            LogEvent("lease", mac=MAC, address="10.78.0.100", detail="pc1"),
        ),
        (
            "dnsmasq-dhcp: 77 PXE(br0) 52:54:00:12:34:56 proxy",
            LogEvent("pxe", mac=MAC, detail="proxy"),
        ),
        (
            "dnsmasq-dhcp: 77 PXE(br0) 10.78.0.50 52:54:00:12:34:56 shimx64.efi",
            LogEvent("pxe", mac=MAC, address="10.78.0.50", detail="shimx64.efi"),
        ),
        (
            "dnsmasq-tftp: sent /s/tftp/undionly.kpxe to 10.78.0.100",
            LogEvent("tftp", address="10.78.0.100", detail="/s/tftp/undionly.kpxe"),
        ),
        ("dnsmasq-tftp: file /s/tftp/grub/x.cfg not found for 10.78.0.100", None),
        (
            "dnsmasq-tftp: file /s/tftp/files/x not found for 10.78.0.100",
            LogEvent(
                "tftp-failed",
                address="10.78.0.100",
                detail="file /s/tftp/files/x not found for 10.78.0.100",
            ),
        ),
        (
            "dnsmasq-tftp: error 8 User aborted the transfer received from 10.78.0.100",
            LogEvent(
                "tftp-failed",
                address="10.78.0.100",
                detail="error 8 User aborted the transfer received from 10.78.0.100",
            ),
        ),
        (
            "Nov 24 11:41:28 dnsmasq-dhcp[12]: DHCPREQUEST(br0) 10.78.0.9 52:54:00:12:34:56",
            LogEvent("request", mac=MAC, address="10.78.0.9"),
        ),
        ("dnsmasq-dhcp: 1 DHCPACK(br0) 10.78.0.100 01:54:00:12:34:56", None),
        ("dnsmasq-dhcp: 1 vendor class: PXEClient:Arch:00000:UNDI:002001", None),
        ("dnsmasq: started, version 2.90 DNS disabled", None),
        ("", None),
    ],
)
def test_log_lines(line: str, wanted: LogEvent | None) -> None:
    assert parse_line(line) == wanted


@given(st.text(max_size=1500))
def test_no_log_line_raises(text: str) -> None:
    for prefix in (
        "",
        "dnsmasq-dhcp: 1 DHCPACK(br0) 10.0.0.1 52:54:00:12:34:56 ",
        "dnsmasq-tftp: sent ",
    ):
        event = parse_line(prefix + text)
        if event is not None:
            assert event.detail.isprintable()
            assert event.detail.isascii()


def test_a_host_name_cannot_pose_as_another_machine() -> None:
    line = (
        "dnsmasq-dhcp: 1 DHCPACK(br0) 10.0.0.1 52:54:00:12:34:56"
        " x DHCPACK(br0) 10.0.0.2 52:54:00:00:00:01"
    )
    event = parse_line(line)
    assert event is not None
    assert (event.mac, event.address) == (MAC, "10.0.0.1")


ARP = """IP address       HW type     Flags       HW address            Mask     Device
10.78.0.50       0x1         0x2         52:54:00:12:34:56     *        br0
10.78.0.51       0x1         0x0         00:00:00:00:00:00     *        br0
"""


def test_the_neighbour_table_tells_who_is_at_an_address() -> None:
    assert neighbour(ARP, "10.78.0.50") == MAC
    assert neighbour(ARP, "10.78.0.51") == ""
    assert neighbour(ARP, "10.78.0.5") == ""
    assert neighbour("", "10.78.0.50") == ""


# ---------------------------------------------------------------- offers

TRANSACTION = b"abcd"


def offer(server: bytes = b"\x0a\x4e\x00\x02", address: bytes = b"\x0a\x4e\x00\x32") -> bytes:
    question = bytearray(make_discover(bytes(6), TRANSACTION))
    question[0] = 2
    question[16:20] = address
    return bytes(question[:240]) + b"\x35\x01\x02\x36" + bytes([len(server)]) + server + b"\xff"


def test_an_offer_names_its_server_and_nothing_else_is_an_offer() -> None:
    assert parse_offer(offer(), TRANSACTION) == IPv4Address("10.78.0.2")
    assert parse_offer(offer(), b"efgh") is None
    assert parse_offer(offer(server=b"abc"), TRANSACTION) is None
    assert parse_offer(offer(address=bytes(4)), TRANSACTION) is None, "a proxy's offer"
    assert parse_offer(make_discover(bytes(6), TRANSACTION), TRANSACTION) is None


@given(st.binary(max_size=80), st.integers(0, 260))
def test_no_packet_raises(data: bytes, place: int) -> None:
    parse_offer(data, TRANSACTION)
    whole = offer()
    parse_offer(whole[:place] + data + whole[place:], TRANSACTION)
    parse_offer(whole[:place], TRANSACTION)


# ---------------------------------------------------------------- the gate


def test_a_window_lets_so_many_in_and_the_next_when_one_is_done() -> None:
    gate = Gate(2, hold_s=100)
    assert gate.ask("a", 0).admitted
    assert gate.ask("b", 0).admitted
    verdict = gate.ask("c", 1)
    assert (verdict.admitted, verdict.delay_s, verdict.ahead) == (False, DELAY_S, 0)
    assert gate.ask("d", 1).ahead == 1
    gate.done("a")
    assert not gate.ask("d", 2).admitted, "c waits longer"
    assert gate.ask("c", 3).admitted
    assert gate.ask("b", 4).admitted, "it started anew and keeps its place"


def test_a_machine_that_dies_while_loading_frees_its_place_in_time() -> None:
    gate = Gate(1, hold_s=100)
    assert gate.ask("a", 0).admitted
    for now_s in range(1, 100, DELAY_S):
        assert not gate.ask("b", now_s).admitted
    assert gate.ask("b", 101).admitted


def test_a_machine_that_was_switched_off_while_waiting_does_not_hold_up_others() -> None:
    gate = Gate(1, hold_s=10)
    gate.ask("a", 0)
    gate.ask("gone", 1)
    assert not gate.ask("b", 9).admitted
    assert not gate.ask("b", 12).admitted, "gone is still expected"
    assert gate.ask("b", 1 + PATIENCE_S).admitted


def test_no_window_lets_everybody_in() -> None:
    gate = Gate(0, hold_s=10)
    assert all(gate.ask(str(number), 0).admitted for number in range(1000))


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans(), st.integers(0, 8))),
)
def test_never_more_than_the_window_load_and_every_persistent_machine_gets_in(
    window: int, moves: list[tuple[str, bool, int]]
) -> None:
    gate, now_s = Gate(window, hold_s=30), 0
    for mac, done, pause in moves:
        now_s += pause
        if done:
            gate.done(mac)
        else:
            gate.ask(mac, now_s)
        assert gate.loading <= window
    waiting = set("abcdefgh")
    for _ in range(60):
        now_s += DELAY_S
        waiting -= {mac for mac in sorted(waiting) if gate.ask(mac, now_s).admitted}
    assert not waiting
