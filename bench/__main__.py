"""`python -m bench`: the file systems; `copy` and `slow`: one file to many nodes."""

from __future__ import annotations

import sys

from bench import copy, slow
from bench.run import main

COMMANDS = {"copy": copy.main, "slow": slow.main}

command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
try:
    sys.exit(command(sys.argv[2:]) if command else main())
except KeyboardInterrupt:  # everything is down by now
    sys.exit(130)
