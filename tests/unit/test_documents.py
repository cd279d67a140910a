"""The documents say what the code does, and their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import errno
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from common import metrics
from common.config import SIZE, format_size
from common.errors import Code, KaError
from nfsp import config, mounting
from nfsp.mds.engine import Statistics
from tests.unit.test_model import GOLDEN

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TABLES: dict[str, type] = {
    "[cluster]": config.Cluster,
    "[[mds]]": config.MdsConfig,
    "[[iod]]": config.IodConfig,
    "[mount]": config.MountConfig,
}
KINDS = {int: "number", str: "text", float: "decimal", Path: "path"}


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def rows(section: str) -> list[list[str]]:
    """The cells of the table rows in a part of docs/operations.md that begin with code."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]


def section(title: str) -> str:
    """A section of docs/operations.md, by its heading or by its table's name."""
    text = text_of("docs/operations.md")
    start = re.search(rf"^(## {re.escape(title)}|`{re.escape(title)}`.*)$", text, re.M | re.I)
    assert start is not None, title
    end = re.search(r"^(## |`\[)", text[start.end() :], re.M)
    return text[start.end() : start.end() + end.start()] if end else text[start.end() :]


# ---------------------------------------------------------------- operations.md


def documented_default(value: str, kind: str) -> str:
    """The default as the table should show it, for comparing."""
    return format_size(int(value)) if kind == "size" and value.isdigit() else value.strip("`\"")


@pytest.mark.parametrize("table", TABLES)
def test_every_configuration_key_is_documented_with_its_type_and_default(table: str) -> None:
    cls = TABLES[table]
    hints = get_type_hints(cls, include_extras=True)
    expected = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = "size" if SIZE in getattr(hint, "__metadata__", ()) else KINDS[hint]
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = format_size(field.default) if kind == "size" else str(field.default)
        expected.append((field.name, kind, default))
    found = [
        (key.strip("`"), kind, documented_default(default, kind))
        for key, kind, default, meaning in rows(section(table))
        if meaning
    ]
    assert found == expected


def test_every_mount_option_is_documented() -> None:
    found = {
        name.partition("=")[0]
        for row in rows(section("Mount options"))
        for name in re.findall(r"`([a-z_=A-Z]+)`", row[0])
    }
    for name in found:
        value = "=1" if name in ("timeout", "attr_timeout", "dirty", "readahead") else ""
        mounting.parse_options((name + value,), config.MountConfig())
    with pytest.raises(KaError, match="unknown mount option") as caught:
        mounting.parse_options(("nonsense",), config.MountConfig())
    assert set(str(caught.value).partition("there are: ")[2].split(", ")) == found


def errors_table() -> Iterator[str]:
    yield "| number | code | errno | repeated | exit code | meaning |"
    yield "|---|---|---|---|---|---|"
    for code in Code:
        repeated = "yes" if code.retryable else "no"
        name = errno.errorcode[code.errno]
        facts = (code.number, code.name, name, repeated, code.exit_code, code.value.meaning)
        yield f"| {' | '.join(map(str, facts))} |"


def test_the_table_of_errors_is_the_codes() -> None:
    found = re.search(r"<!-- errors -->\n(.*?)\n<!-- end -->", text_of("docs/operations.md"), re.S)
    assert found is not None
    assert found[1].splitlines() == list(errors_table())


def test_every_exit_code_is_documented() -> None:
    found = set(re.findall(r"^\| (\d+) \|", section("Exit codes"), re.M))
    assert {str(code.exit_code) for code in Code} | {"0", "130"} == found


def test_every_metric_is_documented_with_its_labels() -> None:
    for module in ("nfsp.iod.server", "nfsp.mds.daemon", "nfsp.client.iod_client"):
        importlib.import_module(module)
    expected = set()
    for family in metrics.registry._collector_to_names:
        described: Any = family
        labels = f"{{{','.join(described._labelnames)}}}" if described._labelnames else ""
        expected.add(f"{described._name}_total{labels}")
    cells = " ".join(row[0] for row in rows(section("Metrics")))
    found = set(re.findall(r"`([^`]+_total[^`]*)`", cells))
    assert found == expected


def test_every_fact_about_the_engine_is_documented() -> None:
    table = section("Status").partition("| engine | what |")[2].partition("| iod | what |")[0]
    found = {name for row in rows(table) for name in re.findall(r"`(\w+)`", row[0])}
    assert found == {field.name for field in dataclasses.fields(Statistics)}


def test_every_check_of_fsck_is_documented() -> None:
    groups = "superblock|map|counter|record|inode|entry|orphan|purge|trim|xattr|writer|slot|chunks"
    name = re.compile(rf"(?:{groups})\.[a-z]+")
    used = {
        node.value
        for path in (ROOT / "nfsp" / "fsck").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and name.fullmatch(node.value)
    }  # fmt: skip
    documented = {check for row in rows(section("fsck")) for check in name.findall(row[0])}
    assert documented == used


# ---------------------------------------------------------------- on-disk-format.md


@pytest.mark.parametrize("golden", [golden for _, golden in GOLDEN])
def test_the_golden_records_are_documented(golden: str) -> None:
    assert golden in text_of("docs/on-disk-format.md")


def test_every_kind_of_key_is_documented() -> None:
    keys = (ROOT / "nfsp" / "keys.py").read_text()
    kinds = set(re.findall(r"^    ([a-z]) <", keys, re.M)) - {"m"}
    table = text_of("docs/on-disk-format.md").partition("## Keys")[2].partition("## Metadata")[0]
    assert set(re.findall(r"^\| `([a-z])` ", table, re.M)) == kinds


# ---------------------------------------------------------------- all documents


def anchors(path: Path) -> set[str]:
    """What a link into a document may name: its headings as GitHub writes them, and ids."""
    text = path.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def targets() -> Iterator[tuple[str, Path, str]]:
    """(where, file, anchor) of everything that points into the documents."""
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if "://" not in link:
                file, _, anchor = link.partition("#")
                path = (document.parent / file).resolve() if file else document
                yield f"{document.name}: {link}", path, anchor
    for top in ("common", "nfsp", "bench", "tests"):
        for source in (ROOT / top).rglob("*.py"):
            for file, anchor in re.findall(r"(docs/[a-z-]+\.md)(?:#([\w-]+))?", source.read_text()):
                yield f"{source.relative_to(ROOT)}: {file}#{anchor}", ROOT / file, anchor


def test_every_link_leads_somewhere() -> None:
    broken = [
        where
        for where, path, anchor in targets()
        if not path.exists() or (anchor and anchor not in anchors(path))
    ]
    assert broken == []


def test_every_path_that_a_document_names_exists() -> None:
    missing = []
    for document in DOCUMENTS:
        paths = r"`((?:common|nfsp|bench|tests|scripts)/[\w/.*-]+)`"
        named = re.findall(paths, document.read_text())
        missing += [f"{document.name}: {path}" for path in named if not list(ROOT.glob(path))]
    assert missing == []


def test_every_command_has_its_section() -> None:
    from nfsp.cli import nfsp

    text = text_of("docs/nfsp.md")
    for name in nfsp.commands:
        assert re.search(rf"^`nfsp {name}\b|\bnfsp {name}\b", text, re.M), name
        assert f"[`{name}`](#" in text, name
