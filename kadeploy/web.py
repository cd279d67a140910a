"""HTTP: the REST API and the page.  The only importer of Starlette.

Position: serve.py (sockets) -> this (requests, who asks) -> service.py (what is meant).

Every request carries a token: in `Authorization: Bearer`, or in the page's cookie (HttpOnly,
SameSite=Strict; a request that changes something must come from our own origin too).  It is looked
up anew each time, and while events are streamed, so a token that is revoked ends them.

Limits: bodies of `BODY_SIZE_MAX`, read within `BODY_S`; `STREAMS_MAX` streams of events.  A client
that does not read is dropped by its socket (serve.py).

Answers are JSON, errors `{"code": ..., "message": ...}`.  The page runs no script and loads nothing
but its own files (`_HEADERS`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common import log
from common.errors import Code, KaError
from kadeploy.rights import Grant
from kadeploy.service import Service
from kadeploy.tokens import Tokens

__all__ = ["ROUTES", "make_app"]

BODY_SIZE_MAX = 64 * 1024
BODY_S = 10.0
STREAMS_MAX = 200
LOOK_S = 0.25
KEEPALIVE_S = 15.0
COOKIE = "kadeploy"
PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_API = "/api/v1"
_ONE = f"{_API}/deployments/{{number}}"
ROUTES = (
    ("GET", "/", "page"),
    ("GET", "/login", "login_form"),
    ("POST", "/login", "login"),
    ("POST", "/logout", "logout"),
    ("GET", "/static/{name}", "static"),
    ("GET", f"{_API}/me", "me"),
    ("GET", f"{_API}/environments", "environments"),
    ("GET", f"{_API}/nodes", "nodes"),
    ("GET", f"{_API}/deployments", "deployments"),
    ("POST", f"{_API}/deployments", "begin"),
    ("GET", _ONE, "deployment"),
    ("GET", f"{_ONE}/events", "events"),
    ("GET", f"{_ONE}/nodes/{{name}}", "node"),
    ("POST", f"{_ONE}/resume", "resume"),
    ("POST", f"{_ONE}/cancel", "cancel"),
)
"""Method, path, and the endpoint's name in `_Web`."""
_STATUS = {
    Code.USAGE: HTTPStatus.BAD_REQUEST,
    Code.TIMEOUT: HTTPStatus.REQUEST_TIMEOUT,
    Code.AUTH: HTTPStatus.UNAUTHORIZED,
    Code.EACCES: HTTPStatus.FORBIDDEN,
    Code.ENOENT: HTTPStatus.NOT_FOUND,
    Code.BUSY: HTTPStatus.CONFLICT,
    Code.E2BIG: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# A send or a read on a connection that has ended; busy: that is just being closed.
_GONE = (
    trio.BrokenResourceError,
    trio.BusyResourceError,
    trio.ClosedResourceError,
    ClientDisconnect,
)
_logger = log.get("kadeploy.web")


def make_app(service: Service, tokens: Tokens) -> ASGIApp:
    """Return the ASGI application."""
    web = _Web(service, tokens)
    app = Starlette(
        routes=[
            Route(path, getattr(web, endpoint), methods=[method])
            for method, path, endpoint in ROUTES
        ],
        exception_handlers={KaError: _refused, HTTPException: _refused_http, Exception: _broken},
    )
    return _with_headers(app)


def _with_headers(app: ASGIApp) -> ASGIApp:
    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await app(scope, receive, send_with)

    return wrapped


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, KaError)
    status = _STATUS.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _logger.error("request.failed", path=request.url.path, reason=error)
    headers = {"WWW-Authenticate": "Bearer"} if error.code is Code.AUTH else None
    return JSONResponse({"code": error.code.name, "message": str(error)}, status, headers)


async def _refused_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = Code.ENOENT if error.status_code == HTTPStatus.NOT_FOUND else Code.USAGE
    return JSONResponse(
        {"code": code.name, "message": error.detail}, error.status_code, error.headers
    )


async def _broken(request: Request, error: Exception) -> Response:
    if _is_gone(error):
        _logger.info("client.gone", path=request.url.path)
    else:
        _logger.error("request.failed", path=request.url.path, exc_info=error)
    content = {"code": Code.INTERNAL.name, "message": Code.INTERNAL.value.meaning}
    return JSONResponse(content, HTTPStatus.INTERNAL_SERVER_ERROR)


def _is_gone(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_gone(one) for one in error.exceptions)
    return isinstance(error, _GONE)


