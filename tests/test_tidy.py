"""The house rules, applied to the whole tree.  The rules themselves: tests/support/tidy.py."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import tidy

ROOT = Path(__file__).parent.parent
PYTHON_TREES = (*tidy.PACKAGES, "bench", "tests")
OTHER_TEXTS = ("Makefile", "pyproject.toml", ".ci/run", "scripts/*", "*.md", "docs/*.md")
# Run by name or by the interpreter, hence imported by nobody.
STARTED_STEMS = frozenset({"__init__", "__main__", "conftest"})


@functools.cache
def tree() -> tuple[tidy.Module, ...]:
    paths = sorted(path for top in PYTHON_TREES for path in (ROOT / top).rglob("*.py"))
    return tuple(
        tidy.parse(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths
    )


@functools.cache
def names() -> frozenset[str]:
    return frozenset(module.name for module in tree() if module.path.name != "__init__.py")


@functools.cache
def pyproject() -> dict[str, dict[str, dict[str, list[str]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def nothing(findings: Iterable[str]) -> None:
    found = sorted(findings)
    assert not found, "\n".join(found)


def test_packages_import_only_what_they_may() -> None:
    nothing(line for module in tree() for line in tidy.imports_across(module, names()))


def test_wrapped_libraries_are_imported_by_their_wrapper_only() -> None:
    nothing(line for module in tree() for line in tidy.imports_owned(module))


def test_pure_modules_reach_no_io_no_clock_no_chance() -> None:
    nothing(line for module in tree() for line in tidy.purity(module, names()))


def test_nothing_calls_a_shell_or_loads_code_from_data() -> None:
    nothing(line for module in tree() for line in tidy.banned_calls(module))


def test_functions_modules_and_lines_are_short_enough_to_read() -> None:
    nothing(line for module in tree() for line in tidy.sizes(module))


def test_nothing_unfinished_is_left_in_the_tree() -> None:
    texts = {str(module.path): module.text for module in tree()}
    for pattern in OTHER_TEXTS:
        for path in ROOT.glob(pattern):
            texts[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    nothing(line for path, text in texts.items() for line in tidy.banned_words(path, text))


def test_every_module_is_imported_or_started_by_something() -> None:
    used = {name for module in tree() for _, name in module.imports() if name != module.name}
    used |= {name for names in _started().values() for name in names}
    nothing(
        f"{module.path}: dead, nothing imports it"
        for module in tree()
        if module.name not in used
        and module.path.stem not in STARTED_STEMS
        and not module.path.stem.startswith("test_")
        and not _has_main(module)
    )


def test_every_module_says_what_it_is() -> None:
    nothing(
        f"{module.path}: no docstring"
        for module in tree()
        if module.tree.body and not ast.get_docstring(module.tree)
    )


def test_every_command_starts_a_module_that_has_a_main() -> None:
    by_name = {module.name: module for module in tree()}
    for path, names in _started().items():
        for name in names - {"common.starting"}:
            assert name in by_name, f"{path}: no module {name}"
            defined = {getattr(node, "name", None) for node in by_name[name].tree.body}
            assert "main" in defined, f"{path}: no main in {name}"


def test_exactly_the_packages_of_the_tree_are_installed() -> None:
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    assert listed == {
        module.name
        for module in tree()
        if module.path.name == "__init__.py" and module.package in tidy.PACKAGES
    }


def test_no_rule_outlives_its_file() -> None:
    owners = {owner for owner in tidy.ONLY_IMPORTER.values() if owner}
    paths = {str(module.path) for module in tree()}
    assert (owners | tidy.PURE) - paths == set()
    assert set(tidy.MAY_IMPORT) - {module.package for module in tree()} == set()


def _started() -> dict[str, set[str]]:
    """Of each command, and of what uses common/starting.py: the modules that it starts."""
    scripts = pyproject()["tool"]["setuptools"]["script-files"]
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in scripts}
    trees |= {str(module.path): module.tree for module in tree() if module.package in tidy.PACKAGES}
    started: dict[str, set[str]] = {path: set() for path in scripts}
    for path, program in trees.items():
        for node in ast.walk(program):
            match node:
                case ast.ImportFrom(module=str(name)) if path in scripts:
                    started[path].add(name)
                case ast.Call(func=ast.Name("command"), args=[ast.Constant(str(name))]):
                    started.setdefault(path, set()).add(name)
    return started


def _has_main(module: tidy.Module) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in module.tree.body
    )


# That the rules bite: a module that breaks each.

OURS = frozenset({"common.link", "karun.ssh", "nfsp.iod.server", "nfsp.model"})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("common/a.py", "import nfsp.model"),
        ("common/a.py", "def f():\n    from karun import ssh"),
        ("nfsp/a.py", "from karun import run"),
        ("nfsp/a.py", "from tests.support import leaks"),
        ("nfsp/mds/a.py", "from nfsp.iod import server"),
        ("nfsp/mds/a.py", "from ..iod.server import Iod"),
        ("kadeploy/a.py", "from karun.ssh import connect"),
        ("kadeploy/a.py", "from karun import ssh"),
        ("kadeploy/a.py", "import nfsp"),
    ],
)
def test_an_import_across_the_house_is_seen(path: str, source: str) -> None:
    assert list(tidy.imports_across(tidy.parse(path, source), OURS))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nfsp/mds/a.py", "from nfsp import model\nfrom common.link import Link\nimport trio"),
        ("kadeploy/a.py", "from karun import run\nimport karun, common.link"),
    ],
)
def test_an_import_within_the_rules_is_let_pass(path: str, source: str) -> None:
    assert list(tidy.imports_across(tidy.parse(path, source), OURS)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nfsp/a.py", "import msgpack"),
        ("nfsp/client/volume.py", "import pyfuse3.asyncio"),
        ("karun/launch.py", "from paramiko import SSHClient"),
        ("common/config.py", "import click"),
    ],
)
def test_a_wrapped_library_elsewhere_is_seen(path: str, source: str) -> None:
    assert list(tidy.imports_owned(tidy.parse(path, source)))


@pytest.mark.parametrize(
    "source", ["import os.path", "from time import time", "from common import link"]
)
def test_a_pure_module_gone_impure_is_seen(source: str) -> None:
    assert list(tidy.purity(tidy.parse("nfsp/model.py", source), OURS))


@pytest.mark.parametrize(
    "docstring", ["Parts.\n\nPure (see x).", "Sans-I/O.  Bytes in.", "A. Pure."]
)
def test_a_module_that_claims_purity_must_be_on_the_list(docstring: str) -> None:
    assert list(tidy.purity(tidy.parse("nfsp/new.py", f'"""{docstring}"""'), OURS))


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "from os import system",
        "import pickle",
        "import yaml\nyaml.load(text)",
    ],
)
def test_a_shell_or_code_from_data_is_seen(source: str) -> None:
    assert list(tidy.banned_calls(tidy.parse("nfsp/a.py", source)))


def test_what_is_too_long_is_seen() -> None:
    function = "def f():\n" + "    pass\n" * 70
    assert len(list(tidy.sizes(tidy.parse("nfsp/a.py", function)))) == 1
    assert len(list(tidy.sizes(tidy.parse("nfsp/a.py", "pass\n" * 601)))) == 1
    assert len(list(tidy.sizes(tidy.parse("nfsp/a.py", "#" * 101)))) == 1
    assert list(tidy.sizes(tidy.parse("nfsp/a.py", function[: -len("    pass\n")]))) == []


def test_leftovers_and_empty_names_are_seen() -> None:
    assert list(tidy.banned_words("nfsp/a.py", "x = 1  # TO" + "DO: later"))
    assert list(tidy.banned_words("common/utils.py", ""))
