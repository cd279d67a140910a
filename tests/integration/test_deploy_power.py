"""Power: escalation, and drivers against implementations that are not ours."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from common.errors import KaError
from kadeploy.nodes import NodeSpec, PowerDriver, PowerSpec
from kadeploy.power import PowerAction, reboot_steps
from kadeploy.power_drivers import power

IPMI = PowerSpec(PowerDriver.IPMI, "10.0.0.9")
WAKE = PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01")
PDU = PowerSpec(PowerDriver.COMMAND, command=("pdu", "{node}", "{action}"))


def actions(node: NodeSpec, level: str) -> list[tuple[str, str]]:
    return [
        (one.spec.driver.value if one.spec else "system", one.action.value)
        for one in reboot_steps(node, level)
    ]


def test_a_reboot_escalates_from_the_system_to_the_last_way() -> None:
    node = NodeSpec("pc1", power=(IPMI, PDU))
    assert actions(node, "soft") == [("system", "cycle")]
    assert actions(node, "hard") == [("ipmi", "cycle")]
    assert actions(node, "harder") == [("command", "off"), ("command", "on")]


def test_a_node_that_can_only_be_woken_is_woken_last() -> None:
    node = NodeSpec("pc1", power=(WAKE,))
    assert actions(node, "harder") == [("wake-on-lan", "on")]
    with pytest.raises(KaError, match="no way to cycle"):
        reboot_steps(node, "hard")


async def test_any_command_is_told_node_and_action(tmp_path: Path) -> None:
    spec = PowerSpec(PowerDriver.COMMAND, command=("echo", "{node}-{action}"))
    assert await power(spec, "pc1", PowerAction.ON) == ""
    spec = PowerSpec(PowerDriver.COMMAND, command=("echo", "on"))
    assert await power(spec, "pc1", PowerAction.STATUS) == "on"
    with pytest.raises(KaError, match="false failed"):
        await power(PowerSpec(PowerDriver.COMMAND, command=("false",)), "pc1", PowerAction.ON)


async def test_a_machine_is_woken_by_its_magic_packet() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        spec = PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01", sock.getsockname()[1], "127.0.0.1")
        await power(spec, "pc1", PowerAction.ON)
        sock.settimeout(5)
        assert sock.recv(200) == b"\xff" * 6 + bytes.fromhex("020000000001") * 16


@pytest.mark.parametrize(
    "answer",
    [
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
    ],
    ids=["garbage", "headers", "chunks", "list", "depth"],
)
async def test_a_controller_that_answers_nonsense_is_one_line(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/redfish/v1/Systems/1"
        with pytest.raises(KaError, match="redfish http") as caught:
            await power(PowerSpec(PowerDriver.REDFISH, url), "pc1", PowerAction.STATUS)
        thread.join()
    assert "\n" not in str(caught.value)


async def test_controllers_that_do_not_answer_do_not_keep_the_others_from_it() -> None:
    alive = PowerSpec(PowerDriver.COMMAND, command=("echo", "on"))
    threaded = PowerSpec(PowerDriver.REDFISH, "redfish, but not a URL")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as dead:
        url = f"http://127.0.0.1:{dead.getsockname()[1]}/redfish/v1/Systems/1"
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    spec = PowerSpec(PowerDriver.REDFISH, url)
                    nursery.start_soon(power, spec, f"pc{number}", PowerAction.STATUS)
                await trio.testing.wait_all_tasks_blocked()
                assert await power(alive, "pc98", PowerAction.STATUS) == "on"
                with pytest.raises(KaError, match="must be a URL"):
                    await power(threaded, "pc99", PowerAction.STATUS)
                assert await trio.to_thread.run_sync(lambda: "done") == "done"
                nursery.cancel_scope.cancel()


async def test_a_controller_that_sends_half_a_packet_is_one_line() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            _, client = server.recvfrom(2000)
            server.sendto(bytes.fromhex("0600ff0706"), client)

        thread = threading.Thread(target=serve)
        thread.start()
        spec = PowerSpec(PowerDriver.IPMI, "127.0.0.1", server.getsockname()[1], "admin")
        with pytest.raises(KaError, match=r"ipmi 127\.0\.0\.1: "):
            await power(spec, "pc1", PowerAction.STATUS)
        thread.join()


async def test_a_machine_that_no_packet_gets_to_is_one_line() -> None:
    spec = PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01", 9, "256.0.0.1")
    with pytest.raises(KaError, match="wake-on-lan 02:00:00:00:00:01: "):
        await power(spec, "pc1", PowerAction.ON)


def test_a_number_that_is_no_port_is_refused() -> None:
    with pytest.raises(ValueError, match="not a port: 99999"):
        PowerSpec(PowerDriver.WAKE, "02:00:00:00:00:01", 99999).validate()


async def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret")
    path.chmod(0o644)
    spec = PowerSpec(PowerDriver.IPMI, "127.0.0.1", 1, "admin", str(path))
    with pytest.raises(KaError, match="chmod 600") as caught:
        await power(spec, "pc1", PowerAction.STATUS)
    assert "secret" not in str(caught.value)
