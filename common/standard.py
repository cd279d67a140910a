"""Standard input, output and error, where whoever started this process has closed them."""

from __future__ import annotations

import os
import sys

__all__ = ["fill_closed"]


def fill_closed() -> None:
    """Open /dev/null in place of those that are closed; to be called before anything is opened.

    Else the next file or socket gets their numbers, and what is printed goes into it.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # so Python says that it is closed
            os.open(os.devnull, os.O_RDWR)  # gets the least number that is free, which is this
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r"))
