"""`kaboot serve`: everything started in order, kept in step with its files, ended in peace.

Order: inventory, state directory, HTTP socket, root given up, dnsmasq, then requests.  A mistake up
to there is one line and an exit; afterwards a broken inventory file is logged and the last good one
stays in force.

Tasks: HTTP, dnsmasq's supervisor, the watcher (inventory file, and what commands wrote to the
store, once a second), the signal receiver.

Not here: what requests mean (service.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import trio

from common import log
from common.descriptors import raise_descriptor_limit
from common.errors import Code, KaError, first_error
from common.signals import on_signal
from kaboot import inventory as inventory_file
from kaboot.control import Control, store_path
from kaboot.dnsmasq import Dnsmasq
from kaboot.http import serve_http
from kaboot.model import Inventory, Mode
from kaboot.no_router import answer_solicitations
from kaboot.privileges import become
from kaboot.service import Service
from kaboot.stage import Staged, owned, stage, stage_dhcp
from kaboot.store import Store

__all__ = ["serve"]

WATCH_S = 1.0
BACKLOG = 512

_log = log.get("kaboot.server")


def serve(path: Path, *, ready_fd: int | None = None) -> None:
    """Serve the site of an inventory file until SIGTERM or SIGINT; raises KaError."""
    inventory = inventory_file.load(path)
    site = inventory.site
    raise_descriptor_limit()  # a machine that loads something takes two
    Control.open(path).close()  # makes the state directory and the store
    with _alone(Path(site.state)):
        staged = stage(inventory)
        for missing in staged.missing:
            _log.error("loader.missing", path=missing)
        listener = _listen(inventory)
        become(site.user, owned(inventory))
        with listener, Store.open(store_path(inventory)) as store:
            work = partial(_run, path, inventory, staged, store, listener, ready_fd)
            try:
                trio.run(work, strict_exception_groups=True)
            except BaseExceptionGroup as group:
                raise first_error(group) from None


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the state directory against a second server."""
    fd = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KaError(Code.EBUSY, f"a kaboot already serves from {state}") from None
        yield
    finally:
        os.close(fd)


async def _run(
    path: Path,
    file: Inventory,
    staged: Staged,
    store: Store,
    listener: socket.socket,
    ready_fd: int | None,
) -> None:
    inventory = file.with_learned(store.learned())
    service = Service(inventory, store)
    dnsmasq = Dnsmasq(staged.config, service.log_line)
    stage_dhcp(inventory)
    await service.render_grub()
    http = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    async with trio.open_nursery() as nursery:

        def stop(number: signal.Signals) -> None:
            _log.info("serve.stopping", signal=number.name)
            nursery.cancel_scope.cancel()

        nursery.start_soon(on_signal, stop)
        nursery.start_soon(dnsmasq.run)
        nursery.start_soon(serve_http, http, service.handle)
        if inventory.site.mode is Mode.DHCP:
            nursery.start_soon(answer_solicitations, inventory.site.interface)
        nursery.start_soon(_Watcher(path, file, service, store, dnsmasq).run)
        await dnsmasq.started.wait()
        _log.info("serve.started", url=inventory.site.url, mode=inventory.site.mode.value)
        if ready_fd is not None:
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)
    _log.info("serve.complete")


def _listen(inventory: Inventory) -> socket.socket:
    """Return the listening socket.

    Made with root still there, for a low port; and by hand, for name resolution loads Python
    modules that a user without root may not be able to read.
    """
    site = inventory.site
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(site.address), site.http_port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise KaError(
            Code.USAGE,
            f"cannot serve HTTP on {site.address}:{site.http_port}: {error.strerror}",
        ) from None
    return listener


class _Watcher:
    """Notices changes of the inventory file and of learned names, and applies them."""

    def __init__(
        self, path: Path, file: Inventory, service: Service, store: Store, dnsmasq: Dnsmasq
    ) -> None:
        self._path = path
        self._file = file
        self._service = service
        self._store = store
        self._dnsmasq = dnsmasq
        self._mark = inventory_file.mark(path)
        self._learned = store.learned()

    async def run(self) -> None:
        while True:
            await trio.sleep(WATCH_S)
            try:
                await self._look()
            except (KaError, OSError) as error:
                # A full disk, say.  What is served goes on as it is.
                _log.error("watch.failed", reason=error)

    async def _look(self) -> None:
        mark = await trio.to_thread.run_sync(inventory_file.mark, self._path)
        learned = await self._service.call(self._store.learned)
        if (mark, learned) == (self._mark, self._learned) or not mark:
            # A step may have been set, or somebody's time in the gate be over.
            await self._service.render_grub()
            return
        if mark != self._mark:
            self._mark = mark
            await self._reload()
        await self._apply(self._file.with_learned(learned))
        self._learned = learned

    async def _reload(self) -> None:
        try:
            fresh = await trio.to_thread.run_sync(inventory_file.load, self._path)
        except KaError as error:
            _log.error("inventory.refused", reason=error, kept="the one read before")
            return
        site, old = fresh.site, self._file.site
        fixed = (old.address, old.http_port, old.state, old.user)
        if (site.address, site.http_port, site.state, site.user) != fixed:
            _log.error("inventory.refused", reason="address, http_port, state and user are read"
                       " when kaboot starts: restart it")  # fmt: skip
            return
        self._file = fresh
        _log.info("inventory.read", nodes=len(fresh.nodes), profiles=len(fresh.profiles))

    async def _apply(self, inventory: Inventory) -> None:
        self._service.use(inventory)
        await self._service.render_grub()
        staged = await trio.to_thread.run_sync(stage_dhcp, inventory)
        if staged.config_changed:
            self._dnsmasq.restart()
        elif staged.hosts_changed:
            self._dnsmasq.reread()
