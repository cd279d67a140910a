"""How a command line begins: what it needs is loaded, and then its `main` is called.

Loading takes some tenths of a second, and there is nothing yet to be cleaned up: until it is over
Ctrl-C ends the process as it ends one that knows no better, without a traceback.
"""

from __future__ import annotations

from importlib import import_module
from signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal
from typing import NoReturn

from common.standard import fill_closed

__all__ = ["command"]


def command(module: str) -> NoReturn:
    """Load *module* and call its `main`, which exits."""
    fill_closed()
    is_heeded = getsignal(SIGINT) is default_int_handler  # else it is ignored: a shell's `&`
    if is_heeded:
        signal(SIGINT, SIG_DFL)
    main = import_module(module).main
    if is_heeded:
        signal(SIGINT, default_int_handler)
    main()
    raise AssertionError("main exits")
