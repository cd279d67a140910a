"""kaboot's HTTP over real sockets: scripts, files, reports, and clients that behave badly."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType

import h11
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaboot import http as http_module
from kaboot.control import Control
from kaboot.http import Reply, serve_http
from kaboot.model import Inventory
from kaboot.requests import BadRequest
from kaboot.service import Service
from kaboot.stage import stage
from kaboot.store import Store
from tests.support.boot_site import INVENTORY, write_site

PC1 = "52-54-00-00-00-01"
STRANGER = "52-54-00-00-00-99"
BIG_SIZE = 24 << 20


class Site:
    """A serving kaboot, without dnsmasq, on a free port of the loopback."""

    def __init__(self, service: Service, config: Path, inventory: Inventory, port: int) -> None:
        self.service = service
        self.config = config
        self.inventory = inventory
        self.port = port

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def raw(self, data: bytes) -> bytes:
        """Send bytes, end, and return all that comes back."""
        with trio.fail_after(20):
            async with await self.connect() as stream:
                await stream.send_all(data)
                await stream.send_eof()
                return b"".join([part async for part in stream])

    async def get(
        self, target: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} {target} HTTP/1.1", "Host: kaboot", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        answer = await self.raw("\r\n".join([*lines, "", ""]).encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        found = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in rest}
        return int(first.split()[1]), found, body

    def control(self) -> Control:
        return Control.open(self.config)

    def stages(self, who: str) -> list[str]:
        with self.control() as control:
            return [f"{event.stage} {event.detail}" for event in control.events(node=who)]


class Serving:
    """An async context manager: pytest-trio's fixtures cannot hold a nursery by themselves."""

    def __init__(self, directory: Path, text: str = INVENTORY) -> None:
        self._directory = directory
        self._text = text

    async def __aenter__(self) -> Site:
        (self._directory / "files/deploy").mkdir(parents=True, exist_ok=True)
        config, inventory = write_site(self._directory, self._text)
        Control.open(config).close()
        stage(inventory)
        self._store = Store.open(self._directory / "state/kaboot.db")
        service = Service(inventory, self._store)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._nursery.start_soon(serve_http, listener, service.handle)
        self._listener = listener
        return Site(service, config, inventory, listener.socket.getsockname()[1])

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._nursery.cancel_scope.cancel()
        try:
            await self._manager.__aexit__(kind, error, traceback)
        finally:
            self._listener.socket.close()
            self._store.close()


@pytest.fixture(name="site")
async def _site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Serving(tmp_path) as site:
        yield site


# ---------------------------------------------------------------- scripts and steps


async def test_a_machine_gets_the_script_of_its_step(site: Site) -> None:
    status, headers, body = await site.get(f"/ipxe/{PC1}?platform=pcbios&serial=ABC")
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert b"sanboot" in body
    with site.control() as control:
        control.assign(["pc1"], "install")
    _, _, body = await site.get(f"/ipxe/{PC1}")
    assert b"/files/deploy/vmlinuz" in body
    assert site.stages("pc1")[0] == "script local ipxe"


async def test_reports_move_a_node_from_install_to_its_own_disk(site: Site) -> None:
    with site.control() as control:
        control.assign(["pc1"], "install")
    grub = site.config.parent / "state/tftp/grub/node/52:54:00:00:00:01.cfg"
    await site.get(f"/ipxe/{PC1}")
    for report, step in (("hello", "install"), ("installed", "deployed"), ("up", "local")):
        assert (await site.get(f"/report/{PC1}/{report}?detail=fine", "POST"))[0] == 200
        with site.control() as control:
            assert control.nodes()[0].assignment.step.value == step
    assert not grub.exists(), "pc1 is a BIOS machine: GRUB has no file for it"
    assert (await site.get(f"/report/{PC1}/installed"))[0] == 200
    assert site.stages("pc1")[-2:] == ["step local (reported up)", "report installed"]


