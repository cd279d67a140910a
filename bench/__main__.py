"""`python -m bench`: the file systems; `python -m bench copy`: one file to many nodes."""

from __future__ import annotations

import sys

from bench import copy
from bench.run import main

sys.exit(copy.main(sys.argv[2:]) if sys.argv[1:2] == ["copy"] else main())