class _Web:
    """The endpoints."""

    def __init__(self, service: Service, tokens: Tokens) -> None:
        self._service = service
        self._tokens = tokens
        self._files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
        self._streams = 0

    # ------------------------------------------------------------ who asks

    def _look_up(self, token: str) -> Grant:
        try:
            return self._tokens.grant(token, time.time_ns() // 1_000_000)
        except KaError as error:
            if error.code is Code.AUTH:
                raise
            _logger.error("tokens.failed", reason=error)  # for us, not for who asks
            raise KaError(Code.EIO, "the tokens cannot be read: see the server's log") from None

    def _token(self, request: Request) -> str:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return token.strip()
        if request.method not in ("GET", "HEAD"):
            _require_own_origin(request)
        return request.cookies.get(COOKIE, "")

    def _grant(self, request: Request) -> Grant:
        return self._look_up(self._token(request))

    # ------------------------------------------------------------ the API

    async def me(self, request: Request) -> Response:
        return JSONResponse(self._service.me(self._grant(request)))

    async def environments(self, request: Request) -> Response:
        return JSONResponse(self._service.environments(self._grant(request)))

    async def nodes(self, request: Request) -> Response:
        return JSONResponse(await self._service.nodes(self._grant(request)))

    async def deployments(self, request: Request) -> Response:
        return JSONResponse(self._service.deployments(self._grant(request)))

    async def begin(self, request: Request) -> Response:
        grant = self._grant(request)
        answer = await self._service.begin(grant, await _json(request))
        _logger.info("deployment.asked", user=grant.user, number=answer["id"])
        return JSONResponse(answer, HTTPStatus.CREATED if answer["id"] else HTTPStatus.OK)

    async def deployment(self, request: Request) -> Response:
        return JSONResponse(self._service.deployment(self._grant(request), _number(request)))

    async def node(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(self._service.node(self._grant(request), _number(request), name))

    async def resume(self, request: Request) -> Response:
        grant = self._grant(request)
        answer = await self._service.resume(grant, _number(request))
        return JSONResponse(answer, HTTPStatus.ACCEPTED)

    async def cancel(self, request: Request) -> Response:
        grant = self._grant(request)
        number = _number(request)
        answer = self._service.cancel(grant, number, await _json(request))
        _logger.info("cancel.asked", user=grant.user, number=number, nodes=answer["nodes"])
        return JSONResponse(answer, HTTPStatus.ACCEPTED)

    async def events(self, request: Request) -> Response:
        token, number = self._token(request), _number(request)

        def look() -> dict[str, Any]:
            return self._service.deployment(self._look_up(token), number)

        look()
        return _Events(self, look)

    def enter_stream(self) -> None:
        if self._streams >= STREAMS_MAX:
            raise KaError(Code.BUSY, f"more than {STREAMS_MAX} look at events")
        self._streams += 1

    def leave_stream(self) -> None:
        self._streams -= 1

    # ------------------------------------------------------------ the page

    async def page(self, request: Request) -> Response:
        try:
            self._grant(request)
        except KaError:
            return RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        return self._file("index.html")

    async def login_form(self, request: Request) -> Response:
        return self._file("login.html")

    async def login(self, request: Request) -> Response:
        _require_own_origin(request)
        text = (await _body(request)).decode(errors="replace")
        try:
            form = parse_qs(text, max_num_fields=4)
        except ValueError:
            form = {}  # it is not from our page
        token = "".join(form.get("token", [])).strip()
        try:
            self._look_up(token)
        except KaError as error:
            _logger.warning("login.failed", reason=error)
            return RedirectResponse("/login#wrong", HTTPStatus.SEE_OTHER)
        answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure)
        return answer

    async def logout(self, request: Request) -> Response:
        _require_own_origin(request)
        answer = RedirectResponse("/login", HTTPStatus.SEE_OTHER)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return answer

    async def static(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        if name not in self._files:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(self._files[name], media_type=_TYPES[Path(name).suffix])


class _Events(Response):
    """Server-sent events: the deployment, then what changes of it.

    `deployment` carries all, `change` the head of it and the nodes that are not what they were.
    Who connects again begins with `deployment` again, so nothing can be missed.
    """

    def __init__(self, web: _Web, look: Callable[[], dict[str, Any]]) -> None:
        super().__init__(media_type="text/event-stream")
        self._web = web
        self._look = look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._web.enter_stream()
        try:
            headers = [(b"content-type", b"text/event-stream"), (b"x-accel-buffering", b"no")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_gone, receive, nursery.cancel_scope)
                await self._tell(send)
        finally:
            self._web.leave_stream()

    async def _until_gone(self, receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _tell(self, send: Send) -> None:
        seen = self._look()
        await _send(send, "deployment", seen)
        told_at = trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            try:
                now = self._look()
            except KaError:
                break  # the token was revoked
            old = {one["name"]: one for one in seen["nodes"]}
            nodes = [one for one in now["nodes"] if one != old.get(one["name"])]
            if nodes or any(now[key] != seen[key] for key in ("running", "ended_ms")):
                await _send(send, "change", {**now, "nodes": nodes, "outline": []})
                told_at = trio.current_time()
            elif trio.current_time() >= told_at + KEEPALIVE_S:
                await _send(send, "", None)
                told_at = trio.current_time()
            seen = now
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Callable[[Message], Awaitable[None]], event: str, content: object) -> None:
    text = f"event: {event}\ndata: {json.dumps(content)}\n\n" if event else ":\n\n"
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _number(request: Request) -> int:
    text: str = request.path_params["number"]
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise KaError(Code.ENOENT, "no such deployment")
    return int(text)


def _require_own_origin(request: Request) -> None:
    """Refuse a form or script of another site that uses the cookie of our page."""
    try:
        origin = urlsplit(request.headers.get("origin", "")).netloc
    except ValueError:
        origin = ""
    if not origin or origin != request.headers.get("host", ""):
        raise KaError(Code.EACCES, "a request with a cookie must come from the page itself")


async def _body(request: Request) -> bytes:
    data = bytearray()
    try:
        with trio.fail_after(BODY_S):
            async for piece in request.stream():
                data += piece
                if len(data) > BODY_SIZE_MAX:
                    raise KaError(Code.E2BIG, f"a body has at most {BODY_SIZE_MAX} bytes")
    except trio.TooSlowError:
        raise KaError(Code.TIMEOUT, "the body does not end") from None
    return bytes(data)


async def _json(request: Request) -> object:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise KaError(Code.USAGE, "send application/json")
    try:
        return json.loads(await _body(request))
    except (ValueError, RecursionError) as error:
        raise KaError(Code.USAGE, f"not JSON: {error}") from None
