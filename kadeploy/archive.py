"""The node's program as one file, made from this very installation and sent to a node as it is.

So a node has the head's version, whatever its deployment environment was built with, and `plan` can
ask a machine that runs another system: Python is all that it needs.  Reproducible: names sorted,
times fixed.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

__all__ = ["MODULES", "build"]

_ROOT = Path(__file__).parent.parent
_TIME = (1980, 1, 1, 0, 0, 0)
MODULES = (
    "common/*.py",
    "common/broadcast/*.py",
    "kadeploy/__init__.py",
    "kadeploy/bootentries.py",
    "kadeploy/disks.py",
    "kadeploy/environment.py",
    "kadeploy/nodes.py",
    "kadeploy/orders.py",
    "kadeploy/partitions.py",
    "kadeploy/node/*.py",
)
_MAIN = b"from kadeploy.node.__main__ import main\n\nmain()\n"


def build() -> bytes:
    """Return a zip file that `python3 FILE facts` runs."""
    made = io.BytesIO()
    files = {str(path.relative_to(_ROOT)) for one in MODULES for path in _ROOT.glob(one)}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", _TIME), _MAIN)
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            archive.writestr(entry, (_ROOT / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return made.getvalue()
