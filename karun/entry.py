"""Where the command `karun` begins: quickly for a command in a session, else with everything.

Loading the whole command line takes longer than a command in a session on two hundred nodes.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, and exit."""
    words = sys.argv[1:]
    if words[:1] == ["run"] and any(word.startswith("--session") for word in words):
        from karun import client

        parsed = client.parse(words[1:])
        if parsed is not None:
            sys.exit(client.main(*parsed))
    from karun import cli

    cli.main()


if __name__ == "__main__":
    main()
