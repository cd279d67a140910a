"""Logging with context: one line for an event, its facts as key=value.

`get(name, iod=3)` returns a logger whose lines all carry `iod=3`.  Events are named
`verb.started`, `verb.complete`, `verb.failed`.  Levels: debug protocol, info a change of state,
warning degraded, error an operator must act.  Keys and payloads are never logged.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from common.errors import Code, KaError

__all__ = ["Logger", "configure", "get"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _fact(value: object) -> str:
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    # Quoted also when a terminal could be fooled: what peers say ends up here.
    plain = text.isprintable() and not any(c in text for c in " ='\"")
    return text if text and plain else repr(text)


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # takes no parameter in Python 3.10, which agents may have


class Logger(_Adapter):
    """A logger with facts: keyword arguments of a call are facts of that line."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        passed = {key: kwargs.pop(key) for key in ("exc_info", "stack_info") if key in kwargs}
        facts = {**(self.extra or {}), **kwargs}
        line = " ".join([str(msg), *(f"{key}={_fact(value)}" for key, value in facts.items())])
        return line, passed

    def bind(self, **facts: object) -> Logger:
        """Return a logger that carries these facts too."""
        return Logger(self.logger, {**(self.extra or {}), **facts})


def get(name: str, **facts: object) -> Logger:
    """Return the logger *name* with facts that all its lines carry."""
    return Logger(logging.getLogger(name), facts)


def configure(level: str = "info") -> None:
    """Send log lines to standard error, one each, with UTC time, level and logger.

    Raises KaError USAGE for an unknown level.
    """
    if level.upper() not in _LEVELS:
        raise KaError(Code.USAGE, f"unknown log level {level!r}: {', '.join(_LEVELS).lower()}")
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "{asctime}.{msecs:03.0f}Z {levelname:<7} {name} {message}", "%Y-%m-%dT%H:%M:%S", style="{"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