async def test_a_report_from_somebody_elses_address_is_refused(site: Site) -> None:
    with site.control() as control:
        control.assign(["pc1"], "install")
    await site.get(f"/ipxe/{STRANGER}")
    status, _, _ = await site.get(f"/report/{PC1}/installed")
    assert status == 403
    with site.control() as control:
        assert control.nodes()[0].assignment.step.value == "install"
    assert "refused report installed for 52:54:00:00:00:01" in site.stages(
        STRANGER.replace("-", ":")
    )


async def test_an_unknown_machine_is_recorded_and_sent_to_its_disk(site: Site) -> None:
    target = f"/ipxe/{STRANGER}?platform=efi&arch=x86_64&serial=S%1b1&product=Opti%20Plex"
    _, _, body = await site.get(target)
    assert b"exit 1" in body
    assert b"kernel" not in body
    with site.control() as control:
        (row,) = control.unknown()
    assert row.machine.product == "Opti Plex"
    assert row.machine.serial == "S?1"


async def test_a_known_serial_names_its_machine_at_once(site: Site) -> None:
    _, _, body = await site.get(f"/ipxe/{STRANGER}?serial=CZC1234567")
    assert b"# kaboot: pc3: local" in body
    with site.control() as control:
        assert control.node("pc3").macs == (STRANGER.replace("-", ":"),)


async def test_names_are_given_in_the_order_of_appearance(site: Site) -> None:
    with site.control() as control:
        control.start_learning(["pc5", "pc4"])
    for number, name in ((1, b"pc5: install"), (2, b"pc4: install"), (3, b"discover")):
        _, _, body = await site.get(f"/ipxe/52-54-00-00-09-{number:02}")
        assert name in body
    with site.control() as control:
        assert control.learning() == []


async def test_a_room_that_is_switched_on_loads_by_windows(tmp_path: Path) -> None:
    text = INVENTORY.replace("[site]", "[site]\nboot_window = 2")
    async with Serving(tmp_path, text) as site:
        with site.control() as control:
            names = [f"pc{number}" for number in range(4, 9)]
            control.start_learning(names)
        macs = [f"52-54-00-00-08-{number:02}" for number in range(5)]
        bodies = [(await site.get(f"/ipxe/{mac}"))[2] for mac in macs]
        assert [b"vmlinuz" in body for body in bodies] == [True, True, False, False, False]
        assert b"2 machines load, 0 wait before this one, again in 5 s" in bodies[2]
        grub = site.config.parent / "state/tftp/grub/node/52:54:00:00:08:02.cfg"
        await site.service.render_grub()
        assert "2 machines load" in grub.read_text()
        await site.get(f"/ipxe/{macs[0]}")  # they all share an address here
        assert (await site.get(f"/report/{macs[0]}/hello"))[0] == 200
        assert b"vmlinuz" in (await site.get(f"/ipxe/{macs[2]}"))[2]
        assert b"vmlinuz" not in (await site.get(f"/ipxe/{macs[3]}"))[2]
        assert site.stages("pc7")[-1] == "wait install ipxe"


async def test_tftp_log_lines_are_stages_of_the_machine_at_that_address(site: Site) -> None:
    root = site.config.parent / "state/tftp"
    mac = STRANGER.replace("-", ":")
    with site.control() as control:
        control.start_learning(["pc4"])
    for line in (
        f"dnsmasq-dhcp: 1 DHCPDISCOVER(br0) {mac}",
        f"dnsmasq-dhcp: 1 DHCPACK(br0) 10.78.0.100 {mac}",
        f"dnsmasq-tftp: sent {root}/shimx64.efi to 10.78.0.100",
        f"dnsmasq-tftp: sent {root}/grub/node/unknown.cfg to 10.78.0.100",
        f"dnsmasq-tftp: sent {root}/files/deploy/vmlinuz to 10.78.0.100",
    ):
        await site.service.log_line(line)
    assert site.stages("pc4") == [
        "discover ",
        "lease ",
        "loader shimx64.efi",
        "unknown grub",
        "learned in the order of switching on",
        "script install grub",
        "kernel deploy/vmlinuz by TFTP",
    ]
    grub = (root / f"grub/node/{mac}.cfg").read_text()
    assert "linux '(tftp,10.78.0.1)/files/deploy/vmlinuz'" in grub


