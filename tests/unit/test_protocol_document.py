"""docs/protocol.md and the tables of docs/broadcast.md say what the code does."""

from __future__ import annotations

import importlib
import re

import pytest

from common.broadcast.datagram import DatagramCodec, DatagramKind
from common.broadcast.group import group_of
from common.broadcast.wire import HOP, PassOver
from common.framing import Kind, encode_frame
from tests.support.protocol_tables import BROADCAST, PROTOCOL, TABLES, between

TEXT = PROTOCOL.read_text()
TRANSFER, TOKEN = bytes(range(16)), bytes(range(32))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_code(name: str) -> None:
    document, table = TABLES[name]
    found = between(name).findall(document.read_text())
    assert found == [table], "run: python -m tests.support.protocol_tables"


def test_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(common|nfsp)\.([a-z_.]+)\.([A-Z_]+)` \| ([^|]+) \|", TEXT, re.M)
    assert len(rows) >= 10
    for package, module, name, value in rows:
        actual = getattr(importlib.import_module(f"{package}.{module}"), name)
        number, _, unit = value.strip().partition(" ")
        scale = {"": 1, "s": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit]
        assert float(number) * scale == actual, f"{name} is {actual}, the document says {value}"


def worked(name: str, text: str) -> bytes:
    """Return the bytes of an example."""
    (block,) = re.findall(rf"```{name}\n(.*?)```", text, re.DOTALL)
    return bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))


def test_the_worked_frame_is_a_frame() -> None:
    assert worked("frame", TEXT) == encode_frame(Kind.REQUEST, 7, b"body", 3) + b"abc"


def test_the_worked_datagram_is_one_of_its_group() -> None:
    text = BROADCAST.read_text()
    header = DatagramCodec(TRANSFER, TOKEN).header(DatagramKind.DATA, 3, 1, b"abc")
    assert worked("datagram", text) == header + b"abc"
    address, port = group_of(TRANSFER)
    assert f"group\n{address}, port {port}:" in text


def test_the_worked_end_of_a_pass_is_one() -> None:
    body = worked("pass over", BROADCAST.read_text())
    assert body == HOP.encode(PassOver(TRANSFER))
    assert HOP.decode(body) == PassOver(TRANSFER)


@pytest.mark.parametrize("anchor", ["frames", "handshake", "messages"])
def test_anchors_that_the_code_names_exist(anchor: str) -> None:
    assert re.search(rf"^## {anchor}$", TEXT, re.M | re.I)
