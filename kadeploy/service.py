"""What the REST API does: a grant and plain values in, plain values out.

Position: web.py (HTTP) -> this -> running.py, store.py.  It knows nothing of HTTP.

Invariants
  * nothing is shown or done before the grant was asked;
  * what a user may not see is the same as what is not there: ENOENT;
  * writes go through a connection of their own: the store that is read tells by `data_version` what
    others wrote, and not what itself did.

What is read of a deployment is kept until somebody writes: a hundred who look at one page cost no
more reads than one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from common import config, nodeset
from common.errors import Code, KaError
from kadeploy import descriptions, running, views
from kadeploy.rights import Grant, Right
from kadeploy.settings import Settings
from kadeploy.store import DeploymentRow, Store
from kadeploy.workflow import Status

__all__ = ["Service"]

LISTED_MAX = 50
"""Deployments in a list: the last ones."""
BOARDS_MAX = 2 * LISTED_MAX

Start = Callable[[int, bool], Awaitable[None]]
"""Carry out a deployment in the background, and whether held nodes go on; raises what is wrong."""


@dataclass(frozen=True, slots=True)
class _Begin:
    """The body of a request to deploy."""

    environment: str
    nodes: str
    version: int | None = None
    missing: bool = False
    breakpoints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Cancel:
    """The body of a request to cancel."""

    nodes: str | None = None
    """None: all."""


@dataclass(frozen=True, slots=True)
class _Board:
    """A deployment as it was read."""

    data_version: int
    row: DeploymentRow
    nodes: tuple[dict[str, Any], ...]


class Service:
    """One of a server.  Methods do not wait, but for those that are async."""

    def __init__(self, settings: Settings, store: Store, start: Start) -> None:
        self._settings = settings
        self._store = store
        self._start = start
        self._boards: OrderedDict[int, _Board] = OrderedDict()

    # ------------------------------------------------------------ to look at

    def me(self, grant: Grant) -> dict[str, Any]:
        nodes = None if grant.nodes is None else nodeset.fold(grant.nodes)
        rights = sorted(right.value for right in grant.rights)
        return {"user": grant.user, "rights": rights, "nodes": nodes}

    def environments(self, grant: Grant) -> list[dict[str, Any]]:
        """Return name and version of each; anybody with a token may know them."""
        return [
            {"name": row.name, "version": row.version, "added_ms": row.added_ms}
            for row in self._store.environments()
        ]

    async def nodes(self, grant: Grant) -> list[dict[str, Any]]:
        """Return the nodes of the nodes file, and what they were deployed with last."""
        known = await trio.to_thread.run_sync(descriptions.read_nodes, self._settings.nodes)
        last = self._store.last()
        made = []
        for node in known.nodes:
            if not grant.may(Right.VIEW, node.name):
                continue
            row = last.get(node.name)
            was = None if row is None else {**asdict(row), "status": row.status.value}
            made.append({"name": node.name, "address": node.address, "last": was})
        return made

    def deployments(self, grant: Grant) -> list[dict[str, Any]]:
        """Return the last ones with a node of the user's, newest first, without their nodes."""
        made = []
        for row in reversed(self._store.deployments(LISTED_MAX)):
            one = self._view(grant, self._board(row.id))
            if one["nodes"]:
                made.append({key: value for key, value in one.items() if key not in _LONG})
        return made

    def deployment(self, grant: Grant, number: int) -> dict[str, Any]:
        """Return one, with all nodes of it that the user may see; raises ENOENT."""
        view = self._view(grant, self._board(number))
        if not view["nodes"]:
            raise _not_found(number)
        return view

    def node(self, grant: Grant, number: int, name: str) -> dict[str, Any]:
        """Return a node of a deployment with every try of every step: its log."""
        found = [one for one in self.deployment(grant, number)["nodes"] if one["name"] == name]
        if not found:
            raise KaError(Code.ENOENT, f"no node {name[:80]!r} in deployment {number}")
        return {**found[0], "tries": [asdict(one) for one in self._store.history(number, name)]}

    def _board(self, number: int) -> _Board:
        now = self._store.data_version()
        board = self._boards.get(number)
        if board is None or (board.data_version != now and board.row.ended_ms is None):
            rows = self._store.deployments(1, number=number)
            if not rows:
                raise _not_found(number)
            outline = rows[0].request.get("outline", ())
            places = (views.place(outline, node) for node in self._store.nodes(number))
            board = self._boards[number] = _Board(now, rows[0], tuple(places))
        self._boards.move_to_end(number)
        while len(self._boards) > BOARDS_MAX:
            self._boards.popitem(last=False)
        return board

    def _view(self, grant: Grant, board: _Board) -> dict[str, Any]:
        nodes = [one for one in board.nodes if grant.may(Right.VIEW, one["name"])]
        row = board.row
        states = [one["status"] for one in nodes]
        return {
            "id": row.id,
            "environment": row.environment,
            "version": row.version,
            "user": row.request.get("user", ""),
            "started_ms": row.started_ms,
            "ended_ms": row.ended_ms,
            "running": row.ended_ms is None and self._store.claimed(row.id),
            "mine": all(grant.may(Right.DEPLOY, one["name"]) for one in board.nodes),
            "counts": {status.value: states.count(status.value) for status in Status},
            "outline": row.request.get("outline", []),
            "nodes": nodes,
        }

    # ------------------------------------------------------------ to do

    async def begin(self, grant: Grant, content: object) -> dict[str, Any]:
        """Begin a deployment; return its number, None when all nodes have it."""
        asked = config.check(content, _Begin, _BODY)
        names = nodeset.expand(asked.nodes)
        grant.require(Right.DEPLOY, names)
        request = running.Request(
            asked.environment, names, asked.version, asked.missing, asked.breakpoints, grant.user
        )

        def begin() -> int | None:
            with Store.open(self._settings.store) as store:
                return running.begin(store, self._settings, request, _now_ms())

        number = await trio.to_thread.run_sync(begin)
        if number is not None:
            try:
                await self._start(number, False)
            except KaError:
                # Somebody was quicker.  It must not begin by itself some other day.
                with Store.open(self._settings.store) as store:
                    store.withdraw(number)
                raise
        return {"id": number}

    async def resume(self, grant: Grant, number: int) -> dict[str, Any]:
        """Let a deployment that stopped, or its held nodes, go on; raises BUSY."""
        view = self.deployment(grant, number)
        self._require(grant, number, self._names(number))
        if view["ended_ms"] is not None:
            raise KaError(Code.USAGE, f"deployment {number} has ended")
        await self._start(number, True)
        return {"id": number}

    def cancel(self, grant: Grant, number: int, content: object) -> dict[str, Any]:
        """Give up nodes of a deployment, all if none are named."""
        asked = config.check(content, _Cancel, _BODY)
        names = self._names(number) if asked.nodes is None else nodeset.expand(asked.nodes)
        self._require(grant, number, names)
        with Store.open(self._settings.store) as store:
            running.cancel(store, number, names, f"cancelled by {grant.user}", _now_ms())
        return {"id": number, "nodes": nodeset.fold(names)}

    def _names(self, number: int) -> list[str]:
        return [one["name"] for one in self._board(number).nodes]

    def _require(self, grant: Grant, number: int, names: Sequence[str]) -> None:
        self.deployment(grant, number)  # not found before not allowed
        grant.require(Right.DEPLOY, names)


_LONG = ("nodes", "outline")
_BODY = Path("request")


def _not_found(number: int) -> KaError:
    return KaError(Code.ENOENT, f"no deployment {number}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
