"""The head's configuration: one TOML file, /etc/kadeploy/kadeploy.toml unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from common import config
from kadeploy.links import SshOptions
from kadeploy.steps import Hook, Options

__all__ = ["CONFIG_DEFAULT", "Settings", "Web", "load"]

CONFIG_DEFAULT = "/etc/kadeploy/kadeploy.toml"


@dataclass(frozen=True, slots=True)
class Web:
    """Where `serve` listens."""

    address: str = "127.0.0.1"
    port: int = 7680
    certificate: Path | None = None
    """PEM, with the chain; without it only this host's own addresses can be listened at."""
    key: Path | None = None

    def validate(self) -> None:
        try:
            loopback = ip_address(self.address).is_loopback
        except ValueError:
            raise ValueError(f"address: not an IP address: {self.address[:80]!r}") from None
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: not a port: {self.port}")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.certificate is None and not loopback:
            raise ValueError("tokens would travel in the clear: set certificate and key")


@dataclass(frozen=True, slots=True)
class Settings:
    nodes: Path = Path("/etc/kadeploy/nodes.yaml")
    """The nodes file."""
    state: Path = Path("/var/lib/kadeploy")
    """Where the store is."""
    kaboot: Path | None = None
    """kaboot's inventory; without it `run` cannot make nodes boot the deployment environment."""
    listen: str = ""
    """Address of this host for broadcasts; empty: no broadcast, images are streamed by ssh."""
    ssh: SshOptions = field(default_factory=SshOptions)
    workflow: Options = field(default_factory=Options)
    hook: tuple[Hook, ...] = ()
    web: Web = field(default_factory=Web)

    @property
    def tokens(self) -> Path:
        return self.state / "tokens.json"

    @property
    def store(self) -> Path:
        return self.state / "kadeploy.db"


def load(path: Path) -> Settings:
    """Return the settings in *path*; the defaults if it is the default file and is not there."""
    if str(path) == CONFIG_DEFAULT and not path.exists():
        return Settings()
    return config.load(path, Settings)
