"""The depot: when a chunk that comes is passed on as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio

from common.broadcast.depot import PAUSE_MAX_S, Depot
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.store import Store
from common.broadcast.switchboard import Switchboard

SIZE = 1000


async def test_a_chunk_is_waited_for_from_its_header_on(autojump_clock: object) -> None:
    manifest = Manifest(bytes(16), "x", SIZE, SIZE, Algorithm.XXH3, bytes(8))
    async with trio.open_nursery() as nursery:
        nowhere = cast("Store", None), None, cast("Switchboard", None)
        depot = Depot(manifest, *nowhere, nursery)
        await trio.sleep(100)
        data = depot.lend(SIZE)
        assert depot.came(0, data, 0, trio.current_time())  # its header alone
        assert depot.paused() == []
        await trio.sleep(0.9 * PAUSE_MAX_S)
        depot.came(0, data, 10, trio.current_time())
        await trio.sleep(0.9 * PAUSE_MAX_S)
        assert depot.paused() == []
        await trio.sleep(0.2 * PAUSE_MAX_S)
        assert depot.paused() == [0]


async def test_only_who_is_broken_off_gets_the_rest_of_a_chunk_that_has_not_come() -> None:
    manifest = Manifest(bytes(16), "x", SIZE, SIZE, Algorithm.XXH3, bytes(8))
    sent: dict[int, Any] = {}
    told: list[int] = []
    board = SimpleNamespace(
        put=lambda peer, frame, _release: sent.update({peer: frame[1]}), more_for=told.append
    )
    store = cast("Store", SimpleNamespace(locate=lambda _chunk: None))
    async with trio.open_nursery() as nursery:
        depot = Depot(manifest, store, None, cast("Switchboard", board), nursery)
        depot.came(0, depot.lend(SIZE), 10, trio.current_time())
        for peer in (1, 2):
            depot.send(peer, 0)
        depot.break_off(1, 0)
        depot.break_off(1, 7)  # it has all come meanwhile
    assert [sent[peer].ready_size for peer in (1, 2)] == [SIZE, 10]
    assert told == [1]