async def test_a_telephone_that_asks_for_an_address_is_not_a_machine(site: Site) -> None:
    await site.service.log_line("dnsmasq-dhcp: 1 DHCPACK(br0) 10.78.0.100 52:54:00:00:00:99 x")
    with site.control() as control:
        assert control.unknown() == []


async def test_a_machine_deaf_to_proxy_offers_is_named_with_the_remedy(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    deaf, sound = "52:54:00:00:00:01", "52:54:00:00:00:02"
    root = site.config.parent / "state/tftp"
    for _ in range(4):
        await site.service.log_line(f"dnsmasq-dhcp: 1 PXE(br0) {deaf} proxy")
        await site.service.log_line(f"dnsmasq-dhcp: 1 PXE(br0) 10.78.0.5 {sound} proxy")
        await site.get(f"/ipxe/{sound.replace(':', '-')}")
    await site.service.log_line(f"dnsmasq-tftp: sent {root}/undionly.kpxe to 10.78.0.5")
    warnings = [r.getMessage() for r in caplog.records if "offer.ignored" in r.getMessage()]
    assert len(warnings) == 1
    assert f"mac={deaf}" in warnings[0]
    assert "kaboot render --site" in warnings[0]


async def test_machines_boot_on_when_the_event_log_cannot_be_written(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    database = site.service._store._db
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(200):
        mac = f"52-54-00-00-{number:02x}-07"
        status, _, body = await site.get(f"/ipxe/{mac}?product={'p' * 64}")
        assert status == 200
        assert b"sanboot" in body
        if "event.lost" in caplog.text:
            break
    assert "event.lost" in caplog.text


# ---------------------------------------------------------------- files


async def test_a_big_file_arrives_whole_and_its_ranges_too(site: Site) -> None:
    data = os.urandom(1 << 20) * (BIG_SIZE >> 20)
    path = site.config.parent / "files/deploy/vmlinuz"
    path.write_bytes(data)
    status, headers, body = await site.get("/files/deploy/vmlinuz")
    assert (status, int(headers["content-length"])) == (200, BIG_SIZE)
    assert hashlib.sha256(body).digest() == hashlib.sha256(data).digest()
    _, headers, body = await site.get("/files/deploy/vmlinuz", "HEAD")
    assert (int(headers["content-length"]), body) == (BIG_SIZE, b"")
    tag = headers["etag"]
    asked = {"Range": "bytes=1000001-5000000"}
    status, headers, body = await site.get("/files/deploy/vmlinuz", **asked)
    assert (status, body) == (206, data[1000001:5000001])
    assert headers["content-range"] == f"bytes 1000001-5000000/{BIG_SIZE}"
    assert (await site.get("/files/deploy/vmlinuz", Range="bytes=-5"))[2] == data[-5:]
    assert (await site.get("/files/deploy/vmlinuz", Range=f"bytes={BIG_SIZE}-"))[0] == 416
    assert (await site.get("/files/deploy/vmlinuz", If_None_Match=tag))[0] == 304
    stale = await site.get("/files/deploy/vmlinuz", If_Range='"other"', **asked)
    assert (stale[0], len(stale[2])) == (200, BIG_SIZE)


async def test_nothing_outside_the_served_directory_is_sent(site: Site, tmp_path: Path) -> None:
    files = tmp_path / "files"
    (files / "out").symlink_to(tmp_path / "state/kaboot.db")
    (files / "in").symlink_to("deploy/real")
    (files / "deploy/real").write_bytes(b"real")
    os.mkfifo(files / "fifo")
    for path in ("out", "fifo", "deploy", "missing", "../state/kaboot.db", "deploy/../../x"):
        assert (await site.get(f"/files/{path}"))[0] == 404, path
    assert (await site.get("/files/in"))[2] == b"real"
    assert (await site.get("/loader/kaboot.db"))[0] == 404


async def test_the_stages_of_loading_are_in_the_log_with_sizes(site: Site) -> None:
    (site.config.parent / "files/deploy/vmlinuz").write_bytes(b"x" * 1000)
    await site.get(f"/ipxe/{PC1}")
    await site.get("/files/deploy/vmlinuz")
    await site.get("/files/deploy/base.gz")
    stages = site.stages("pc1")
    assert stages[1].startswith("kernel deploy/vmlinuz 1000 bytes in ")
    assert stages[2] == "initrd-failed deploy/base.gz: No such file or directory"


async def test_a_client_that_goes_away_in_mid_file_is_said_so(site: Site) -> None:
    (site.config.parent / "files/deploy/vmlinuz").write_bytes(bytes(BIG_SIZE))
    await site.get(f"/ipxe/{PC1}")
    async with await site.connect() as stream:
        await stream.send_all(b"GET /files/deploy/vmlinuz HTTP/1.1\r\nHost: x\r\n\r\n")
        await stream.receive_some(1000)
    with trio.fail_after(10):
        while len(site.stages("pc1")) < 2:  # noqa: ASYNC110  # a database has no event to wait for
            await trio.sleep(0.05)
    assert f"broken off, of {BIG_SIZE}" in site.stages("pc1")[1]


# ---------------------------------------------------------------- bad clients


async def test_several_requests_go_over_one_connection(site: Site) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await site.raw(one * 5)
    assert answer.count(b"kaboot serves") == 5


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000, b"431"),
        (b"POST /report/x/up HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n"
         + b"a" * 100_000, b"413"),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
        (b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
    ],
)  # fmt: skip
async def test_a_bad_request_gets_its_status(site: Site, data: bytes, status: bytes) -> None:
    answer = await site.raw(data)
    assert answer.split(b" ", 2)[1] == status


