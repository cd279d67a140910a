"""Workloads side by side: nfsp, real peers and the local disk, in one run on one machine.

`python -m bench` (or `make bench`).  docs/benchmarks.md says what is measured and how to read it.

    run.py        command line; which system runs what, when; exit code
    scratch.py    the one directory everything lives in, and what an earlier run left there
    cell.py       a system's namespaces, seen from outside
    inside.py     the same, seen from inside: start, measure, answer
    systems.py    the contract of a system; local and nfsp
    peers.py      GlusterFS and MooseFS
    packages.py   Debian packages of the peers
    workloads.py  the list of workloads; they know a directory and nothing else:
    large.py, small.py, tree.py on what load.py gives them
    realtree.py   the archive of real files that tree.py unpacks
    cpu.py        processor time from /proc
    model.py      samples and scales, to and from JSON
    report.py     the tables
    facts.py      what the machine is

Nothing here asserts a time: machines are noisy, only ratios within one run mean something.
"""
