"""The archive that a node runs, built from this very installation.

A zip of `karun/agent` with the compiled modules of this Python beside the sources (without comments
and docstrings): a node with the same version compiles nothing, another one compiles what it needs.
Reproducible: names sorted, times fixed, compiled modules without times.  Kept in the user's cache,
as it travels and under the digest of what it was made from: compiling and packing take longer.

Nothing in the zip is compressed: unpacking would make every node load zlib at each start.  What
goes over the wire, once for each node, is.

What copying takes beyond that is the *heavy* archive: trio, the broadcast engine and what they
need, as far as it is pure Python.  It is sent when a node first needs it (karun/agent/heavy.py).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.errors import Code, KaError
from karun.agent import loader

__all__ = ["Archive", "build", "build_heavy", "cache_directory", "loader_text", "xxhash_place"]

HEAVY_PACKAGES = (
    "attr", "attrs", "idna", "msgpack", "outcome", "sniffio", "sortedcontainers", "trio",
)  # fmt: skip
HEAVY_OWN = ("common/*.py", "common/broadcast/*.py", "karun/node_*.py")
HEAVY_LEFT_OUT = ("_tests/", "/testing/", "_tools/", "uts46data.py", "__main__.py")
_ROOT = Path(loader.__file__).parent.parent.parent
_TIME = (1980, 1, 1, 0, 0, 0)
_COMPILE = """
import json, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
for path, target, name in json.load(sys.stdin):
    py_compile.compile(path, target, name, doraise=True, optimize=2, invalidation_mode=mode)
"""
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
    return _build("agent", {name: _ROOT / name for name in _names()})


def build_heavy() -> Archive:
    """Return the heavy archive, likewise."""
    paths = {str(path.relative_to(_ROOT)): path for own in HEAVY_OWN for path in _ROOT.glob(own)}
    for package in HEAVY_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise KaError(Code.INTERNAL, f"the Python package {package} is missing")
        top = Path(spec.origin).parent
        paths |= {str(path.relative_to(top.parent)): path for path in top.rglob("*.py")}
    chosen = sorted(name for name in paths if not any(part in name for part in HEAVY_LEFT_OUT))
    return _build("heavy", {name: paths[name] for name in chosen})


def _build(kind: str, paths: dict[str, Path]) -> Archive:
    sources = {name: path.read_bytes() for name, path in paths.items()}
    key = hashlib.sha256(sys.implementation.cache_tag.encode())
    for name, source in sources.items():
        key.update(b"%s %d\n" % (name.encode(), len(source)) + source)
    kept = _kept(kind, key.hexdigest())
    found = _read(kept) if kept else None
    if found is None:
        data = _zip(paths, sources)
        found = Archive(zlib.compress(data, 9), hashlib.sha256(data).hexdigest())
        if kept:
            _keep(kept, found)
    return found


def xxhash_place() -> str:
    """Return the directory from which processes of this machine can import xxhash; empty: none.

    It is compiled, so it is in no archive.
    """
    spec = importlib.util.find_spec("xxhash")
    return str(Path(spec.origin).parent.parent) if spec and spec.origin else ""


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
    paths = ["karun/__init__.py", "karun/launch_plan.py", "karun/pmi.py", "karun/sampler.py"]
    paths += [str(path.relative_to(_ROOT)) for path in (_ROOT / "karun/agent").glob("*.py")]
    return sorted(set(paths))


def _zip(paths: dict[str, Path], sources: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="karun-") as name:
        directory = Path(name)
        compiled = _compiled(paths, directory)
        path = directory / "agent.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, source in sources.items():
                _add(archive, name + "c", compiled[name].read_bytes())
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


def _compiled(paths: dict[str, Path], directory: Path) -> dict[str, Path]:
    """Compile modules; return where they are.

    Done by an interpreter that has loaded nothing else: a compiled module shows which of its
    constants are in use elsewhere in the process.
    """
    found = {name: directory / f"{number}.pyc" for number, name in enumerate(paths)}
    work = [(str(paths[name]), str(target), name) for name, target in found.items()]
    words = [sys.executable, "-I", "-S", "-c", _COMPILE]
    subprocess.run(words, input=json.dumps(work).encode(), check=True)
    return found


def _kept(kind: str, key: str) -> Path | None:
    directory = cache_directory()
    return directory / f"{kind}-{key}.archive" if directory else None


def _read(path: Path) -> Archive | None:
    """Return what is kept, if it is whole: two digests, of the zip file and of the rest."""
    try:
        digest, own_digest, data = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        return None
    is_whole = hashlib.sha256(data).hexdigest().encode() == own_digest
    return Archive(data, digest.decode()) if is_whole else None


def _keep(path: Path, archive: Archive) -> None:
    own_digest = hashlib.sha256(archive.data).hexdigest()
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        beside.write_bytes(f"{archive.digest}\n{own_digest}\n".encode() + archive.data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
