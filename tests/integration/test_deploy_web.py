"""kadeploy's REST API, against the real server: who may what, limits, and that it survives."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from common.errors import Code, KaError
from kadeploy import settings
from kadeploy.rights import Grant, Right
from kadeploy.settings import Settings
from kadeploy.store import Store
from kadeploy.tokens import Tokens
from kadeploy.web import ROUTES
from tests.support.deploy_web import (
    ROOT,
    Answer,
    Site,
    serving,
    token_for,
    write_certificate,
    write_site,
)

COUNT = 12
STEP_S = 0.02
DEPLOYMENTS = "/api/v1/deployments"
WAIT_S = 30.0


@dataclass(frozen=True)
class Room:
    """A server and three users: of all nodes, of some, and one who may only look at some."""

    site: Site
    settings: Settings
    root: str
    alice: str
    bob: str

    def begin(self, nodes: str, **more: object) -> int:
        content = {"environment": "debian12", "nodes": nodes, **more}
        answer = self.site.ask(DEPLOYMENTS, content, token=self.root)
        assert answer.status == 201, answer.body
        number: int = answer.json["id"]
        return number

    def show(self, number: int, token: str = "") -> Answer:
        return self.site.ask(f"{DEPLOYMENTS}/{number}", token=token or self.root)

    def until_ended(self, number: int) -> dict[str, Any]:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            content: dict[str, Any] = self.show(number).json
            if content["ended_ms"] is not None:
                return content
            time.sleep(0.05)  # nothing but the API tells, and that is what is looked at
        raise AssertionError(f"deployment {number} does not end: {content}")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    directory = tmp_path_factory.mktemp("site")
    found = write_site(directory, COUNT, STEP_S)
    tokens = (
        token_for(found, "root", "*", Right.DEPLOY),
        token_for(found, "alice", "pc[001-004]", Right.DEPLOY),
        token_for(found, "bob", "pc[003-005]", Right.VIEW),
    )
    with serving(directory, STEP_S) as site:
        yield Room(site, found, *tokens)
    said = site.log.read_text()
    assert "Traceback" not in said
    assert not any(token in said for token in tokens)


API = [(method, path) for method, path, _ in ROUTES if path.startswith("/api/")]


def test_the_document_has_just_these_requests() -> None:
    text = (ROOT / "docs/kadeploy.md").read_text()
    documented = re.findall(r"^\| `(GET|POST) (/api/\S+)` \|", text, re.M)
    assert documented == [(method, path.replace(":int", "")) for method, path in API]


@pytest.mark.parametrize(("method", "path"), API)
def test_nothing_is_answered_without_a_valid_token(room: Room, method: str, path: str) -> None:
    path = path.replace("{number}", "1").replace("{name}", "pc001")
    for token in ("wrong", f"ka-{room.root[3:11]}-{'A' * 43}", room.root + "x"):
        answer = room.site.ask(path, token=token, method=method)
        assert (answer.status, answer.json["code"]) == (401, "AUTH")
        assert answer.headers["www-authenticate"] == "Bearer"
    bare = room.site.ask(path, method=method)
    assert bare.status == (401 if method == "GET" else 403)


def test_a_deployment_is_begun_shown_and_logged(room: Room) -> None:
    number = room.begin("pc[001-003]")
    content = room.until_ended(number)
    assert content["counts"]["deployed"] == 3
    assert (content["user"], content["environment"], content["version"]) == ("root", "debian12", 3)
    assert [one["macro"] for one in content["outline"]] == [
        "SetDeploymentEnv", "BroadcastEnv", "BootNewEnv",
    ]  # fmt: skip
    listed = room.site.ask(DEPLOYMENTS, token=room.root).json
    assert listed[0]["id"] == number
    node = room.site.ask(f"{DEPLOYMENTS}/{number}/nodes/pc002", token=room.root).json
    assert (node["status"], node["progress"]) == ("deployed", 1.0)
    steps = [one["step"] for one in node["tries"]]
    assert steps[0] == "boot-deployment"
    assert steps[-1] == "wait-system"
    again = room.site.ask(
        DEPLOYMENTS,
        {"environment": "debian12", "nodes": "pc[001-003]", "missing": True},
        token=room.root,
    )
    assert (again.status, again.json) == (200, {"id": None})
    last = room.site.ask("/api/v1/nodes", token=room.root).json[0]["last"]
    assert last == {
        "deployment": number, "environment": "debian12", "version": 3, "status": "deployed",
    }  # fmt: skip


def test_rights_are_by_node_set_and_user(room: Room) -> None:
    site = room.site
    number = room.begin("pc[003-006]")
    room.until_ended(number)
    assert site.ask("/api/v1/me", token=room.bob).json == {
        "user": "bob", "rights": ["view"], "nodes": "pc[003-005]",
    }  # fmt: skip
    names = [one["name"] for one in site.ask("/api/v1/nodes", token=room.alice).json]
    assert names == ["pc001", "pc002", "pc003", "pc004"]
    seen = room.show(number, room.bob).json
    assert [one["name"] for one in seen["nodes"]] == ["pc003", "pc004", "pc005"]
    assert sum(seen["counts"].values()) == 3
    assert not seen["mine"]
    # What is not his does not exist for him.
    other = room.begin("pc[007-008]")
    room.until_ended(other)
    for path in ("", "/nodes/pc007", "/events"):
        hidden = site.ask(f"{DEPLOYMENTS}/{other}{path}", token=room.bob)
        assert (hidden.status, hidden.json["code"]) == (404, "ENOENT")
    assert site.ask(f"{DEPLOYMENTS}/{number}/nodes/pc006", token=room.bob).status == 404
    assert other not in [one["id"] for one in site.ask(DEPLOYMENTS, token=room.bob).json]
    # Seeing is not deploying, and some nodes are not all.
    begin = {"environment": "debian12", "nodes": "pc003"}
    refused = site.ask(DEPLOYMENTS, begin, token=room.bob)
    assert (refused.status, refused.json["message"]) == (403, "bob may not deploy pc003")
    begin = {"environment": "debian12", "nodes": "pc[004-005]"}
    refused = site.ask(DEPLOYMENTS, begin, token=room.alice)
    assert (refused.status, refused.json["message"]) == (403, "alice may not deploy pc005")
    for action in ("cancel", "resume"):
        assert site.ask(f"{DEPLOYMENTS}/{number}/{action}", {}, token=room.alice).status == 403


def test_nodes_are_held_resumed_and_cancelled(room: Room) -> None:
    number = room.begin("pc[001-004]", breakpoints=["prepare-disks"])
    deadline = time.monotonic() + WAIT_S
    while (content := room.show(number).json)["counts"]["held"] < 4 or content["running"]:
        assert time.monotonic() < deadline, content
        time.sleep(0.05)
    cancel = f"{DEPLOYMENTS}/{number}/cancel"
    assert room.site.ask(cancel, {"nodes": "pc009"}, token=room.root).status == 400
    assert room.site.ask(cancel, {"nodes": ""}, token=room.root).status == 400
    assert room.site.ask(cancel, {"nodes": "pc[001-002]"}, token=room.alice).status == 202
    assert room.show(number).json["counts"]["failed"] == 2
    assert room.site.ask(f"{DEPLOYMENTS}/{number}/resume", {}, token=room.alice).status == 202
    content = room.until_ended(number)
    assert {one["name"]: one["reason"] for one in content["nodes"]} == {
        "pc001": "cancelled by alice",
        "pc002": "cancelled by alice",
        "pc003": "",
        "pc004": "",
    }
    late = room.site.ask(f"{DEPLOYMENTS}/{number}/resume", {}, token=room.root)
    assert (late.status, late.json["code"]) == (400, "USAGE")


class Events:
    """A stream of events, read line by line."""

    def __init__(self, site: Site, number: int, token: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=20)
        path = f"{DEPLOYMENTS}/{number}/events"
        self._connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        self._answer = self._connection.getresponse()
        assert self._answer.headers["Content-Type"] == "text/event-stream"

    def next(self) -> tuple[str, Any] | None:
        """Return the next event; None at the end."""
        name = ""
        while line := self._answer.readline().decode().rstrip("\n"):
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                self._answer.readline()
                return name, json.loads(line.removeprefix("data: "))
        return None

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


def test_events_tell_the_whole_then_what_changes_until_the_token_is_void(room: Room) -> None:
    token = token_for(room.settings, "carol", "pc[009-010]", Right.VIEW)
    number = room.begin("pc[009-012]")
    events = Events(room.site, number, token)
    first = events.next()
    assert first is not None
    assert first[0] == "deployment"
    states = {one["name"]: one for one in first[1]["nodes"]}
    assert set(states) == {"pc009", "pc010"}
    ended = first[1]["ended_ms"]
    while ended is None:
        event = events.next()
        assert event is not None
        assert event[0] == "change"
        states |= {one["name"]: one for one in event[1]["nodes"]}
        ended = event[1]["ended_ms"]
    assert set(states) == {"pc009", "pc010"}
    assert states == {one["name"]: one for one in room.show(number, token).json["nodes"]}
    Tokens(room.settings.tokens).revoke(token[3:11])
    assert events.next() is None
    events.close()
    assert room.show(number, token).status == 401


def test_wrong_requests_are_refused_in_one_line(room: Room) -> None:
    def refusal(body: bytes, kind: str = "application/json") -> tuple[int, str]:
        answer = room.site.ask(
            DEPLOYMENTS, body=body, token=room.root, headers={"Content-Type": kind}
        )
        assert set(answer.json) == {"code", "message"}
        assert "\n" not in answer.json["message"]
        return answer.status, answer.json["message"]

    assert refusal(b"{}", "text/plain") == (400, "send application/json")
    assert refusal(b"{")[0] == 400
    assert refusal(b"[" * 60_000)[0] == 400
    assert refusal(b"[]")[1] == "request: not a table of keys"
    assert "missing keys 'environment', 'nodes'" in refusal(b"{}")[1]
    wrong = {"environment": "debian12", "nodes": "pc001", "node": 1}
    assert "did you mean 'nodes'" in refusal(json.dumps(wrong).encode())[1]
    wrong = {"environment": "debian12", "nodes": "pc[001-999999999]"}
    assert refusal(json.dumps(wrong).encode())[0] == 400
    wrong = {"environment": "debian12", "nodes": "pc099"}
    assert refusal(json.dumps(wrong).encode())[0] == 400
    wrong = {"environment": "\ud800", "nodes": "pc001"}
    assert refusal(json.dumps(wrong).encode())[0] == 400
    assert refusal(b" " * 100_000)[0] == 413
    for number in (1 << 63, "9" * 5000, "0x1", "-1", "1 "):
        answer = room.site.ask(f"{DEPLOYMENTS}/{quote(str(number))}", token=room.root)
        assert (answer.status, answer.json["code"]) == (404, "ENOENT"), number
    assert room.site.ask("/nowhere", token=room.root).json["code"] == "ENOENT"
    assert room.site.ask(DEPLOYMENTS, token=room.root, method="DELETE").status == 405


def test_the_cookie_is_of_use_to_our_own_page_only(room: Room) -> None:
    site = room.site
    origin = {"Origin": site.url, "Content-Type": "application/x-www-form-urlencoded"}
    form = f"token={room.alice}".encode()
    wrong = site.ask("/login", body=b"token=no", headers=origin)
    assert (wrong.status, wrong.headers["location"]) == (303, "/login#wrong")
    assert "set-cookie" not in wrong.headers
    strange = site.ask("/login", body=form, headers={**origin, "Origin": "http://evil.example"})
    assert strange.status == 403
    assert site.ask("/login", body=form, headers={**origin, "Origin": "http://["}).status == 403
    many = site.ask("/login", body=b"a=1&" * 9 + form, headers=origin)
    assert many.headers["location"] == "/login#wrong"
    good = site.ask("/login", body=form, headers=origin)
    cookie = good.headers["set-cookie"]
    assert (good.status, good.headers["location"]) == (303, "/")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    held = {"Cookie": cookie.partition(";")[0]}
    assert site.ask("/", headers=held).status == 200
    assert site.ask("/").headers["location"] == "/login"
    assert site.ask("/api/v1/me", headers=held).json["user"] == "alice"
    content = {"environment": "debian12", "nodes": "pc099"}
    assert site.ask(DEPLOYMENTS, content, headers=held).status == 403
    own = {**held, "Origin": site.url}
    assert site.ask(DEPLOYMENTS, content, headers=own).status == 403  # not his node, by rights
    assert "may not deploy" in site.ask(DEPLOYMENTS, content, headers=own).json["message"]


def test_every_answer_forbids_strange_scripts_frames_and_caches(room: Room) -> None:
    for path in ("/", "/login", "/static/page.js", "/static/none", "/api/v1/me"):
        headers = room.site.ask(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    assert room.site.ask("/static/../service.py").status == 404


def test_a_killed_server_goes_on_and_one_node_has_one_deployment(tmp_path: Path) -> None:
    found = write_site(tmp_path, COUNT, 0.3)
    token = token_for(found, "root", "*", Right.DEPLOY)
    content = {"environment": "debian12", "nodes": "pc[001-003]"}
    with serving(tmp_path, 0.3) as site:
        # Of those who ask in the same moment one gets the nodes, the others are told.
        with ThreadPoolExecutor() as pool:
            asked = [pool.submit(site.ask, DEPLOYMENTS, content, token=token) for _ in range(4)]
        answers = sorted((one.result() for one in asked), key=lambda answer: answer.status)
        assert [one.status for one in answers] == [201, 409, 409, 409]
        assert answers[-1].json["code"] == "BUSY"
        number = answers[0].json["id"]
        assert [one["id"] for one in site.ask(DEPLOYMENTS, token=token).json] == [number]
        resumed = site.ask(f"{DEPLOYMENTS}/{number}/resume", {}, token=token)
        assert (resumed.status, resumed.json["code"]) == (409, "BUSY")
        with Store.open(found.store) as store:
            deadline = time.monotonic() + WAIT_S
            while len(store.history(number)) < 4:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        site.process.kill()
        site.process.wait()
    with Store.open(found.store) as store:
        assert store.deployment(number).ended_ms is None
        done = {(row.node, row.step) for row in store.history(number) if row.ok}
    with serving(tmp_path, 0.01) as site:
        room = Room(site, found, token, token, token)
        assert room.until_ended(number)["counts"]["deployed"] == 3
    with Store.open(found.store) as store:
        steps = [(row.node, row.step) for row in store.history(number) if row.ok]
    assert done <= set(steps)
    assert len(steps) == len(set(steps)), "a step that had ended was done again"


def test_the_command_serves_over_tls_and_does_the_real_steps(tmp_path: Path) -> None:
    found = write_site(tmp_path, 2, 0.01)
    write_certificate(tmp_path)
    token = token_for(found, "root", "*", Right.DEPLOY)
    with serving(tmp_path, None) as site:
        assert site.url.startswith("https://")
        room = Room(site, found, token, token, token)
        content = room.until_ended(room.begin("pc[001-002]"))
        # There is no kaboot here, which real steps find out.
        reasons = {one["reason"] for one in content["nodes"]}
        missing = "boot-deployment: no kaboot inventory in the configuration (key kaboot)"
        assert reasons == {missing}
        form = {"Origin": site.url, "Content-Type": "application/x-www-form-urlencoded"}
        cookie = site.ask("/login", body=f"token={token}".encode(), headers=form).headers
        assert "Secure" in cookie["set-cookie"]


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    write_site(tmp_path, 1, 0.01)
    config = tmp_path / "kadeploy.toml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config.write_text(config.read_text().replace("port = 0", f"port = {port}"))
        program = "from kadeploy.cli import main; main()"
        words = [sys.executable, "-c", program, "-c", str(config), "serve"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    where = f"127.0.0.1 port {port}"
    assert done.stderr == f"kadeploy: cannot serve on {where}: Address already in use\n"


def test_those_who_say_nothing_keep_nobody_out(room: Room) -> None:
    """Hundreds of connections that begin a request and never end it."""
    place = urlsplit(room.site.url)
    address = (str(place.hostname), int(place.port or 0))
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            silent = stack.enter_context(socket.create_connection(address))
            silent.sendall(b"POST /api/v1/deployments HTTP/1.1\r\nHost: x\r\n")
        assert room.site.ask("/api/v1/me", token=room.bob).status == 200


@pytest.mark.slow
def test_a_client_that_takes_no_answers_is_dropped(room: Room) -> None:
    """Else it would hold up its task for ever, and the end of the server with it."""
    number = room.begin(f"pc[001-{COUNT:03}]")
    place = urlsplit(room.site.url)
    request = (
        f"GET {DEPLOYMENTS}/{number} HTTP/1.1\r\nHost: head\r\n"
        f"Authorization: Bearer {room.root}\r\n\r\n"
    ).encode()
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect((str(place.hostname), int(place.port or 0)))
        greedy.settimeout(WAIT_S)
        # Without a time-out of the server's, this would wait for ours when all buffers are full.
        with pytest.raises(ConnectionError):
            greedy.sendall(request * 100_000)
    room.until_ended(number)


def test_a_deployment_of_another_process_is_followed_and_cancelled(tmp_path: Path) -> None:
    found = write_site(tmp_path, 4, 0.01)
    token = token_for(found, "root", "*", Right.DEPLOY)
    with Store.open(found.store) as store:
        number = store.begin(store.environment("debian12"), {}, ["pc001", "pc002"], 0)
    words = [sys.executable, "-m", "tests.support.deploy_mock", str(found.store), "2", "0.3"]
    with serving(tmp_path, 0.01) as site, subprocess.Popen(words, cwd=ROOT) as head:
        events = Events(site, number, token)
        event = events.next()
        while event is not None and not event[1]["running"]:
            event = events.next()
        refused = site.ask(f"{DEPLOYMENTS}/{number}/resume", {}, token=token)
        assert (refused.status, refused.json["code"]) == (409, "BUSY")
        cancel = f"{DEPLOYMENTS}/{number}/cancel"
        assert site.ask(cancel, {"nodes": "pc002"}, token=token).status == 202
        while event is not None and event[1]["ended_ms"] is None:
            event = events.next()
        assert event is not None
        assert (event[1]["counts"]["deployed"], event[1]["counts"]["failed"]) == (1, 1)
        events.close()
        assert head.wait(WAIT_S) == 0
    with Store.open(found.store) as store:
        assert [node.reason for node in store.nodes(number)] == ["", "cancelled by root"]


def test_what_was_overtaken_is_not_gone_on_with_after_a_restart(tmp_path: Path) -> None:
    found = write_site(tmp_path, 2, 0.01)
    token = token_for(found, "root", "*", Right.DEPLOY)
    with Store.open(found.store) as store:
        environment = store.environment("debian12")
        old, new = (store.begin(environment, {"user": "root"}, ["pc001"], 0) for _ in range(2))
    with serving(tmp_path, 0.01) as site:
        room = Room(site, found, token, token, token)
        assert room.until_ended(new)["counts"]["deployed"] == 1
        assert room.show(old).json["counts"]["waiting"] == 1
        assert not room.show(old).json["running"]


def test_what_is_wrong_with_our_files_is_not_told_to_who_asks(tmp_path: Path) -> None:
    found = write_site(tmp_path, 1, 0.01)
    token = token_for(found, "root", "*", Right.DEPLOY)
    with serving(tmp_path, 0.01) as site:
        found.tokens.chmod(0o644)
        broken = site.ask("/api/v1/me", token=token)
        assert (broken.status, broken.json["code"]) == (500, "EIO")
        assert str(found.tokens) not in broken.json["message"]
        assert "chmod 600" in site.log.read_text()


# ---------------------------------------------------------------- tokens and configuration


def test_the_token_file_is_its_owners_only_and_holds_no_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    tokens = Tokens(path)
    text = tokens.add("alice", "pc[1-2]", [Right.VIEW], 1000, expires_ms=5000)
    assert path.stat().st_mode & 0o777 == 0o600
    assert text[12:] not in path.read_text()
    assert tokens.grant(text, 4999) == Grant(
        "alice", frozenset({Right.VIEW}), frozenset({"pc1", "pc2"})
    )
    with pytest.raises(KaError) as caught:
        tokens.grant(text, 5000)
    assert caught.value.code is Code.AUTH
    for user, nodes in (("a b", "pc1"), ("alice", "pc[")):
        with pytest.raises(KaError):
            tokens.add(user, nodes, [Right.VIEW], 0)
    assert [one.user for one in Tokens(path).known()] == ["alice"]
    path.chmod(0o644)
    with pytest.raises(KaError, match="chmod 600"):
        tokens.grant(text, 1000)


def test_tokens_travel_in_the_clear_on_this_host_only(tmp_path: Path) -> None:
    path = tmp_path / "kadeploy.toml"
    path.write_text('[web]\naddress = "10.0.0.1"\n')
    with pytest.raises(KaError, match="set certificate and key"):
        settings.load(path)
    path.write_text('[web]\naddress = "10.0.0.1"\ncertificate = "c.pem"\nkey = "k.pem"\n')
    assert settings.load(path).web.certificate == tmp_path / "c.pem"
