"""What runs on every node: the lean agent, and what the head shares with it.

Starting this on a node must cost little more than starting Python, because on many a cluster the
head waits for nothing else: these modules import builtin and C modules only (no enum, typing,
dataclasses, socket, signal, subprocess), and are sent as one small archive.
Figures: docs/karun.md#what-an-agent-costs; the list of imports: tests/unit/test_karun_agent.py.
"""
