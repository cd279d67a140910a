"""The archive that a node runs, built from this very installation.

A zip of `karun/agent` with the compiled modules of this Python beside the sources (without comments
and docstrings): a node with the same version compiles nothing, another one compiles what it needs.
Reproducible: names sorted, times fixed, compiled modules without times.  Kept in the user's cache,
under the digest of what it was made from, because compiling takes longer than reading.

Nothing in the zip is compressed: unpacking would make every node load zlib at each start.  What
goes over the wire, once for each node, is.
"""

from __future__ import annotations

import ast
import hashlib
import os
import py_compile
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from karun.agent import loader

__all__ = ["Archive", "build", "cache_directory", "loader_text"]

_ROOT = Path(loader.__file__).parent.parent.parent
_TIME = (1980, 1, 1, 0, 0, 0)
_LOADER = "karun/agent/loader.py"


@dataclass(frozen=True, slots=True)
class Archive:
    """What the loader checks, and what it gets."""

    data: bytes
    """The zip file, compressed once more for the way."""
    digest: str
    """SHA-256 of the zip file."""

    @property
    def loader(self) -> str:
        """The Python statement that a node runs first: no quotes, blanks or newlines in it."""
        call = f"{loader_text()}\nload({self.digest!r}, {len(self.data)})\n"
        return f"exec(bytes.fromhex({call.encode().hex()!r}))".replace("'", '"')


def build() -> Archive:
    """Return the archive, from the cache if it is there."""
    sources = {name: (_ROOT / name).read_bytes() for name in _names()}
    key = hashlib.sha256(sys.implementation.cache_tag.encode())
    for name, source in sources.items():
        key.update(b"%s %d\n" % (name.encode(), len(source)) + source)
    kept = _kept(key.hexdigest())
    data = _read(kept) if kept else b""
    if not data:
        data = _zip(sources)
        if kept:
            _keep(kept, data)
    return Archive(zlib.compress(data, 9), hashlib.sha256(data).hexdigest())


def loader_text() -> str:
    """Return the loader without docstring and comments."""
    return _bare((_ROOT / _LOADER).read_bytes())


def cache_directory() -> Path | None:
    """Return a directory that is this user's alone; None: there is none to be had."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(home) / "karun"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return None
    return directory if found.st_uid == os.geteuid() and not found.st_mode & 0o077 else None


def _names() -> list[str]:
    paths = ["karun/__init__.py", "karun/launch_plan.py"]
    paths += [str(path.relative_to(_ROOT)) for path in (_ROOT / "karun/agent").glob("*.py")]
    return sorted(set(paths) - {_LOADER})


def _zip(sources: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="karun-") as directory:
        path = Path(directory) / "agent.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, source in sources.items():
                _add(archive, name + "c", _compiled(name, Path(directory)))
                _add(archive, name, _bare(source).encode())
        return path.read_bytes()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _TIME), data)


def _bare(source: bytes) -> str:
    """Return a module without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            kept = [one for one in node.body if not _is_text(one)]
            node.body = kept or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _compiled(name: str, directory: Path) -> bytes:
    target = directory / "compiled.pyc"
    py_compile.compile(
        str(_ROOT / name),
        cfile=str(target),
        dfile=name,
        doraise=True,
        optimize=2,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return target.read_bytes()


def _kept(key: str) -> Path | None:
    directory = cache_directory()
    return directory / f"agent-{key}.zip" if directory else None


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return data if zipfile.is_zipfile(path) else b""
    except OSError:
        return b""


def _keep(path: Path, data: bytes) -> None:
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
