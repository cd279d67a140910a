"""docs/kaboot.md says what the code does: keys, steps, reports, commands; its examples load."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest

from kaboot import inventory
from kaboot.cli import kaboot
from kaboot.model import Loaders, Step
from kaboot.steps import Report
from tests.support.boot_site import write_site

TEXT = (Path(__file__).parents[2] / "docs/kaboot.md").read_text()
TABLES: dict[str, type] = {
    "[site]": inventory.SiteTable,
    "[[profile]]": inventory.ProfileTable,
    "[[node]]": inventory.NodeTable,
    "[[group]]": inventory.GroupTable,
}
KINDS: dict[Any, str] = {
    int: "number", str: "text", bool: "flag", Path: "path", tuple[str, ...]: "list of texts"
}  # fmt: skip
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```toml\n(.*?)```", TEXT, re.DOTALL))


def rows(start: str) -> list[list[str]]:
    """The rows that begin with code of the first table after a text."""
    _, _, rest = TEXT.partition(start)
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table is not None, start
    lines = [line for line in table[0].splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default == ():
        return "[]"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


@pytest.mark.parametrize("table", TABLES)
def test_every_key_of_the_inventory_is_documented_with_type_and_default(table: str) -> None:
    hints = get_type_hints(TABLES[table])
    expected = [
        (field.name, KINDS[hints[field.name]], default_of(field))
        for field in dataclasses.fields(TABLES[table])
    ]
    found = [
        (key.strip("`"), kind, default.strip("`"))
        for key, kind, default, meaning in rows(f"\n`{table}`: ")
        if meaning
    ]
    assert found == expected


def test_every_loader_is_documented() -> None:
    paragraph = TEXT.partition("`[loaders]`: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+_\w+)`", paragraph)) == {
        f.name for f in dataclasses.fields(Loaders)
    }


def test_every_step_and_report_is_documented() -> None:
    steps = {row[0].strip("`").partition(":")[0] for row in rows("\n## Steps")}
    assert steps == {step.value for step in Step}
    sentence = TEXT.partition("\nReports are ")[2].partition("Each")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == {report.value for report in Report}


def test_every_command_and_its_options_are_documented() -> None:
    text = " ".join(row[0] for row in rows("\n## Commands"))
    assert isinstance(kaboot, click.Group)
    for name, command in kaboot.commands.items():
        assert f"`kaboot {name}" in text
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert any(option in text for option in parameter.opts), (name, parameter.opts)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_inventories(name: str, tmp_path: Path) -> None:
    text = EXAMPLES[name]
    if "[site]" not in text:
        text = EXAMPLES["room"] + text
    _, made = write_site(tmp_path, text)
    assert made.nodes


def test_there_is_an_example_for_a_room_and_for_a_foreign_dhcp_server() -> None:
    assert set(EXAMPLES) == {"room", "proxy", "diskless"}
    assert 'mode = "proxy"' in EXAMPLES["proxy"]
    assert 'nodes = "pc[1-8]"' in EXAMPLES["room"]
