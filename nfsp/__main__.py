"""`python -m nfsp` is `nfsp`."""

from common.starting import command

command("nfsp.cli")
