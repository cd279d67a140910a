"""`python -m nfsp` is `nfsp`."""

from nfsp.cli import main

main()
