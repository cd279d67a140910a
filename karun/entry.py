"""Where the command `karun` begins: quickly for a command in a session, else with everything.

Loading the whole command line takes longer than a command in a session on two hundred nodes.  So
`karun run --session NAME`, in this order, goes to the session without it; with other options
before `--session` it gets there too, through karun/cli_run.py.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, and exit."""
    words = sys.argv[1:]
    if words[:2] == ["run", "--session"] and len(words) > 3 and not {"-h", "--help"} & {*words}:
        from karun import client

        if None in (sys.stdin, sys.stdout, sys.stderr):  # else there is nothing to load for this
            from common.standard import fill_closed

            fill_closed()
        os._exit(client.main(words[2], words[3:]))  # nothing is left to be written, or ended
    from common.starting import command

    command("karun.cli")


if __name__ == "__main__":
    main()
