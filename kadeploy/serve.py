"""`kadeploy serve`: the REST API and the page, and the deployments begun through them.

The only importer of Hypercorn.  One trio loop: HTTP, and a task for each deployment, which is its
head just as `kadeploy run` would be.  A deployment that fails for a mistake of ours or of the
configuration ends its own task only; it stays in the store and can be resumed.

When it starts, it goes on with deployments that were begun here and have not ended; not with one
whose nodes were deployed otherwise since.
"""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from typing import cast

import trio
from hypercorn.config import Config
from hypercorn.trio import serve as serve_http
from hypercorn.typing import Framework

from common import log
from common.errors import Code, KaError, first_error
from common.signals import on_signal
from kadeploy import running
from kadeploy.deploying import Deployer
from kadeploy.running import MakeSteps
from kadeploy.service import Service
from kadeploy.settings import Settings, Web
from kadeploy.store import Store
from kadeploy.tokens import Tokens
from kadeploy.web import make_app

__all__ = ["serve"]

GRACE_S = 1.0
"""For answers under way; streams of events never end by themselves."""
HEADER_SIZE_MAX = 16 * 1024
STALL_MS = 10_000
"""A client that takes nothing for so long is dropped by the kernel: Hypercorn shields its sends."""

_logger = log.get("kadeploy.serve")


def serve(
    settings: Settings, *, ready_fd: int | None = None, make_steps: MakeSteps = Deployer
) -> None:
    """Serve until SIGTERM or SIGINT; raises KaError.

    The address is written to *ready_fd* when requests are taken.
    """
    with Store.open(settings.store) as store:
        work = partial(_run, settings, store, ready_fd, make_steps)
        try:
            trio.run(work, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            raise first_error(group) from None


async def _run(
    settings: Settings, store: Store, ready_fd: int | None, make_steps: MakeSteps
) -> None:
    stop = trio.Event()

    def end(number: signal.Signals) -> None:
        _logger.info("serve.stopping", signal=number.name)
        stop.set()

    async with trio.open_nursery() as nursery:

        async def start(number: int, release: bool) -> None:
            await nursery.start(_carry_out, settings, make_steps, number, release)

        service = Service(settings, store, start)
        app = make_app(service, Tokens(settings.tokens))
        nursery.start_soon(on_signal, end)
        # The two libraries write the types of one protocol, ASGI, differently.
        framework = cast(Framework, app)
        work = partial(serve_http, framework, _hypercorn(settings.web), shutdown_trigger=stop.wait)
        binds = await nursery.start(work)
        for number in _left_over(store):
            try:
                await start(number, False)
            except KaError as error:
                _logger.error("deployment.failed", deployment=number, reason=error)
        _logger.info("serve.started", url=binds[0])
        if ready_fd is not None:
            os.write(ready_fd, f"{binds[0]}\n".encode())
            os.close(ready_fd)
        await stop.wait()
        # Heads end here; what they were at begins again with the next start.
        nursery.cancel_scope.deadline = trio.current_time() + 2 * GRACE_S
    _logger.info("serve.complete")


def _hypercorn(web: Web) -> Config:
    config = Config()
    config.bind = [f"fd://{_listen(web)}"]
    if web.certificate is not None and web.key is not None:
        config.certfile, config.keyfile = str(web.certificate), str(web.key)
        try:
            config.create_ssl_context()
        except OSError as error:
            message = f"cannot use {web.certificate} with {web.key}: {error}"
            raise KaError(Code.USAGE, message) from None
    config.alpn_protocols = ["http/1.1"]  # one way to hold up a stream, not two
    config.graceful_timeout = GRACE_S
    config.h11_max_incomplete_size = HEADER_SIZE_MAX
    config.include_server_header = False
    config.errorlog = None
    return config


def _listen(web: Web) -> int:
    """Return a socket to listen at, made here so that a mistake is one line."""
    family = socket.AF_INET6 if ":" in web.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What is accepted inherits it.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
        try:
            sock.bind((web.address, web.port))
        except OSError as error:
            where = f"{web.address} port {web.port}"
            raise KaError(Code.USAGE, f"cannot serve on {where}: {error.strerror}") from None
        return sock.detach()


def _left_over(store: Store) -> list[int]:
    """Return what was begun here and has not ended, if no node of it was deployed since."""
    last = store.last()
    return [
        row.id
        for row in store.deployments(open_only=True)
        if row.request.get("user")
        and all(node.ended or last[node.name].deployment == row.id for node in store.nodes(row.id))
    ]


async def _carry_out(
    settings: Settings,
    make_steps: MakeSteps,
    number: int,
    release: bool,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Be the head of a deployment; raises what is wrong before it begins, later logs it."""
    logger = _logger.bind(deployment=number)
    begun = False

    def on_begun() -> None:
        nonlocal begun
        begun = True
        logger.info("deployment.started")
        task_status.started()

    try:
        with Store.open(settings.store) as store:
            await running.carry_out(
                store,
                settings,
                number,
                release=release,
                on_begun=on_begun,
                make_steps=make_steps,
            )
    except Exception as error:  # one deployment's trouble is not the others'
        if not begun:
            raise
        logger.error("deployment.failed", exc_info=error)
    else:
        logger.info("deployment.complete")
