"""What a post-install step is made from and what comes of it; texts by jinja2.

Pure.  Below `postinstall.py` (the steps, Linux) and `windows.py`.  Templates are strict: a word
that is not defined stops the plan, before any disk is touched, instead of leaving a hole in a
configuration file.  What ends in .xml is escaped for XML.  They run in jinja2's sandbox, for they
may come from users.  The only importer of jinja2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from common.errors import Code, KaError
from kadeploy.nodes import Nodes, NodeSpec
from kadeploy.orders import HiveEdit, NewFile
from kadeploy.partitions import DiskLayout

__all__ = ["Customization", "Work", "rendered"]


@dataclass(frozen=True, slots=True)
class Customization:
    files: tuple[NewFile, ...] = ()
    remove: tuple[str, ...] = ()
    scripts: tuple[NewFile, ...] = ()
    ssh_host_keys: bool = False
    hives: tuple[HiveEdit, ...] = ()
    esp_hives: tuple[HiveEdit, ...] = ()
    """On the EFI system partition, which Windows does not mount."""

    def joined(self, other: Customization) -> Customization:
        """Return both, this one first."""
        return Customization(
            self.files + other.files,
            self.remove + other.remove,
            self.scripts + other.scripts,
            self.ssh_host_keys or other.ssh_host_keys,
            self.hives + other.hives,
            self.esp_hives + other.esp_hives,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What the built-ins render from."""

    node: NodeSpec
    nodes: Nodes
    layouts: Sequence[DiskLayout]
    context: Mapping[str, Any]
    """What a template sees."""


def rendered(name: str, text: str, context: Mapping[str, Any]) -> str:
    """Return a template's text; raises USAGE with *name* and the place of a fault."""
    engine = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        autoescape=name.removesuffix(".j2").endswith(".xml"),
        keep_trailing_newline=True,
    )
    try:
        return engine.from_string(text).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise KaError(Code.USAGE, f"{name}: line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise KaError(Code.USAGE, f"{name}: {error}") from None