async def test_a_bug_in_answering_is_500_and_the_server_lives(
    monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    monkeypatch.setattr(site.service, "_store", None)
    assert (await site.get(f"/ipxe/{PC1}"))[0] == 500
    assert (await site.get("/health"))[0] == 200


async def test_a_silent_client_is_dropped_and_does_not_keep_others_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_module, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(http_module, "IDLE_TIMEOUT_S", 0.5)
    async with Serving(tmp_path) as site, await site.connect() as one, await site.connect() as two:
        await one.send_all(b"GET /hea")
        with trio.fail_after(10):
            assert (await site.get("/health"))[0] == 200
            assert await one.receive_some() == b""
            assert await two.receive_some() == b""


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=100),
            st.sampled_from(
                [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n", b"HEAD ", b"Range: bytes=1-2"]
            ),
        ),
        max_size=8,
    )
)
def test_no_bytes_end_the_server(parts: list[bytes]) -> None:
    async def handler(incoming: http_module.Incoming) -> Reply:
        raise BadRequest(404, "no such page")

    async def attempt() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_http, listener, handler)
            for data in (b"".join(parts), b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"):
                with trio.fail_after(10), trio.socket.socket() as client:
                    await client.connect(address)
                    try:
                        for part in parts if data == b"".join(parts) else [data]:
                            await client.send(part)
                        client.shutdown(socket.SHUT_WR)
                        answer = await client.recv(100)
                    except OSError:
                        continue
            assert answer.startswith(b"HTTP/1.1 404")
            nursery.cancel_scope.cancel()
        listener.socket.close()

    trio.run(attempt)


def test_the_placeholder_for_a_files_bytes_has_their_length_without_them() -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.next_event()
    connection.next_event()
    headers = [("Content-Length", str(1 << 40))]
    connection.send(h11.Response(status_code=200, headers=headers))
    placeholder = http_module._Placeholder(1 << 40)
    connection.send_with_data_passthrough(h11.Data(data=placeholder))
    assert connection.send(h11.EndOfMessage()) == b""
