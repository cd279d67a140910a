"""Descriptions on disk: environments and nodes, YAML files read with the safe loader.

Every fault is one line that names file, place and key.  A key written twice is refused: YAML would
silently take the last.  The only importer of yaml.

Not here: what the keys mean (environment.py, nodes.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common import config
from common.errors import Code, KaError
from kadeploy.environment import Environment
from kadeploy.nodes import Nodes, NodeSpec

__all__ = ["parse_environment", "read_environment", "read_facts", "read_nodes", "read_text"]

FILE_SIZE_MAX = 4 * 1024 * 1024


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases (a small file could unfold into gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not taken", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_text(path: Path) -> str:
    """Return a description's text; raises KaError USAGE."""
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_SIZE_MAX + 1)
        if len(data) > FILE_SIZE_MAX:
            raise KaError(Code.USAGE, f"{path}: larger than {config.format_size(FILE_SIZE_MAX)}")
        return data.decode()
    except OSError as error:
        raise KaError(Code.USAGE, f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KaError(Code.USAGE, f"{path}: not UTF-8 text") from None


def _parse(text: str, path: Path) -> object:
    try:
        # _Loader is a SafeLoader: it makes plain values only.
        loader = _Loader(text)
        try:
            content: object = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (at line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise KaError(Code.USAGE, f"{path}: {error.problem or 'not YAML'}{where}") from None
    except (yaml.YAMLError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise KaError(Code.USAGE, f"{path}: {line}") from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        # What PyYAML makes of `!!bool maybe`, `!!timestamp x` or `"\Uffffffff"`.
        raise KaError(Code.USAGE, f"{path}: a value cannot be read: {error}") from None
    except RecursionError:
        raise KaError(Code.USAGE, f"{path}: nested too deeply") from None
    return content


def parse_environment(text: str, path: Path) -> Environment:
    """Return the environment described by *text*, read from *path*; raises KaError USAGE."""
    return config.check(_parse(text, path), Environment, path)


def read_environment(path: Path) -> Environment:
    return parse_environment(read_text(path), path)


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a node's program answered, kept in a file; raises KaError USAGE."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise KaError(Code.USAGE, f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise KaError(Code.USAGE, f"{path}: not the facts of a node")
    return content


def read_nodes(path: Path) -> Nodes:
    """Return the nodes described in a file; raises KaError USAGE.

    Files with passwords are relative to it, as all that a configuration names.
    """
    found = config.check(_parse(read_text(path), path), Nodes, path)
    directory = path.absolute().parent
    return replace(found, nodes=tuple(_placed(node, directory) for node in found.nodes))


def _placed(node: NodeSpec, directory: Path) -> NodeSpec:
    power = tuple(
        replace(one, password_file=str(directory / one.password_file)) if one.password_file else one
        for one in node.power
    )
    return replace(node, power=power)
