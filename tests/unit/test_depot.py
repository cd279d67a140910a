"""The depot: when a chunk that comes is passed on as it is."""

from __future__ import annotations

from typing import cast

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
