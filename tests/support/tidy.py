"""The house rules as functions: a parsed module in, the rules it breaks out.

Pure, so that each rule can be shown a module that breaks it.  The tables below are the rules;
tests/test_tidy.py applies them to the tree and sees to it that no entry outlives its file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = [
    "LINE_LENGTH_MAX",
    "MAY_IMPORT",
    "ONLY_IMPORTER",
    "PACKAGES",
    "PURE",
    "Module",
    "banned_calls",
    "banned_words",
    "imports_across",
    "imports_owned",
    "parse",
    "purity",
    "sizes",
]

LINE_LENGTH_MAX = 100
FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 600

PACKAGES = ("common", "nfsp", "karun", "kaboot", "kadeploy")

# Which of our packages a package may import, itself apart.  What ends in `.__init__` is a public
# face: the package may be imported, its modules may not.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "common": frozenset(),
    "nfsp": frozenset({"common"}),
    "karun": frozenset({"common"}),
    "kaboot": frozenset({"common"}),
    "kadeploy": frozenset({"common", "karun.__init__", "kaboot.__init__"}),
    "bench": frozenset({"common"}),
}

# The parts of nfsp meet in its top modules only.
STRANGERS = ("nfsp.mds", "nfsp.iod", "nfsp.client")

# Libraries that one module wraps for all others.  click is apart: see `_may_import_click`.
ONLY_IMPORTER: dict[str, str | None] = {
    "h11": "kaboot/http.py",
    "hivex": "kadeploy/node/hives.py",
    "hypercorn": "kadeploy/serve.py",
    "jinja2": "kadeploy/builtin.py",
    "lmdb": "nfsp/mds/lmdb_store.py",
    "msgpack": "common/codec.py",
    "paramiko": "karun/ssh.py",
    "prometheus_client": "common/metrics.py",
    "pyfuse3": "nfsp/client/fuse.py",
    "pyghmi": "kadeploy/power_drivers.py",
    "rich": "karun/top_table.py",
    "sqlite3": "common/database.py",
    "starlette": "kadeploy/web.py",
    "xxhash": "common/checksum.py",
    "yaml": "kadeploy/descriptions.py",
}

# No I/O, no clock, no chance: what these decide, `now`, ids and randomness being arguments, can
# be tested and simulated without a machine.
PURE: frozenset[str] = frozenset(
    {
        "common/broadcast/__init__.py",
        "common/broadcast/chunkset.py",
        "common/broadcast/balance.py",
        "common/broadcast/cost.py",
        "common/broadcast/datagram.py",
        "common/broadcast/downstream.py",
        "common/broadcast/hop.py",
        "common/broadcast/image.py",
        "common/broadcast/job.py",
        "common/broadcast/loans.py",
        "common/broadcast/machines.py",
        "common/broadcast/manifest.py",
        "common/broadcast/multicast.py",
        "common/broadcast/node.py",
        "common/broadcast/outcome.py",
        "common/broadcast/pace.py",
        "common/broadcast/passing.py",
        "common/broadcast/planner.py",
        "common/broadcast/scenario.py",
        "common/broadcast/simulator.py",
        "common/broadcast/standby.py",
        "common/broadcast/store.py",
        "common/broadcast/topology.py",
        "common/broadcast/upstream.py",
        "common/broadcast/wire.py",
        "common/checksum.py",
        "common/codec.py",
        "common/errors.py",
        "common/framing.py",
        "common/messages.py",
        "common/session.py",
        "common/sizes.py",
        "common/xxh3.py",
        "kaboot/dhcp.py",
        "kaboot/dnsmasq_log.py",
        "kaboot/gate.py",
        "kaboot/model.py",
        "kaboot/naming.py",
        "kaboot/requests.py",
        "kaboot/scripts.py",
        "kaboot/steps.py",
        "kaboot/words.py",
        "kadeploy/bootentries.py",
        "kadeploy/builtin.py",
        "kadeploy/disks.py",
        "kadeploy/environment.py",
        "kadeploy/nodes.py",
        "kadeploy/orders.py",
        "kadeploy/partitions.py",
        "kadeploy/plan.py",
        "kadeploy/planview.py",
        "kadeploy/postinstall.py",
        "kadeploy/power.py",
        "kadeploy/rights.py",
        "kadeploy/steps.py",
        "kadeploy/windows.py",
        "kadeploy/workflow.py",
        "karun/agent/barrier.py",
        "karun/agent/frames.py",
        "karun/agent/member.py",
        "karun/agent/proof.py",
        "karun/agent/setup.py",
        "karun/connectors.py",
        "karun/copied.py",
        "karun/feed.py",
        "karun/fold.py",
        "karun/latecomers.py",
        "karun/launch_plan.py",
        "karun/lines.py",
        "karun/naming.py",
        "karun/orders.py",
        "karun/output.py",
        "karun/pmi.py",
        "karun/power.py",
        "karun/progress.py",
        "karun/prompt.py",
        "karun/reasons.py",
        "karun/results.py",
        "karun/roster.py",
        "karun/sampler.py",
        "karun/session_wire.py",
        "karun/top.py",
        "nfsp/client/block_sums.py",
        "nfsp/fsck/chunks.py",
        "nfsp/fsck/directory.py",
        "nfsp/fsck/entries.py",
        "nfsp/fsck/findings.py",
        "nfsp/fsck/mend.py",
        "nfsp/fsck/records.py",
        "nfsp/fsck/steps.py",
        "nfsp/fsck/survey.py",
        "nfsp/fsck/table.py",
        "nfsp/fsck/tree.py",
        "nfsp/iod/chunk.py",
        "nfsp/iod/chunkplan.py",
        "nfsp/keys.py",
        "nfsp/mds/acl.py",
        "nfsp/mds/attributes.py",
        "nfsp/mds/clustermap.py",
        "nfsp/mds/create.py",
        "nfsp/mds/engine.py",
        "nfsp/mds/journal.py",
        "nfsp/mds/journal_recovery.py",
        "nfsp/mds/lmdb_config.py",
        "nfsp/mds/namespace.py",
        "nfsp/mds/opentable.py",
        "nfsp/mds/overlay.py",
        "nfsp/mds/placement.py",
        "nfsp/mds/queues.py",
        "nfsp/mds/rename.py",
        "nfsp/mds/sessions.py",
        "nfsp/mds/view.py",
        "nfsp/mds/xattrs.py",
        "nfsp/model.py",
        "nfsp/striping.py",
        "nfsp/wire.py",
    }
)
# fmt: off
IMPURE_LIBRARIES = frozenset({
    "asyncio", "logging", "os", "pathlib", "random", "secrets", "select", "socket", "ssl",
    "subprocess", "tempfile", "threading", "time", "trio",
})
# fmt: on

BANNED_IMPORTS = {
    "marshal": "use common.codec",
    "pickle": "use common.codec",
    "shelve": "use the metadata engine",
}
BANNED_CALLS = {
    "os.popen": "use subprocess or trio.run_process with a list",
    "os.system": "use subprocess or trio.run_process with a list",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
}
BANNED_MODULE_NAMES = frozenset({"helper", "helpers", "misc", "util", "utils"})
# Put together here, so that this file does not trip over itself.
LEFTOVER = re.compile(r"\b(" + "|".join(("FIX" "ME", "TO" "DO", "X" "XX")) + r")\b")
CLAIMS_PURITY = re.compile(r"(?:^|[.:] )\s*(?:Pure|Sans-I/O)\b[.,;:( ]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Module:
    """A source file: its place in the repository, its text, its tree."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """What an import statement calls it."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        return self.path.parts[0]

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and full name of everything imported, at the top or inside a function.

        `from a import b` names both `a` and `a.b`: b may be a module.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                yield node.lineno, base
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        above = list(self.path.parts[: len(self.path.parts) - node.level])
        return ".".join([*above, node.module] if node.module else above)


