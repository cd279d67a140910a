"""The head's configuration: one TOML file, /etc/kadeploy/kadeploy.toml unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from common import config
from kadeploy.links import SshOptions
from kadeploy.steps import Hook, Options

__all__ = ["CONFIG_DEFAULT", "Settings", "load"]

CONFIG_DEFAULT = "/etc/kadeploy/kadeploy.toml"


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

    @property
    def store(self) -> Path:
        return self.state / "kadeploy.db"


def load(path: Path) -> Settings:
    """Return the settings in *path*; the defaults if it is the default file and is not there."""
    if str(path) == CONFIG_DEFAULT and not path.exists():
        return Settings()
    return config.load(path, Settings)
