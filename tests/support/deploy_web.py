"""kadeploy's server with mock nodes: a site on disk, and the real server in a process of its own.

`python -m tests.support.deploy_web DIR SECONDS_PER_STEP READY_FD` serves the site in DIR; only the
steps are not real.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common import log
from kadeploy import serve, settings
from kadeploy.deploying import Target
from kadeploy.rights import Right
from kadeploy.settings import Settings
from kadeploy.store import Store
from kadeploy.tokens import Tokens
from tests.support import deploy
from tests.support.deploy_mock import MockNodes, name_of

ROOT = Path(__file__).parents[2]
STOP_S = 20.0
CERTIFICATE, KEY = "tls.pem", "tls.key"
_CONFIG = """nodes = "nodes.yaml"
state = "state"

[web]
port = 0

[workflow]
reboot_window = 50
reboot_pause_ms = {step_ms}
boot_timeout_ms = {boot_ms}
boot_per_node_ms = 0
gather_ms = {gather_ms}
"""


def write_site(directory: Path, count: int, step_s: float, boot_s: float = 60.0) -> Settings:
    """Make a head's configuration with nodes and an environment; return its settings.

    *boot_s*: how long one that never comes up is waited for; a busy host needs some.
    """
    step_ms = max(1, int(step_s * 1000))
    text = _CONFIG.format(step_ms=step_ms, boot_ms=int(boot_s * 1000), gather_ms=3 * step_ms)
    (directory / "kadeploy.toml").write_text(text)
    lines = [
        f"  - {{name: {name_of(index)}, disks: [{{role: system, serial: SN{index:04}}}]}}\n"
        for index in range(1, count + 1)
    ]
    (directory / "nodes.yaml").write_text("nodes:\n" + "".join(lines))
    (directory / "debian.tar.zst").write_bytes(bytes(1000))
    found = settings.load(directory / "kadeploy.toml")
    with Store.open(found.store) as store:
        store.add_environment("debian12", 3, directory / "env.yaml", deploy.LINUX, 0)
    return found


def write_certificate(directory: Path) -> None:
    """Make a certificate of this host's own, and put it into the configuration."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "head")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / CERTIFICATE).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / KEY).write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path = directory / "kadeploy.toml"
    lines = f'[web]\ncertificate = "{CERTIFICATE}"\nkey = "{KEY}"\n'
    path.write_text(path.read_text().replace("[web]\n", lines))


def token_for(found: Settings, user: str, nodes: str, *rights: Right) -> str:
    return Tokens(found.tokens).add(user, nodes, rights, time.time_ns() // 1_000_000)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Site:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    certificate: Path

    def ask(
        self,
        path: str,
        content: object = None,
        *,
        token: str = "",
        method: str = "",
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Send a request; *content* as JSON, or *body* as it is."""
        sent = dict(headers or {})
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if content is not None:
            body = json.dumps(content).encode()
            sent.setdefault("Content-Type", "application/json")
        place = urlsplit(self.url)
        connection: http.client.HTTPConnection
        if place.scheme == "https":
            trust = ssl.create_default_context(cafile=self.certificate)
            connection = http.client.HTTPSConnection(place.netloc, timeout=20, context=trust)
        else:
            connection = http.client.HTTPConnection(place.netloc, timeout=20)
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            answer = connection.getresponse()
            lower = {key.lower(): value for key, value in answer.getheaders()}
            return Answer(answer.status, lower, answer.read())


@contextlib.contextmanager
def serving(directory: Path, step_s: float | None) -> Iterator[Site]:
    """Run the server of a site, with mock nodes unless *step_s* is None.

    It must end in peace when it is asked to.
    """
    reader, writer = os.pipe()
    if step_s is None:
        program = "from kadeploy.cli import main; main()"
        config = str(directory / "kadeploy.toml")
        words = [sys.executable, "-c", program, "-c", config, "serve", "--ready-fd"]
    else:
        words = [sys.executable, "-m", "tests.support.deploy_web", str(directory), str(step_s)]
    log_path = directory / "log"
    with open(log_path, "ab") as log_file, open(reader, "rb") as ready:
        process = subprocess.Popen(
            [*words, str(writer)], cwd=ROOT, pass_fds=[writer], stdout=log_file, stderr=log_file
        )
        os.close(writer)
        try:
            url = ready.readline().decode().strip()
            assert url, log_path.read_text()
            yield Site(url, process, log_path, directory / CERTIFICATE)
            if process.poll() is None:
                process.terminate()
                assert process.wait(STOP_S) == 0
        finally:
            process.kill()
            process.wait()


def main(directory: Path, step_s: float, ready_fd: int) -> None:
    log.configure("info")

    def make_steps(target: Target, found: Settings, names: Sequence[str]) -> MockNodes:
        return MockNodes(step_s)

    found = settings.load(directory / "kadeploy.toml")
    serve.serve(found, ready_fd=ready_fd, make_steps=make_steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