def parse(path: str, text: str) -> Module:
    return Module(PurePosixPath(path), text, ast.parse(text, filename=path))


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_across(module: Module, modules: frozenset[str]) -> Iterator[str]:
    """Imports of our other packages that the table does not allow.  `modules`: all of ours."""
    allowed = MAY_IMPORT.get(module.package)
    if allowed is None:
        return
    for line, name in module.imports():
        package = name.partition(".")[0]
        if package == module.package:
            yield from _strangers(module, line, name)
        elif package in PACKAGES or package in ("bench", "tests"):
            face = f"{package}.__init__" in allowed and not (name in modules and "." in name)
            if package not in allowed and not face:
                yield f"{module.path}:{line}: {module.package} must not import {name}"


def _strangers(module: Module, line: int, name: str) -> Iterator[str]:
    mine = next((part for part in STRANGERS if _inside(module.name, part)), None)
    theirs = next((part for part in STRANGERS if _inside(name, part)), None)
    if mine and theirs and mine != theirs:
        yield f"{module.path}:{line}: {mine} must not import {name}"


def _may_import_click(path: PurePosixPath) -> bool:
    return path.stem == "cli" or path.stem.startswith("cli_") or path.name == "__main__.py"


def imports_owned(module: Module) -> Iterator[str]:
    """Libraries imported outside the one module that wraps them."""
    if module.package == "tests":
        return
    for line, name in module.imports():
        library = name.partition(".")[0]
        if library == "click" and not _may_import_click(module.path):
            yield f"{module.path}:{line}: click belongs in cli.py and cli_*.py"
        owner = ONLY_IMPORTER.get(library, str(module.path))
        if owner != str(module.path):
            yield f"{module.path}:{line}: {library} is imported by {owner or 'nobody'} only"


