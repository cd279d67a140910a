"""Where on this node something goes, or comes from: `%h`, and the rules of `cp`."""

from __future__ import annotations

import os

STAGE_NAME = ".ka-part"
"""In a directory that an earlier copy did not complete (common/broadcast/image.py)."""


def filled(template: str, node: str) -> str:
    """Return a path with `%h` replaced by the node's name, `%%` by a percent sign."""
    return "%".join(part.replace("%h", node) for part in template.split("%%"))


def resolve(path: str, name: str, *, is_tree: bool, into: bool) -> str:
    """Return where a source of this name goes, as `cp` would have it; raises OSError.

    An existing directory gets it inside, under its name, and so does what ends in a slash, or is
    the destination of several (*into*).  A directory that an earlier copy of a tree has begun is
    gone on with.  A link to a file is followed; what is no file is not replaced by one.
    """
    if os.path.isdir(path) and not path.endswith("/"):
        begun = is_tree and os.path.lexists(os.path.join(path, STAGE_NAME))
        into = into or not begun
    if into or path.endswith("/"):
        if not name:
            raise IsADirectoryError(21, "is a directory", path)
        path = os.path.join(path, name)
    if is_tree or not os.path.lexists(path):
        return path
    path = os.path.realpath(path)
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise FileExistsError(17, "is neither a file nor a directory", path)
    return path


def words_of(error: OSError) -> str:
    """Return what is wrong, without Python's decorations."""
    return error.strerror or str(error)
