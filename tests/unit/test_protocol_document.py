"""docs/protocol.md and the tables of docs/broadcast.md say what the code does."""

from __future__ import annotations

import importlib
import re

import pytest

from common.framing import Kind, encode_frame
from tests.support.protocol_tables import PROTOCOL, TABLES, between

TEXT = PROTOCOL.read_text()


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


def test_the_worked_frame_is_a_frame() -> None:
    (block,) = re.findall(r"```frame\n(.*?)```", TEXT, re.DOTALL)
    data = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert data == encode_frame(Kind.REQUEST, 7, b"body", 3) + b"abc"


@pytest.mark.parametrize("anchor", ["frames", "handshake", "messages"])
def test_anchors_that_the_code_names_exist(anchor: str) -> None:
    assert re.search(rf"^## {anchor}$", TEXT, re.M | re.I)