def purity(module: Module, modules: frozenset[str]) -> Iterator[str]:
    """What makes a module of the pure list impure; and a pure one that is not on the list."""
    if str(module.path) not in PURE:
        docstring = ast.get_docstring(module.tree) or ""
        if module.package in PACKAGES and CLAIMS_PURITY.search(docstring):
            yield f"{module.path}: says it is pure; put it on the list"
        return
    for line, name in module.imports():
        if name.partition(".")[0] in IMPURE_LIBRARIES:
            yield f"{module.path}:{line}: a pure module must not import {name}"
        if name in modules and name.replace(".", "/") + ".py" not in PURE:
            yield f"{module.path}:{line}: a pure module must not import {name}, which is not pure"


def banned_calls(module: Module) -> Iterator[str]:
    """Imports and calls that are wrong wherever they stand, with what to use instead."""
    for line, name in module.imports():
        instead = BANNED_CALLS.get(name) or BANNED_IMPORTS.get(name)
        if instead:
            yield f"{module.path}:{line}: {name}: {instead}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if dotted in BANNED_CALLS:
                yield f"{module.path}:{node.lineno}: {dotted}: {BANNED_CALLS[dotted]}"
        if isinstance(node, ast.keyword) and node.arg == "shell":
            value = node.value
            if not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{module.path}:{node.lineno}: shell=: pass a list of words"


def sizes(module: Module) -> Iterator[str]:
    """Functions, modules and lines that are too long to be read at once."""
    lines = module.text.splitlines()
    if len(lines) > MODULE_LINES_MAX:
        yield f"{module.path}: {len(lines)} lines, at most {MODULE_LINES_MAX}"
    for number, line in enumerate(lines, start=1):
        if len(line) > LINE_LENGTH_MAX:
            yield f"{module.path}:{number}: {len(line)} columns, at most {LINE_LENGTH_MAX}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                yield (
                    f"{module.path}:{node.lineno}: {node.name} has {length} lines,"
                    f" at most {FUNCTION_LINES_MAX}"
                )


def banned_words(path: str, text: str) -> Iterator[str]:
    """Leftovers of unfinished work, and names that say nothing."""
    if PurePosixPath(path).stem in BANNED_MODULE_NAMES:
        yield f"{path}: name the module after what it does"
    for number, line in enumerate(text.splitlines(), start=1):
        if found := LEFTOVER.search(line):
            yield f"{path}:{number}: {found[0]} left over"
