"""The command lines of tools that are not built yet say so and pretend nothing."""

from __future__ import annotations

import importlib

import pytest
from click.testing import CliRunner

UNBUILT = ("kadeploy",)


@pytest.mark.parametrize("tool", UNBUILT)
@pytest.mark.parametrize("arguments", [[], ["run", "-w", "node[1-3]", "--", "date"], ["--json"]])
def test_an_unbuilt_tool_says_so_in_one_line_and_exits_2(tool: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(importlib.import_module(f"{tool}.cli").main, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"{tool} is not built yet" in result.stderr


@pytest.mark.parametrize("tool", UNBUILT)
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_an_unbuilt_tool_still_answers_help_and_version(tool: str, argument: str) -> None:
    result = CliRunner().invoke(importlib.import_module(f"{tool}.cli").main, [argument])
    assert result.exit_code == 0
    assert tool in result.stdout
