"""The broadcast engine: one source, many nodes, every byte verified.  docs/broadcast.md is its map.

`topology` (who feeds whom) -> `cost` and `planner` (which shape, and why) -> `manifest` (what is
sent) -> `hop` (what one node does); `simulator` runs thousands of hops in virtual time.
"""
