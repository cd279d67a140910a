"""The task `watch`: a line of counters (karun/sampler.py) on standard output, again and again.

    watch PERIOD_MS COUNT        COUNT 0: until it is stopped

Late by a sleep of the machine or not, samples are never made up for: rates are made of the time
that is in them.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from karun.sampler import encode, sample


def main(words: list[str]) -> int:
    """Write samples; return the exit code."""
    period_s, count = int(words[0]) / 1000, int(words[1])
    due = monotonic()
    told = 0
    while True:
        os.write(1, encode(sample()) + b"\n")
        told += 1
        if told == count:
            return 0
        due = max(due + period_s, monotonic())
        sleep(max(0.0, due - monotonic()))
